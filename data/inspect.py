"""Describes a dataset: columns, episodes, returns, and what may be wrong with it.

    python -m data.inspect my.hdf5
    python -m data.inspect my.hdf5 --task halfcheetah-2x3-medium-fo --histogram returns.png
    python -m data.inspect minari:mujoco/halfcheetah/medium-v0 --task halfcheetah-2x3-medium-fo

Without --task it reads HDF5 files in D4RL's layout and lists the environments that they fit. With
--task, which may also be FILE:NAME of your own, it loads the dataset as the scripts do and adds
scores.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # this folder's inspect.py would shadow Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import dataclass
from typing import Annotated

import h5py
import numpy as np
import tyro
from matplotlib.figure import Figure

from data.offline_dataset import OfflineDataset, episode_ends, load_dataset
from mamujoco_envs import COLUMNS, InputError, Task, all_tasks, blocks, find_task, require


@dataclass
class Args:
    file: Annotated[Path, tyro.conf.Positional]
    """HDF5 file, folder of a Minari dataset, or minari:NAME"""
    task: str | None = None
    """task that the data are meant for"""
    histogram: Path | None = None
    """a .png file for a histogram of the episodes' returns"""


def list_columns(path: Path) -> dict[str, tuple]:
    """Prints what an HDF5 file holds; returns the shape of each array by its name."""
    shapes = {}

    def visit(name: str, item) -> None:
        if isinstance(item, h5py.Dataset):
            shapes[name] = item.shape
            print(f"  {name}: {item.shape}, {item.dtype}")

    require(path.is_file(), f"no file at {path}")
    try:
        with h5py.File(path, locking=False) as file:
            print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
            file.visititems(visit)
            for name, value in file.attrs.items():
                print(f"  attribute {name}: {value}")
    except OSError as error:
        raise InputError(f"{path} cannot be read as HDF5 ({error})") from None
    return shapes


def stand_in(path: Path, shapes: dict[str, tuple]) -> Task:
    """A one-agent task with the widths of the file, for files whose task is not given."""
    missing = ", ".join(name for name in COLUMNS if name not in shapes)
    advice = "name your columns in a Task's layout and give it with --task"
    if missing == "timeouts":
        advice = "give --task FILE:NAME; files of a task of your own need none"
    require(not missing, f"{path} has no {missing}, so it is not in D4RL's layout; {advice}")
    two_axes = len(shapes["observations"]) == len(shapes["actions"]) == 2
    require(two_axes, f"'observations' and 'actions' in {path} must be [rows, width]; {advice}")
    width, actions = shapes["observations"][1], shapes["actions"][1]
    never = max(shapes["observations"][0], 1)
    return Task("", blocks(width), blocks(actions), never, name=path.stem, state_dim=width)


def fitting_environments(shapes: dict[str, tuple]) -> list[str]:
    """Environments of this repository with the file's widths."""
    width, actions = shapes["observations"][1], shapes["actions"][1]
    widths = 27 if width == 111 else width, actions  # D4RL's ant files have contact forces, too
    return sorted(
        {
            task.environment_name
            for task in all_tasks().values()
            if (task.state_dim, task.num_agents * task.action_dim) == widths and not task.columns
        }
    )


def spread(values) -> str:
    """Minimum, mean, median and maximum of an array in a line."""
    middle = f"mean {np.mean(values):.4g}, median {np.median(values):.4g}"
    return f"min {np.min(values):.4g}, {middle}, max {np.max(values):.4g}"


def find_faults(dataset: OfflineDataset) -> list[str]:
    """What a learner may stumble over, a line each."""
    faults, lengths = [], (dataset.last_rows - dataset.first_rows + 1).numpy()
    actions, states = dataset.actions.numpy(), dataset.states.numpy()
    flat_actions = actions.reshape(len(actions), -1)
    still = np.flatnonzero(states.std(0) < 1e-6).tolist()
    if still:
        faults.append(f"dimensions of the state that never change: {still}")
    idle = np.flatnonzero(flat_actions.std(0) < 1e-6).tolist()
    if idle:
        faults.append(f"actions that never change: {idle}")
    clamped = float((abs(flat_actions) > 0.999).mean())
    are_ones = np.isclose(flat_actions, 1, atol=1e-4)
    if not dataset.task.discrete and are_ones.any() and (are_ones | (flat_actions == 0)).all():
        faults.append("all actions are 0 or 1: if they are options, set discrete=True in the task")
        faults[-1] += " and store them as one-hot vectors"
    elif not dataset.task.discrete and clamped > 0.2:
        faults.append(f"{clamped:.0%} of the actions are at -1 or 1: were they rescaled?")
    stds = states.std(0)
    usual = np.median(stds[stds > 1e-6]) if (stds > 1e-6).any() else 1.0
    largest = float(abs(states).max() / usual)
    if largest > 1e3:
        faults.append(f"a state is {largest:.0f} times the usual standard deviation of a dimension")
    rewards = dataset.rewards.numpy()
    if rewards.std() < 1e-6:
        faults.append("rewards never change")
    absorbing, longest = (dataset.masks[dataset.last_rows] == 0).numpy(), lengths == lengths.max()
    late = int((absorbing & longest).sum())
    if late > 1 and not (longest & ~absorbing).any():
        faults.append(f"{late} terminals come at the longest length, {lengths.max()}, and no")
        faults[-1] += " time-out does: are they time-outs?"
    cut, limit = lengths[~absorbing], dataset.task.episode_length
    if dataset.task.file and len(cut) > 1 and cut.max() < limit:
        faults.append(f"time-outs come after {cut.max()} steps at most, but episode_length is")
        faults[-1] += f" {limit}: a team's return cannot be compared with the data's"
    last = dataset.last_rows[:-1].numpy()
    nexts, firsts = dataset.next_states.numpy()[last], states[last + 1]
    leaks = int(np.isclose(nexts, firsts, rtol=1e-4, atol=1e-4).all(1).sum())
    if leaks and len(still) < states.shape[1]:
        faults.append(f"{leaks} episodes end in the first state of the next one: does")
        faults[-1] += " next_observations have an episode's own last state at its end?"
    if len(lengths) > 1 and np.median(lengths) == 1 and dataset.task.episode_length > 1:
        faults.append("most episodes have one row: are rows shuffled, or do several copies take")
        faults[-1] += " turns? Write one episode after the other"
    if len(lengths) == 1:
        faults.append("there is one episode, and a world model needs some to be held out")
    elif len(lengths) < 10:
        faults.append(f"there are only {len(lengths)} episodes, of which one is held out")
    return faults


def find_unflagged_ends(columns: dict[str, np.ndarray]) -> int:
    """How many episodes end without a flag, where the next state is not the next row's."""
    flags = columns["terminals"].astype(bool) | columns["timeouts"].astype(bool)
    return int((episode_ends(columns) & ~flags)[:-1].sum())


def plot_returns(dataset: OfflineDataset, path: Path) -> None:
    """A histogram of the episodes' returns."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    returns = dataset.episode_returns()
    axes.hist(returns, bins=min(50, max(5, len(returns) // 5)))
    axes.axvline(returns.mean(), color="black", linestyle="--", label=f"mean {returns.mean():.4g}")
    axes.set(xlabel="return of an episode", ylabel="episodes", title=dataset.task.name)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main(args: Args) -> OfflineDataset:
    if args.histogram:
        require(args.histogram.suffix == ".png", f"--histogram must end in .png: {args.histogram}")
        folder = args.histogram.absolute().parent
        require(folder.is_dir(), f"no folder {folder} to write {args.histogram.name} to")
        require(os.access(folder, os.W_OK), f"{folder} is not writable; give another --histogram")
        require(not args.histogram.exists(), f"{args.histogram} exists; give another --histogram")
    is_minari = str(args.file).startswith("minari:") or args.file.is_dir()
    is_other_folder = args.file.is_dir() and not (args.file / "data").is_dir()
    require(not is_other_folder, f"{args.file} is a folder, but holds no Minari dataset")
    require(args.task or not is_minari, "a Minari dataset needs a --task with the same states")
    shapes = {} if is_minari else list_columns(args.file)
    task = find_task(args.task) if args.task else stand_in(args.file, shapes)
    dataset = load_dataset(task, args.file)

    lengths = (dataset.last_rows - dataset.first_rows + 1).numpy()
    returns, absorbing = dataset.episode_returns(), int((dataset.masks == 0).sum())
    print(f"{dataset.size} transitions, {len(lengths)} episodes, {absorbing} terminal states")
    print(f"length: {spread(lengths)}")
    print(f"return: {spread(returns)}")
    if args.task:
        print(f"score:  {spread(task.normalized_score(returns))}")
    print(f"reward: {spread(dataset.rewards.numpy())}")
    print(f"sha256: {dataset.description['sha256']}")
    if shapes and not args.task:
        fitting = ", ".join(fitting_environments(shapes)) or "none of this repository"
        print(f"environments with these widths: {fitting}")
    faults = find_faults(dataset)
    if not task.layout and "timeouts" in shapes:
        with h5py.File(args.file, locking=False) as file:
            columns = {name: file[name][()] for name in COLUMNS}
        unflagged = find_unflagged_ends(columns)
        if unflagged:
            faults.append(f"{unflagged} episodes end without a flag, and are taken for time-outs")
        both = int((columns["terminals"].astype(bool) & columns["timeouts"].astype(bool)).sum())
        if both:
            faults.append(
                f"{both} rows have both flags, and are taken for terminals, not time-outs"
            )
    for fault in faults:
        print(f"warning: {fault}")
    if not faults:
        print("no warnings")
    if args.histogram:
        plot_returns(dataset, args.histogram)
        print(f"{args.histogram}: a histogram of the returns")
    return dataset


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
