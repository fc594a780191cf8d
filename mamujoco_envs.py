"""Multi-agent MuJoCo tasks (Section 5.3 of the paper): one arm or one body, one agent per joint or limb.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem",
AAMAS 2024. Two-agent Reacher: agent 0 ("red", the leader) drives the shoulder, agent 1 ("blue") the elbow. Four-agent Ant: agent 0
("yellow") drives the front left leg, agents 1 to 3 the front right, the back left and the back right one.

What is here, in this order:
- `Task` and `TASKS`: which state dimensions each agent observes, which actuators it drives, the normalised score.
- `Simulator`: many copies of a gymnasium environment stepped at once on all cores. It deals in global
  states, which are the environment's own observations, so it can go on from any row of a dataset.
- `evaluate`: greedy episodes of a team, with the agents' histories. `plot_team_strategy`: what the team agreed on.
- `parallel_env`: the same task behind PettingZoo's Parallel API, for use in other projects.

    env = mamujoco_envs.parallel_env("reacher-leader-only")
    observations, infos = env.reset(seed=1)
"""

import difflib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.reacher_v4 import ReacherEnv
from gymnasium.spaces import Box

HISTORY_LENGTH = 10  # past (observation, action) pairs that an agent remembers (Appendix A.1)
ACTION_LIMIT = 1 - 1e-5  # actions in histories and datasets are clamped to +-ACTION_LIMIT


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one line that says what to do."""


INDEX_TENSORS: dict[tuple, torch.Tensor] = {}


def index_tensor(indices: tuple, device: torch.device) -> torch.Tensor:
    """int64 tensor of nested tuples, made once for each device: a copy from the host would stall a GPU at every use."""
    if (indices, device) not in INDEX_TENSORS:  # a plain dictionary, because torch.compile does not see functools.cache
        INDEX_TENSORS[indices, device] = torch.tensor(indices, device=device)
    return INDEX_TENSORS[indices, device]


@dataclass(frozen=True)
class Task:
    """One environment, one dataset and one observation function for each agent."""

    name: str
    environment: str
    """key of `ENVIRONMENTS`, a gymnasium id"""
    dataset: str
    """name of the offline dataset; tasks that differ in what agents observe share it, and its world model"""
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
    discrete: bool = False
    """actions are one-hot vectors, and agents need no memory (Section 5.2)"""

    @property
    def num_agents(self) -> int:
        return len(self.observed)

    @property
    def obs_dims(self) -> tuple[int, ...]:
        """Each agent's true observation width; stacked observations are zero-padded to the widest."""
        return tuple(len(indices) for indices in self.observed)

    @property
    def action_dim(self) -> int:
        """Actions per agent."""
        return len(self.driven[0])

    def observe(self, states: torch.Tensor) -> torch.Tensor:
        """Agents' observations, stacked and zero-padded: [..., state] -> [..., agent, obs]."""
        width = max(self.obs_dims)  # padding points one past the last state dimension, where a zero is put
        padded = tuple(indices + (self.state_dim,) * (width - len(indices)) for indices in self.observed)
        return torch.nn.functional.pad(states, (0, 1))[..., index_tensor(padded, states.device)]

    def split_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """The environment's action vectors to agents' actions: [..., agent * action] -> [..., agent, action]."""
        return actions[..., index_tensor(self.driven, actions.device)]

    def join_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """Agents' actions to the environment's action vectors: [..., agent, action] -> [..., agent * action]."""
        order = tuple(int(i) for i in np.argsort(np.concatenate(self.driven)))
        return actions.flatten(-2)[..., index_tensor(order, actions.device)]

    def normalized_score(self, returns):
        """0 is the random team's return, 1 the mean return of the experts (Table 2); works on numbers and arrays."""
        return (returns - self.random_return) / (self.expert_return - self.random_return)


# Reacher's state: 0 cos(theta1), 1 cos(theta2), 2 sin(theta1), 3 sin(theta2), 4-5 target, 6-7 angular velocities,
# 8-10 fingertip minus target.
REACHER_OBSERVED = {
    "all-observant": (tuple(range(11)), tuple(range(11))),
    "independent": ((0, 2, 6, 4, 5), (1, 3, 7, 4, 5)),
    "leader-only": ((0, 2, 6, 1, 3, 7, 4, 5), (0, 2, 6, 1, 3, 7)),
}
TASKS = {
    f"reacher-{name}": Task(
        name=f"reacher-{name}",
        environment="Reacher-v4",
        dataset="reacher-expert-mix",
        observed=observed,
        driven=((0,), (1,)),
        state_dim=11,
        episode_length=50,
        random_return=-11.144625,
        expert_return=-4.2370844,
        entropy_target=-4.0,
    )
    for name, observed in REACHER_OBSERVED.items()
}

# Ant's state: 0 height, 1-4 orientation, 5-12 angles of hip and ankle of each leg, 13-15 velocity, 16-18 angular velocity, 19-26 joint
# velocities in the order of the angles. Its actuators are in another order: the back right leg's come first.
ANT_OBSERVED = {
    "fo": (tuple(range(27)),) * 4,
    "po": ((0, 1, 2, 3, 4, 16, 17, 18, 13, 14, 15, 5, 19, 6, 20), (7, 21, 8, 22), (9, 23, 10, 24), (11, 25, 12, 26)),
}
ANT_OWN_LEGS = ((2, 3), (4, 5), (6, 7), (0, 1))  # each agent drives the leg that it observes
ANT_OTHER_LEGS = ((0, 1), (2, 3), (4, 5), (6, 7))  # as in the paper's release: each drives the leg that its neighbour observes
for behavior in ("random", "medium", "full-replay", "expert"):
    for view, driven in {"fo": ANT_OWN_LEGS, "po": ANT_OWN_LEGS, "po-other-legs": ANT_OTHER_LEGS}.items():
        TASKS[f"ant-{behavior}-{view}"] = Task(
            name=f"ant-{behavior}-{view}",
            environment="Ant-v4",
            dataset=f"ant-{behavior}",
            observed=ANT_OBSERVED[view[:2]],
            driven=driven,
            state_dim=27,
            episode_length=1000,
            random_return=-325.6,
            expert_return=3879.7,
            entropy_target=-6.0,
        )


def find_task(name: str, tasks: dict[str, Task] = TASKS) -> Task:
    """The task of that name; raises `InputError` with the nearest names if there is none."""
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.3) or list(tasks)
        raise InputError(f"unknown task '{name}'; did you mean {', '.join(near)}?")
    return tasks[name]


class Reacher:
    """`Reacher-v4`: how an episode starts, and states and rewards as functions of arrays.

    The fingertip's position is MuJoCo's own `xpos`: after a step it is the one of the integrator's last stage, a few
    millimetres behind the joints, so it cannot be computed from them.
    """

    frame_skip = 2

    def __init__(self):
        env = ReacherEnv()
        self.model, self.init_qpos, self.init_qvel = env.model, env.init_qpos, env.init_qvel
        self.fingertip, self.target = self.model.body("fingertip").id, self.model.body("target").id

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
        """qpos and qvel [B, 4] of global states [B, 11], exact to rounding for angles within +-pi.

        The elbow's limit of 3 rad is soft: constant full torque can push it beyond pi, which a state cannot tell from beyond -pi.
        """
        angles = np.arctan2(states[:, 2:4], states[:, 0:2])
        return np.hstack([angles, states[:, 4:6]]), np.hstack([states[:, 6:8], np.zeros_like(angles)])

    def state(self, qpos: np.ndarray, qvel: np.ndarray, xpos: np.ndarray) -> np.ndarray:
        """Global states [B, 11] of qpos and qvel [B, 4] and body positions [B, body, 3]."""
        offset = xpos[:, self.fingertip] - xpos[:, self.target]
        return np.hstack([np.cos(qpos[:, :2]), np.sin(qpos[:, :2]), qpos[:, 2:], qvel[:, :2], offset])

    def reward(self, states: np.ndarray, actions: np.ndarray, xpos: np.ndarray, next_xpos: np.ndarray) -> np.ndarray:
        """[B]; Reacher-v4 rewards the state before the step."""
        return -np.linalg.norm(states[:, 8:], axis=1) - np.square(actions).sum(1)

    def terminal(self, next_states: np.ndarray) -> np.ndarray:
        """[B] bool."""
        return np.zeros(len(next_states), dtype=bool)


class Ant:
    """`Ant-v4`: how an episode starts, and states and rewards as functions of arrays.

    A state has no position in the plane, so the reward, the torso's progress along x, is taken from MuJoCo's `xpos`.
    """

    frame_skip = 5

    def __init__(self):
        env = AntEnv()
        self.model, self.init_qpos, self.init_qvel, self.dt = env.model, env.init_qpos, env.init_qvel, env.dt
        self.torso = self.model.body("torso").id

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """qpos [15] and qvel [14] of a new episode, drawn as gymnasium draws them."""
        return self.init_qpos + rng.uniform(-0.1, 0.1, size=15), self.init_qvel + 0.1 * rng.standard_normal(14)

    def restore(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """qpos [B, 15], at the origin of the plane, and qvel [B, 14] of global states [B, 27]."""
        return np.hstack([np.zeros((len(states), 2)), states[:, :13]]), states[:, 13:]

    def state(self, qpos: np.ndarray, qvel: np.ndarray, xpos: np.ndarray) -> np.ndarray:
        """Global states [B, 27] of qpos [B, 15] and qvel [B, 14]."""
        return np.hstack([qpos[:, 2:], qvel])

    def reward(self, states: np.ndarray, actions: np.ndarray, xpos: np.ndarray, next_xpos: np.ndarray) -> np.ndarray:
        """[B]: speed along x, 1 for being alive, and the cost of control. Ant-v4 has no cost of contact."""
        speed = (next_xpos[:, self.torso, 0] - xpos[:, self.torso, 0]) / self.dt
        return speed + 1 - 0.5 * np.square(actions).sum(1)

    def terminal(self, next_states: np.ndarray) -> np.ndarray:
        """[B] bool: the torso is too low or too high, or the state is not finite."""
        healthy = np.isfinite(next_states).all(1) & (next_states[:, 0] >= 0.2) & (next_states[:, 0] <= 1.0)
        return ~healthy


ENVIRONMENTS = {"Reacher-v4": Reacher, "Ant-v4": Ant}


class Simulator:
    """Copies of a task's environment, stepped together on all cores. Equals gymnasium's to the bit, step by step.

    Each copy keeps its own `MjData`, whose arrays are viewed once: `mj_step` runs without Python's lock, and looking up
    an attribute of `MjData` costs as much as half a step of Reacher. (`mujoco.rollout` returns neither body positions,
    which Reacher's reward needs, nor the solver's warm start, without which the ant drifts away from gymnasium's.)
    Time-outs are the caller's: the simulator does not count steps.
    """

    def __init__(self, task: Task, num_envs: int):
        self.task, self.environment = task, ENVIRONMENTS[task.environment]()
        self.data = [mujoco.MjData(self.environment.model) for _ in range(num_envs)]
        self.qpos, self.qvel = [data.qpos for data in self.data], [data.qvel for data in self.data]
        self.xpos, self.ctrl = [data.xpos for data in self.data], [data.ctrl for data in self.data]
        self.states, self.positions = np.zeros((num_envs, task.state_dim)), np.stack(self.xpos)
        self.threads = min(num_envs, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.threads)

    def reset(self, generators: list[np.random.Generator], where: np.ndarray | None = None) -> np.ndarray:
        """Starts an episode from each generator, which moves on; states [B, state]. With `where` [B], in these copies alone.

        `np.random.default_rng(seed)` gives the episode that `gymnasium.make(...).reset(seed=seed)` starts.
        """
        qpos, qvel = zip(*[self.environment.reset(rng) for rng in generators])
        self._place(range(len(self.data)) if where is None else np.flatnonzero(where), qpos, qvel)
        self._read()
        return self.states

    def set_states(self, states: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Goes on from given global states [B, state], such as rows of a dataset, in the copies `where` [B] is true."""
        index = np.arange(len(self.data)) if where is None else np.flatnonzero(where)
        self._place(index, *self.environment.restore(np.asarray(states, dtype=np.float64)[index]))
        kept = self.states
        self._read()
        self.states = kept.copy()
        self.states[index] = states[index]
        return self.states

    def step(self, actions: np.ndarray, where: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Joint actions [B, agent, action], clipped to [-1, 1] -> states [B, state], rewards [B], terminals [B] (bool).

        With `where` [B], the other copies stand still.
        """
        joint = np.empty((len(self.data), self.environment.model.nu))
        joint[:, np.concatenate(self.task.driven)] = np.clip(actions, -1, 1).reshape(len(self.data), -1)
        active = range(len(self.data)) if where is None else np.flatnonzero(where)
        list(self.pool.map(lambda first: self._step_chunk(active[first :: self.threads], joint), range(self.threads)))
        states, positions = self.states, self.positions
        self._read()
        rewards = self.environment.reward(states, joint, positions, self.positions)
        return self.states, rewards, self.environment.terminal(self.states)

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
        self.states = self.environment.state(np.stack(self.qpos), np.stack(self.qvel), self.positions)


SIMULATORS = {"Reacher-v4": Simulator, "Ant-v4": Simulator}


def make_simulator(task: Task, num_envs: int):
    """`num_envs` copies of the task's environment."""
    return SIMULATORS[task.environment](task, num_envs)


def append_to_histories(histories: torch.Tensor, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Shifts histories [B, agent, 10, action + obs] left by one and appends this step's pair, its action clamped.

    The action comes first in a pair, so that the padding of narrow observations comes last.
    """
    pair = torch.cat([actions.clamp(-ACTION_LIMIT, ACTION_LIMIT), observations], dim=-1)
    return torch.cat([histories[:, :, 1:], pair.unsqueeze(2)], dim=2)


class Evaluation(NamedTuple):
    returns: np.ndarray  # [episode]
    lengths: np.ndarray  # [episode]
    first_states: np.ndarray  # [episode, state]
    last_states: np.ndarray  # [episode, state]


@torch.no_grad()
def evaluate(task: Task, act: Callable, episodes: int, seed: int = 10102, device="cpu") -> Evaluation:
    """Runs a team in the true environment, all episodes at once; episode i starts from seed + i.

    `act(observations [B, agent, obs], histories [B, agent, 10, action + obs]) -> actions [B, agent, action]`, in [-1, 1].
    """
    simulator = make_simulator(task, episodes)
    states = first_states = last_states = simulator.reset([np.random.default_rng(seed + i) for i in range(episodes)])
    width = max(task.obs_dims) + task.action_dim
    histories = torch.zeros(episodes, task.num_agents, HISTORY_LENGTH, width, device=device)
    returns, lengths, alive = np.zeros(episodes), np.zeros(episodes, dtype=int), np.ones(episodes, dtype=bool)
    for _ in range(task.episode_length):
        observations = task.observe(torch.as_tensor(states, dtype=torch.float32, device=device))
        actions = act(observations, histories)
        histories = append_to_histories(histories, observations, actions)
        states, rewards, terminals = simulator.step(actions.cpu().numpy(), alive)
        returns += np.where(alive, rewards, 0)
        lengths += alive
        last_states = np.where(alive[:, None], states, last_states)
        alive &= ~terminals
        if not alive.any():
            break
    return Evaluation(returns, lengths, first_states, last_states)


def plot_team_strategy(task: Task, evaluation: Evaluation, path: Path) -> None:
    """Saves what a Reacher team agreed on: the arm's bend theta2 at the end of each episode against the target's position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = evaluation.last_states
    bend = np.degrees(np.arctan2(last[:, 3], last[:, 1]))
    score = task.normalized_score(evaluation.returns.mean())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    points = left.scatter(last[:, 4], last[:, 5], c=bend, cmap="coolwarm", vmin=-180, vmax=180, edgecolors="grey", linewidths=0.5)
    left.set(xlabel="target x (m)", ylabel="target y (m)", aspect="equal", title="target positions")
    figure.colorbar(points, ax=left, label="bend θ2 at the end (°)")
    right.scatter(np.degrees(np.arctan2(last[:, 5], last[:, 4])), bend, c=bend, cmap="coolwarm", vmin=-180, vmax=180, edgecolors="grey", linewidths=0.5)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="direction of the target (°)", ylabel="bend θ2 at the end (°)", ylim=(-185, 185), title=f"θ2 > 0 in {np.mean(bend > 0):.0%} of episodes")
    figure.suptitle(f"{task.name}: score {score:.2f} over {len(bend)} episodes")
    figure.savefig(path, dpi=120)
    plt.close(figure)


class ParallelEnv:
    """One task behind PettingZoo's Parallel API, without depending on PettingZoo. Built by `parallel_env`."""

    def __init__(self, task: Task, render_mode: str | None = None):
        self.task, self.render_mode = task, render_mode
        self.metadata = {"name": task.name, "render_modes": ["human", "rgb_array"], "is_parallelizable": True}
        # The camera that follows the ant, which runs out of any other's sight.
        options = {"camera_name": "track"} if task.environment == "Ant-v4" else {}
        self.environment = {"Reacher-v4": ReacherEnv, "Ant-v4": AntEnv}[task.environment](render_mode=render_mode, **options)
        self.metadata["render_fps"] = self.environment.metadata["render_fps"]
        self.possible_agents = [f"agent_{i}" for i in range(task.num_agents)]
        self.agents: list[str] = []
        self.state_space = self.environment.observation_space
        self.observation_spaces = {
            agent: Box(-np.inf, np.inf, (width,), np.float64) for agent, width in zip(self.possible_agents, task.obs_dims)
        }
        self.action_spaces = {agent: Box(-1.0, 1.0, (task.action_dim,), np.float32) for agent in self.possible_agents}
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
        """Observations, rewards, terminations, truncations and infos by agent; all agents share one reward."""
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
        return {agent: self.current_state[list(observed)] for agent, observed in zip(self.possible_agents, self.task.observed)}

    def state(self) -> np.ndarray:
        """The global state [state], from which every agent's observation is taken."""
        return self.current_state.copy()

    def render(self):
        """A frame [height, width, 3] with `render_mode="rgb_array"`, None with "human"."""
        if self.render_mode is None:
            raise InputError('nothing to render to: make the task with parallel_env(task, render_mode="rgb_array") or "human"')
        return self.environment.render()

    def close(self) -> None:
        self.environment.close()


def parallel_env(task: str, render_mode: str | None = None) -> ParallelEnv:
    """A task by name, such as "reacher-leader-only", behind PettingZoo's Parallel API."""
    return ParallelEnv(find_task(task), render_mode)
