"""Multi-agent MuJoCo tasks (Section 5.3): one arm or one body, with one agent per joint or limb.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198). In two-agent Reacher, agent 0 ("red", the
leader) drives the shoulder and agent 1 ("blue") the elbow. In four-agent Ant, agent 0 ("yellow")
drives the front left leg, and agents 1 to 3 drive the front right, back left and back right legs.

HalfCheetah, Hopper and Walker2d are split as in Multi-Agent MuJoCo (Peng et al., arXiv 2003.06709).

- `Task`: what each agent observes and drives, and how returns are normalised.
- `MujocoEnvironment`: a gymnasium environment as functions of arrays; a new one takes ten lines.
- `Simulator`: many copies of an environment, stepped in parallel on all cores.
- `evaluate`: plays greedy episodes. `plot_team_strategy`: what a Reacher team agreed on.
  `plot_ant_paths`: where an Ant team walks, seen from above.
- `parallel_env`: the same tasks behind PettingZoo's Parallel API, for other projects:

    env = mamujoco_envs.parallel_env("reacher-leader-only")
    observations, infos = env.reset(seed=1)
"""

import difflib
import importlib
import importlib.util
import operator
import os
import shlex
import sys
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.reacher_v4 import ReacherEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import SyncVectorEnv

NAMED_DEFAULTS = ("", "Ant-v4", "Reacher-v4", "coordination")  # for Task.defaults
HISTORY_LENGTH = 10  # past (action, observation) pairs that an agent remembers (Appendix A.1)
ACTION_LIMIT = 1 - 1e-5  # actions in histories and datasets are clamped to +-ACTION_LIMIT
EVALUATION_SEED = 10102  # episode i of an evaluation starts from seed EVALUATION_SEED + i


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that says what to do."""


def require(condition, message: str) -> None:
    """Raises `InputError` with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def command_line(script: str, *words) -> str:
    """What to type to run a script of this repository; paths may have spaces."""
    return shlex.join(["python", script, *map(str, words)])


# Tasks.

INDEX_TENSORS: dict[tuple, torch.Tensor] = {}


def index_tensor(indices: tuple, device) -> torch.Tensor:
    """int64 tensor of nested tuples, cached per device: copying from the host would stall a GPU.

    The cache is a dictionary: torch.compile ignores functools.cache, and would copy at every call.
    """
    if (indices, device) not in INDEX_TENSORS:
        INDEX_TENSORS[indices, device] = torch.tensor(indices, device=device)
    return INDEX_TENSORS[indices, device]


@cache  # unlike `index_tensor`, it is never called within torch.compile
def orders_and_signs(matrices: tuple, device):
    """Of signed permutations: which entry each reads, and its sign [permutation, entry]."""
    matrices = torch.stack(matrices).to(device)
    return matrices.abs().argmax(dim=-1), matrices.sum(dim=-1)


def permuted(values, matrices: tuple, number):
    """`values` [..., entry], each moved by the signed permutation of its `number` [...]."""
    order, signs = orders_and_signs(matrices, values.device)
    return values.gather(-1, order[number]) * signs[number]


class Symmetry(NamedTuple):
    """What leaves the dynamics of a task unchanged, though not its reward: turning the world and,
    for some bodies, seeing them from another side."""

    heading: Callable
    """`heading(states)`: angles [...] of states [..., state]"""
    turn: Callable
    """`turn(states, angles)`: the states, turned by these angles"""
    speed: Callable
    """`speed(states)`: the speed along x [...], which the reward pays for"""
    body_symmetries: tuple = ()
    """pairs of signed permutations S [state, state] and A [action, action] of state s and joint
    action a, such that step(S s, A a) = S step(s, a). S leaves heading 0 at 0, and the first pair
    changes nothing."""

    def move_transition(self, move: Callable, states, next_states, rewards):
        """The same transition with `move` applied to its states; its reward changes by the
        difference in speed along x.

        That speed is taken as the mean of those before and after the step, whereas the environment
        divides distance by time.
        """
        speeds = self.speed(states) + self.speed(next_states)
        states, next_states = move(states), move(next_states)
        moved_speeds = self.speed(states) + self.speed(next_states)
        return states, next_states, rewards + (moved_speeds - speeds) / 2

    def turn_transition(self, angles, states, next_states, rewards):
        """The same transition, turned by these angles."""
        transition = states, next_states, rewards
        return self.move_transition(lambda states: self.turn(states, angles), *transition)

    def random_sides(self, shape, device="cpu", generator=None):
        """Numbers of the body's symmetries: half are drawn at random, half are 0, for no change."""
        sides = torch.randint(len(self.body_symmetries), shape, device=device, generator=generator)
        return sides * (torch.rand(shape, device=device, generator=generator) < 0.5)

    def seen_from(self, sides, states, joint_actions, next_states, rewards):
        """Transitions [...] at heading 0, each moved by the body's symmetry of its number."""
        state_matrices, action_matrices = zip(*self.body_symmetries)

        def move(states):
            return permuted(states, state_matrices, sides)

        states, next_states, rewards = self.move_transition(move, states, next_states, rewards)
        return states, permuted(joint_actions, action_matrices, sides), next_states, rewards

    def at_heading_zero(self, step: Callable, states, *inputs):
        """Evaluates `step(states, *inputs)` at heading 0 and turns its result back.

        The result is a NamedTuple with `next_states` and `rewards`.
        """
        heading = self.heading(states)
        states = self.turn(states, -heading)
        answer = step(states, *inputs)
        transition = states, answer.next_states, answer.rewards
        _, next_states, rewards = self.turn_transition(heading, *transition)
        return answer._replace(next_states=next_states, rewards=rewards)


# The columns of a dataset in D4RL's layout.
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


@dataclass(frozen=True)
class Task:
    """One environment, one dataset, and what each agent observes and drives.

    A task of your own needs the first four fields; docs/your_own_task.md has examples.
    """

    environment: "str | type[MujocoEnvironment]"
    """a class such as `HalfCheetah`, a gymnasium id, or "" if there are only logged data"""
    observed: tuple[tuple[int, ...], ...]
    """[agent][obs]: the dimensions of the global state that each agent observes, in order"""
    driven: tuple[tuple[int, ...], ...]
    """[agent][action]: the dimensions of the environment's action that each agent sets, in order"""
    episode_length: int
    """steps after which an episode is cut (a time-out, not a terminal state)"""
    name: str = ""
    """by default the name of the variable in the file that defines the task"""
    dataset: str = ""
    """name of the offline dataset, or a file next to the one that defines the task; by default the
    task's name. Tasks with the same dataset share its world model"""
    state_dim: int = 0
    """width of the global state; by default the environment's, or else what agents observe of it"""
    random_return: float = 0.0
    expert_return: float = 1.0
    """returns with normalised scores of 0 and 1 (Table 2); by default the score is the return"""
    entropy_target: float | None = None
    """joint entropy below which PPO pays a bonus (Appendix A.1); by default minus the number of
    actions, as in SAC (arXiv 1812.05905)"""
    simulator: type | None = None
    """a class called with (task, num_envs): copies of the environment, with the methods of
    `Simulator`; by default the best one available for the environment"""
    recorder: str = ""
    """module whose `record(task, path)` makes the dataset when it is missing"""
    plot: Callable | None = None
    """`plot(evaluation, path)` draws what a team agreed on"""
    symmetry: Symmetry | None = None
    """of the dynamics: world models see states at heading 0 alone, and learn from all sides of the
    body"""
    model_errors: Callable | None = None
    """`model_errors(predict, states)`: task-specific diagnostics of a world model"""
    layout: dict[str, str | tuple[str, ...]] | None = None
    """the file's own names for D4RL's columns (COLUMNS); where a column has several, they are
    concatenated, such as the agents' observations into the state"""
    columns: Callable | None = None
    """`columns(task)`: the dataset itself, where it is generated in memory"""
    discrete: bool = False
    """whether actions are one-hot vectors (Section 5.2)"""
    locomotion: bool = False
    """whether returns measure distance run; IQL scales such rewards (arXiv 2110.06169)"""
    defaults: str = ""
    """Ant-v4 (long episodes) or Reacher-v4 (short ones), whose defaults the scripts use where they
    have none for this environment"""
    file: str = ""
    """FILE:NAME of a task of your own, as --task names it; set by `find_task`"""

    def __post_init__(self):
        for field in ("observed", "driven"):  # ranges and lists will do, too
            message = f"'{field}' needs dimensions for each agent, such as ((0, 1), (2,))"
            try:
                groups = tuple(tuple(map(operator.index, group)) for group in getattr(self, field))
            except TypeError:
                raise InputError(message) from None
            object.__setattr__(self, field, groups)
        message = f"defaults of {self.name or 'the task'} are '{self.defaults}'"
        require(self.defaults in NAMED_DEFAULTS, f"{message}; take Ant-v4 or Reacher-v4")
        known = self.environment
        is_class = isinstance(known, type) and issubclass(known, MujocoEnvironment)
        message = "environment must be a gymnasium id (gymnasium.register gives one to a class of"
        message += ' gymnasium), a subclass of MujocoEnvironment, or "" for none'
        require(isinstance(known, str) or is_class, message)
        check_split(self)
        check_reference(self)
        check_layout(self)
        widest = 1 + max(index for seen in self.observed for index in seen)
        entropy_target = self.entropy_target
        if entropy_target is None:
            entropy_target = -float(sum(map(len, self.driven)))
        derived = {
            "state_dim": self.state_dim or state_width(self.environment) or widest,
            "dataset": str(self.dataset or self.name),  # a Path would be in every checkpoint
            "entropy_target": entropy_target,
        }
        for field, value in derived.items():
            object.__setattr__(self, field, value)
        message = f"an agent of {self.name or 'the task'} observes dimension {widest - 1}"
        known = f"the state has dimensions 0 to {self.state_dim - 1}"
        require(widest <= self.state_dim, f"{message}; {known}")
        check_symmetry(self)

    @property
    def environment_name(self) -> str:
        """gymnasium's id, or the name of a class of your own."""
        known = self.environment
        ids = {environment: name for name, environment in ENVIRONMENTS.items()}
        return known if isinstance(known, str) else ids.get(known, known.__name__)

    @property
    def environment_class(self) -> "type[MujocoEnvironment] | None":
        """The environment as functions of arrays, where there is a class of it."""
        known = self.environment
        return ENVIRONMENTS.get(known) if isinstance(known, str) else known

    @property
    def simulator_class(self) -> type:
        """The class of the simulator: the task's own, or the best one for its environment."""
        return self.simulator or choose_simulator(self.environment)

    def make_simulator(self, num_envs: int):
        """Copies of the environment, with the methods of `Simulator`."""
        return self.simulator_class(self, num_envs)

    @property
    def has_environment(self) -> bool:
        """Whether a team can be evaluated in anything but its world model."""
        return self.simulator_class is not WorldModelSimulator

    @property
    def continues_from_states(self) -> bool:
        """Whether the simulator can start from any state of a dataset."""
        return hasattr(self.simulator_class, "set_states")

    @property
    def option(self) -> str:
        """What the command line calls the task."""
        return self.file or self.name

    @property
    def own_dataset(self) -> Path | None:
        """The dataset next to the task's file, or Minari's, if the task names one."""
        if not self.file:
            return None
        if self.dataset.startswith("minari:"):
            return Path(self.dataset)
        path = Path(self.file).parent / self.dataset
        return path if path.suffix or (path / "data").is_dir() else None

    @property
    def world_model_path(self) -> Path:
        """The shipped world model or, for a dataset of your own, the file next to it (for Minari's:
        next to the task's file) with its name and the suffix .pt."""
        if self.dataset.startswith("minari:") and self.file:
            return Path(self.file).parent / f"{self.own_dataset.name}.pt"
        if self.own_dataset:
            return self.own_dataset.with_suffix(".pt")
        return Path(__file__).resolve().parent / "data" / "weights" / f"{self.dataset}.pt"

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
    def split(self) -> dict:
        """Who observes and drives what, which reveals files made for other agents."""
        return {"observed": self.observed, "driven": self.driven}

    @property
    def scale(self) -> tuple[float, float, int]:
        """What turns returns into scores, and how long episodes are."""
        return float(self.random_return), float(self.expert_return), int(self.episode_length)

    @property
    def partially_observable(self) -> bool:
        """Whether some agent does not see the whole state."""
        return any(len(set(indices)) < self.state_dim for indices in self.observed)

    def observe(self, states: torch.Tensor) -> torch.Tensor:
        """Agents' observations, stacked and zero-padded: [..., state] -> [..., agent, obs]."""
        # Padding indexes an extra dimension after the state's last one, which is zero.
        width = max(self.obs_dims)
        padded = tuple(seen + (self.state_dim,) * (width - len(seen)) for seen in self.observed)
        return F.pad(states, (0, 1))[..., index_tensor(padded, states.device)]

    def split_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """The environment's actions to the agents': [..., joint] -> [..., agent, action]."""
        return actions[..., index_tensor(self.driven, actions.device)]

    def join_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """The agents' actions to the environment's: [..., agent, action] -> [..., joint]."""
        # Without NumPy, which would break the graph that torch.compile captures.
        driven = sum(self.driven, ())
        order = tuple(driven.index(i) for i in range(len(driven)))
        return actions.flatten(-2)[..., index_tensor(order, actions.device)]

    def normalized_score(self, returns):
        """0 is the random team's return, 1 the experts' mean (Table 2); numbers or arrays."""
        return (returns - self.random_return) / (self.expert_return - self.random_return)

    def paper_score(self, algorithm: str) -> str | None:
        """Mean ± standard error over the paper's seeds, None where it reports none."""
        if self.file:  # a task of your own, whatever its name
            return None
        return PAPER_SCORES.get(algorithm, {}).get(self.name.removesuffix("-other-legs"))


def check_split(task: Task) -> None:
    """Raises `InputError` unless each action is driven once, and equally many by each agent."""
    name = task.name or "the task"
    agents, others = len(task.observed), len(task.driven)
    require(agents and others, f"{name} needs agents in 'observed' and 'driven'")
    message = f"{name} has {agents} agents in 'observed', but {others} in 'driven'"
    require(agents == others, message)
    message = f"every agent of {name} must observe and drive at least one dimension"
    require(all(task.observed) and all(task.driven), message)
    message = f"agents of {name} drive different numbers of actions; split an agent that drives"
    message += " more into several that observe the same"
    require(len({len(driven) for driven in task.driven}) == 1, message)
    message = f"agents of {name} choose among options, so each drives as many actions as it has"
    options = len(task.driven[0]) > 1 or not task.discrete
    require(options, f"{message} options, such as blocks(3, 3)")
    actions = sorted(index for driven in task.driven for index in driven)
    message = f"agents of {name} must drive each action once, 0 to {len(actions) - 1}"
    require(actions == list(range(len(actions))), f"{message}; not {actions}")
    lowest = min(index for seen in task.observed for index in seen)
    require(lowest >= 0, f"agents of {name} observe dimensions from 0 on; not {lowest}")
    length = task.episode_length
    message = f"episode_length of {name} must be a whole number above 0; not {length}"
    require(isinstance(length, (int, np.integer)) and length > 0, message)


def check_reference(task: Task) -> None:
    """Raises `InputError` unless `random_return` is below `expert_return`, and both are finite."""
    low, high = task.random_return, task.expert_return
    message = f"'random_return' of {task.name or 'the task'} must be below 'expert_return'"
    require(low < high and np.isfinite(high - low), f"{message}; they are {low} and {high}")


def check_symmetry(task: Task) -> None:
    """Raises `InputError` unless the body's symmetries fit, and the first one changes nothing."""
    symmetries = task.symmetry.body_symmetries if task.symmetry else ()
    eyes = torch.eye(task.state_dim), torch.eye(sum(map(len, task.driven)))
    name = f"body_symmetries of {task.name or 'the task'}"
    shapes = " and ".join(str(list(eye.shape)) for eye in eyes)
    message = f"each of {name} must be two signed permutations, {shapes}, of state and joint action"
    for pair in symmetries:
        fits = len(pair) == 2 and all(
            matrix.shape == eye.shape and torch.equal(matrix.abs() @ matrix.abs().T, eye)
            for matrix, eye in zip(pair, eyes)
        )
        require(fits, message)
    message = f"the first of {name} must be two identity matrices"
    require(not symmetries or all(map(torch.equal, symmetries[0], eyes)), message)


def check_layout(task: Task) -> None:
    """Raises `InputError` unless the layout maps D4RL's columns to a name or several."""
    name, layout = task.name or "the task", task.layout or {}
    require(isinstance(layout, dict), f"layout of {name} must be a dict from D4RL's columns")
    unknown = ", ".join(column for column in layout if column not in COLUMNS)
    message = f"layout of {name} has {unknown}; D4RL's columns are {', '.join(COLUMNS)}"
    require(not unknown, message)
    empty = ", ".join(column for column, names in layout.items() if not names)
    require(not empty, f"layout of {name} has no name for {empty}")
    for column, names in layout.items():
        names = (names,) if isinstance(names, str) else names
        named = isinstance(names, (tuple, list)) and all(isinstance(x, str) for x in names)
        require(named, f"layout of {name} must name {column} by a string, or several in a tuple")


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
# Actuators are not in the order of the joints: the back right leg's come first. With "own legs"
# each agent drives the leg that it observes; with "other legs" (the release), its neighbour's.
ANT_OWN_LEGS = ((2, 3), (4, 5), (6, 7), (0, 1))
ANT_OTHER_LEGS = ((0, 1), (2, 3), (4, 5), (6, 7))
ANT_STEP_SECONDS = 0.05
# From above, in the order of the state: where the legs point, and the axes of their ankles.
ANT_LEGS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
ANT_ANKLES = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])


def ant_heading(states):
    """The angle by which the torso is turned about the vertical axis [...], from -2 pi to 2 pi.

    It is the twist of the orientation q = (w, x, y, z) about that axis, so that turning back makes
    z = 0 and w positive: q and -q are one orientation, but two states.
    """
    return 2 * torch.atan2(states[..., 4], states[..., 1])


def turn_ant(states, angles):
    """Orientation and velocity of the torso, turned about the vertical axis. Joints stay, and so
    does the angular velocity, which MuJoCo gives in the torso's own frame."""
    w, x, y, z = states[..., 1:5].unbind(-1)
    speed_x, speed_y = states[..., 13], states[..., 14]
    cos, sin = (angles / 2).cos(), (angles / 2).sin()
    turned = states.clone()
    turned[..., 1] = cos * w - sin * z
    turned[..., 2] = cos * x - sin * y
    turned[..., 3] = cos * y + sin * x
    turned[..., 4] = cos * z + sin * w
    turned[..., 13] = angles.cos() * speed_x - angles.sin() * speed_y
    turned[..., 14] = angles.sin() * speed_x + angles.cos() * speed_y
    return turned


def ant_body_symmetry(side):
    """Matrices [27, 27] and [8, 8] for the state and joint action of an ant at heading 0.

    The whole world is turned or mirrored by `side` [2, 2], an orthogonal matrix that puts each leg
    in the place of another. Then each leg is given the name of the one whose place it has taken.
    """
    one, handedness = torch.ones(1, 1), side.det().round().view(1, 1)  # -1 for a mirror
    velocity = side, one
    rotation = handedness * side, handedness  # in a mirror, rotations go the other way round

    # Legs that point the same way have a product of 2, the squared length of their vectors.
    moves_to = (ANT_LEGS @ side @ ANT_LEGS.T == 2).float()  # [new leg, old leg]
    # All hips turn about the vertical axis, each ankle about its own, which may point backwards.
    same_sense = handedness * (ANT_ANKLES @ side @ ANT_ANKLES.T) / 2  # 1 or -1 where legs match
    joints = torch.zeros(8, 8)
    joints[0::2, 0::2], joints[1::2, 1::2] = handedness * moves_to, same_sense * moves_to

    # Height, orientation (w, x, y, z) and joints, then their velocities.
    state = torch.block_diag(one, one, *rotation, joints, *velocity, *rotation, joints)
    return state, joints.roll((2, 2), (0, 1))  # the last leg has the first actuators


def square_symmetries():
    """The eight rotations and reflections [2, 2] of a square, the identity first."""
    quarter, mirror = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.diag(torch.tensor([1.0, -1.0]))
    turns = [torch.linalg.matrix_power(quarter, quarters) for quarters in range(4)]
    return turns + [turn @ mirror for turn in turns]


ANT_SYMMETRY = Symmetry(
    heading=ant_heading,
    turn=turn_ant,
    speed=lambda states: states[..., 13],
    body_symmetries=tuple(map(ant_body_symmetry, square_symmetries())),
)


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
        recorder="data.collect_reacher",
        plot=plot_team_strategy,
        model_errors=retargeting_error,
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
        recorder="data.collect_mujoco",
        locomotion=True,
        symmetry=ANT_SYMMETRY,
        plot=plot_ant_paths,
    )


def blocks(*widths: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive indices, one block per agent: blocks(2, 1) is ((0, 1), (2,)).

    For example what agents observe, if the state is the concatenation of their observations.
    """
    ends = np.cumsum(widths).tolist()
    return tuple(tuple(range(end - width, end)) for end, width in zip(ends, widths))


class Body(NamedTuple):
    """A planar body of Multi-Agent MuJoCo. Its actuators are in the order of its joints.

    The state: height, pitch and joint angles, then the velocities of x, height, pitch and joints.
    """

    environment: str
    joints: int
    splits: tuple[str, ...]
    """agents x joints per agent, which are neighbours"""
    random_return: float
    expert_return: float
    """D4RL's reference returns, for scores of 0 and 100"""


BODIES = {
    "halfcheetah": Body("HalfCheetah-v4", 6, ("2x3", "6x1"), -280.178953, 12135.0),
    "hopper": Body("Hopper-v4", 3, ("3x1",), -20.272305, 3234.3),
    "walker2d": Body("Walker2d-v4", 6, ("2x3",), 1.629008, 4592.3),
}
BEHAVIORS = ("random", "medium", "full-replay", "expert")


def planar_task(body: str, split: str, behavior: str, view: str) -> Task:
    """A body, one of its splits, a dataset, and "fo" or "po" (agents see only their own joints)."""
    environment, joints, _, random_return, expert_return = BODIES[body]
    agents, share = map(int, split.split("x"))
    driven = blocks(*[share] * agents)
    state_dim = 5 + 2 * joints
    own_joints = tuple(
        (*(2 + joint for joint in own), *(5 + joints + joint for joint in own)) for own in driven
    )
    return Task(
        name=f"{body}-{split}-{behavior}-{view}",
        environment=environment,
        dataset=f"{body}-{behavior}",
        observed=own_joints if view == "po" else (tuple(range(state_dim)),) * agents,
        driven=driven,
        state_dim=state_dim,
        episode_length=1000,
        random_return=random_return,
        expert_return=expert_return,
        recorder="data.collect_mujoco",
        locomotion=True,
        defaults="Ant-v4",
    )


@cache
def all_tasks() -> dict[str, Task]:
    """Every task of this repository by its name."""
    import coordination_game  # here, because it imports this module

    tasks = [reacher_task(view) for view in REACHER_OBSERVED]
    for behavior in BEHAVIORS:
        tasks += [ant_task(behavior, view) for view in ("fo", "po", "po-other-legs")]
    for name, body in BODIES.items():
        for split in body.splits:
            for behavior in BEHAVIORS:
                tasks += [planar_task(name, split, behavior, view) for view in ("fo", "po")]
    return {task.name: task for task in [*tasks, *coordination_game.tasks()]}


def find_task(name: str) -> Task:
    """The task of that name, or the one called NAME in a file of your own, "path/file.py:NAME".

    Raises `InputError` with the nearest names if there is none.
    """
    require(isinstance(name, str), "a task is given by its name, or FILE.py:NAME of your own")
    if ".py:" in name:
        return own_task(*name.rsplit(":", 1))
    is_own = name.endswith(".py") or ":" in name
    require(not is_own, f"'{name}' is no task; one of your own is FILE.py:NAME")
    tasks = all_tasks()
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.3) or list(tasks)[:3]
        message = f"unknown task '{name}'; did you mean {', '.join(near)}?"
        raise InputError(f"{message} One of your own is FILE.py:NAME")
    return tasks[name]


OWN_TASKS: dict[tuple, dict[str, Task]] = {}


def own_task(file: str, name: str) -> Task:
    """The `Task` that the variable `name` of a Python file holds.

    The file is run once, and again when it has changed, as it may while a notebook runs.
    """
    path = Path(file).resolve()
    message = f"no file {path} of the task {name}; give --task with the path of the file"
    require(path.is_file(), message)
    key = path, path.read_bytes()
    if key not in OWN_TASKS:
        OWN_TASKS[key] = tasks_of(path)
    tasks = OWN_TASKS[key]
    known = ", ".join(tasks) or "none"
    require(name in tasks, f"{file} holds no Task called {name}; it has {known}")
    return tasks[name]


def tasks_of(path: Path) -> dict[str, Task]:
    """Runs a Python file; returns the tasks that its variables hold, by their names."""
    spec = importlib.util.spec_from_file_location(f"own_task_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their own module here
    sys.path.append(str(path.parent))  # so that the file can import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f" in line {lines[-1]}" if lines else ""
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        raise InputError(f"{path} fails{place}: {reason}") from None
    return {
        name: replace(task, name=task.name or name, file=f"{path}:{name}")
        for name, task in vars(module).items()
        if isinstance(task, Task)
    }


# Simulators.


class Moment(NamedTuple):
    """A snapshot of B copies of an environment."""

    states: np.ndarray  # [B, state]
    qpos: np.ndarray  # [B, nq]
    qvel: np.ndarray  # [B, nv]
    xpos: np.ndarray  # [B, body, 3], positions of all bodies


class MujocoEnvironment:
    """A gymnasium MuJoCo environment as functions of arrays, for `Simulator`.

    A subclass names gymnasium's class and defines `reset`, `reward` and, where episodes can end
    early, `terminal`. The rest suits environments whose state is qpos, without the positions in the
    plane, followed by qvel. `largest_difference` compares the result with gymnasium.
    """

    gymnasium: type
    """gymnasium's class of the environment"""
    hidden_positions = 1
    """positions at the beginning of qpos that a state leaves out: x, or x and y"""
    velocity_limit = np.inf
    """velocities in states are clipped at this value"""
    camera = None
    """the model's camera for films"""

    def __init__(self):
        env = build(self.gymnasium)
        self.model, self.init_qpos, self.init_qvel = env.model, env.init_qpos, env.init_qvel
        self.frame_skip, self.dt = env.frame_skip, env.dt
        unit = (self.model.actuator_ctrlrange == (-1, 1)).all()
        advice = "name its gymnasium id instead, with its actions in RescaleAction"
        require(unit, f"actuators of {type(self).__name__} must take [-1, 1]; {advice}")

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """qpos [nq] and qvel [nv] of a new episode, drawn as gymnasium draws them."""
        raise NotImplementedError

    def reward(self, before: Moment, actions: np.ndarray, after: Moment) -> np.ndarray:
        """[B], given the environment's actions [B, joint] within [-1, 1]."""
        raise NotImplementedError

    def terminal(self, after: Moment):
        """[B] bool: never, unless a subclass says otherwise."""
        return np.zeros(len(after.states), dtype=bool)

    def state(self, qpos: np.ndarray, qvel: np.ndarray, xpos: np.ndarray) -> np.ndarray:
        """Global states [B, state] of qpos [B, nq], qvel [B, nv], body positions [B, body, 3]."""
        velocities = np.clip(qvel, -self.velocity_limit, self.velocity_limit)
        return np.hstack([qpos[:, self.hidden_positions :], velocities])

    def restore(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """qpos [B, nq], at the origin of the plane, and qvel [B, nv] of global states."""
        origin = np.zeros((len(states), self.hidden_positions))
        split = self.model.nq - self.hidden_positions
        return np.hstack([origin, states[:, :split]]), states[:, split:]


class Reacher(MujocoEnvironment):
    """`Reacher-v4`.

    The fingertip's position is MuJoCo's own `xpos`: after a step, it is that of the integrator's
    last stage and lags up to 5 mm behind the joints, so it cannot be computed from them.
    """

    gymnasium = ReacherEnv

    def __init__(self):
        super().__init__()
        self.fingertip = self.model.body("fingertip").id
        self.target = self.model.body("target").id

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, size=4)
        target = rng.uniform(-0.2, 0.2, size=2)
        while np.linalg.norm(target) >= 0.2:
            target = rng.uniform(-0.2, 0.2, size=2)
        qpos[2:] = target
        qvel = self.init_qvel + rng.uniform(-0.005, 0.005, size=4)
        qvel[2:] = 0
        return qpos, qvel

    def reward(self, before: Moment, actions: np.ndarray, after: Moment) -> np.ndarray:
        """[B]; Reacher-v4 rewards the state before the step."""
        return -np.linalg.norm(before.states[:, 8:], axis=1) - np.square(actions).sum(1)

    def state(self, qpos: np.ndarray, qvel: np.ndarray, xpos: np.ndarray) -> np.ndarray:
        angles = qpos[:, :2]
        offset = xpos[:, self.fingertip] - xpos[:, self.target]
        return np.hstack([np.cos(angles), np.sin(angles), qpos[:, 2:], qvel[:, :2], offset])

    def restore(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """qpos and qvel [B, 4] of global states [B, 11], exact for angles within +-pi.

        The elbow's limit of 3 rad is soft: constant full torque can push it beyond pi, which a
        state cannot tell from beyond -pi.
        """
        angles = np.arctan2(states[:, 2:4], states[:, 0:2])
        qpos = np.hstack([angles, states[:, 4:6]])
        return qpos, np.hstack([states[:, 6:8], np.zeros_like(angles)])


class Ant(MujocoEnvironment):
    """`Ant-v4`, whose reward is the progress of the torso's `xpos`, not of qpos."""

    gymnasium = AntEnv
    hidden_positions = 2
    camera = "track"  # follows the ant, which runs out of sight of any other

    def __init__(self):
        super().__init__()
        self.torso = self.model.body("torso").id

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, size=15)
        return qpos, self.init_qvel + 0.1 * rng.standard_normal(14)

    def reward(self, before: Moment, actions: np.ndarray, after: Moment) -> np.ndarray:
        """[B]: speed along x, plus 1 for being alive, minus the control cost (no contact cost)."""
        speed = (after.xpos[:, self.torso, 0] - before.xpos[:, self.torso, 0]) / self.dt
        return speed + 1 - 0.5 * np.square(actions).sum(1)

    def terminal(self, after: Moment):
        """[B]: the torso is too low or too high, or the state is not finite."""
        states, height = after.states, after.states[:, 0]
        return ~((abs(states) < np.inf).all(1) & (height >= 0.2) & (height <= 1.0))


class HalfCheetah(MujocoEnvironment):
    """`HalfCheetah-v4`. Its episodes end by time-out only."""

    gymnasium = HalfCheetahEnv
    camera = "track"

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, size=9)
        return qpos, self.init_qvel + 0.1 * rng.standard_normal(9)

    def reward(self, before: Moment, actions: np.ndarray, after: Moment) -> np.ndarray:
        """[B]: speed along x, minus the control cost."""
        speed = (after.qpos[:, 0] - before.qpos[:, 0]) / self.dt
        return speed - 0.1 * np.square(actions).sum(1)


class Hopper(MujocoEnvironment):
    """`Hopper-v4`."""

    gymnasium = HopperEnv
    velocity_limit = 10
    camera = "track"

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = self.init_qpos + rng.uniform(-0.005, 0.005, size=self.model.nq)
        return qpos, self.init_qvel + rng.uniform(-0.005, 0.005, size=self.model.nv)

    def reward(self, before: Moment, actions: np.ndarray, after: Moment) -> np.ndarray:
        """[B]: speed along x, plus 1 for being alive, minus the control cost."""
        speed = (after.qpos[:, 0] - before.qpos[:, 0]) / self.dt
        return speed + 1 - 0.001 * np.square(actions).sum(1)

    def terminal(self, after: Moment):
        """[B]: the torso is too low or tilted, or a value reaches 100."""
        height, pitch = after.states[:, 0], after.states[:, 1]
        moderate = (abs(after.states[:, 1:5]) < 100).all(1) & (abs(after.qvel) < 100).all(1)
        return ~(moderate & (height > 0.7) & (abs(pitch) < 0.2))


class Walker2d(Hopper):
    """`Walker2d-v4`, which starts and is rewarded like the hopper."""

    gymnasium = Walker2dEnv

    def terminal(self, after: Moment):
        """[B]: the torso is too low, too high or tilted."""
        height, pitch = after.states[:, 0], after.states[:, 1]
        return ~((height > 0.8) & (height < 2) & (abs(pitch) < 1))


ENVIRONMENTS = {
    "Reacher-v4": Reacher,
    "Ant-v4": Ant,
    "HalfCheetah-v4": HalfCheetah,
    "Hopper-v4": Hopper,
    "Walker2d-v4": Walker2d,
}


def available_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Simulator:
    """Copies of a task's environment, stepped together on all cores.

    After `reset`, it matches gymnasium's environment bit for bit at every step. It works on global
    states, so it can continue from any row of a dataset (`set_states`); the positions of bodies are
    computed anew there, which shifts the ant's first reward by 0.003 on average (0.13 at most, in
    1,200 steps). Time-outs are left to the caller: it does not count steps.

    Each copy has its own `MjData`, because `mj_step` runs without Python's lock, and keeps views of
    its arrays, because looking up an attribute of `MjData` costs half as much as a step of Reacher.
    (`mujoco.rollout` returns neither body positions, which Reacher's reward needs, nor the solver's
    warm start, without which the ant drifts away from gymnasium's.)
    """

    def __init__(self, task: Task, num_envs: int):
        self.task, self.environment = task, task.environment_class()
        self.data = [mujoco.MjData(self.environment.model) for _ in range(num_envs)]
        self.qpos, self.qvel = [data.qpos for data in self.data], [data.qvel for data in self.data]
        self.xpos, self.ctrl = [data.xpos for data in self.data], [data.ctrl for data in self.data]
        self.states = np.zeros((num_envs, task.state_dim))
        self.threads = min(num_envs, available_cores())
        self.pool = ThreadPoolExecutor(self.threads)
        self._read()
        check_widths(task, self.states.shape[1], self.environment.model.nu)

    def reset(self, generators: list, where: np.ndarray | None = None) -> np.ndarray:
        """Starts an episode from each numpy generator, which advances; returns states [B, state].

        `np.random.default_rng(seed)` gives the episode that `gymnasium.make(...).reset(seed=seed)`
        starts. With `where` [B], only these copies start episodes.
        """
        copies = range(len(self.data)) if where is None else np.flatnonzero(where)
        message = f"{len(copies)} copies start an episode, so as many generators are needed"
        require(len(generators) == len(copies), f"{message}, not {len(generators)}")
        message = f"'reset' of {self.task.environment_name} must return qpos and qvel"
        for i, rng in zip(copies, generators):
            start = self.environment.reset(rng)
            require(isinstance(start, tuple) and len(start) == 2, message)
            self._place([i], *[[x] for x in start])
        self._read()
        return self.states

    def set_states(self, states: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """Continues from global states [B, state]; with `where` [B], only these copies do."""
        index = np.arange(len(self.data)) if where is None else np.flatnonzero(where)
        self._place(index, *self.environment.restore(np.asarray(states, dtype=np.float64)[index]))
        now = self.states.copy()
        now[index] = states[index]
        self._read()
        # Kept as given: read back, Reacher's fingertip and clipped velocities would differ.
        self.states, self.moment = now, self.moment._replace(states=now)
        return now

    def step(self, actions: np.ndarray, where: np.ndarray | None = None):
        """One step of all copies; with `where` [B], only these copies step.

        Takes the agents' actions [B, agent, action], clipped to [-1, 1]; returns states [B, state],
        rewards [B] and terminals [B] (bool).
        """
        joint = np.empty((len(self.data), self.environment.model.nu))
        clipped = np.clip(actions, -1, 1).reshape(len(self.data), -1)
        joint[:, np.concatenate(self.task.driven)] = clipped
        active = range(len(self.data)) if where is None else np.flatnonzero(where)
        chunks = [active[first :: self.threads] for first in range(self.threads)]
        list(self.pool.map(lambda chunk: self._step_chunk(chunk, joint), chunks))
        before = self.moment
        self._read()
        rewards = np.asarray(self.environment.reward(before, joint, self.moment))
        terminals = np.asarray(self.environment.terminal(self.moment), dtype=bool)
        one_each = joint.shape[:1]  # [copy]
        for method, values in {"reward": rewards, "terminal": terminals}.items():
            message = f"'{method}' of {self.task.environment_name} must be one number per copy"
            require(values.shape == one_each, f"{message}, {one_each}; it is {values.shape}")
        return self.states, rewards, terminals

    def step_from(self, states: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
        """`step` on tensors, from `states` [B, state]; copies in another state are moved first."""
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
        places = np.stack(self.qpos), np.stack(self.qvel), np.stack(self.xpos)
        self.states = self.environment.state(*places)
        self.moment = Moment(self.states, *places)


def check_widths(task: Task, state_dim: int, actuators: int) -> None:
    """Raises `InputError` unless a task has as many states and actions as its environment."""
    name, environment = task.name or "the task", task.environment_name
    message = f"states of {name} have {task.state_dim} dimensions"
    require(task.state_dim == state_dim, f"{message}; those of {environment} have {state_dim}")
    driven = task.num_agents * task.action_dim
    message = f"agents of {name} drive {driven} actions; {environment} has {actuators}"
    require(driven == actuators, message)


class GymnasiumSimulator:
    """Copies of any gymnasium environment, through gymnasium's own vector API.

    Episodes can be played, but not continued from given states: `Simulator` can do both.
    """

    def __init__(self, task: Task, num_envs: int):
        self.task = task
        self.copies = SyncVectorEnv([lambda: make_environment(task)] * num_envs)
        weakref.finalize(self, self.copies.close)  # they may hold files or processes

    def reset(self, generators: list) -> np.ndarray:
        """States [B, state] of the episodes that the generators' seeds start in gymnasium.

        Generators do not advance; the same ones start the same episodes again.
        """
        # The seeds that `np.random.default_rng` was given.
        seeds = [rng.bit_generator.seed_seq.entropy for rng in generators]
        whole = all(isinstance(seed, (int, np.integer)) for seed in seeds)
        require(whole, "gymnasium needs generators made by default_rng(SEED) from a whole number")
        states, _ = self.copies.reset(seed=[int(seed) for seed in seeds])
        return states.astype(np.float64)

    def step(self, actions: np.ndarray, where: np.ndarray | None = None):
        """One step of all copies, whatever `where` says: those whose episode has ended begin anew.

        Takes the agents' actions [B, agent, action], clipped to [-1, 1]; returns states [B, state],
        rewards [B] and ends [B] (bool), whether by a terminal or by the environment's own time-out.
        """
        joint = np.empty(self.copies.action_space.shape, self.copies.action_space.dtype)
        joint[:, np.concatenate(self.task.driven)] = np.clip(actions, -1, 1).reshape(len(joint), -1)
        states, rewards, terminals, truncations, _ = self.copies.step(joint)
        return states.astype(np.float64), rewards, terminals | truncations


def build(environment: type, **options):
    """A gymnasium environment, without MuJoCo's warning about half_cheetah.xml at every load.

    The handler is installed only meanwhile: called from a thread of `Simulator`, it can wait
    forever.
    """
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        return environment(**options)
    finally:
        mujoco.set_mju_user_warning(None)


class GameEnvironment(gymnasium.Env):
    """One copy of a coordination game behind gymnasium's API."""

    def __init__(self, task: Task):
        self.task, self.simulator = task, task.make_simulator(1)
        self.observation_space = Box(-np.inf, np.inf, (task.state_dim,), np.float64)
        self.action_space = Box(-1.0, 1.0, (task.num_agents * task.action_dim,), np.float64)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.simulator.reset([self.np_random])[0], {}

    def step(self, action):
        actions = self.task.split_actions(torch.as_tensor(action[None])).numpy()
        states, rewards, terminals = self.simulator.step(actions)
        return states[0], rewards[0], terminals[0], False, {}


def make_by_id(name: str, advice: str = "", **options):
    """gymnasium's environment of that id; raises `InputError` if it cannot be made."""
    try:
        return gymnasium.make(name, **options)
    except Exception as error:  # each environment fails in its own way
        reason = " ".join(str(error).split())
        raise InputError(f"gymnasium cannot make '{name}' ({reason}){advice}") from None


def make_environment(task: Task, render_mode: str | None = None):
    """gymnasium's environment of a task; raises `InputError` if it does not fit the task."""
    if task.columns:
        require(not render_mode, f"{task.name} has no pictures; leave out render_mode")
        return GameEnvironment(task)
    if task.environment_class:
        camera = task.environment_class.camera
        options = {"camera_name": camera} if camera else {}
        env = build(task.environment_class.gymnasium, render_mode=render_mode, **options)
        check_widths(task, env.observation_space.shape[0], env.model.nu)
        return env
    name, length = task.environment, task.episode_length
    pictures = {"render_mode": render_mode} if render_mode else {}
    films = "; films need a class that takes render_mode" if pictures else ""
    env = make_by_id(name, films, max_episode_steps=length, disable_env_checker=True, **pictures)
    states, actions = env.observation_space, env.action_space
    actuators = task.num_agents * task.action_dim
    for space, width, kind in ((states, task.state_dim, "states"), (actions, actuators, "actions")):
        fits = isinstance(space, Box) and space.shape == (width,)
        require(fits, f"{task.name} needs {kind} of shape ({width},); those of {name} are {space}")
    advice = "wrap it in gymnasium.wrappers.RescaleAction(env, -1, 1)"
    unit = (actions.low == -1).all() and (actions.high == 1).all()
    require(unit, f"actions of {name} must be within [-1, 1]; {advice}")
    return env


class WorldModelSimulator:
    """Copies of a task's world model, for logged data without an environment.

    Episodes start from first states of the data. Scores say only what the model promises.
    """

    def __init__(self, task: Task, num_envs: int):
        path = task.world_model_path
        command = command_line("world_model.py", "--task", task.option, "--output", path)
        message = f"{task.name} has no environment, and no world model to evaluate in at {path}"
        require(path.is_file(), f"{message}; copy one there, or make it with: {command}")
        # Imported here, because moma_ppo.py imports this module.
        self.model = importlib.import_module("moma_ppo").open_world_model(task, path, "cpu")
        message = f"{path} was exported without first states"
        message += f"; move it away and make it again with: {command}"
        require("first_states" in self.model.model, message)
        self.evaluated_in = f"the world model {path.name} alone"
        self.states = torch.zeros(num_envs, task.state_dim)
        self.generator = torch.Generator()

    def reset(self, generators: list) -> np.ndarray:
        """States [B, state]: a first state of the data for each numpy generator."""
        first_states = self.model.model["first_states"]
        rows = [int(rng.integers(len(first_states))) for rng in generators]
        self.states = first_states[rows]
        self.generator.manual_seed(int(generators[0].integers(2**31)))
        return self.states.double().numpy()

    def step(self, actions: np.ndarray, where: np.ndarray | None = None):
        """Agents' actions [B, agent, action] -> states [B, state], rewards [B], terminals [B]."""
        actions = torch.as_tensor(actions, dtype=torch.float32)
        step = self.model.step(self.states, actions, self.generator)
        self.states = step.next_states
        return self.states.double().numpy(), step.rewards.double().numpy(), step.masks.numpy() == 0


def choose_simulator(environment: "str | type[MujocoEnvironment]") -> type:
    """The class that simulates an environment, as `Task.environment` names it."""
    if not environment:
        return WorldModelSimulator
    has_class = not isinstance(environment, str) or environment in ENVIRONMENTS
    return Simulator if has_class else GymnasiumSimulator


def state_width(environment: "str | type[MujocoEnvironment]") -> int:
    """Dimensions of an environment's global state, 0 if there is no environment."""
    if not environment:
        return 0
    known = ENVIRONMENTS.get(environment) if isinstance(environment, str) else environment
    if known:
        env = known()
        places = env.init_qpos[None], env.init_qvel[None], np.zeros((1, env.model.nbody, 3))
        return env.state(*places).shape[1]
    env = make_by_id(environment)
    space = env.observation_space
    env.close()
    flat = isinstance(space, Box) and len(space.shape) == 1
    advice = "wrap it in gymnasium.wrappers.FlattenObservation"
    require(flat, f"states of {environment} must be a flat Box, not {space}; {advice}")
    return space.shape[0]


def largest_difference(task: Task, steps: int = 1000) -> dict[str, float]:
    """Largest difference of states and rewards between a task's `Simulator` and gymnasium.

    Both get the same random actions; when an episode ends, a new one starts. The simulator has a
    second copy with other actions, to catch a `reward` that mixes up copies.
    """
    require(task.environment_class, f"{task.name} has no class to compare with gymnasium")
    env, simulator, rng = make_environment(task), Simulator(task, 2), np.random.default_rng(0)
    seed, ended, found = 0, True, []
    for _ in range(steps):
        if ended:
            state, _ = env.reset(seed=seed)
            states = simulator.reset([np.random.default_rng(seed), np.random.default_rng(seed + 1)])
            found.append((abs(states[0] - state).max(), 0, 0))
            seed += 1
        actions = rng.uniform(-1, 1, (2, task.num_agents, task.action_dim))
        joint = task.join_actions(torch.as_tensor(actions))[0].numpy()
        state, reward, terminated, truncated, _ = env.step(joint)
        ended = terminated or truncated
        states, rewards, terminals = simulator.step(actions)
        difference = abs(states[0] - state).max(), abs(rewards[0] - reward), terminals[0] != ended
        found.append(difference)
    # Unlike Python's max, NumPy's keeps nan.
    return dict(zip(("states", "rewards", "terminals"), np.max(found, axis=0).tolist()))


# Evaluation.


def append_to_histories(histories, observations, actions) -> torch.Tensor:
    """Shifts histories [B, agent, 10, pair] left by one and appends this step's pair.

    The action comes first in a pair, so that the padding of narrow observations is last. It is
    clamped, even where it is one-hot.
    """
    pair = torch.cat([actions.clamp(-ACTION_LIMIT, ACTION_LIMIT), observations], dim=-1)
    return torch.cat([histories[:, :, 1:], pair.unsqueeze(2)], dim=2)


class Evaluation(NamedTuple):
    """Episodes that a team played in the true environment, or in what `evaluated_in` names."""

    task: Task
    returns: np.ndarray  # [episode]
    lengths: np.ndarray  # [episode]
    first_states: np.ndarray  # [episode, state]
    last_states: np.ndarray  # [episode, state]
    transitions: dict[str, np.ndarray]  # states, actions, ... of all steps, [N, ...]
    extra: dict = {}  # figures of a script's own
    evaluated_in: str = ""  # what replaced the true environment, if anything

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
            **({"evaluated_in": self.evaluated_in} if self.evaluated_in else {}),
            **self.extra,
        }


@torch.no_grad()
def evaluate(task: Task, act: Callable, episodes: int, seed=EVALUATION_SEED, device="cpu"):
    """Runs a team in the true environment, all episodes at once; episode i starts from seed + i.

    `act` maps observations [B, agent, obs] and histories [B, agent, 10, pair] to actions
    [B, agent, action] in [-1, 1]. Returns an `Evaluation`.
    """
    simulator = task.make_simulator(episodes)
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
    names = ("states", "actions", "rewards", "next_states", "ends")
    columns = dict(zip(names, map(np.concatenate, zip(*transitions))))
    where = getattr(simulator, "evaluated_in", "")
    states = first_states, last_states
    return Evaluation(task, returns, lengths, *states, columns, evaluated_in=where)


# How accurate a world model (a `WorldModel` of moma_ppo.py) is on the states a team visits.


@torch.no_grad()
def model_returns(model, task: Task, act: Callable, states: torch.Tensor):
    """Returns of the greedy team in the world model, from these first states [B, state]; if they
    exceed the true ones, the team exploits the model."""
    generator = torch.Generator(states.device).manual_seed(0)
    histories = states.new_zeros(len(states), *task.history_shape)
    returns, alive = states.new_zeros(len(states)), states.new_ones(len(states))
    for _ in range(task.episode_length):
        observations = task.observe(states)
        actions = act(observations, histories)
        histories = append_to_histories(histories, observations, actions)
        step = model.step(states, actions, generator)
        returns, alive = returns + alive * step.rewards, alive * step.masks
        states = step.next_states
    return returns


@torch.no_grad()
def errors_on(model, transitions):
    """One-step errors of the world model on the team's own true transitions, its uncertainty there,
    and the share of them that end outside the data's bounding box."""
    rows = np.linspace(0, len(transitions["rewards"]) - 1, 10_000).astype(int)
    low, high = model.model["state_min"], model.model["state_max"]
    names = ("states", "actions", "rewards", "next_states")
    states, actions, rewards, next_states = (
        torch.as_tensor(transitions[name][rows], device=low.device) for name in names
    )
    symmetry = model.task.symmetry
    if symmetry:  # the model is queried at heading 0
        transition = -symmetry.heading(states), states, next_states, rewards
        states, next_states, rewards = symmetry.turn_transition(*transition)
    means, _ = model.predict(states, actions)
    outside = ((next_states < low) | (next_states > high)).any(dim=-1)
    return {
        "model_state_error": (means[..., :-1] - next_states).norm(dim=-1).mean().item(),
        "model_reward_error": (means[..., -1] - rewards).abs().mean().item(),
        "epsilon_g": model.step(states, actions).epsilon_g.mean().item(),
        "outside_box": outside.float().mean().item(),
    }


def with_model_errors(evaluation: Evaluation, model, act: Callable) -> Evaluation:
    """The evaluation, with what the world model predicts for the same team added."""
    first_states = torch.as_tensor(evaluation.first_states).to(model.model["state_min"])
    returns = model_returns(model, evaluation.task, act, first_states)
    extra = {"model_return": returns.mean().item()}
    return evaluation._replace(extra=extra | errors_on(model, evaluation.transitions))


@torch.no_grad()
def retargeting_error(predict: Callable, states: torch.Tensor) -> dict[str, float]:
    """Reacher: error of the mean reward for arms of the data with another row's target.

    `states` are in random order; `predict(states, joint_actions)` returns rewards [member, batch]
    last. Experts are almost never still and off target, so "still means on target" fits the data,
    and a team learns to stop short.
    """
    other, states = states.roll(1, dims=0), states.clone()
    states[:, 8:10] += states[:, 4:6] - other[:, 4:6]
    states[:, 4:6] = other[:, 4:6]
    rewards = predict(states, states.new_zeros(len(states), 2)).rewards
    error = (rewards.mean(0) + states[:, 8:10].norm(dim=1)).abs().mean().item()
    return {"retargeting_error": error}


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


def plot_ant_paths(evaluation: Evaluation, path: Path) -> None:
    """Saves what an Ant team does, seen from above: its paths, and where it heads.

    The state has no position, so a path is the sum of the torso's velocities.
    """
    from matplotlib.figure import Figure

    states, count = evaluation.transitions["states"], len(evaluation.lengths)
    # Transitions are sorted by time, then by episode; finished episodes are left out.
    alive = evaluation.lengths > np.arange(evaluation.lengths.max())[:, None]  # [time, episode]
    velocities = np.zeros((*alive.shape, 2))
    velocities[alive] = states[:, 13:15]
    positions = np.cumsum(velocities * ANT_STEP_SECONDS, axis=0)
    fell = np.zeros(alive.shape, dtype=bool)
    fell[alive] = evaluation.transitions["ends"] > 0
    ends, falls = positions[-1], fell.any(axis=0)
    w, x, y, z = states[:, 1:5].T
    headings = np.degrees(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2)))

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for episode, length in enumerate(evaluation.lengths):
        left.plot(*positions[:length, episode].T, color="C0", linewidth=0.7, alpha=0.5)
    left.plot(*ends[~falls].T, "o", color="C0", markersize=3, label="after the last step")
    left.plot(*ends[falls].T, "x", color="C3", markersize=5, label="where it fell")
    left.plot(0, 0, "k+", markersize=10, label="start")
    left.set(xlabel="x (m), which is rewarded", ylabel="y (m)")
    left.set_aspect("equal", adjustable="datalim")
    left.set_title(f"{falls.mean():.0%} of episodes end in a fall")
    left.legend(fontsize=8)
    right.hist(headings, bins=72, range=(-180, 180), color="C0")
    right.set(xlabel="heading of the torso (°)", ylabel="states visited", xlim=(-180, 180))
    speed = states[:, 13].mean()
    right.set_title(f"mean speed along x {speed:.1f} m/s")
    score = evaluation.record()["score"]
    figure.suptitle(f"{evaluation.task.name}: score {score:.2f} over {count} episodes")
    figure.savefig(path, dpi=120)


# PettingZoo's Parallel API.


class ParallelEnv:
    """One task behind PettingZoo's Parallel API, without depending on PettingZoo."""

    def __init__(self, task: Task, render_mode: str | None = None):
        self.task, self.render_mode = task, render_mode
        self.environment = make_environment(task, render_mode)
        self.metadata = {
            "name": task.name,
            "render_modes": self.environment.metadata.get("render_modes", []),
            "render_fps": self.environment.metadata.get("render_fps", 30),
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
            agent: Discrete(task.action_dim)
            if task.discrete
            else Box(-1.0, 1.0, (task.action_dim,), np.float32)
            for agent in self.possible_agents
        }
        self.current_state, self.steps = np.zeros(task.state_dim), 0

    def observation_space(self, agent: str) -> Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Box | Discrete:
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

        All agents share one reward. Actions outside [-1, 1] are clipped. A discrete action is a
        number, or one-hot, as a team's `act_greedily` returns it.
        """
        if not self.agents:
            return {}, {}, {}, {}, {}
        joint = np.zeros(self.environment.action_space.shape)
        for agent, driven in zip(self.possible_agents, self.task.driven):
            action = actions[agent]
            if self.task.discrete and np.ndim(action) == 0:
                options = self.task.action_dim
                message = f"{agent} chooses {action}; its options are 0 to {options - 1}"
                require(0 <= action < options, message)
                action = np.eye(options)[action]
            joint[list(driven)] = np.clip(action, -1, 1)
        self.current_state, reward, terminated, cut, _ = self.environment.step(joint)
        self.steps += 1
        truncated = bool(cut) or self.steps >= self.task.episode_length
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


def parallel_env(task: str | Task, render_mode: str | None = None) -> ParallelEnv:
    """A task, or one by name such as "reacher-leader-only", behind PettingZoo's Parallel API."""
    task = find_task(task) if isinstance(task, str) else task
    require(task.environment, f"{task.name} has no gymnasium environment to play in")
    return ParallelEnv(task, render_mode)


# The paper's scores (Tables 3 to 5): mean ± standard error over seeds.
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
    "moma_ppo-ground-truth": {
        "ant-random-fo": "1.17 ± 0.03",
        "ant-medium-fo": "1.68 ± 0.03",
        "ant-full-replay-fo": "1.66 ± 0.03",
        "ant-expert-fo": "1.71 ± 0.04",
        "ant-random-po": "0.47 ± 0.01",
        "ant-medium-po": "0.81 ± 0.20",
        "ant-full-replay-po": "0.84 ± 0.07",
        "ant-expert-po": "0.43 ± 0.06",
    },
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
        "ant-full-replay-po": "0.21 ± 0.02",
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
        "ant-full-replay-po": "0.20 ± 0.01",
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
    # Not in the paper; report.py looks them up.
    "inspo": {},
    "logo": {},
}
