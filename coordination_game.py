"""The Iterated Coordination Game (Section 5.2): agents that choose alike are rewarded, and nothing else says which choice.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem",
AAMAS 2024, Figure 3 (a), Tables 1 and 3. Each step, every agent chooses one of the options; the reward is 1 if all choose the
same one, else 0. All agents observe the previous joint action, one-hot (zeros at the first step); that is the global state, too. An
episode has ten steps. The score is the mean reward of a step.

    python coordination_game.py               # the pay-off matrix, and the three datasets beside Table 1
    python coordination_game.py --agents 4    # generalised to more agents

Importing this file adds its tasks to `mamujoco_envs.TASKS`: coordination-favorable, coordination-neutral and coordination-unfavorable
with two agents, and coordination-unfavorable-3, -4 and -8 with more. Others: `TASKS[name] = coordination_task(behavior, agents, actions)`.
The paper does not give observations, the horizon or the size of the datasets; those above are ours.
"""

import sys
import zlib
from dataclasses import dataclass

import numpy as np
import tyro

from mamujoco_envs import SIMULATORS, TASKS, InputError, Task

EPISODES, EPISODE_LENGTH = 5000, 10
PAPER_SCORES = {"favorable": 0.623, "neutral": 0.502, "unfavorable": 0.375}  # Table 1


@dataclass
class Args:
    agents: int = 2
    """agents of the game"""
    actions: int = 2
    """options that an agent chooses from"""
    seed: int = 0
    """seed of the datasets"""


def coordination_task(behavior: str, agents: int = 2, actions: int = 2) -> Task:
    """The game with a dataset by `behavior`: "favorable", "neutral" or "unfavorable" (Table 1)."""
    if behavior not in PAPER_SCORES or agents < 2 or actions < 2:
        raise InputError(f"no game '{behavior}' of {agents} agents and {actions} actions; needs one of {', '.join(PAPER_SCORES)} and two or more of each")
    size = "" if agents == actions == 2 else f"-{agents}" if actions == 2 else f"-{agents}x{actions}"
    return Task(
        name=f"coordination-{behavior}{size}",
        environment="coordination",
        dataset=f"coordination-{behavior}{size}",
        observed=(tuple(range(agents * actions)),) * agents,
        driven=tuple(tuple(range(i * actions, (i + 1) * actions)) for i in range(agents)),
        state_dim=agents * actions,
        episode_length=EPISODE_LENGTH,
        random_return=0.0,
        expert_return=float(EPISODE_LENGTH),
        entropy_target=-4.0,
        discrete=True,
    )


def own_task(task: Task) -> Task:
    """The game's task of that name: `task` may be a view of it in which one agent sets all actions."""
    return TASKS.get(task.name, task)


def behavior_policies(task: Task) -> np.ndarray:
    """The probability of each option in the dataset, [agent, action] (Table 1); "right" is the last option.

    Unfavorable with more than two agents: the first half of the agents lean to the left and the others to the right.
    """
    lean = task.dataset.split("-")[1]
    right = np.full(task.num_agents, {"favorable": 0.75, "neutral": 1 / task.action_dim, "unfavorable": 0.75}[lean])
    if lean == "unfavorable":
        right[: task.num_agents // 2] = 0.25
    policies = np.repeat((1 - right)[:, None] / (task.action_dim - 1), task.action_dim, axis=1)
    policies[:, -1] = right
    return policies


class CoordinationGame:
    """`batch` copies of the game, with the methods of `mamujoco_envs.Simulator`."""

    def __init__(self, task: Task, batch: int):
        self.task, self.states = own_task(task), np.zeros((batch, task.state_dim))

    def reset(self, generators: list[np.random.Generator]) -> np.ndarray:
        """The states before the first step, all zeros: [batch, state]."""
        self.states = np.zeros((len(generators), self.task.state_dim))
        return self.states

    def set_states(self, states: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Goes on from the given states [batch, state] in the copies `where` [batch] is true."""
        self.states = np.array(states, dtype=np.float64) if where is None else np.where(where[:, None], states, self.states)
        return self.states

    def step(self, actions: np.ndarray, where: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One-hot actions, [batch, agent, action] or joined -> states [batch, state], rewards [batch], terminals [batch] (never).

        No episode ends before the others, so all copies take the step, whatever `where` says.
        """
        choices = np.argmax(np.reshape(actions, (-1, self.task.num_agents, self.task.action_dim)), axis=-1)
        self.states = np.eye(self.task.action_dim)[choices].reshape(len(choices), -1)
        rewards = (choices == choices[:, :1]).all(axis=1).astype(np.float64)
        return self.states, rewards, np.zeros(len(choices), dtype=bool)


def make_columns(task: Task, seed: int = 0) -> dict[str, np.ndarray]:
    """The offline dataset in D4RL's layout: 50,000 steps of the behaviour policies of Table 1, the same for the same seed."""
    task = own_task(task)
    rng = np.random.default_rng([seed, zlib.crc32(task.dataset.encode())])
    cumulative = behavior_policies(task).cumsum(axis=1)
    draws = rng.random((EPISODES * EPISODE_LENGTH, task.num_agents, 1))
    choices = (draws >= cumulative[:, :-1]).sum(axis=-1)  # [step, agent]
    actions = np.eye(task.action_dim, dtype=np.float32)[choices].reshape(len(choices), -1)
    first = np.arange(len(choices)) % EPISODE_LENGTH == 0
    states = np.roll(actions, 1, axis=0) * ~first[:, None]
    rewards = (choices == choices[:, :1]).all(axis=1).astype(np.float32)
    never = np.zeros(len(choices), dtype=bool)
    timeouts = np.arange(1, len(choices) + 1) % EPISODE_LENGTH == 0
    return {
        "observations": states,
        "actions": actions,
        "rewards": rewards,
        "next_observations": actions,
        "terminals": never,
        "timeouts": timeouts,
    }


SIMULATORS["coordination"] = CoordinationGame
for behavior in PAPER_SCORES:
    TASKS[f"coordination-{behavior}"] = coordination_task(behavior)
for agents in (3, 4, 8):
    TASKS[f"coordination-unfavorable-{agents}"] = coordination_task("unfavorable", agents)


def describe(args: Args) -> None:
    names = ["left", "right"] if args.actions == 2 else [str(i) for i in range(args.actions)]
    tasks = [coordination_task(behavior, args.agents, args.actions) for behavior in PAPER_SCORES]
    if args.agents == 2:
        print("reward " + "".join(f"{name:>8}" for name in names))
        for i, name in enumerate(names):
            print(f"{name:7}" + "".join(f"{int(i == j):8}" for j in range(args.actions)))
        print()
    share = "P(" + names[-1] + ")"
    print(f"{'dataset':12} {share} of each agent{'':8} mean score   Table 1")
    for task, (behavior, paper) in zip(tasks, PAPER_SCORES.items()):
        columns = make_columns(task, args.seed)
        chosen = columns["actions"].reshape(-1, args.agents, args.actions)[:, :, -1].mean(axis=0)
        paper = f"{paper:.3f}" if args.agents == args.actions == 2 else "-"
        expected = sum(np.prod(option) for option in behavior_policies(task).T)
        print(f"{behavior:12} {' '.join(f'{p:.3f}' for p in chosen):27} {columns['rewards'].mean():.3f} (expected {expected:.3f})   {paper}")


if __name__ == "__main__":
    try:
        describe(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
