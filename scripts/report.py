"""Keeps the results of finished runs in docs/results/, writes the tables of README and docs, and
draws their figures.

    python scripts/report.py --runs runs/*__*  # adds these runs, then writes the tables
    python scripts/report.py                   # writes the tables again

docs/results/TABLE.json has, for every run, its arguments and versions and, except for games beyond
the paper, its raw returns, evaluations and machine. Tables stand between <!-- table NAME --> and
<!-- end --> in README.md and docs/*.md, and are made from these files alone; a test checks that
they agree.
"""

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import filelock
import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.stats import bootstrap, trim_mean

from mamujoco_envs import BODIES, PAPER_SCORES, InputError, all_tasks, find_task, require
from scripts.reproduce import (
    ABLATIONS,
    COMPARED_ON,
    VARIANTS,
    Cell,
    changed_options,
    color_of,
    default_options,
    load_result,
    plot_curves,
    rounded,
    script_of,
)
from training_run import REPOSITORY, say

RESULTS = REPOSITORY / "docs" / "results"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
NAMES = {
    "iql": "IQL (centralised)",
    "maiql": "MAIQL",
    "maiql_ft": "MAIQL, fine-tuned online",
    "matd3_bc": "MATD3+BC",
    "ibc": "IBC",
    "itd3_bc": "ITD3+BC",
    "icql": "ICQL",
    "iomar": "IOMAR",
    "inspo": "InSPO",
    "logo": "LOGO-style",
    "moma_ppo": "MOMA-PPO",
}
# The rows of Table 5, of the ablations and of LOGO's comparison.
VARIANT_NAMES = NAMES | {
    "moma_ppo-ground-truth": "rollouts in the true simulator",
    "moma_ppo-aleatoric": "aleatoric penalty",
    "moma_ppo-aleatoric-no-cuts": "aleatoric penalty, no rollout cut",
    "moma_ppo-no-penalty": "no penalty",
    "moma_ppo-no-cuts": "no rollout cut",
    "moma_ppo-neither": "no penalty, no rollout cut",
    **{f"moma_ppo-k{k}": f"k = {k}, from any states" for k in (5, 10, 25, 50)},
    "moma_ppo-in-logo": "MOMA-PPO in LOGO's model",
    "logo-data-alone": "MACQL on the data alone",
    "logo-penalty": "LOGO-style, a penalty instead of weights",
}
FILES = {"coordination": "table-3", "reacher": "table-4a", "ant": "table-4b"}
# Tables of docs/agreement.md: prefixes of their tasks' names, and who is compared, if not all.
AGREEMENT = {
    "scaling": "coordination-unfavorable",
    "continuous": "continuous-",
    "peaks": "peaks-",
    "climbing": "climbing-",
    "dynamics": ("reacher-", "ant-medium-fo"),
}
COMPARED = {
    "scaling": ("inspo", "logo", "moma_ppo"),
    "dynamics": ("maiql", "matd3_bc", "ibc", "inspo", "moma_ppo"),
}
FILES |= dict.fromkeys(BODIES, "table-other")
README_TASKS = (
    *("reacher-all-observant", "reacher-independent", "reacher-leader-only"),
    *("coordination-favorable", "coordination-neutral", "coordination-unfavorable"),
    "ant-medium-fo",
)
KEPT = ("score", "score_stderr", "returns", "steps", "seconds", "evaluations", "args", "dataset")
KEPT += ("world_model", "versions", "machine", "model_return")
KEPT_OF_GAMES = ("score", "score_stderr", "return", "steps", "seconds", "args", "versions")


@dataclass
class Args:
    runs: tuple[Path, ...] = ()
    """folders of finished runs to add, named TASK__ALGORITHM__SEED as reproduce.py does"""


def write(path: Path, text: str) -> None:
    """Writes a file atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path) -> dict[str, dict]:
    """The runs of one file of docs/results/."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; get it back with: git restore {path}") from None


def add_run(run_dir: Path, folder: Path = RESULTS) -> None:
    """Adds a run to its table's file, replacing an older one of the same name."""
    path = run_dir / "result.json"
    require(path.is_file(), f"no result at {path}; give folders of finished runs")
    task, algorithm, seed, *more = run_dir.name.split("__") + ["", ""]
    known = task in all_tasks() and algorithm in NAMES | VARIANTS and seed.isdigit()
    require(
        known and not any(more),
        f"{run_dir} must be named TASK__ALGORITHM__SEED, as reproduce.py names runs",
    )
    # All greedy episodes of a game are alike, so games beyond the paper keep the mean return only.
    is_game = all_tasks()[task].columns and task not in PAPER_SCORES["moma_ppo"]
    columns = KEPT_OF_GAMES if is_game else KEPT
    name = "table-games" if is_game else FILES[task.split("-")[0]]
    table = folder / f"{'table-ablations' if algorithm in VARIANTS else name}.json"
    runs = read_table(table) if table.is_file() else {}
    result = load_result(path)
    result["args"].pop("run_dir", None)  # a place on somebody's machine
    if result["args"].get("world_model"):  # of another run: keeps the end of the path
        result["args"]["world_model"] = "/".join(Path(result["args"]["world_model"]).parts[-2:])
    run = {"task": task, "algorithm": algorithm, "seed": int(seed)}
    run |= {name: rounded(result[name]) for name in columns if name in result}
    found = result["script"], result["args"]["task"], result["args"]["seed"]
    same = found == (script_of(algorithm), task, int(seed))
    require(same, f"{run_dir} is a run of {found[0]}.py on {found[1]}, seed {found[2]}")
    changed = changed_options(algorithm, task, run["args"])
    require(not changed, f"{run_dir} has {changed}, but tables are of defaults alone")
    runs[run_dir.name] = run
    lines = (f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(runs.items()))
    write(table, "{\n" + ",\n".join(lines) + "\n}\n")


def read_runs(folder: Path = RESULTS) -> dict[tuple[str, str], list[dict]]:
    """All runs that are kept and have today's defaults, by algorithm and task."""
    cells = {}
    for path in sorted(folder.glob("table-*.json")):
        for run in read_table(path).values():
            if not changed_options(run["algorithm"], run["task"], run.get("args", {})):
                cells.setdefault((run["algorithm"], run["task"]), []).append(run)
    return cells


def score(runs: list[dict]) -> str:
    """Mean and standard error over seeds; a single run's error, over its episodes, is starred."""
    if not runs:
        return "not run"
    scores = [run["score"] for run in runs]
    if len(runs) == 1:
        return f"{scores[0]:.2f} ± {runs[0]['score_stderr']:.2f}*"
    return f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores) / len(runs) ** 0.5:.2f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def span(values) -> str:
    """The smallest and the largest value, as "1 to 3", or "3" where they are equal."""
    low_and_high = sorted({min(values), max(values)})
    return " to ".join(f"{value:,}" for value in low_and_high)


def median_seconds(finished: dict[str, list[dict]]) -> list[int]:
    """Median training time of a run on each task."""
    return [round(statistics.median(run["seconds"] for run in runs)) for runs in finished.values()]


def table_of_paper(prefix: str, cells) -> str:
    """A row for each algorithm, a column for each task, the paper's scores in brackets.

    Algorithms that the paper does not have get a row once they have run.
    """
    columns = [
        task
        for task in all_tasks()
        if task.startswith(prefix) and any(task in PAPER_SCORES[name] for name in NAMES)
    ]
    rows = []
    for algorithm, name in NAMES.items():
        paper = PAPER_SCORES[algorithm]
        finished = {task: cells[algorithm, task] for task in columns if (algorithm, task) in cells}
        if not finished and not any(task in paper for task in columns):
            continue
        row = []
        for task in columns:
            if task in paper:
                row.append(f"{score(finished.get(task, []))} ({paper[task]})")
            else:
                row.append(score(finished[task]) if task in finished else "-")
        runs = [run for task in finished for run in finished[task]]
        steps = span([run["steps"] for run in runs]) if runs else "-"
        seconds = span(median_seconds(finished)) if runs else "-"
        seeds = span([len(finished[task]) for task in finished]) if runs else "-"
        rows.append([name, steps, seconds, seeds, *row])
    views = [task.removeprefix(f"{prefix}-") for task in columns]
    return markdown(["algorithm", "steps", "seconds", "seeds", *views], rows)


def table_of_algorithm(algorithm: str, cells) -> str:
    """All tasks of an algorithm."""
    rows = []
    for task in all_tasks():
        runs = cells.get((algorithm, task), [])
        if runs:
            seconds = f"{statistics.median(run['seconds'] for run in runs):,.0f}"
            paper = find_task(task).paper_score(algorithm) or "-"
            row = [f"`{task}`", f"{runs[0]['steps']:,}", str(len(runs)), score(runs), paper]
            rows.append([*row, seconds])
    if not rows:
        return "No run of this version yet."
    return markdown(["task", "steps", "seeds", "score", "paper", "seconds"], rows)


def table_of_agreement(table: str, cells) -> str:
    """A row for each algorithm, a column for each task, and the seconds of a run."""
    columns = [task for task in all_tasks() if task.startswith(AGREEMENT[table])]
    rows = []
    for algorithm in COMPARED.get(table, NAMES):
        finished = {task: cells[algorithm, task] for task in columns if (algorithm, task) in cells}
        if finished:
            seeds = span([len(runs) for runs in finished.values()])
            scores = [score(finished.get(task, [])) for task in columns]
            rows.append([NAMES[algorithm], seeds, *scores, span(median_seconds(finished))])
    if not rows:
        return "No run of this version yet."
    return markdown(["algorithm", "seeds", *(f"`{x}`" for x in columns), "seconds"], rows)


def interval(statistic, *samples: list[float]) -> str:
    """A statistic of scores over seeds and its bootstrapped 95 % interval."""
    samples = [np.array(sample) for sample in samples]
    # "percentile", because BCa is not defined where all seeds score alike.
    options = {"method": "percentile", "n_resamples": 9999, "rng": 0}
    found = bootstrap(samples, statistic, vectorized=True, **options).confidence_interval
    middle = statistic(*samples, axis=-1)
    return f"{middle:z.2f} [{found.low:z.2f}, {found.high:z.2f}]"  # z: never -0.00


def interquartile_mean(scores, axis=-1):
    """The mean without the lowest and the highest quarter of the seeds, rounded down (Agarwal et
    al., NeurIPS 2021); with three seeds, nothing is cut."""
    return trim_mean(scores, 0.25, axis=axis)


def difference(ours, theirs, axis=-1):
    return np.mean(ours, axis=axis) - np.mean(theirs, axis=axis)


def table_of_intervals(cells) -> str:
    """Cells and ablations with three seeds or more, and MOMA-PPO's lead over each."""
    rows = []
    for task in PAPER_SCORES["moma_ppo"]:
        ours = [run["score"] for run in cells.get(("moma_ppo", task), [])]
        for algorithm, name in VARIANT_NAMES.items():
            scores = [run["score"] for run in cells.get((algorithm, task), [])]
            if len(scores) < 3:
                continue
            above = "-"
            if algorithm != "moma_ppo" and len(ours) >= 3:
                above = interval(difference, ours, scores)
            middle = interval(interquartile_mean, scores)
            rows.append([f"`{task}`", name, str(len(scores)), middle, above])
    figures = ["interquartile mean [95 %]", "lead of MOMA-PPO's mean [95 %]"]
    return markdown(["task", "algorithm", "seeds", *figures], rows)


def part_of_paper(run: dict) -> str:
    """Where a run belongs, for `table_of_time`."""
    algorithm, task = run["algorithm"], run["task"]
    if "logo" in algorithm:
        return "LOGO-style and its comparison"
    if algorithm in VARIANTS:
        return "Table 5, Figures 4, 8 and 9"
    tables = {"coordination": "Table 3", "reacher": "Table 4 (a)", "ant": "Table 4 (b)"}
    in_paper = any(task in scores for scores in PAPER_SCORES.values())
    return tables[task.split("-")[0]] if in_paper else "beyond the paper"


def table_of_time(cells) -> str:
    """How long the kept runs have trained."""
    parts = {}
    for runs in cells.values():
        for run in runs:
            parts.setdefault(part_of_paper(run), []).append(run["seconds"])
    rows = []
    for part, seconds in sorted(parts.items()):
        hours, middle = f"{sum(seconds) / 3600:.1f}", f"{statistics.median(seconds):,.0f}"
        rows.append([part, f"{len(seconds):,}", hours, middle, f"{max(seconds):,.0f}"])
    return markdown(["runs of", "runs", "hours", "median run, s", "longest run, s"], rows)


def runs_of_variant(variant: str, task: str, cells) -> list[dict]:
    """A variant's runs, or MOMA-PPO's if it has the same options, as with k = 50 on the ant."""
    runs = cells.get((variant, task), [])
    if not runs and default_options(variant, task) == default_options("moma_ppo", task):
        return cells.get(("moma_ppo", task), [])
    return runs


def table_of_ablation(name: str, cells) -> str:
    """A row for each variant, the paper's scores in brackets, where it has figures."""
    rows = []
    for variant in ABLATIONS[name]:
        paper = PAPER_SCORES.get(variant, {})
        found = {task: runs_of_variant(variant, task, cells) for task in COMPARED_ON[name]}
        scores = [
            score(runs) + (f" ({paper[task]})" if task in paper else "")
            for task, runs in found.items()
        ]
        seeds = [len(runs) for runs in found.values() if runs] or [0]
        rows.append([VARIANT_NAMES[variant], span(seeds), *scores])
    return markdown(["algorithm", "seeds", *(f"`{x}`" for x in COMPARED_ON[name])], rows)


def table_of_readme(cells) -> str:
    """MOMA-PPO and the best of the decentralised offline baselines, on seven tasks."""
    rows = []
    for task in README_TASKS:
        baselines = {
            algorithm: cells[algorithm, task]
            for algorithm in NAMES
            if algorithm not in ("moma_ppo", "maiql_ft", "iql") and (algorithm, task) in cells
        }
        best = "not run"
        if baselines:
            means = {a: statistics.mean(r["score"] for r in runs) for a, runs in baselines.items()}
            winner = max(means, key=means.get)
            best = f"{score(baselines[winner])} ({NAMES[winner]})"
        own = score(cells.get(("moma_ppo", task), []))
        rows.append([f"`{task}`", own, best, PAPER_SCORES["moma_ppo"][task]])
    return markdown(
        ["task", "MOMA-PPO", "best decentralised baseline", "MOMA-PPO in the paper"], rows
    )


def make_table(name: str, cells) -> str:
    """The table behind <!-- table NAME -->."""
    if name == "readme":
        return table_of_readme(cells)
    if name in NAMES:
        return table_of_algorithm(name, cells)
    if name in AGREEMENT:
        return table_of_agreement(name, cells)
    if name == "intervals":
        return table_of_intervals(cells)
    if name == "time":
        return table_of_time(cells)
    if name in ABLATIONS:
        return table_of_ablation(name, cells)
    require(name in FILES, f"no table is called '{name}'")
    return table_of_paper(name, cells)


def with_tables(text: str, cells) -> str:
    """A page with its tables regenerated."""

    def replaced(match):
        return f"{match[1]}\n{make_table(match[2], cells)}\n{match[3]}"

    return re.sub(r"(<!-- table ([\w-]+) -->).*?(<!-- end -->)", replaced, text, flags=re.DOTALL)


def draw_curves(cells, folder: Path) -> None:
    """Learning curves of the kept runs, over time and over steps: docs/figures/curves-TABLE.png and
    curves-TABLE-steps.png. Those of MOMA-PPO's ablations are over steps alone."""
    for prefix, table in (("reacher", "4a"), ("ant", "4b")):
        shown = {
            Cell(algorithm, task): runs
            for (algorithm, task), runs in cells.items()
            if task.startswith(prefix) and algorithm in NAMES
        }
        plot_curves(shown, folder / f"curves-{table}.png", "seconds of training", NAMES)
        plot_curves(shown, folder / f"curves-{table}-steps.png", "steps", NAMES)
    for table, variants in ABLATIONS.items():
        shown = {
            Cell(variant, task): runs_of_variant(variant, task, cells)
            for task in COMPARED_ON[table]
            for variant in variants
        }
        if table != "local-to-global" and any(
            runs and cell.algorithm not in ("moma_ppo", "maiql") for cell, runs in shown.items()
        ):
            plot_curves(shown, folder / f"curves-{table}.png", "steps", VARIANT_NAMES)


def compared_cells(table: str, cells: dict) -> dict:
    """The runs of the algorithms and tasks that a table compares."""
    compared = COMPARED.get(table, NAMES)
    return {
        (algorithm, task): runs
        for (algorithm, task), runs in cells.items()
        if algorithm in compared and task.startswith(AGREEMENT[table])
    }


def draw_bars(cells: dict, path: Path) -> None:
    """One table of docs/agreement.md: a group of bars for each task, a bar for each algorithm.

    Every dot is the score of one seed, every bar the mean of an algorithm on a task.
    """
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


def draw_figures(cells: dict, folder: Path) -> None:
    """The learning curves, and the bars of docs/agreement.md."""
    draw_curves(cells, folder)
    for table in AGREEMENT:
        compared = compared_cells(table, cells)
        if compared:
            draw_bars(compared, folder / f"agreement-{table}.png")


def main(args: Args) -> None:
    left_out = 0
    with filelock.FileLock(RESULTS / ".lock"):  # another report.py waits
        for run_dir in args.runs:
            try:
                add_run(run_dir)
            except InputError as error:
                say(f"left out: {error}")
                left_out += 1
        cells = read_runs()
        draw_figures(cells, REPOSITORY / "docs" / "figures")
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            write(page, with_tables(text, cells))
    say(f"{sum(map(len, cells.values()))} runs in {RESULTS}; tables written")
    require(
        not left_out, f"{left_out} of {len(args.runs)} runs were left out; the reasons are above"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
