"""The Iterated Coordination Game (Section 5.2): agents who choose alike are rewarded.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Figure 3 (a), Tables 1 and 3. Each step every
agent chooses one of the options; the reward is 1 if all choose the same one, else 0. All agents
observe the previous joint action, one-hot (zeros at the first step), which is also the global
state. An episode has ten steps, and the score is the mean reward of a step.

    python coordination_game.py               # pay-off matrix; the three datasets and Table 1
    python coordination_game.py --agents 4    # generalised to more agents

Tasks: coordination-{favorable,neutral,unfavorable} with two agents, and
coordination-unfavorable-{3,4,8} with more. The paper does not give the observations, the horizon or
the size of the datasets; these are ours.
"""

import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from mamujoco_envs import InputError, Task, require

EPISODES, EPISODE_LENGTH = 5000, 10
BEHAVIORS = {"favorable": 0.623, "neutral": 0.502, "unfavorable": 0.375}  # mean scores of Table 1


@dataclass
class Args:
    agents: int = 2
    """agents of the game"""
    actions: int = 2
    """options that an agent chooses from"""
    seed: int = 0
    """seed of the datasets"""


def coordination_task(behavior: str, agents: int = 2, actions: int = 2) -> Task:
    """The game with a dataset by `behavior`, a key of BEHAVIORS (Table 1)."""
    require(behavior in BEHAVIORS, f"no game '{behavior}'; take one of {', '.join(BEHAVIORS)}")
    require(agents >= 2, f"the game needs two or more agents; it has {agents}")
    require(actions >= 2, f"the game needs two or more actions; it has {actions}")
    size = "" if agents == actions == 2 else f"-{agents}"
    size += "" if actions == 2 else f"x{actions}"
    state = tuple(range(agents * actions))
    return Task(
        name=f"coordination-{behavior}{size}",
        environment="coordination",
        dataset=f"coordination-{behavior}{size}",
        observed=(state,) * agents,
        driven=tuple(state[i * actions : (i + 1) * actions] for i in range(agents)),
        state_dim=agents * actions,
        episode_length=EPISODE_LENGTH,
        random_return=0.0,
        expert_return=float(EPISODE_LENGTH),
        entropy_target=-4.0,
        simulator=CoordinationGame,
        columns=make_columns,
        discrete=True,
    )


def tasks() -> list[Task]:
    """The games that have a name of their own."""
    more_agents = [coordination_task("unfavorable", agents) for agents in (3, 4, 8)]
    return [*map(coordination_task, BEHAVIORS), *more_agents]


def shape_of_game(task: Task) -> tuple[int, int]:
    """Agents and actions, also where `task` lets a single agent set all actions."""
    size = task.dataset.split("-")[2:]
    agents, _, actions = size[0].partition("x") if size else ("2", "", "")
    return int(agents), int(actions or 2)


def behavior_policies(task: Task) -> np.ndarray:
    """The probability of each option in the dataset, [agent, action]; "right" is the last option.

    Table 1, generalised: on unfavorable data the first half of the agents lean to the left and the
    others to the right.
    """
    agents, actions = shape_of_game(task)
    behavior = task.dataset.split("-")[1]
    right = np.full(agents, 1 / actions if behavior == "neutral" else 0.75)
    if behavior == "unfavorable":
        right[: agents // 2] = 0.25
    policies = np.repeat((1 - right)[:, None] / (actions - 1), actions, axis=1)
    policies[:, -1] = right
    return policies


def rewards_of(choices: np.ndarray) -> np.ndarray:
    """1 where all agents choose alike, else 0: [..., agent] -> [...]."""
    return (choices == choices[..., :1]).all(axis=-1).astype(np.float64)


class CoordinationGame:
    """`num_envs` copies of the game, with the methods of `mamujoco_envs.Simulator`."""

    def __init__(self, task: Task, num_envs: int):
        self.agents, self.actions = shape_of_game(task)
        self.states = np.zeros((num_envs, task.state_dim))

    def reset(self, generators: list) -> np.ndarray:
        """The states before the first step, all zeros: [B, state]."""
        self.states = np.zeros_like(self.states)
        return self.states

    def set_states(self, states: np.ndarray) -> np.ndarray:
        """Continues from the given states [B, state]."""
        self.states = np.array(states, dtype=np.float64)
        return self.states

    def step(self, actions: np.ndarray, where: np.ndarray | None = None):
        """One-hot actions [B, agent, action] -> states [B, state], rewards [B], terminals [B].

        No episode ends before the others, so all copies step, whatever `where` says.
        """
        one_hot = np.reshape(actions, (len(self.states), self.agents, self.actions))
        choices = np.argmax(one_hot, axis=-1)
        self.states = np.eye(self.actions)[choices].reshape(len(choices), -1)
        return self.states, rewards_of(choices), np.zeros(len(choices), dtype=bool)

    def step_from(self, states, actions):
        """`step` on tensors, from `states` [B, state]; the game does not depend on them."""
        return [states.new_tensor(x) for x in self.step(actions.cpu().numpy())]


def make_columns(task: Task, seed: int = 0) -> dict[str, np.ndarray]:
    """The offline dataset in D4RL's layout: 50,000 steps of the behaviour policies of Table 1."""
    agents, actions = shape_of_game(task)
    rng = np.random.default_rng([seed, zlib.crc32(task.dataset.encode())])
    cumulative = behavior_policies(task).cumsum(axis=1)
    draws = rng.random((EPISODES * EPISODE_LENGTH, agents, 1))
    choices = (draws >= cumulative[:, :-1]).sum(axis=-1)  # [step, agent]
    one_hot = np.eye(actions, dtype=np.float32)[choices].reshape(len(choices), -1)
    step = np.arange(len(choices)) % EPISODE_LENGTH
    return {
        "observations": np.roll(one_hot, 1, axis=0) * (step > 0)[:, None],
        "actions": one_hot,
        "rewards": rewards_of(choices).astype(np.float32),
        "next_observations": one_hot,
        "terminals": np.zeros(len(choices), dtype=bool),
        "timeouts": step == EPISODE_LENGTH - 1,
    }


def train_world_model(task: Task, seed: int, run_dir: Path) -> Path:
    """The game's world model, trained in `run_dir` in seconds, so that none ships."""
    path = run_dir / "world_model.pt"
    if not path.is_file():
        script = Path(__file__).resolve().parent / "world_model.py"
        # Agreement gets rarer with every agent, so its reward takes longer to learn.
        steps = 500 * (task.num_agents - 1)
        options = ["--task", task.name, "--seed", str(seed), "--total-steps", str(steps)]
        options += ["--run-dir", run_dir]
        if (run_dir / "checkpoint.pt").is_file():
            options = ["--resume", run_dir]
        finished = subprocess.run([sys.executable, script, *options])
        require(finished.returncode == 0, f"no world model in {run_dir}; its own error is above")
    return path


def describe(args: Args) -> None:
    """Prints the pay-off matrix and the datasets, with Table 1 where it has them."""
    games = [coordination_task(behavior, args.agents, args.actions) for behavior in BEHAVIORS]
    options = [str(i) for i in range(args.actions)]
    names = ["left", "right"] if args.actions == 2 else options
    if args.agents == 2:
        print("reward " + "".join(f"{name:>8}" for name in names))
        for i, name in enumerate(names):
            print(f"{name:7}" + "".join(f"{int(i == j):8}" for j in range(args.actions)))
        print()
    share = f"P({names[-1]}) of each agent"
    print(f"{'dataset':12} {share:27} {'mean score':10} {'expected':8} {'Table 1':7}")
    for task, (behavior, paper) in zip(games, BEHAVIORS.items()):
        columns = make_columns(task, args.seed)
        chosen = columns["actions"].reshape(-1, args.agents, args.actions)[:, :, -1].mean(axis=0)
        shares = " ".join(f"{p:.3f}" for p in chosen)
        mean, expected = columns["rewards"].mean(), behavior_policies(task).prod(axis=0).sum()
        figure = f"{paper:.3f}" if args.agents == args.actions == 2 else "-"
        print(f"{behavior:12} {shares:27} {mean:<10.3f} {expected:<8.3f} {figure:7}")


if __name__ == "__main__":
    try:
        describe(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
