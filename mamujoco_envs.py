"""Multi-agent MuJoCo tasks (Section 5.3): one arm or one body, with one agent per joint or limb.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198). In two-agent Reacher, agent 0 ("red", the
leader) drives the shoulder and agent 1 ("blue") the elbow. In four-agent Ant, agent 0 ("yellow")
drives the front left leg, and agents 1 to 3 drive the front right, back left and back right legs.

- `Task`: what each agent observes and drives, and how returns are normalised.
- `Simulator`: many copies of a gymnasium environment, stepped together on all cores.
- `evaluate`: greedy episodes of a team. `plot_team_strategy`: what a Reacher team agreed on.
- `parallel_env`: the same tasks behind PettingZoo's Parallel API, for other projects:

    env = mamujoco_envs.parallel_env("reacher-leader-only")
    observations, infos = env.reset(seed=1)
"""

import difflib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.reacher_v4 import ReacherEnv
from gymnasium.spaces import Box

HISTORY_LENGTH = 10  # past (action, observation) pairs that an agent remembers (Appendix A.1)
ACTION_LIMIT = 1 - 1e-5  # actions in histories and datasets are clamped to +-ACTION_LIMIT
EVALUATION_SEED = 10102  # episode i of an evaluation starts from seed EVALUATION_SEED + i


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that says what to do."""


def require(condition, message: str) -> None:
    """Raises `InputError` with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


# Tasks.

INDEX_TENSORS: dict[tuple, torch.Tensor] = {}


def index_tensor(indices: tuple, device) -> torch.Tensor:
    """int64 tensor of nested tuples, kept per device: a copy from the host would stall a GPU.

    A plain dictionary, because torch.compile cannot trace functools.cache.
    """
    if (indices, device) not in INDEX_TENSORS:
        INDEX_TENSORS[indices, device] = torch.tensor(indices, device=device)
    return INDEX_TENSORS[indices, device]


@dataclass(frozen=True)
class Task:
    """One environment, one dataset, and what each agent observes and drives."""

    name: str
    environment: str
    """gymnasium id, or "coordination" """
    dataset: str
    """name of the offline dataset; tasks with the same dataset share its world model"""
    observed: tuple[tuple[int, ...], ...]
    """[agent][obs]: the dimensions of the global state that each agent observes, in order"""
    driven: tuple[tuple[int, ...], ...]
    """[agent][action]: the dimensions of the environment's action that each agent sets, in order"""
    state_dim: int
    episode_length: int
    """steps after which an episode is cut (a time-out, not a terminal state)"""
    random_return: float
    expert_return: float
    """returns that the normalised score calls 0 and 1 (Table 2)"""
    entropy_target: float
    """joint entropy that PPO keeps (Appendix A.1)"""
    simulator: Callable
    """`simulator(task, num_envs)`: copies of the environment, with the methods of `Simulator`"""
    recorder: str = ""
    """module whose `record(task, path)` makes the dataset when it is missing"""
    plot: Callable | None = None
    """`plot(evaluation, path)` draws what a team agreed on"""
    columns: Callable | None = None
    """`columns(task)`: the dataset itself, where it is generated in memory"""
    discrete: bool = False
    """whether actions are one-hot vectors (Section 5.2)"""

    @property
    def num_agents(self) -> int:
        return len(self.observed)

    @property
    def obs_dims(self) -> tuple[int, ...]:
        """Each agent's true observation width; stacked observations are padded to the widest."""
        return tuple(len(indices) for indices in self.observed)

    @property
    def action_dim(self) -> int:
        """Actions per agent."""
        return len(self.driven[0])

    @property
    def pair_dims(self) -> tuple[int, ...]:
        """Width of each agent's (action, observation) pairs."""
        return tuple(self.action_dim + width for width in self.obs_dims)

    @property
    def history_shape(self) -> tuple[int, int, int]:
        """Shape of all agents' histories: [agent, 10, pair]."""
        return self.num_agents, HISTORY_LENGTH, max(self.pair_dims)

    @property
    def partially_observable(self) -> bool:
        """Whether some agent does not see the whole state."""
        return any(len(set(indices)) < self.state_dim for indices in self.observed)

    def observe(self, states: torch.Tensor) -> torch.Tensor:
        """Agents' observations, stacked and zero-padded: [..., state] -> [..., agent, obs]."""
        # Padding points at an extra dimension behind the state's last one, which is zero.
        width = max(self.obs_dims)
        padded = tuple(seen + (self.state_dim,) * (width - len(seen)) for seen in self.observed)
        return F.pad(states, (0, 1))[..., index_tensor(padded, states.device)]

    def split_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """The environment's actions to the agents': [..., joint] -> [..., agent, action]."""
        return actions[..., index_tensor(self.driven, actions.device)]

    def join_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """The agents' actions to the environment's: [..., agent, action] -> [..., joint]."""
        order = tuple(int(i) for i in np.argsort(np.concatenate(self.driven)))
        return actions.flatten(-2)[..., index_tensor(order, actions.device)]

    def normalized_score(self, returns):
        """0 is the random team's return, 1 the experts' mean (Table 2); numbers or arrays."""
        return (returns - self.random_return) / (self.expert_return - self.random_return)

    def paper_score(self, algorithm: str) -> str | None:
        """Mean ± standard error over the paper's seeds, None where it reports none."""
        return PAPER_SCORES.get(algorithm, {}).get(self.name.removesuffix("-other-legs"))


# The state: 0 cos(theta1), 1 cos(theta2), 2 sin(theta1), 3 sin(theta2), 4-5 target, 6-7 angular
# velocities, 8-10 fingertip minus target.
REACHER_OBSERVED = {
    "all-observant": (tuple(range(11)), tuple(range(11))),
    "independent": ((0, 2, 6, 4, 5), (1, 3, 7, 4, 5)),
    "leader-only": ((0, 2, 6, 1, 3, 7, 4, 5), (0, 2, 6, 1, 3, 7)),
}

# The state: 0 height, 1-4 orientation, 5-12 angles of each leg's hip and ankle, 13-15 velocity,
# 16-18 angular velocity, 19-26 joint velocities in the order of the angles.
ANT_TORSO = (0, 1, 2, 3, 4, 16, 17, 18, 13, 14, 15)
ANT_OBSERVED = {
    "fo": (tuple(range(27)),) * 4,
    "po": ((*ANT_TORSO, 5, 19, 6, 20), (7, 21, 8, 22), (9, 23, 10, 24), (11, 25, 12, 26)),
}
# Actuators come in another order than joints: the back right leg's are first. With "own legs" each
# agent drives the leg that it observes; with "other legs", the paper's release, its neighbour's.
ANT_OWN_LEGS = ((2, 3), (4, 5), (6, 7), (0, 1))
ANT_OTHER_LEGS = ((0, 1), (2, 3), (4, 5), (6, 7))


def reacher_task(view: str) -> Task:
    """Two-agent Reacher: `view` is a key of REACHER_OBSERVED."""
    return Task(
        name=f"reacher-{view}",
        environment="Reacher-v4",
        dataset="reacher-expert-mix",
        observed=REACHER_OBSERVED[view],
        driven=((0,), (1,)),
        state_dim=11,
        episode_length=50,
        random_return=-11.144625,
        expert_return=-4.2370844,
        entropy_target=-4.0,
        simulator=Simulator,
        recorder="data.collect_reacher",
        plot=plot_team_strategy,
    )


def ant_task(behavior: str, view: str) -> Task:
    """Four-agent Ant: a dataset of D4RL, and "fo", "po" or "po-other-legs"."""
    return Task(
        name=f"ant-{behavior}-{view}",
        environment="Ant-v4",
        dataset=f"ant-{behavior}",
        observed=ANT_OBSERVED[view[:2]],
        driven=ANT_OTHER_LEGS if view == "po-other-legs" else ANT_OWN_LEGS,
        state_dim=27,
        episode_length=1000,
        random_return=-325.6,
        expert_return=3879.7,
        entropy_target=-6.0,
        simulator=Simulator,
        recorder="data.collect_ant",
    )


def all_tasks() -> dict[str, Task]:
    """Every task of this repository by its name."""
    import coordination_game  # here, because it imports this module

    tasks = [reacher_task(view) for view in REACHER_OBSERVED]
    for behavior in ("random", "medium", "full-replay", "expert"):
        tasks += [ant_task(behavior, view) for view in ("fo", "po", "po-other-legs")]
    return {task.name: task for task in [*tasks, *coordination_game.tasks()]}


def find_task(name: str) -> Task:
    """The task of that name; raises `InputError` with the nearest names if there is none."""
    tasks = all_tasks()
    near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.3) or list(tasks)
    require(name in tasks, f"unknown task '{name}'; did you mean {', '.join(near)}?")
    return tasks[name]


# Simulators.


class Reacher:
    """`Reacher-v4`: how an episode starts, and states and rewards as functions of arrays.

    The fingertip's position is MuJoCo's own `xpos`: after a step it is the one of the integrator's
    last stage, a few millimetres behind the joints, so it cannot be computed from them.
    """

    gymnasium = ReacherEnv
    frame_skip = 2
    camera = None

    def __init__(self):
        env = ReacherEnv()
        self.model, self.init_qpos, self.init_qvel = env.model, env.init_qpos, env.init_qvel
        self.fingertip = self.model.body("fingertip").id
        self.target = self.model.body("target").id

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """qpos [4] and qvel [4] of a new episode, drawn as gymnasium draws them."""
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, size=4)
        target = rng.uniform(-0.2, 0.2, size=2)
        while np.linalg.norm(target) >= 0.2:
            target = rng.uniform(-0.2, 0.2, size=2)
        qpos[2:] = target
        qvel = self.init_qvel + rng.uniform(-0.005, 0.005, size=4)
        qvel[2:] = 0
        return qpos, qvel

    def restore(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """qpos and qvel [B, 4] of global states [B, 11], exact for angles within +-pi.

        The elbow's limit of 3 rad is soft: constant full torque can push it beyond pi, which a
        state cannot tell from beyond -pi.
        """
        angles = np.arctan2(states[:, 2:4], states[:, 0:2])
        qpos = np.hstack([angles, states[:, 4:6]])
        return qpos, np.hstack([states[:, 6:8], np.zeros_like(angles)])

    def state(self, qpos: np.ndarray, qvel: np.ndarray, xpos: np.ndarray) -> np.ndarray:
        """Global states [B, 11] of qpos and qvel [B, 4] and body positions [B, body, 3]."""
        angles = qpos[:, :2]
        offset = xpos[:, self.fingertip] - xpos[:, self.target]
        return np.hstack([np.cos(angles), np.sin(angles), qpos[:, 2:], qvel[:, :2], offset])

    def reward(self, states, actions, xpos, next_xpos) -> np.ndarray:
        """[B]; Reacher-v4 rewards the state before the step."""
        return -np.linalg.norm(states[:, 8:], axis=1) - np.square(actions).sum(1)

    @staticmethod
    def terminal(next_states):
        """[B] bool, of an array or a tensor: never, episodes of Reacher end by time-out only."""
        return abs(next_states[:, 0]) > np.inf


class Ant:
    """`Ant-v4`: how an episode starts, and states and rewards as functions of arrays.

    A state has no position in the plane, so the reward, the torso's progress along x, is taken from
    MuJoCo's `xpos`.
    """

    gymnasium = AntEnv
    frame_skip = 5
    camera = "track"  # follows the ant, which runs out of sight of any other

    def __init__(self):
        env = AntEnv()
        self.model, self.init_qpos, self.init_qvel = env.model, env.init_qpos, env.init_qvel
        self.dt = env.dt
        self.torso = self.model.body("torso").id

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """qpos [15] and qvel [14] of a new episode, drawn as gymnasium draws them."""
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, size=15)
        return qpos, self.init_qvel + 0.1 * rng.standard_normal(14)

    def restore(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """qpos [B, 15], at the origin of the plane, and qvel [B, 14] of global states [B, 27]."""
        return np.hstack([np.zeros((len(states), 2)), states[:, :13]]), states[:, 13:]

    def state(self, qpos: np.ndarray, qvel: np.ndarray, xpos: np.ndarray) -> np.ndarray:
        """Global states [B, 27] of qpos [B, 15] and qvel [B, 14]."""
        return np.hstack([qpos[:, 2:], qvel])

    def reward(self, states, actions, xpos, next_xpos) -> np.ndarray:
        """[B]: speed along x, 1 for being alive, and the cost of control (none of contact)."""
        speed = (next_xpos[:, self.torso, 0] - xpos[:, self.torso, 0]) / self.dt
        return speed + 1 - 0.5 * np.square(actions).sum(1)

    @staticmethod
    def terminal(next_states):
        """[B] bool, of an array or a tensor: the torso is too low or too high, or the state is not
        finite."""
        height = next_states[:, 0]
        return ~((abs(next_states) < np.inf).all(1) & (height >= 0.2) & (height <= 1.0))


ENVIRONMENTS = {"Reacher-v4": Reacher, "Ant-v4": Ant}


def available_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Simulator:
    """Copies of a task's environment, stepped together on all cores.

    Equals gymnasium's environment step by step, to the bit. It deals in global states, so it can
    continue from any row of a dataset. Time-outs are the caller's: it does not count steps.

    Each copy keeps its own `MjData`, whose arrays are viewed once: `mj_step` runs without Python's
    lock, and looking up an attribute of `MjData` costs as much as half a step of Reacher.
    (`mujoco.rollout` returns neither body positions, which Reacher's reward needs, nor the solver's
    warm start, without which the ant drifts away from gymnasium's.)
    """

    def __init__(self, task: Task, num_envs: int):
        self.task, self.environment = task, ENVIRONMENTS[task.environment]()
        self.data = [mujoco.MjData(self.environment.model) for _ in range(num_envs)]
        self.qpos, self.qvel = [data.qpos for data in self.data], [data.qvel for data in self.data]
        self.xpos, self.ctrl = [data.xpos for data in self.data], [data.ctrl for data in self.data]
        self.states, self.positions = np.zeros((num_envs, task.state_dim)), np.stack(self.xpos)
        self.threads = min(num_envs, available_cores())
        self.pool = ThreadPoolExecutor(self.threads)

    def reset(self, generators: list, where: np.ndarray | None = None) -> np.ndarray:
        """Starts an episode from each numpy generator, which moves on; states [B, state].

        `np.random.default_rng(seed)` gives the episode that `gymnasium.make(...).reset(seed=seed)`
        starts. With `where` [B], starts episodes in these copies alone.
        """
        qpos, qvel = zip(*[self.environment.reset(rng) for rng in generators])
        copies = range(len(self.data)) if where is None else np.flatnonzero(where)
        self._place(copies, qpos, qvel)
        self._read()
        return self.states

    def set_states(self, states: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Continues from global states [B, state], in the copies `where` [B] is true."""
        index = np.arange(len(self.data)) if where is None else np.flatnonzero(where)
        self._place(index, *self.environment.restore(np.asarray(states, dtype=np.float64)[index]))
        kept = self.states
        self._read()
        self.states = kept.copy()
        self.states[index] = states[index]
        return self.states

    def step(self, actions: np.ndarray, where: np.ndarray | None = None):
        """One step of all copies, or of those `where` [B] is true.

        Takes joint actions [B, agent, action], clipped to [-1, 1]; returns states [B, state],
        rewards [B] and terminals [B] (bool).
        """
        joint = np.empty((len(self.data), self.environment.model.nu))
        clipped = np.clip(actions, -1, 1).reshape(len(self.data), -1)
        joint[:, np.concatenate(self.task.driven)] = clipped
        active = range(len(self.data)) if where is None else np.flatnonzero(where)
        chunks = [active[first :: self.threads] for first in range(self.threads)]
        list(self.pool.map(lambda chunk: self._step_chunk(chunk, joint), chunks))
        states, positions = self.states, self.positions
        self._read()
        rewards = self.environment.reward(states, joint, positions, self.positions)
        return self.states, rewards, self.environment.terminal(self.states)

    def step_from(self, states: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
        """`step` on tensors, from `states` [B, state]; copies elsewhere are moved there first."""
        known = torch.as_tensor(self.states).to(states)
        elsewhere = (known != states).any(dim=1).cpu().numpy()
        self.set_states(states.cpu().numpy(), where=elsewhere)
        return [torch.as_tensor(x).to(states) for x in self.step(actions.cpu().numpy())]

    def _step_chunk(self, chunk, joint: np.ndarray) -> None:
        model, frame_skip = self.environment.model, self.environment.frame_skip
        for i in chunk:
            self.ctrl[i][:] = joint[i]
            mujoco.mj_step(model, self.data[i], frame_skip)

    def _place(self, index, qpos, qvel) -> None:
        for i, one_qpos, one_qvel in zip(index, qpos, qvel):
            mujoco.mj_resetData(self.environment.model, self.data[i])
            self.qpos[i][:], self.qvel[i][:] = one_qpos, one_qvel
            mujoco.mj_forward(self.environment.model, self.data[i])

    def _read(self) -> None:
        self.positions = np.stack(self.xpos)  # of all bodies, [B, body, 3]
        self.states = self.environment.state(
            np.stack(self.qpos), np.stack(self.qvel), self.positions
        )


# Evaluation.


def append_to_histories(histories, observations, actions) -> torch.Tensor:
    """Shifts histories [B, agent, 10, pair] left by one and appends this step's pair.

    The action, clamped, comes first in a pair, so that the padding of narrow observations is last.
    """
    pair = torch.cat([actions.clamp(-ACTION_LIMIT, ACTION_LIMIT), observations], dim=-1)
    return torch.cat([histories[:, :, 1:], pair.unsqueeze(2)], dim=2)


class Evaluation(NamedTuple):
    """Episodes of a team in the true environment."""

    task: Task
    returns: np.ndarray  # [episode]
    lengths: np.ndarray  # [episode]
    first_states: np.ndarray  # [episode, state]
    last_states: np.ndarray  # [episode, state]
    transitions: dict[str, np.ndarray]  # states, actions, ... of all steps, [N, ...]
    extra: dict = {}  # figures of a script's own

    def record(self) -> dict:
        """What a run keeps: score, its standard error over episodes, and the raw returns."""
        scores = self.task.normalized_score(self.returns)
        error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else None
        return {
            "score": float(scores.mean()),
            "score_stderr": None if error is None else float(error),
            "return": float(self.returns.mean()),
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
            **self.extra,
        }


@torch.no_grad()
def evaluate(task: Task, act: Callable, episodes: int, seed=EVALUATION_SEED, device="cpu"):
    """Runs a team in the true environment, all episodes at once; episode i starts from seed + i.

    `act` maps observations [B, agent, obs] and histories [B, agent, 10, pair] to actions
    [B, agent, action] in [-1, 1]. Returns an `Evaluation`.
    """
    simulator = task.simulator(task, episodes)
    states = simulator.reset([np.random.default_rng(seed + i) for i in range(episodes)])
    first_states = last_states = states
    histories = torch.zeros(episodes, *task.history_shape, device=device)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=int)
    alive, transitions = np.ones(episodes, dtype=bool), []
    for _ in range(task.episode_length):
        before = states
        observations = task.observe(torch.as_tensor(states, dtype=torch.float32, device=device))
        actions = act(observations, histories)
        histories = append_to_histories(histories, observations, actions)
        actions = actions.cpu().numpy()
        states, rewards, terminals = simulator.step(actions, alive)
        step = before, actions, rewards, states, terminals
        transitions.append([column[alive].astype(np.float32) for column in step])
        returns += np.where(alive, rewards, 0)
        lengths += alive
        last_states = np.where(alive[:, None], states, last_states)
        alive &= ~terminals
        if not alive.any():
            break
    names = ("states", "actions", "rewards", "next_states", "terminals")
    columns = dict(zip(names, map(np.concatenate, zip(*transitions))))
    return Evaluation(task, returns, lengths, first_states, last_states, columns)


def plot_team_strategy(evaluation: Evaluation, path: Path) -> None:
    """Saves what a Reacher team agreed on: the final bend theta2 for each target position."""
    from matplotlib.figure import Figure

    last = evaluation.last_states
    bend = np.degrees(np.arctan2(last[:, 3], last[:, 1]))
    direction = np.degrees(np.arctan2(last[:, 5], last[:, 4]))
    colors = {"c": bend, "cmap": "coolwarm", "vmin": -180, "vmax": 180}
    colors |= {"edgecolors": "grey", "linewidths": 0.5}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(last[:, 4], last[:, 5], **colors)
    left.set(xlabel="target x (m)", ylabel="target y (m)", aspect="equal")
    left.set_title("targets in the colour of the final bend")
    right.scatter(direction, bend, **colors)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="direction of the target (°)", ylabel="final bend θ2 (°)", ylim=(-185, 185))
    right.set_title(f"θ2 > 0 in {np.mean(bend > 0):.0%} of episodes")
    score = evaluation.record()["score"]
    figure.suptitle(f"{evaluation.task.name}: score {score:.2f} over {len(bend)} episodes")
    figure.savefig(path, dpi=120)


# PettingZoo's Parallel API.


class ParallelEnv:
    """One task behind PettingZoo's Parallel API, without depending on PettingZoo."""

    def __init__(self, task: Task, render_mode: str | None = None):
        self.task, self.render_mode = task, render_mode
        environment = ENVIRONMENTS[task.environment]
        options = {"camera_name": environment.camera} if environment.camera else {}
        self.environment = environment.gymnasium(render_mode=render_mode, **options)
        self.metadata = {
            "name": task.name,
            "render_modes": ["human", "rgb_array"],
            "render_fps": self.environment.metadata["render_fps"],
            "is_parallelizable": True,
        }
        self.possible_agents = [f"agent_{i}" for i in range(task.num_agents)]
        self.agents: list[str] = []
        self.state_space = self.environment.observation_space
        self.observation_spaces = {
            agent: Box(-np.inf, np.inf, (width,), np.float64)
            for agent, width in zip(self.possible_agents, task.obs_dims)
        }
        self.action_spaces = {
            agent: Box(-1.0, 1.0, (task.action_dim,), np.float32) for agent in self.possible_agents
        }
        self.current_state, self.steps = np.zeros(task.state_dim), 0

    def observation_space(self, agent: str) -> Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Box:
        return self.action_spaces[agent]

    @property
    def num_agents(self) -> int:
        return len(self.agents)

    @property
    def max_num_agents(self) -> int:
        return len(self.possible_agents)

    @property
    def unwrapped(self) -> "ParallelEnv":
        return self

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Observations and infos by agent. The same seed starts the same episode."""
        self.current_state, _ = self.environment.reset(seed=seed, options=options)
        self.agents, self.steps = list(self.possible_agents), 0
        return self.observations(), {agent: {} for agent in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        """Observations, rewards, terminations, truncations and infos by agent.

        All agents share one reward. Actions outside [-1, 1] are clipped.
        """
        if not self.agents:
            return {}, {}, {}, {}, {}
        joint = np.zeros(self.environment.action_space.shape)
        for agent, driven in zip(self.possible_agents, self.task.driven):
            joint[list(driven)] = np.clip(actions[agent], -1, 1)
        self.current_state, reward, terminated, _, _ = self.environment.step(joint)
        self.steps += 1
        truncated = self.steps >= self.task.episode_length
        agents, observations = self.agents, self.observations()
        if terminated or truncated:
            self.agents = []
        return (
            observations,
            {agent: float(reward) for agent in agents},
            {agent: bool(terminated) for agent in agents},
            {agent: truncated for agent in agents},
            {agent: {} for agent in agents},
        )

    def observations(self) -> dict[str, np.ndarray]:
        """What each agent sees of the current state."""
        return {
            agent: self.current_state[list(observed)]
            for agent, observed in zip(self.possible_agents, self.task.observed)
        }

    def state(self) -> np.ndarray:
        """The global state [state], from which every agent's observation is taken."""
        return self.current_state.copy()

    def render(self):
        """A frame [height, width, 3] with `render_mode="rgb_array"`, None with "human"."""
        hint = 'make the task with parallel_env(task, render_mode="rgb_array") or "human"'
        require(self.render_mode, f"nothing to render to: {hint}")
        return self.environment.render()

    def close(self) -> None:
        self.environment.close()


def parallel_env(task: str, render_mode: str | None = None) -> ParallelEnv:
    """A MuJoCo task by name, such as "reacher-leader-only", behind PettingZoo's Parallel API."""
    task = find_task(task)
    require(
        task.environment in ENVIRONMENTS, f"{task.name} is no MuJoCo task; take reacher-* or ant-*"
    )
    return ParallelEnv(task, render_mode)


# The paper's scores (Tables 3 and 4): mean ± standard error over seeds.
PAPER_SCORES = {
    "moma_ppo": {
        "coordination-favorable": "1.00 ± 0.00",
        "coordination-neutral": "1.00 ± 0.00",
        "coordination-unfavorable": "1.00 ± 0.00",
        "reacher-all-observant": "1.07 ± 0.01",
        "reacher-independent": "0.95 ± 0.06",
        "reacher-leader-only": "1.00 ± 0.01",
        "ant-random-fo": "0.52 ± 0.07",
        "ant-medium-fo": "1.29 ± 0.06",
        "ant-full-replay-fo": "1.42 ± 0.07",
        "ant-expert-fo": "1.49 ± 0.01",
        "ant-random-po": "0.42 ± 0.05",
        "ant-medium-po": "0.54 ± 0.19",
        "ant-full-replay-po": "0.46 ± 0.10",
        "ant-expert-po": "0.18 ± 0.00",
    },
    "iql": {
        "coordination-favorable": "1.00 ± 0.00",
        "coordination-neutral": "1.00 ± 0.00",
        "coordination-unfavorable": "1.00 ± 0.00",
        "reacher-all-observant": "1.07 ± 0.01",
        "ant-random-fo": "0.12 ± 0.00",
        "ant-medium-fo": "0.97 ± 0.02",
        "ant-full-replay-fo": "1.22 ± 0.02",
        "ant-expert-fo": "1.26 ± 0.01",
    },
    "inspo": {},  # is not in the paper
    "maiql": {
        "coordination-favorable": "1.00 ± 0.00",
        "coordination-neutral": "0.90 ± 0.10",
        "coordination-unfavorable": "0.00 ± 0.00",
        "reacher-all-observant": "0.96 ± 0.05",
        "reacher-independent": "0.92 ± 0.04",
        "reacher-leader-only": "0.80 ± 0.05",
        "ant-random-fo": "0.28 ± 0.01",
        "ant-medium-fo": "0.85 ± 0.02",
        "ant-full-replay-fo": "0.77 ± 0.21",
        "ant-expert-fo": "1.24 ± 0.00",
        "ant-random-po": "0.31 ± 0.00",
        "ant-medium-po": "0.14 ± 0.02",
        "ant-full-replay-po": "0.18 ± 0.02",
        "ant-expert-po": "-0.16 ± 0.01",
    },
    "maiql_ft": {
        "ant-random-fo": "0.28 ± 0.03",
        "ant-medium-fo": "0.81 ± 0.02",
        "ant-full-replay-fo": "0.95 ± 0.13",
        "ant-expert-fo": "1.06 ± 0.07",
        "ant-random-po": "0.34 ± 0.04",
        "ant-medium-po": "0.11 ± 0.01",
        "ant-full-replay-po": "-0.07 ± 0.10",
        "ant-expert-po": "-0.23 ± 0.02",
    },
    "matd3_bc": {
        "reacher-all-observant": "1.04 ± 0.01",
        "reacher-independent": "0.59 ± 0.03",
        "reacher-leader-only": "0.73 ± 0.02",
    },
    "ibc": {
        "coordination-favorable": "1.00 ± 0.00",
        "coordination-neutral": "0.55 ± 0.11",
        "coordination-unfavorable": "0.00 ± 0.00",
        "reacher-all-observant": "1.02 ± 0.01",
        "reacher-independent": "0.76 ± 0.04",
        "reacher-leader-only": "0.84 ± 0.02",
        "ant-random-fo": "0.31 ± 0.00",
        "ant-medium-fo": "0.84 ± 0.01",
        "ant-full-replay-fo": "1.20 ± 0.01",
        "ant-expert-fo": "1.24 ± 0.00",
        "ant-random-po": "0.31 ± 0.00",
        "ant-medium-po": "0.17 ± 0.01",
        "ant-full-replay-po": "0.21 ± 0.01",
        "ant-expert-po": "0.05 ± 0.04",
    },
    "itd3_bc": {
        "reacher-all-observant": "0.78 ± 0.00",
        "reacher-independent": "0.30 ± 0.11",
        "reacher-leader-only": "0.48 ± 0.04",
        "ant-random-fo": "0.22 ± 0.02",
        "ant-medium-fo": "1.04 ± 0.00",
        "ant-full-replay-fo": "1.33 ± 0.01",
        "ant-expert-fo": "1.25 ± 0.02",
        "ant-random-po": "0.31 ± 0.00",
        "ant-medium-po": "0.22 ± 0.05",
        "ant-full-replay-po": "0.20 ± 0.02",
        "ant-expert-po": "0.16 ± 0.00",
    },
    "icql": {
        "reacher-all-observant": "0.48 ± 0.06",
        "reacher-independent": "0.46 ± 0.04",
        "reacher-leader-only": "0.31 ± 0.05",
        "ant-random-fo": "0.08 ± 0.00",
        "ant-medium-fo": "0.88 ± 0.12",
        "ant-full-replay-fo": "1.21 ± 0.02",
        "ant-expert-fo": "0.73 ± 0.15",
        "ant-random-po": "0.17 ± 0.02",
        "ant-medium-po": "0.09 ± 0.02",
        "ant-full-replay-po": "0.09 ± 0.01",
        "ant-expert-po": "0.11 ± 0.03",
    },
    "iomar": {
        "reacher-all-observant": "0.73 ± 0.01",
        "reacher-independent": "0.45 ± 0.02",
        "reacher-leader-only": "0.39 ± 0.02",
        "ant-random-fo": "0.08 ± 0.00",
        "ant-medium-fo": "1.10 ± 0.03",
        "ant-full-replay-fo": "1.30 ± 0.00",
        "ant-expert-fo": "1.16 ± 0.01",
        "ant-random-po": "0.21 ± 0.02",
        "ant-medium-po": "0.06 ± 0.01",
        "ant-full-replay-po": "0.11 ± 0.02",
        "ant-expert-po": "0.10 ± 0.01",
    },
}
