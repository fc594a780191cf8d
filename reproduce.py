"""Runs the scripts behind one table of the paper and prints it: mean ± standard error over seeds, beside the paper's figure.

    python reproduce.py --table 3          # the coordination game: 4 algorithms x 3 datasets x 10 seeds
    python reproduce.py --table scaling    # MOMA-PPO on the unfavorable dataset with 2, 3, 4 and 8 agents
    python reproduce.py --table 4a         # two-agent Reacher

Each run is a process of its own with one thread, as many at once as there are cores. A run that has a result is not run again,
so an interrupted table goes on where it stopped; raw returns are in each run's result.json.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

GAMES = [f"coordination-{behavior}" for behavior in ("favorable", "neutral", "unfavorable")]
REACHER = [f"reacher-{view}" for view in ("all-observant", "independent", "leader-only")]
TABLES = {  # tasks of each algorithm, and the number of seeds
    "3": ({"iql": GAMES, "maiql": GAMES, "ibc": GAMES, "moma_ppo": GAMES}, 10),
    "scaling": ({"moma_ppo": ["coordination-unfavorable", *[f"coordination-unfavorable-{agents}" for agents in (3, 4, 8)]]}, 10),
    "4a": ({"iql": REACHER[:1], "maiql": REACHER, "ibc": REACHER, "moma_ppo": REACHER}, 3),
}


@dataclass
class Args:
    table: Literal["3", "scaling", "4a"] = "3"
    """which table"""
    seeds: int | None = None
    """seeds 1, 2, ...; if not given, the paper's 10 for the game and 3 for Reacher"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """runs at once"""
    folder: Path = Path("runs")
    """where the runs' folders go"""


def run(algorithm: str, task: str, seed: int, folder: Path) -> dict | None:
    """One run's result; None if it failed, after printing its error."""
    run_dir = folder / f"{task}__{algorithm}__{seed}"
    if not (run_dir / "result.json").is_file():
        script = f"{algorithm}.py" if algorithm == "moma_ppo" else f"baselines/{algorithm}.py"
        resumed = ["--resume", str(run_dir)] if (run_dir / "checkpoint.pt").is_file() else ["--run-dir", str(run_dir), "--task", task, "--seed", str(seed)]
        command = [sys.executable, Path(__file__).parent / script, *resumed]
        finished = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if finished.returncode != 0:
            tqdm.write(f"{algorithm} {task} seed {seed}: {finished.stderr.strip().splitlines()[-1]}")
            return None
    return json.loads((run_dir / "result.json").read_text())


def main(args: Args) -> None:
    rows, seeds = TABLES[args.table]
    jobs = [(algorithm, task, seed) for algorithm, tasks in rows.items() for task in tasks for seed in range(1, (args.seeds or seeds) + 1)]
    started, results = time.perf_counter(), {}
    with ThreadPoolExecutor(args.workers) as pool:
        futures = [pool.submit(run, *job, args.folder) for job in jobs]
        for job, future in zip(tqdm(jobs, unit="run"), futures):
            results[job] = future.result()
    print(f"\n{'algorithm':10} {'task':28} {'ours':>16} {'the paper':>14}   seconds of training a run")
    for algorithm, tasks in rows.items():
        for task in tasks:
            done = [result for job, result in results.items() if job[:2] == (algorithm, task) and result]
            if not done:
                print(f"{algorithm:10} {task:28} {'no run finished':>16}")
                continue
            scores = [result["score"] for result in done]
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
            seconds = statistics.median(result["seconds"] for result in done)
            ours = f"{statistics.mean(scores):.3f} ± {error:.3f}"
            print(f"{algorithm:10} {task:28} {ours:>16} {done[0]['paper_score'] or '-':>14}   {seconds:.0f}, {len(scores)} seeds")
    print(f"{time.perf_counter() - started:.0f} s in all, {args.workers} runs at once")


if __name__ == "__main__":
    main(tyro.cli(Args))
