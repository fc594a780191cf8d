"""Runs the scripts behind one table of the paper and prints it: mean ± standard error over seeds, beside the paper's figure.

    python reproduce.py --table 3          # the coordination game: 4 algorithms x 3 datasets x 10 seeds
    python reproduce.py --table scaling    # MOMA-PPO on the unfavorable dataset with 2, 3, 4 and 8 agents
    python reproduce.py --table 4a         # two-agent Reacher
    python reproduce.py --table 4b         # four-agent Ant
    python reproduce.py --table 4b --tasks ant-medium-fo --algorithms ibc moma_ppo --seeds 1    # two of its cells

Each run is a process of its own with one thread, as many at once as there are cores. A run that has a result is not run again,
so an interrupted table goes on where it stopped; raw returns are in each run's result.json. The learning curves of all runs are
drawn in table_TABLE.png beside them, those of single cells in a file that names these.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import coordination_game  # noqa: F401, its tasks
from mamujoco_envs import find_task

GAMES = [f"coordination-{behavior}" for behavior in ("favorable", "neutral", "unfavorable")]
REACHER = [f"reacher-{view}" for view in ("all-observant", "independent", "leader-only")]
ANT = [
    f"ant-{behavior}-{view}"
    for view in ("fo", "po")
    for behavior in ("random", "medium", "full-replay", "expert")
]
TEAMS = [
    "maiql",
    "matd3_bc",
    "ibc",
    "itd3_bc",
    "icql",
    "iomar",
    "moma_ppo",
]  # in the order of Table 4
TABLES = {  # tasks of each algorithm, the number of seeds, and options of every run
    "3": ({"iql": GAMES, "maiql": GAMES, "ibc": GAMES, "moma_ppo": GAMES}, 10, []),
    "scaling": (
        {
            "moma_ppo": [
                "coordination-unfavorable",
                *[f"coordination-unfavorable-{agents}" for agents in (3, 4, 8)],
            ]
        },
        10,
        [],
    ),
    "4b": (
        {"iql": ANT[:4]} | {algorithm: ANT for algorithm in TEAMS if algorithm != "matd3_bc"},
        3,
        ["--compile"],
    ),
    "4a": ({"iql": REACHER[:1]} | {algorithm: REACHER for algorithm in TEAMS}, 3, ["--compile"]),
}


@dataclass
class Args:
    table: Literal["3", "scaling", "4a", "4b"] = "3"
    """which table"""
    seeds: int | None = None
    """seeds 1, 2, ...; if not given, the paper's 10 for the game and 3 for Reacher and the ant"""
    tasks: tuple[str, ...] = ()
    """only these tasks of the table; all if not given"""
    algorithms: tuple[str, ...] = ()
    """only these algorithms of the table; all if not given"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """runs at once"""
    folder: Path = Path("runs")
    """where the runs' folders go"""


def run(algorithm: str, task: str, seed: int, folder: Path, options: list[str]) -> dict | None:
    """One run's result; None if it failed, after printing its error."""
    run_dir = folder / f"{task}__{algorithm}__{seed}"
    if not (run_dir / "result.json").is_file():
        script = f"{algorithm}.py" if algorithm == "moma_ppo" else f"baselines/{algorithm}.py"
        arguments = ["--run-dir", str(run_dir), "--task", task, "--seed", str(seed), *options]
        if (run_dir / "checkpoint.pt").is_file():
            arguments = ["--resume", str(run_dir)]
        elif run_dir.exists():  # killed before its first checkpoint
            shutil.rmtree(run_dir)
        command = [sys.executable, Path(__file__).parent / script, *arguments]
        finished = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if finished.returncode != 0:
            reason = [f"exit status {finished.returncode}", *finished.stderr.strip().splitlines()][
                -1
            ]
            tqdm.write(f"{algorithm} {task} seed {seed}: {reason}")
            return None
    return json.loads((run_dir / "result.json").read_text())


def plot_curves(results: dict[tuple[str, str, int], dict | None], path: Path) -> None:
    """Scores during training over its seconds, a panel for each task, a line for each run and a colour for each algorithm.

    Dashed: the mean of the dataset's episodes.
    """
    tasks, algorithms = [list(dict.fromkeys(names)) for names in list(zip(*results))[1::-1]]
    figure = Figure(figsize=(4 * len(tasks), 3.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks):
        for (algorithm, own_task, seed), result in results.items():
            if own_task == task and result and result["evaluations"]:
                seconds, scores = zip(
                    *[
                        (evaluation["seconds"], evaluation["score"])
                        for evaluation in result["evaluations"]
                    ]
                )
                label = algorithm if algorithm not in axes.get_legend_handles_labels()[1] else None
                mean_score = find_task(task).normalized_score(result["dataset"]["mean_return"])
                axes.axhline(mean_score, color="black", linestyle="--", linewidth=1)
                axes.plot(
                    seconds,
                    scores,
                    ".-",
                    color=f"C{algorithms.index(algorithm)}",
                    label=label,
                    linewidth=1,
                    markersize=3,
                )
        axes.set(title=task, xlabel="seconds of training", xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("normalised score")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    if args.workers < 1 or args.seeds is not None and args.seeds < 1:
        sys.exit("error: --workers and --seeds must be above 0")
    rows, seeds, options = TABLES[args.table]
    if unknown := {*args.algorithms} - {*rows} | {*args.tasks} - {
        task for tasks in rows.values() for task in tasks
    }:
        sys.exit(f"error: table {args.table} has no {', '.join(sorted(unknown))}")
    rows = {
        algorithm: [task for task in tasks if task in (args.tasks or tasks)]
        for algorithm, tasks in rows.items()
    }
    rows = {
        algorithm: tasks
        for algorithm, tasks in rows.items()
        if tasks and algorithm in (args.algorithms or rows)
    }
    jobs = [
        (algorithm, task, seed)
        for algorithm, tasks in rows.items()
        for task in tasks
        for seed in range(1, (args.seeds or seeds) + 1)
    ]
    if not jobs:
        sys.exit(f"error: table {args.table} has no such cell")
    started, results = time.perf_counter(), {}
    with ThreadPoolExecutor(args.workers) as pool:
        futures = [pool.submit(run, *job, args.folder, options) for job in jobs]
        try:
            for job, future in zip(tqdm(jobs, unit="run"), futures):
                results[job] = future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            sys.exit("stopped; the same command goes on with this table")
    print(
        f"\n{'algorithm':10} {'task':28} {'ours':>16} {'the paper':>14}   seconds of training a run"
    )
    for algorithm, tasks in rows.items():
        for task in tasks:
            done = [
                result for job, result in results.items() if job[:2] == (algorithm, task) and result
            ]
            if not done:
                print(f"{algorithm:10} {task:28} {'no run finished':>16}")
                continue
            scores = [result["score"] for result in done]
            # Over seeds, as the paper's; that of a single one is over its episodes.
            error = (
                statistics.stdev(scores) / len(scores) ** 0.5
                if len(scores) > 1
                else done[0]["score_stderr"]
            )
            seconds = statistics.median(result["seconds"] for result in done)
            ours = f"{statistics.mean(scores):.3f} ± {error:.3f}"
            print(
                f"{algorithm:10} {task:28} {ours:>16} {done[0]['paper_score'] or '-':>14}   {seconds:.0f}, {len(scores)} {'seeds' if len(scores) > 1 else 'seed'}"
            )
    print(f"{time.perf_counter() - started:.0f} s in all, {args.workers} runs at once")
    plot_curves(
        results,
        args.folder / ("_".join(["table", args.table, *args.tasks, *args.algorithms]) + ".png"),
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
