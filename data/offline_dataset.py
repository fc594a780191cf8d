"""Offline datasets in D4RL's HDF5 layout, checked on load, kept on the device and sampled there.

    dataset = load_dataset(task, device="cuda")
    batch = dataset.batch(dataset.sample_rows(256), with_histories=True)

The layout (D4RL, Fu et al. 2020) has one row per transition, episode after episode: `observations`,
`actions`, `rewards`, `next_observations`, `terminals` and `timeouts`. Here `observations` are the
environment's global states; `Task.observe` takes the agents' observations from them. D4RL's own
files load as they are: of the ant's 111 dimensions the first 27 are the state. So do files with
other names for these columns (`Task.layout`) and Minari's datasets, "minari:NAME" or a folder.
"""

import copy
import functools
import hashlib
import importlib
from pathlib import Path
from typing import NamedTuple

import filelock
import h5py
import numpy as np
import torch

from mamujoco_envs import (
    ACTION_LIMIT,
    COLUMNS,
    ENVIRONMENTS,
    HISTORY_LENGTH,
    InputError,
    Task,
    all_tasks,
    append_to_histories,
    require,
)

FOLDER = Path(__file__).resolve().parent
SPLIT_SEED = 12345  # the paper's release splits by one fixed permutation, too

# gymnasium's v5 environments whose states and dynamics are those of v4, and how their rewards
# differ: v4's hopper earns 1 for being alive even as it falls.
SAME_IN_V5 = {"HalfCheetah-v5": 0.0, "Hopper-v5": 1.0}
OTHER_IN_V5 = {
    "Ant-v5": "its rewards have a cost of contact",
    "Reacher-v5": "its states lack a dimension, and it rewards the state after the step",
    "Walker2d-v5": "its feet have another friction",
}


class DamagedFile(InputError):
    """The file is truncated or not HDF5, so that only recording or downloading it again helps."""


class Batch(NamedTuple):
    """Transitions with the agents' observations and, where agents have a memory, histories."""

    states: torch.Tensor  # [batch, state]
    observations: torch.Tensor  # [batch, agent, obs]
    histories: torch.Tensor | None  # [batch, agent, 10, pair]
    actions: torch.Tensor  # [batch, agent, action]
    rewards: torch.Tensor  # [batch]
    masks: torch.Tensor  # [batch], 0 if the next state is absorbing
    next_states: torch.Tensor
    next_observations: torch.Tensor
    next_histories: torch.Tensor | None


class OfflineDataset:
    """N transitions on one device, as tensors.

    `states`, `next_states` [N, state] float32; `actions` [N, agent, action] float32, clamped to
    +-ACTION_LIMIT unless they are one-hot; `rewards` [N] float32; `masks` [N] float32, 0 where the
    next state is absorbing (a time-out is not); `episode_starts` [N] int64, the row at which a
    row's episode began. `first_rows` and `last_rows` [episode] int64. `description` says where the
    data come from.
    """

    def __init__(self, task: Task, columns: dict[str, np.ndarray], device="cpu", source: str = ""):
        def tensor(name: str) -> torch.Tensor:
            return torch.as_tensor(columns[name], dtype=torch.float32, device=device)

        self.task, self.device = task, device
        self.states, self.next_states = tensor("observations"), tensor("next_observations")
        self.rewards, self.masks = tensor("rewards"), 1 - tensor("terminals")
        self.actions = task.split_actions(tensor("actions"))
        if not task.discrete:
            self.actions.clamp_(-ACTION_LIMIT, ACTION_LIMIT)
        self.size = len(self.states)

        ends = episode_ends(columns)
        last = np.flatnonzero(ends)
        first = np.concatenate([[0], last[:-1] + 1])
        self.first_rows = torch.as_tensor(first, device=device)
        self.last_rows = torch.as_tensor(last, device=device)
        self.episode_starts = self.first_rows.repeat_interleave(
            self.last_rows - self.first_rows + 1
        )
        self._offsets = torch.arange(-HISTORY_LENGTH, 0, device=device)
        self.description = {
            "name": task.dataset,
            "source": source,
            "transitions": self.size,
            "episodes": len(first),
            "mean_return": float(self.episode_returns().mean()),
            "sha256": fingerprint(columns),
        }

    def sample_rows(self, count: int, first: bool = False) -> torch.Tensor:
        """Random rows [count]; with `first`, the first rows of random episodes."""
        if first:
            return self.first_rows[
                torch.randint(len(self.first_rows), (count,), device=self.device)
            ]
        return torch.randint(self.size, (count,), device=self.device)

    def histories(self, rows: torch.Tensor) -> torch.Tensor:
        """The agents' last ten (action, observation) pairs before `rows` [B]: [B, agent, 10, pair].

        Oldest first (Appendix A.1). Pairs from before the episode's start are zero.
        """
        past = rows[:, None] + self._offsets
        known = past >= self.episode_starts[rows][:, None]
        past = past.clamp(min=0)
        observations = self.task.observe(self.states[past])  # [B, 10, agent, obs]
        pairs = torch.cat([self.actions[past], observations], dim=-1)
        return (pairs * known[..., None, None]).transpose(1, 2)

    def batch(self, rows: torch.Tensor, with_histories: bool) -> Batch:
        """The transitions at `rows` [B], with the histories before and after them if asked for."""
        states, actions, next_states = self.states[rows], self.actions[rows], self.next_states[rows]
        observations = self.task.observe(states)
        histories = next_histories = None
        if with_histories:
            histories = self.histories(rows)
            next_histories = append_to_histories(histories, observations, actions)
        return Batch(
            states,
            observations,
            histories,
            actions,
            self.rewards[rows],
            self.masks[rows],
            next_states,
            self.task.observe(next_states),
            next_histories,
        )

    def episode_returns(self) -> np.ndarray:
        """The return of each episode [episode]."""
        # Fine-tuning appends rows that belong to no episode of the data.
        rewards = self.rewards[: self.size].cpu().numpy().astype(np.float64)
        return np.add.reduceat(rewards, self.first_rows.cpu().numpy())

    def discounted_returns(self, gamma: float) -> torch.Tensor:
        """Discounted sums of rewards to the end of each row's episode [N].

        After a time-out, the mean reward is assumed to continue forever.
        """
        rewards, masks = self.rewards.tolist(), self.masks.tolist()
        after_time_out = float(self.rewards.mean()) / (1 - gamma)
        last_rows = set(self.last_rows.tolist())
        returns, following = [0.0] * self.size, 0.0
        for row in reversed(range(self.size)):
            following = after_time_out if row in last_rows else following
            following = rewards[row] + gamma * masks[row] * following
            returns[row] = following
        return torch.tensor(returns, device=self.device)

    @functools.cached_property
    def at_heading_zero(self) -> "OfflineDataset":
        """The same dataset, or if the task has a symmetry a copy with each transition turned to
        heading 0, where world models are queried. (Rows then no longer continue each other.)"""
        symmetry = self.task.symmetry
        if symmetry is None:
            return self
        turned, heading = copy.copy(self), symmetry.heading(self.states)
        transitions = self.states, self.next_states, self.rewards
        transitions = symmetry.turn_transition(-heading, *transitions)
        turned.states, turned.next_states, turned.rewards = transitions
        return turned

    @functools.cached_property
    def from_random_sides(self) -> "OfflineDataset":
        """`at_heading_zero` or, if the task's body has symmetries, a copy of it in which half of
        the transitions are seen from random sides, the same ones on every device."""
        symmetry, upright = self.task.symmetry, self.at_heading_zero
        if symmetry is None or not symmetry.body_symmetries:
            return upright
        moved, joint_actions = copy.copy(upright), self.task.join_actions(upright.actions)
        transitions = upright.states, joint_actions, upright.next_states, upright.rewards
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        sides = symmetry.random_sides(self.rewards.shape, generator=generator).to(self.device)
        transitions = symmetry.seen_from(sides, *transitions)
        moved.states, joint_actions, moved.next_states, moved.rewards = transitions
        moved.actions = self.task.split_actions(joint_actions)
        return moved

    def bounding_box(self) -> dict[str, torch.Tensor]:
        """Smallest and largest value of each state dimension and of the reward (Section 3.1)."""
        states = torch.cat([self.states, self.next_states])
        return {
            "state_min": states.amin(0),
            "state_max": states.amax(0),
            "reward_min": self.rewards.min(),
            "reward_max": self.rewards.max(),
        }

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for training (about 90 %) and held-out rows, split by episode; always the same."""
        episodes = len(self.first_rows)
        advice = "record more, or flag 'timeouts'"
        require(episodes > 1, f"the dataset has one episode, and some must be held out; {advice}")
        order = np.random.default_rng(SPLIT_SEED).permutation(episodes)
        held_out = np.zeros(episodes, dtype=bool)
        held_out[order[: max(1, episodes // 10)]] = True
        lengths = (self.last_rows - self.first_rows + 1).cpu().numpy()
        held_out = torch.as_tensor(np.repeat(held_out, lengths), device=self.device)
        training_rows, held_out_rows = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        message = "the dataset has a single transition to learn from; record more"
        require(len(training_rows) > 1, message)
        return training_rows, held_out_rows


def episode_ends(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Whether each row ends an episode [N]: it is flagged, the last, or not continued by the next.

    A next state that differs from the following row's state ends an episode, flagged or not.
    """
    ends = columns["terminals"].astype(bool) | columns["timeouts"].astype(bool)
    following, claimed = columns["observations"][1:], columns["next_observations"][:-1]
    ends[:-1] |= ~np.isclose(following, claimed, rtol=1e-4, atol=1e-4).all(axis=1)
    ends[-1] = True  # D4RL's files may stop in the middle of an episode
    return ends


def fingerprint(columns: dict[str, np.ndarray]) -> str:
    """SHA-256 of the columns' contents, by which a run notices that its data have changed."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest()


def dataset_path(task: Task) -> Path:
    """The task's own file: in this folder, or beside the file that defines the task."""
    return task.own_dataset or FOLDER / f"{task.dataset}.hdf5"


def record_once(task: Task, path: Path) -> None:
    """Records the task's dataset; if several runs need it, one records and the others wait."""
    try:
        recorder = importlib.import_module(task.recorder)
    except ModuleNotFoundError as error:
        raise InputError(f"the recorder of {task.name} cannot be imported ({error})") from None
    message = f"the recorder of {task.name}, {task.recorder}, has no function 'record'"
    require(hasattr(recorder, "record"), message)
    lock = filelock.FileLock(f"{path}.lock", timeout=20)
    while not lock.is_locked:
        try:
            lock.acquire()
        except filelock.Timeout:
            print(f"waiting for {path}, which another run records", flush=True)
        except OSError as error:
            raise InputError(f"cannot write to {path.parent} ({error}); change its mode") from None
    try:
        if not path.is_file():
            recorder.record(task, path)
    finally:
        lock.release()


def load_dataset(task: Task, path: Path | None = None, device="cpu") -> OfflineDataset:
    """Loads a task's own dataset, recording it first if it is missing, or the one at `path`.

    `path` is an HDF5 file, the folder of a Minari dataset or "minari:NAME". Raises `InputError`,
    which names the file and, where it can, the row, if data are missing, damaged, not finite or
    made for another task.
    """
    if path is None and task.columns:
        return OfflineDataset(task, task.columns(task), device, "generated")
    if path is None:
        path = dataset_path(task)
        if not path.is_file() and task.recorder:
            record_once(task, path)
    path = Path(path)
    is_minari = str(path).startswith("minari:") or (path / "data").is_dir()
    columns, source = (read_minari if is_minari else read_columns)(task, path)
    return OfflineDataset(task, columns, device, source)


def read_columns(task: Task, path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The columns of an HDF5 file in D4RL's layout, checked against the task, and their source."""
    if not path.is_file():
        raise InputError(f"no dataset at {path}; {advice_on_missing(task, path)}")
    try:
        with h5py.File(path, locking=False) as file:
            source = as_text(file.attrs.get("source", path.name))
            recorded = as_text(file.attrs.get("environment", ""))
            alive_bonus = check_environment(task, path, recorded)
            columns = {name: read_column(task, path, file, name) for name in COLUMNS}
    except (OSError, RuntimeError, KeyError) as error:  # h5py's errors
        if isinstance(error, PermissionError):
            raise InputError(f"{path} cannot be read ({error.strerror}); change its mode") from None
        message = f"{path} cannot be read as HDF5 ({error})"
        if "plugin" in str(error):  # which hdf5plugin brings for Blosc, Zstd and others
            raise InputError(f"{message}; install what decompresses it") from None
        advice = "if it is truncated, record or download it again"
        raise DamagedFile(f"{message}; {advice}") from None
    columns["rewards"] += alive_bonus * columns["terminals"]
    check_columns(task, path, columns)
    return columns, source


def as_text(attribute) -> str:
    """An attribute of an HDF5 file, which programs other than h5py may store as bytes."""
    return attribute.decode(errors="replace") if isinstance(attribute, bytes) else str(attribute)


def advice_on_missing(task: Task, path: Path) -> str:
    """What to do where there is no dataset at `path`."""
    if not task.file:
        return f"leave out --dataset to use {task.name}'s own"
    shipped = {known.dataset: known.recorder for known in all_tasks().values()}
    if shipped.get(task.dataset) and path == dataset_path(task):
        return f'recorder="{shipped[task.dataset]}" in the task records it'
    return "give one with --dataset, or name it in the task, with its suffix"


def read_column(task: Task, path: Path, file: h5py.File, name: str) -> np.ndarray:
    """One column as float32, or bool for flags."""
    joint_dim = task.num_agents * task.action_dim
    widths = {"observations": (task.state_dim,), "actions": (joint_dim,)}
    widths["next_observations"] = widths["observations"]
    first_shape = find_parts(task, path, file, "observations")[0].shape
    size = first_shape[0] if first_shape else 0  # a single number has no rows
    shape = (size, *widths.get(name, ()))
    is_own = task.layout or task.file
    if name == "timeouts" and is_own and name not in (*file, *(task.layout or ())):
        return np.zeros(size, dtype=bool)  # discontinuities end episodes, too
    parts = find_parts(task, path, file, name)
    if name == "actions":
        check_options(task, path, size, sum(int(np.prod(part.shape[1:])) for part in parts))
    if task.layout and name in task.layout:
        return as_column(join_parts(task, path, parts, shape), name, path)
    (column,) = parts
    # D4RL's ant files have 84 contact forces after the state, all zero.
    has_contact_forces = column.shape == (size, 111) and shape == (size, 27)
    fits = column.shape == shape or has_contact_forces
    advice = ""
    if is_own and column.size == np.prod(shape):
        advice = "; name it in the task's layout, and it is flattened"
    elif task.file and not task.environment and name == "observations":
        advice = "; if agents see only a part of the state, set the task's state_dim"
    message = f"'{name}' in {path} has shape {column.shape}; {task.name} needs {shape}{advice}"
    require(fits, message)

    values = column[()]
    if has_contact_forces:
        rewards = "its rewards have a cost of contact, which Ant-v4's have not"
        require(not values[:, 27:].any(), f"'{name}' in {path} has contact forces, so {rewards}")
        values = values[:, :27].copy()  # frees the zeros
    return as_column(values, name, path)


def find_parts(task: Task, path: Path, file: h5py.File, name: str) -> list[h5py.Dataset]:
    """The arrays of a file that make up one of D4RL's columns, named as in the task's layout."""
    names = (task.layout or {}).get(name, name)
    kind = "its own" if task.layout else "D4RL's"
    layout = f"{task.name} needs a file in {kind} layout"
    parts = []
    for own_name in (names,) if isinstance(names, str) else names:
        advice = ""
        if name == "next_observations":
            advice = ": the following row's observation, and at an episode's end its own last state"
        require(own_name in file, f"{path} has no '{own_name}'{advice}; {layout}")
        part = file[own_name]
        numbers = isinstance(part, h5py.Dataset) and part.dtype.kind in "biuf"
        require(numbers, f"'{own_name}' in {path} holds no numbers; {layout}")
        parts.append(part)
    return parts


def join_parts(task: Task, path: Path, parts: list[h5py.Dataset], shape: tuple) -> np.ndarray:
    """The parts of a column side by side, agent by agent, in the shape that the task needs."""
    widths = [int(np.prod(part.shape[1:])) for part in parts]
    same_rows = all(part.shape[:1] == shape[:1] for part in parts)
    found = ", ".join(f"'{part.name.strip('/')}' {part.shape}" for part in parts)
    fits = same_rows and sum(widths) == int(np.prod(shape[1:]))
    require(fits, f"{path} has {found}; side by side, {task.name} needs {shape}")
    values = [part[()].reshape(len(part), width) for part, width in zip(parts, widths)]
    return np.concatenate(values, axis=1).reshape(shape)


def check_options(task: Task, path: Path, size: int, width: int) -> None:
    """Raises `InputError` if actions [size, width] are numbers of options, not one-hot vectors."""
    needed = f"({size}, {task.num_agents * task.action_dim})"
    message = f"'actions' in {path} has one number per agent; {task.name} needs one-hot vectors"
    message += f", such as np.eye({task.action_dim})[actions].reshape{needed}"
    require(not task.discrete or width != task.num_agents, message)


def as_column(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Values as float32, or bool for flags; raises `InputError` with the first bad row."""
    if name in ("terminals", "timeouts"):
        is_flag = (values == 0) | (values == 1)
        check_rows(values, is_flag, name, path, "is a flag other than 0 and 1")
        return values.astype(bool)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    fault, advice = "is not finite in 32 bits", "leave its episode out"
    check_rows(values, np.isfinite(values), name, path, fault, advice)
    return values


def read_minari(task: Task, path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The columns of a Minari dataset, "minari:NAME" or a folder, and where they come from.

    Minari is not a requirement of this repository, so it is imported only here.
    """
    try:
        import minari
    except ImportError:
        message = f"{path} is a Minari dataset; install Minari to read it"
        raise InputError(f'{message}: pip install "minari[hdf5,hf]"') from None
    name = str(path).removeprefix("minari:")
    try:
        if name == str(path):
            found = minari.MinariDataset(path / "data")
        else:
            found = minari.load_dataset(name, download=True)
        environment = found.spec.env_spec.id if found.spec.env_spec else ""
        episodes = list(found.iterate_episodes())
    except Exception as error:  # of Minari, of its storage, or of the network
        reason = " ".join(str(error).split())
        raise InputError(f"Minari cannot load {name} ({type(error).__name__}: {reason})") from None
    alive_bonus = check_environment(task, path, environment)
    return columns_of_episodes(task, path, episodes, alive_bonus), f"Minari's {found.id}"


def columns_of_episodes(task: Task, path: Path, episodes: list, alive_bonus) -> dict:
    """D4RL's columns from Minari's episodes, which have one more state than actions."""
    values = [value for x in episodes for value in (x.observations, x.actions)]
    arrays = values and all(isinstance(value, np.ndarray) for value in values)
    message = f"{path} has no episodes whose observations and actions are arrays"
    require(arrays, f"{message}; {task.name} needs them")
    parts = [
        (
            x.observations[:-1],
            x.actions,
            x.rewards,
            x.observations[1:],
            x.terminations,
            x.truncations,
        )
        for x in episodes
    ]
    columns = dict(zip(COLUMNS, map(np.concatenate, zip(*parts))))
    size, joint_dim = len(columns["actions"]), task.num_agents * task.action_dim
    check_options(task, path, size, int(np.prod(columns["actions"].shape[1:])))
    widths = {"observations": task.state_dim, "next_observations": task.state_dim}
    for name, width in (widths | {"actions": joint_dim}).items():
        shape, needed = columns[name].shape, (len(columns[name]), width)
        message = f"'{name}' in {path} has shape {shape}; {task.name} needs {needed}"
        require(shape == needed, message)
    columns = {name: as_column(column, name, path) for name, column in columns.items()}
    columns["rewards"] += alive_bonus * columns["terminals"]
    columns["timeouts"] &= ~columns["terminals"]
    check_columns(task, path, columns)
    return columns


def check_environment(task: Task, path: Path, recorded: str) -> np.float32:
    """Raises `InputError` if the environment that data were recorded in does not suit the task.

    Returns what v4 adds to the reward of a terminal step, which these data lack.
    """
    known = task.environment_name
    if recorded in ("", known):
        return np.float32(0)
    if known not in ENVIRONMENTS:  # such as Hopper-v5, whose v4 pays another reward for a fall
        differs = known in OTHER_IN_V5 or SAME_IN_V5.get(known, 0) != 0
        other = differs and recorded.replace("-v4", "-v5") == known
        require(not other, f"{path} was recorded in {recorded}, not in {known}, which differs")
        return np.float32(0)
    same_body = recorded.removesuffix("-v5") == known.removesuffix("-v4")
    why = f": {OTHER_IN_V5[recorded]}" if same_body and recorded in OTHER_IN_V5 else ""
    same = same_body and recorded in SAME_IN_V5
    require(same, f"{path} was recorded in {recorded}, not in {known}{why}")
    return np.float32(SAME_IN_V5[recorded])


def check_rows(values, good, name: str, path: Path, fault: str, advice: str = "") -> None:
    """Raises `InputError` with the first row of `values` that is not `good`."""
    if not good.all():
        index = tuple(np.argwhere(~good)[0])
        message = f"row {index[0]} of '{name}' in {path} {fault}: {values[index]}"
        raise InputError(f"{message}; {advice}" if advice else message)


def check_columns(task: Task, path: Path, columns: dict[str, np.ndarray]) -> None:
    """Raises `InputError` where actions or episodes cannot be the task's."""
    size, actions = len(columns["observations"]), columns["actions"]
    require(size > 1, f"{path} has fewer than two transitions; record or download more")
    if not task.discrete:
        within = np.abs(actions) <= 1.001
        check_rows(actions, within, "actions", path, "is outside [-1, 1]", "rescale the actions")
    else:
        options = task.split_actions(torch.as_tensor(actions)).numpy()
        one_hot = (options.max(-1) == 1) & (np.abs(options).sum(-1) == 1)
        fault = "has an agent whose action is not one-hot"
        check_rows(actions, one_hot.all(-1), "actions", path, fault)
    last = np.flatnonzero(episode_ends(columns))
    lengths = np.diff(np.concatenate([[-1], last]))
    if lengths.max() > task.episode_length:
        row = int(last[lengths.argmax()])
        message = f"the episode that ends at row {row} of {path} has {lengths.max()} steps"
        limit = f"{task.name}'s have at most {task.episode_length}"
        advice = "flag every episode's end in 'timeouts'"
        if task.file:
            advice += ", or raise the task's episode_length"
        raise InputError(f"{message}; {limit}: {advice}")
