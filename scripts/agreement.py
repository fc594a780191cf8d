"""Draws the figures of docs/agreement.md from the runs that docs/results/ keeps.

    python scripts/reproduce.py --table continuous     # or scaling, climbing: makes the runs
    python scripts/report.py --runs runs/*__*          # keeps them
    python scripts/agreement.py                        # draws docs/figures/agreement-*.png

Every dot is the score of one seed, every bar the mean of an algorithm on a task.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro
from matplotlib.figure import Figure

from mamujoco_envs import InputError, all_tasks, require
from scripts.report import AGREEMENT, COMPARED, NAMES, RESULTS, read_runs
from scripts.reproduce import color_of
from training_run import REPOSITORY, say


@dataclass
class Args:
    results: Path = RESULTS
    """folder of the kept runs"""
    figures: Path = REPOSITORY / "docs" / "figures"
    """folder of the figures"""


def cells_of(table: str, cells: dict) -> dict:
    """The runs of the algorithms and tasks that a table compares."""
    compared = COMPARED.get(table, NAMES)
    return {
        (algorithm, task): runs
        for (algorithm, task), runs in cells.items()
        if algorithm in compared and task.startswith(AGREEMENT[table])
    }


def draw(cells: dict, path: Path) -> None:
    """One table: a group of bars for each task, a bar for each algorithm."""
    algorithms = [name for name in NAMES if any(name == algorithm for algorithm, _ in cells)]
    tasks = [name for name in all_tasks() if any(name == task for _, task in cells)]
    width = 0.8 / len(algorithms)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, algorithm in enumerate(algorithms):
        color = color_of(algorithm)
        label = NAMES[algorithm]
        for place, task in enumerate(tasks):
            scores = np.array([run["score"] for run in cells.get((algorithm, task), [])])
            if len(scores):
                x = place - 0.4 + (i + 0.5) * width
                axes.bar(x, scores.mean(), 0.9 * width, color=color, alpha=0.5, label=label)
                # Seeds often end at the same score, so dots are spread over the bar.
                places = (np.arange(len(scores)) + 0.5) / len(scores) - 0.5
                spread = x + 0.8 * width * places
                axes.plot(spread, scores, ".", color=color, markersize=4)
                label = None
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="grey", linewidth=0.8)
    labels = [task.replace("-", "-\n", 1) for task in tasks]
    axes.set_xticks(range(len(tasks)), labels, fontsize=8)
    axes.set_ylabel("normalised score")
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=90)


def main(args: Args) -> None:
    require(args.figures.is_dir(), f"no folder {args.figures} to draw to")
    cells = read_runs(args.results)
    drawn = [table for table in AGREEMENT if cells_of(table, cells)]
    require(drawn, f"no runs in {args.results}; run scripts/reproduce.py and scripts/report.py")
    for table in drawn:
        path = args.figures / f"agreement-{table}.png"
        draw(cells_of(table, cells), path)
        say(str(path))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
