"""Offline datasets in D4RL's HDF5 layout, checked on load, kept on the device and sampled there.

    dataset = load_dataset(task, device="cuda")
    batch = dataset.batch(dataset.sample_rows(256))

The layout (D4RL, Fu et al. 2020) has one row per transition, episode after episode: `observations`,
`actions`, `rewards`, `next_observations`, `terminals` and `timeouts`. Here `observations` are the
environment's global states; `Task.observe` takes the agents' observations from them. D4RL's own ant
files load as they are: of their 111 dimensions the first 27 are the state.
"""

import hashlib
import importlib
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch

from mamujoco_envs import (
    ACTION_LIMIT,
    HISTORY_LENGTH,
    InputError,
    Task,
    append_to_histories,
    require,
)

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"  # the small files that ship
SPLIT_SEED = 12345  # the paper's release splits by one fixed permutation, too
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


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
    """N transitions on one device; every field is a tensor with N rows.

    `states`, `next_states` [N, state] float32; `actions` [N, agent, action] float32, clamped to
    +-ACTION_LIMIT; `rewards` [N] float32; `masks` [N] float32, 0 where the next state is absorbing
    (a time-out is not); `episode_starts` [N] int64, the row at which a row's episode began.
    `first_rows` and `last_rows` [episode] int64. `description` says where the data come from.
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

        Oldest first. Pairs from before the episode's start are zero (Appendix A.1).
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
        rewards = self.rewards[: self.size].cpu().numpy().astype(np.float64)
        return np.add.reduceat(rewards, self.first_rows.cpu().numpy())

    def discounted_returns(self, gamma: float) -> torch.Tensor:
        """Discounted sums of rewards to the end of each row's episode [N].

        After a time-out the mean reward is assumed to go on forever.
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
        """Rows for training (about 90 %) and for validation, split by episode; always the same."""
        episodes = len(self.first_rows)
        order = np.random.default_rng(SPLIT_SEED).permutation(episodes)
        held_out = np.zeros(episodes, dtype=bool)
        held_out[order[: max(1, episodes // 10)]] = True
        lengths = (self.last_rows - self.first_rows + 1).cpu().numpy()
        held_out = torch.as_tensor(np.repeat(held_out, lengths), device=self.device)
        return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def episode_ends(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Whether each row ends an episode [N]: flagged, the last, or not continued by the next.

    A next state unlike the following row's state ends an episode, whether it is flagged or not.
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
    return FOLDER / f"{task.dataset}.hdf5"


def load_dataset(task: Task, path: Path | None = None, device="cpu") -> OfflineDataset:
    """Loads a task's own dataset, recording it first if it is missing, or the file at `path`.

    Raises `InputError`, naming the file and the row, if the file is missing, damaged, not finite or
    made for another task.
    """
    if path is None and task.columns:
        return OfflineDataset(task, task.columns(task), device, "generated")
    if path is None:
        path = dataset_path(task)
        if not path.is_file() and task.recorder:
            importlib.import_module(task.recorder).record(task, path)
    columns, source = read_columns(task, Path(path))
    return OfflineDataset(task, columns, device, source)


def read_columns(task: Task, path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The columns of an HDF5 file in D4RL's layout, checked against the task, and their source."""
    require(path.is_file(), f"no dataset at {path}; leave out --dataset to use {task.name}'s own")
    try:
        with h5py.File(path, locking=False) as file:
            source = str(file.attrs.get("source", path.name))
            columns = {name: read_column(task, path, file, name) for name in COLUMNS}
    except (OSError, RuntimeError, KeyError) as error:  # h5py's errors
        if isinstance(error, PermissionError):
            raise InputError(f"{path} cannot be read ({error.strerror}); change its mode") from None
        advice = "delete it and record or download it again"
        raise DamagedFile(f"{path} is truncated or not HDF5 ({error}); {advice}") from None
    check_columns(task, path, columns)
    return columns, source


def read_column(task: Task, path: Path, file: h5py.File, name: str) -> np.ndarray:
    """One column as float32, or bool for flags."""
    joint_dim = task.num_agents * task.action_dim
    widths = {"observations": (task.state_dim,), "actions": (joint_dim,)}
    widths["next_observations"] = widths["observations"]
    layout = f"{task.name} needs a file in D4RL's layout"
    require(name in file, f"{path} has no '{name}'; {layout}")
    column = file[name]
    numbers = isinstance(column, h5py.Dataset) and column.dtype.kind in "biuf"
    require(numbers, f"'{name}' in {path} holds no numbers; {layout}")
    size = (file["observations"].shape or (0,))[0]
    shape = (size, *widths.get(name, ()))
    # D4RL's ant files have 84 contact forces behind the state, all zero.
    has_contact_forces = column.shape == (size, 111) and shape == (size, 27)
    fits = column.shape == shape or has_contact_forces
    require(fits, f"'{name}' in {path} has shape {column.shape}; {task.name} needs {shape}")

    values = column[()]
    if has_contact_forces:
        rewards = "its rewards have a cost of contact, which Ant-v4's have not"
        require(not values[:, 27:].any(), f"'{name}' in {path} has contact forces, so {rewards}")
        values = values[:, :27].copy()  # lets go of the zeros
    if name in ("terminals", "timeouts"):
        check_rows(
            values, (values == 0) | (values == 1), name, path, "is a flag other than 0 and 1"
        )
        return values.astype(bool)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    check_rows(values, np.isfinite(values), name, path, "is not finite as a 32-bit float")
    return values


def check_rows(values: np.ndarray, good: np.ndarray, name: str, path: Path, fault: str) -> None:
    """Raises `InputError` with the first row of `values` that is not `good`."""
    if not good.all():
        index = tuple(np.argwhere(~good)[0])
        raise InputError(f"row {index[0]} of '{name}' in {path} {fault}: {values[index]}")


def check_columns(task: Task, path: Path, columns: dict[str, np.ndarray]) -> None:
    """Raises `InputError` where actions or episodes cannot be the task's."""
    size, actions = len(columns["observations"]), columns["actions"]
    require(size > 1, f"{path} has {size} transitions; record or download more")
    fault = "is outside [-1, 1]; rescale the actions"
    check_rows(actions, np.abs(actions) <= 1.001, "actions", path, fault)
    last = np.flatnonzero(episode_ends(columns))
    lengths = np.diff(np.concatenate([[-1], last]))
    if lengths.max() > task.episode_length:
        row = int(last[lengths.argmax()])
        limit = f"{task.name}'s have at most {task.episode_length}: flag its 'timeouts'"
        raise InputError(
            f"the episode that ends at row {row} of {path} has {lengths.max()} steps; {limit}"
        )
