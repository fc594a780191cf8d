"""Coordination games: the paper's (Section 5.2), games of numbers, and the climbing game.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Figure 3 (a), Tables 1 and 3. Agents act
simultaneously and observe the previous joint action, which is also the global state. An episode has
ten steps; the score is the mean reward per step, at most 1. Only `coordination` is the paper's, and
its observations, horizon and dataset size are ours. docs/tasks.md lists the tasks.

    python coordination_game.py               # pay-off matrix; the three datasets and Table 1
    python coordination_game.py --agents 4    # generalised to more agents
"""

import re
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from mamujoco_envs import InputError, Task, require
from training_run import load_checkpoint

EPISODES, EPISODE_LENGTH = 5000, 10
BEHAVIORS = {"favorable": 0.623, "neutral": 0.502, "unfavorable": 0.375}  # mean scores of Table 1
COVERAGES = (0, 0.1, 1, 10)  # percent of the climbing game's data that show its best joint action
# The climbing game of Claus and Boutilier (AAAI 1998): whoever climbs alone pays for it.
CLIMBING = np.array([[11, -30, 0], [-30, 7, 6], [0, 0, 5]]) / 11
PEAK, PEAK_WIDTH = 0.5, 0.25


@dataclass
class Args:
    agents: int = 2
    """agents of the game"""
    actions: int = 2
    """options that an agent chooses from"""
    seed: int = 0
    """random seed for the datasets"""


# Rewards [...] of choices or numbers [..., agent].


def all_alike(choices: np.ndarray) -> np.ndarray:
    """1 where all agents choose alike, else 0."""
    return (choices == choices[..., :1]).all(axis=-1).astype(np.float64)


def climbing(choices: np.ndarray) -> np.ndarray:
    """The pay-offs of the climbing game of two agents and three options, at most 1."""
    return CLIMBING[choices[..., 0], choices[..., 1]]


def product(numbers: np.ndarray) -> np.ndarray:
    """The product: two agents earn 1 if both choose 1 or both choose -1, more agents if an even
    number of them choose -1 and the others 1."""
    return numbers.prod(axis=-1)


def two_peaks(numbers: np.ndarray) -> np.ndarray:
    """1 where all agents choose PEAK or all choose -PEAK, and less away from these points."""
    squares = [np.square(numbers - peak).sum(axis=-1) for peak in (PEAK, -PEAK)]
    return np.exp(-np.minimum(*squares) / (2 * PEAK_WIDTH**2))


REWARDS = {
    "coordination": all_alike,
    "climbing": climbing,
    "continuous": product,
    "peaks": two_peaks,
}


# Tasks.


class Game(NamedTuple):
    """The game that the name of a dataset stands for."""

    kind: str
    """key of REWARDS"""
    behavior: str
    """key of BEHAVIORS; in the climbing game the coverage, in percent"""
    agents: int
    actions: int
    """options per agent, or 1 where it chooses a number"""


def game_of(task: Task) -> Game:
    """The game of a task, even of one in which a single agent acts for all."""
    kind, _, rest = task.dataset.partition("-")
    advice = "keep the game's dataset, and give yours with --dataset"
    behaviors = r"\d+(\.\d+)?" if kind == "climbing" else "|".join(BEHAVIORS)
    is_game = kind in REWARDS and re.fullmatch(rf"({behaviors})(-\d+(x\d+)?)?", rest)
    require(is_game, f"'{task.dataset}' names no game; {advice}")
    behavior, *size = rest.split("-")  # size: "4" agents, "4x3" with three options; or usual
    agents, _, actions = size[0].partition("x") if size else ("2", "", "")
    usual = {"coordination": 2, "climbing": 3}.get(kind, 1)
    return Game(kind, behavior, int(agents), int(actions or usual))


def make_task(kind: str, behavior: str, agents: int, actions: int, size: str) -> Task:
    """`size` is the suffix of the name, if there are more agents or actions than usual."""
    discrete = kind in ("coordination", "climbing")
    state = tuple(range(agents * actions))
    return Task(
        name=f"{kind}-{behavior}{size}",
        environment="coordination" if discrete else "continuous",
        dataset=f"{kind}-{behavior}{size}",
        observed=(state,) * agents,
        driven=tuple(state[i * actions : (i + 1) * actions] for i in range(agents)),
        state_dim=agents * actions,
        episode_length=EPISODE_LENGTH,
        random_return=0.0,
        expert_return=float(EPISODE_LENGTH),
        # Discrete entropy is never negative, so a target of -4 means no entropy bonus.
        entropy_target=-4.0 if discrete else -2.0 * agents,
        simulator=CoordinationGame,
        columns=make_columns,
        discrete=discrete,
        defaults="coordination",
    )


def coordination_task(behavior: str, agents: int = 2, actions: int = 2) -> Task:
    """The paper's game with a dataset by `behavior`, a key of BEHAVIORS (Table 1)."""
    require(behavior in BEHAVIORS, f"no game '{behavior}'; take one of {', '.join(BEHAVIORS)}")
    require(agents >= 2, f"the game needs two or more agents; it has {agents}")
    require(actions >= 2, f"the game needs two or more actions; it has {actions}")
    size = "" if agents == actions == 2 else f"-{agents}"
    size += "" if actions == 2 else f"x{actions}"
    return make_task("coordination", behavior, agents, actions, size)


def continuous_task(kind: str, behavior: str, agents: int = 2) -> Task:
    """The game of numbers in [-1, 1]; `kind` is "continuous" (their product) or "peaks"."""
    require(kind in ("continuous", "peaks"), f"no game '{kind}'; take continuous or peaks")
    require(behavior in BEHAVIORS, f"no game '{behavior}'; take one of {', '.join(BEHAVIORS)}")
    require(agents >= 2, f"the game needs two or more agents; it has {agents}")
    return make_task(kind, behavior, agents, 1, "" if agents == 2 else f"-{agents}")


def climbing_task(coverage: float) -> Task:
    """The climbing game; `coverage` percent of its data are the best joint action."""
    require(0 <= coverage <= 100, f"coverage must be from 0 to 100 percent; it is {coverage}")
    share = np.format_float_positional(coverage, trim="-")  # never as 1e-05
    return make_task("climbing", share, 2, 3, "")


def tasks() -> list[Task]:
    """The games that --task knows by name."""
    return [
        *map(coordination_task, BEHAVIORS),
        *(coordination_task("unfavorable", agents) for agents in (3, 4, 8, 16)),
        *(continuous_task("continuous", behavior) for behavior in BEHAVIORS),
        *(continuous_task("peaks", behavior) for behavior in BEHAVIORS),
        *map(climbing_task, COVERAGES),
    ]


# The game and its datasets.


class CoordinationGame:
    """`num_envs` copies of the game, with the methods of `mamujoco_envs.Simulator`."""

    def __init__(self, task: Task, num_envs: int):
        self.game, self.discrete = game_of(task), task.discrete
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
        """Actions [B, agent, action], one-hot or clipped to [-1, 1] -> states [B, state], rewards
        [B], terminals [B].

        All episodes end together, so all copies step, whatever `where` says.
        """
        agents, width = self.game.agents, self.game.actions
        joint = np.reshape(actions, (len(self.states), agents, width))
        if self.discrete:
            chosen = np.argmax(joint, axis=-1)
            joint = np.eye(width)[chosen]
        else:
            joint = np.clip(joint, -1, 1)
            chosen = joint[..., 0]
        self.states = joint.reshape(len(joint), -1)
        return self.states, REWARDS[self.game.kind](chosen), np.zeros(len(joint), dtype=bool)

    def step_from(self, states, actions):
        """`step` on tensors, from `states` [B, state]; the game does not depend on them."""
        return [states.new_tensor(x) for x in self.step(actions.cpu().numpy())]


def lean_left(game: Game) -> np.ndarray:
    """Whether each agent leans to the left rather than to the right [agent] (Table 1, generalised).

    On unfavorable data, the first half of the agents (rounded down) do. In the product game only
    the first agent does, so that following the data earns less than nothing, however many agents
    there are.
    """
    count = 1 if game.kind == "continuous" else game.agents // 2
    return (np.arange(game.agents) < count) & (game.behavior == "unfavorable")


def behavior_policies(task: Task) -> np.ndarray:
    """The probability of each option in the dataset [agent, action]: 0.75 for the first option of
    agents that lean left and for the last option of the others; neutral agents choose uniformly.
    """
    game = game_of(task)
    if game.behavior == "neutral":
        return np.full((game.agents, game.actions), 1 / game.actions)
    policies = np.full((game.agents, game.actions), 0.25 / (game.actions - 1))
    policies[np.arange(game.agents), np.where(lean_left(game), 0, -1)] = 0.75
    return policies


def draw_choices(task: Task, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws the options in the data [size, agent]."""
    if game_of(task).kind == "climbing":
        # The best joint action as often as the coverage says, the other eight equally often.
        best = float(game_of(task).behavior) / 100
        joint = np.where(rng.random(size) < best, 0, rng.integers(1, CLIMBING.size, size))
        return np.stack(np.unravel_index(joint, CLIMBING.shape), axis=-1)
    cumulative = behavior_policies(task).cumsum(axis=1)
    draws = rng.random((size, len(cumulative), 1))
    return (draws >= cumulative[:, :-1]).sum(axis=-1)


def draw_numbers(task: Task, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws the numbers in the data [size, agent]: each is a sign times a uniform in [0, 1]."""
    game = game_of(task)
    positive = 0.5 if game.behavior == "neutral" else np.where(lean_left(game), 0.25, 0.75)
    signs = np.where(rng.random((size, game.agents)) < positive, 1, -1)
    return signs * rng.random((size, game.agents))


def make_columns(task: Task, seed: int = 0) -> dict[str, np.ndarray]:
    """The offline dataset in D4RL's layout: 50,000 steps of the behaviour policies."""
    game = game_of(task)
    rng = np.random.default_rng([seed, zlib.crc32(task.dataset.encode())])
    draw = draw_choices if task.discrete else draw_numbers
    chosen = draw(task, rng, EPISODES * EPISODE_LENGTH)  # [step, agent]
    joint = np.eye(game.actions)[chosen].reshape(len(chosen), -1) if task.discrete else chosen
    joint = joint.astype(np.float32)
    step = np.arange(len(chosen)) % EPISODE_LENGTH
    return {
        "observations": np.roll(joint, 1, axis=0) * (step > 0)[:, None],
        "actions": joint,
        "rewards": REWARDS[game.kind](chosen).astype(np.float32),
        "next_observations": joint,
        "terminals": np.zeros(len(chosen), dtype=bool),
        "timeouts": step == EPISODE_LENGTH - 1,
    }


def train_world_model(
    task: Task, seed: int, device: str, run_dir: Path, dataset: Path | None = None
) -> Path:
    """Trains the game's world model in `run_dir`, by default on the game's own dataset.

    This is quick, so none ships.
    """
    path = run_dir / "world_model.pt"
    begun = (run_dir / "checkpoint.pt").is_file()
    if begun:
        begun_with = load_checkpoint(run_dir)["args"]["seed"]
        message = f"{run_dir} has seed {begun_with}, not {seed}; give another --run-dir"
        require(begun_with == seed, message)
    if not path.is_file():
        script = Path(__file__).resolve().parent / "world_model.py"
        options = ["--resume", run_dir]
        if not begun:
            options = ["--task", task.option, "--seed", str(seed), "--run-dir", run_dir]
        options += ["--dataset", dataset] if dataset else []
        if task.discrete and not begun:
            # Agreement gets rarer with every agent, so its reward takes longer to learn.
            options += ["--total-steps", str(500 * (task.num_agents - 1))]
        finished = subprocess.run([sys.executable, script, *options, "--device", device])
        message = f"world_model.py made no model in {run_dir}; its error is above"
        require(finished.returncode == 0, message)
    return path


def describe(args: Args) -> None:
    """Prints the pay-off matrix and the datasets, with Table 1 where it has them."""
    require(args.seed >= 0, f"--seed must be 0 or more; it is {args.seed}")
    small = args.agents * args.actions <= 1000
    require(small, "--agents times --actions must be at most 1000; use smaller ones")
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
    except KeyboardInterrupt:
        sys.exit(130)
