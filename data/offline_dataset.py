"""Offline datasets in D4RL's HDF5 layout, checked on load, kept on the device, sampled there with the agents' histories.

    dataset = load_dataset(task, device="cuda")
    indices = torch.randint(dataset.size, (256,), device="cuda")
    states, actions = dataset.states[indices], dataset.actions[indices]
    histories = dataset.histories(indices)

The layout (D4RL, Fu et al. 2020): `observations`, `actions`, `rewards`, `next_observations`, `terminals`, `timeouts`, one
row a transition, episode after episode. Here `observations` are the environment's global states. D4RL's own files of the ant
(`python -m data.download_d4rl --name medium`) load as they are; of their 111 dimensions the first 27 are the state.
"""

from pathlib import Path

import h5py
import numpy as np
import torch

from mamujoco_envs import ACTION_LIMIT, HISTORY_LENGTH, InputError, Task

FOLDER = Path(__file__).parent
SPLIT_SEED = 12345  # the paper's release splits 90/10 by one fixed permutation of transitions


class OfflineDataset:
    """N transitions on one device; every field is a tensor with N rows.

    `states`, `next_states` [N, state] float32; `actions` [N, agent, action] float32, clamped to +-ACTION_LIMIT; `rewards`
    [N] float32; `masks` [N] float32, 0 where the next state is absorbing (a time-out is not); `episode_starts` [N] int64,
    the row at which a row's episode began. `description` is for results: where the dataset comes from, its size, its mean return.
    """

    def __init__(self, task: Task, columns: dict[str, np.ndarray], device="cpu", source: str = ""):
        def tensor(name: str) -> torch.Tensor:
            return torch.as_tensor(columns[name], dtype=torch.float32, device=device)

        self.task, self.device = task, device
        self.states, self.next_states, self.rewards = tensor("observations"), tensor("next_observations"), tensor("rewards")
        self.actions = task.split_actions(tensor("actions"))
        if not task.discrete:
            self.actions.clamp_(-ACTION_LIMIT, ACTION_LIMIT)
        self.masks = 1 - tensor("terminals")
        self.size = len(self.states)
        ends = columns["terminals"].astype(bool) | columns["timeouts"].astype(bool)
        ends[-1] = True  # D4RL's files may stop in the middle of an episode
        self.episode_ends = np.flatnonzero(ends)
        starts = np.concatenate([[0], self.episode_ends[:-1] + 1])
        lengths = np.diff(np.append(starts, self.size))
        self.episode_starts = torch.as_tensor(np.repeat(starts, lengths), device=device)
        mean_return = float(self.episode_returns().mean())
        self.description = {"name": task.dataset, "source": source, "transitions": self.size, "mean_return": mean_return}
        self._offsets = torch.arange(-HISTORY_LENGTH, 0, device=device)

    def histories(self, indices: torch.Tensor) -> torch.Tensor:
        """The agents' last ten (action, observation) pairs before rows `indices` [B]: [B, agent, 10, action + obs].

        Oldest first. Pairs from before the episode's start are zero rows (Appendix A.1).
        """
        rows = indices[:, None] + self._offsets
        known = rows >= self.episode_starts[indices][:, None]
        rows = rows.clamp(min=0)
        pairs = torch.cat([self.actions[rows], self.task.observe(self.states[rows])], dim=-1)  # [B, 10, agent, action + obs]
        return (pairs * known[..., None, None]).transpose(1, 2)

    def bounding_box(self) -> dict[str, torch.Tensor]:
        """The smallest and largest value of each state dimension [state] and of the reward [] (Section 3.1)."""
        states = torch.cat([self.states, self.next_states])
        return {
            "state_min": states.amin(0),
            "state_max": states.amax(0),
            "reward_min": self.rewards.min(),
            "reward_max": self.rewards.max(),
        }

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row indices for training (90 %) and for validation (10 %), the same in every run."""
        order = torch.as_tensor(np.random.default_rng(SPLIT_SEED).permutation(self.size), device=self.device)
        return order[: self.size * 9 // 10], order[self.size * 9 // 10 :]

    def episode_returns(self) -> np.ndarray:
        """The return of each episode [episode]."""
        starts = np.concatenate([[0], self.episode_ends[:-1] + 1])
        return np.add.reduceat(self.rewards[: self.size].cpu().numpy().astype(np.float64), starts)


def dataset_path(task: Task) -> Path:
    return FOLDER / f"{task.dataset}.hdf5"


def load_dataset(task: Task, path: Path | None = None, device="cpu") -> OfflineDataset:
    """Loads a task's dataset, or the file at `path`. A task's own is recorded from the shipped policies if it is missing.

    Raises `InputError`, naming the file and the key, if the file is missing, truncated, not finite or made for another task.
    """
    if path is None and task.environment == "coordination":
        from coordination_game import make_columns

        return OfflineDataset(task, make_columns(task), device)
    if path is None:
        path = dataset_path(task)
        if not path.is_file() and task.dataset == "reacher-expert-mix":
            from data import collect_reacher

            collect_reacher.record_dataset(collect_reacher.Dataset(output=path))
        elif not path.is_file():
            from data import collect_ant

            collect_ant.record_dataset(collect_ant.Dataset(name=task.dataset.removeprefix("ant-"), output=path))
    if not Path(path).is_file():
        command = ""
        if task.environment == "Reacher-v4":
            command = f"; make it with: python -m data.collect_reacher dataset --output {path}"
        elif task.environment == "Ant-v4":
            options = f"--name {task.dataset.removeprefix('ant-')} --output {path}"
            command = f"; make ours with: python -m data.collect_ant dataset {options}, or download D4RL's: python -m data.download_d4rl {options}"
        raise InputError(f"no dataset at {path}{command}")
    columns, source = read_columns(task, Path(path))
    return OfflineDataset(task, columns, device, source)


def read_columns(task: Task, path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The columns of an HDF5 file in D4RL's layout, checked against the task, and where they come from."""
    widths = {
        "observations": (task.state_dim,),
        "actions": (task.num_agents * task.action_dim,),
        "rewards": (),
        "next_observations": (task.state_dim,),
        "terminals": (),
        "timeouts": (),
    }
    columns = {}
    try:
        with h5py.File(path) as file:
            source = str(file.attrs.get("source", path.name))
            for key, width in widths.items():
                if key not in file and key == "next_observations":
                    raise InputError(f"{path} has no 'next_observations', and where episodes end they cannot be told; take D4RL's version 2")
                if key not in file:
                    raise InputError(f"{path} has no '{key}'; {task.name} needs a file in D4RL's layout")
                column = file[key]
                if not isinstance(column, h5py.Dataset) or column.dtype.kind not in "biuf":
                    raise InputError(f"'{key}' in {path} holds no numbers; {task.name} needs a file in D4RL's layout")
                size = size if columns else (column.shape or (0,))[0]  # the first column's
                contact_forces = task.environment == "Ant-v4" and width == (task.state_dim,) and column.shape == (size, 111)
                if column.shape != (size, *width) and not contact_forces:
                    raise InputError(f"'{key}' in {path} has shape {column.shape}; {task.name} needs {(size, *width)}")
                columns[key] = column[()]
                if not np.isfinite(columns[key]).all():
                    row = int(np.argwhere(~np.isfinite(columns[key]))[0, 0])
                    raise InputError(f"'{key}' in {path} is not finite at row {row}; record or download the file again")
                if contact_forces:  # D4RL's files have 84 of them, all zero
                    if columns[key][:, task.state_dim :].any():
                        raise InputError(f"'{key}' in {path} has contact forces, so its rewards have a cost of contact; Ant-v4's have none")
                    columns[key] = columns[key][:, : task.state_dim].copy()  # lets go of the zeros
    except (OSError, RuntimeError, KeyError) as error:  # h5py's errors for damaged files
        raise InputError(f"{path} is truncated or not HDF5 ({error}); delete it and record or download it again") from None
    if not len(columns["observations"]):
        raise InputError(f"{path} has no transitions; record or download it again")
    return columns, source
