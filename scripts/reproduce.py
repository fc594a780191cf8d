"""Runs what a table of the paper reports, prints it next to the paper's figures, draws curves.

    python scripts/reproduce.py --table 3          # the coordination game, Table 3
    python scripts/reproduce.py --table scaling    # agreement of 2 to 16 agents
    python scripts/reproduce.py --table continuous # Table 3 for choices of numbers
    python scripts/reproduce.py --table climbing   # a best strategy that the data hardly show
    python scripts/reproduce.py --table 4a         # two-agent Reacher, Table 4 (a)
    python scripts/reproduce.py --table 4b         # four-agent Ant, Table 4 (b)
    python scripts/reproduce.py --table 5          # rollouts in the true simulator, Table 5
    python scripts/reproduce.py --table figure-8   # penalty and cuts, Figure 8
    python scripts/reproduce.py --table figure-4   # epistemic or aleatoric penalty, Figure 4
    python scripts/reproduce.py --table figure-9   # rollout length, Figure 9
    python scripts/reproduce.py --table finetuning # MAIQL before and after online fine-tuning
    python scripts/reproduce.py --table local-to-global    # LOGO-style and its variants
    python scripts/reproduce.py --table 4b --tasks ant-medium-fo --algorithms ibc moma_ppo --seeds 1
    python scripts/reproduce.py --table other --tasks halfcheetah-2x3-medium-fo --algorithms ibc

Every run is a process with one thread, and as many run at once as there are cores. Ctrl-C or
SIGTERM stops them after saving; the same command then resumes. Runs that have finished, in
FOLDER/TASK__ALGORITHM__SEED, are not repeated.
Curves over time are in FOLDER/table_TABLE.png, over steps in FOLDER/table_TABLE_steps.png; chosen
tasks and algorithms are added to the names. If there are GPUs, runs are spread over them.

    python scripts/reproduce.py --table 4b --cluster slurm --gpus 1 --slurm partition=gpu mem=16G
    python scripts/reproduce.py --table 4b --dry-run | parallel    # or xargs, or an array job

--cluster slurm submits an array of jobs, one per run, through submitit (pip install submitit), and
waits for them. A job that is preempted, requeued or out of time resumes its run.
"""

import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mamujoco_envs import PAPER_SCORES, InputError, all_tasks, available_cores, find_task, require
from training_run import (
    REPOSITORY,
    check_agents,
    check_positive,
    default_args,
    find_compiler,
    load,
    load_checkpoint,
    restored,
    say,
)

# In the order of Table 4: the script of each algorithm, and its options.
ALGORITHMS = {
    "iql": ["baselines/iql.py"],
    "maiql": ["baselines/maiql.py"],
    "maiql_ft": ["baselines/maiql.py", "--finetune"],
    "matd3_bc": ["baselines/matd3_bc.py"],
    "ibc": ["baselines/ibc.py"],
    "itd3_bc": ["baselines/itd3_bc.py"],
    "icql": ["baselines/icql.py"],
    "iomar": ["baselines/iomar.py"],
    "inspo": ["baselines/inspo.py"],
    "logo": ["baselines/logo.py"],
    "moma_ppo": ["moma_ppo.py"],
}
OFFLINE = tuple(name for name in ALGORITHMS if name not in ("maiql_ft", "logo"))
# The model from LOGO's run with the same task and seed.
IN_LOGOS_MODEL = ["--world-model", "{folder}/{task}__logo__{seed}/world_model.pt"]
# MOMA-PPO and LOGO with changed options; runs are named after the variant.
VARIANTS = {
    "moma_ppo-ground-truth": ["--ground-truth"],
    "moma_ppo-aleatoric": ["--penalty", "aleatoric"],
    "moma_ppo-aleatoric-no-cuts": ["--penalty", "aleatoric", "--max-uncertainty", "inf"],
    "moma_ppo-no-penalty": ["--penalty", "none"],
    "moma_ppo-no-cuts": ["--max-uncertainty", "inf"],
    "moma_ppo-neither": ["--penalty", "none", "--max-uncertainty", "inf"],
    # Short rollouts would never see the end of an episode if all began at its first state.
    **{
        f"moma_ppo-k{k}": ["--rollout-length", str(k), "--start-states", "any"]
        for k in (5, 10, 25, 50)
    },
    "moma_ppo-in-logo": IN_LOGOS_MODEL,
    "logo-data-alone": ["--synthetic-share", "0"],
    "logo-penalty": ["--uncertainty", "penalty", *IN_LOGOS_MODEL],
}
ALGORITHMS |= {
    name: ALGORITHMS[name.partition("-")[0]] + options for name, options in VARIANTS.items()
}
# The rows of Table 5, of the figures and of our own comparisons, and the tasks of each.
ABLATIONS = {
    "5": ("moma_ppo", "moma_ppo-ground-truth"),
    "finetuning": ("maiql", "maiql_ft"),
    "figure-4": ("moma_ppo", "moma_ppo-aleatoric", "moma_ppo-aleatoric-no-cuts"),
    "figure-8": ("moma_ppo", "moma_ppo-no-penalty", "moma_ppo-no-cuts", "moma_ppo-neither"),
    "figure-9": tuple(f"moma_ppo-k{k}" for k in (5, 10, 25, 50)),
    # Runs in LOGO's model come after LOGO's own, which make it.
    "local-to-global": ("logo", "logo-data-alone", "logo-penalty", "moma_ppo-in-logo", "moma_ppo"),
}
COMPARED_ON = {name: ("reacher-leader-only", "ant-medium-fo") for name in ABLATIONS}
COMPARED_ON["5"] += ("ant-medium-po",)
COMPARED_ON["local-to-global"] += ("reacher-independent", "ant-medium-po")
# One thread per run; waiting threads yield a busy core to others.
JOB_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


class Table(NamedTuple):
    tasks: str | tuple[str, ...] | None
    """prefix of its tasks' names; None: any that --tasks names, including tasks of your own"""
    seeds: int
    """number of seeds, as in the paper"""
    compile: bool
    """whether runs are long enough to be worth compiling"""
    algorithms: tuple[str, ...] = ()
    """its algorithms; if empty, all that the paper has a figure for, and InSPO"""


TABLES = {
    "3": Table("coordination-", seeds=10, compile=False),
    "scaling": Table("coordination-unfavorable", 10, False, ("moma_ppo", "inspo", "logo")),
    "continuous": Table(("continuous-", "peaks-"), 10, False, OFFLINE),
    "climbing": Table("climbing-", 10, False, ("iql", "maiql", "ibc", "inspo", "moma_ppo")),
    "4a": Table("reacher-", seeds=3, compile=True),
    "4b": Table("ant-", seeds=3, compile=True),
    "other": Table(None, seeds=3, compile=True),
} | {name: Table(COMPARED_ON[name], 3, True, rows) for name, rows in ABLATIONS.items()}
# Options in which a run may differ from its table's defaults.
FREE = ("task", "seed", "device", "run_dir", "resume", "compile")


@dataclass
class Args:
    table: Literal[
        "3", "4a", "4b", "5", "finetuning", "figure-4", "figure-8", "figure-9",
        "scaling", "continuous", "climbing", "local-to-global", "other",
    ] = "3"  # fmt: skip
    """table of the paper, or one of the last five, which go beyond it; "other" means any tasks"""
    seeds: int | None = None
    """run seeds 1 to this; by default 10 for games and 3 for the others, as in the paper"""
    tasks: tuple[str, ...] = ()
    """only these tasks of the table; with --table other any, including FILE:NAME of your own"""
    algorithms: tuple[str, ...] = ()
    """only these algorithms of the table"""
    workers: int = field(default_factory=available_cores)
    """runs at once on this machine; Slurm limits its own jobs"""
    folder: Path = Path("runs")
    """folder of the run folders and of the curves"""
    dry_run: bool = False
    """print the commands that can run now, one per line, and stop"""
    cluster: Literal["local", "slurm"] = "local"
    """where to run: on this machine, or as jobs of the Slurm cluster that it belongs to"""
    hours: float = 12.0
    """time limit of a Slurm job, after which it is requeued, up to three times"""
    gpus: int = 0
    """GPUs of a Slurm job"""
    slurm: tuple[str, ...] = ()
    """further options of sbatch, such as partition=gpu mem=16G account=lab"""


class Cell(NamedTuple):
    """One cell of a table."""

    algorithm: str
    task: str


class Job(NamedTuple):
    """One run of a cell."""

    cell: Cell
    seed: int
    run_dir: Path


# What is to run.


def table_cells(args: Args) -> list[Cell]:
    """The table's cells, less those not asked for.

    The paper's tables have the cells that it gives a figure for, and InSPO wherever MOMA-PPO is.
    """
    table = TABLES[args.table]
    if table.tasks is None:
        return other_cells(args)
    in_paper = {name: PAPER_SCORES.get(name, {}) for name in ALGORITHMS}
    in_paper["inspo"] = PAPER_SCORES["moma_ppo"]
    names = [name for name in all_tasks() if name.startswith(table.tasks)]
    names = [name for name in names if not name.endswith("-other-legs")]
    cells = [
        Cell(algorithm, name)
        for algorithm in table.algorithms or in_paper
        for name in names
        if table.algorithms or (name in in_paper[algorithm] and algorithm not in VARIANTS)
    ]
    algorithms = list(dict.fromkeys(cell.algorithm for cell in cells))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    for asked_for, known in ((args.algorithms, algorithms), (args.tasks, tasks)):
        unknown = ", ".join(name for name in asked_for if name not in known)
        require(not unknown, f"table {args.table} has no {unknown}; it has {', '.join(known)}")
    chosen = [
        cell
        for cell in cells
        if cell.algorithm in (args.algorithms or algorithms) and cell.task in (args.tasks or tasks)
    ]
    require(chosen, f"table {args.table} has none of these algorithms on these tasks")
    return chosen


def other_cells(args: Args) -> list[Cell]:
    """Any algorithms on any tasks, whether the paper has a figure or not."""
    require(args.tasks, "--table other needs --tasks, names or FILE:NAME of your own")
    unknown = ", ".join(name for name in args.algorithms if name not in ALGORITHMS)
    require(not unknown, f"no algorithm is called {unknown}; there are {', '.join(ALGORITHMS)}")
    algorithms = args.algorithms or OFFLINE
    tasks = [find_task(name).option for name in args.tasks]
    return [Cell(algorithm, task) for algorithm in algorithms for task in tasks]


def own_options(job: Job) -> list[str]:
    """The options that set the run's variant."""
    _, *options = ALGORITHMS[job.cell.algorithm]
    task = find_task(job.cell.task).name
    places = {"folder": job.run_dir.parent, "task": task, "seed": job.seed}
    return [option.format(**places) for option in options]


def job_command(job: Job, options: list[str]) -> list[str]:
    """The command that starts the run, or resumes it if there is a checkpoint."""
    script = ALGORITHMS[job.cell.algorithm][0]
    command = [sys.executable, os.path.relpath(REPOSITORY / script)]
    if (job.run_dir / "checkpoint.pt").is_file():
        return [*command, "--resume", str(job.run_dir)]
    command += ["--task", job.cell.task, "--seed", str(job.seed), "--run-dir", str(job.run_dir)]
    return [*command, *own_options(job), *options]


def needs_another_run(algorithm: str) -> bool:
    """Whether its runs roll out in a world model that another run of the table makes."""
    return any("{folder}" in option for option in ALGORITHMS[algorithm])


def missing_model(job: Job) -> str:
    """What is wrong if the run needs a world model that another run has not made yet."""
    if not needs_another_run(job.cell.algorithm):
        return ""
    path = own_options(job)[-1]
    return "" if Path(path).is_file() else f"there is no {path}; run logo first"


def compile_options() -> list[str]:
    """--compile, if there is a C++ compiler."""
    if find_compiler():
        return ["--compile"]
    note = "note: runs are not compiled, because there is no C++ compiler; install g++"
    print(note, file=sys.stderr)  # not among the commands that --dry-run prints
    return []


# What is in a run folder already.


def rounded(value):
    """Floats rounded to five digits, which is more than errors justify."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def script_of(algorithm: str) -> str:
    """The name of its script, such as "maiql" for maiql_ft."""
    return Path(ALGORITHMS[algorithm][0]).stem


@cache
def default_options(algorithm: str, task: str) -> dict:
    """The options of a table's run, rounded as in kept results."""
    script, *options = ALGORITHMS[algorithm]
    module = import_module(script.removesuffix(".py").replace("/", "."))
    defaults = default_args(module.DEFAULTS, task)
    return rounded(vars(tyro.cli(type(defaults), args=options, default=defaults)))


@cache
def calibrated(task: str, ground_truth: bool) -> dict:
    """MOMA-PPO's options that come from the world model; none if the task's does not ship."""
    if ground_truth:
        return {"lambda_g": 0.0, "max_uncertainty": math.inf}
    path = find_task(task).world_model_path
    with suppress(Exception):  # a run itself says what is wrong with its model
        model = load(path)
        return rounded({"lambda_g": model["lambda_g"], "max_uncertainty": model["l_epsilon"]})
    return {}


def changed_options(algorithm: str, task: str, options: dict) -> str:
    """Options of a run that differ from its algorithm's today, such as "total_steps 400"."""
    expected, changed = default_options(algorithm, task), []
    for name in expected | options:
        # An option that the run did not have yet counts as None.
        wanted, found = (str(x.get(name)) for x in (expected, options))
        if name in ("lambda_g", "max_uncertainty") and expected.get(name, 0) is None:
            # A run keeps the values that it took from its world model.
            known = not needs_another_run(algorithm) and found != "None"
            values = calibrated(task, expected["ground_truth"]) if known else {}
            wanted = str(values.get(name, found))
        if name == "cql_points" and wanted == "None":  # older runs saved the default's value
            usual = "24" if find_task(task).action_dim == 1 else "6"
            wanted = found if found == usual else wanted
        if needs_another_run(algorithm) and name == "world_model":
            # The model of that run for this task and seed, in whatever folder.
            places = {"task": find_task(task).name, "seed": options.get("seed")}
            own = wanted.removeprefix("{folder}/").format(**places)
            wanted = found if found.endswith(own) else own
        if name not in FREE and found != wanted:
            changed.append(f"{name} {found}")
    return ", ".join(changed)


def check_folder(job: Job) -> None:
    """Raises `InputError` if the folder of a run holds a different run."""
    run = read_result(job)
    if run is None:
        try:
            run = load_checkpoint(job.run_dir)
        except InputError:
            return  # there is no run yet, or none that can be read
    saved, script = run["args"], script_of(job.cell.algorithm)
    found = restored(saved["task"], job.run_dir), saved["seed"], run["script"]
    same = found == (job.cell.task, job.seed, script)
    other = "" if same else f"of {run['script']}.py on {saved['task']}, seed {saved['seed']}"
    changed = other or changed_options(job.cell.algorithm, job.cell.task, rounded(saved))
    message = f"{job.run_dir} holds a run {other or f'with {changed}'}"
    require(not changed, f"{message}; move it away, or give another --folder")
    check_task(job, run)


def check_task(job: Job, run: dict) -> None:
    """Raises `InputError` if a task of your own has changed since its run.

    Checks who observes and drives what, and the returns that scores 0 and 1 stand for.
    """
    task, advice = find_task(job.cell.task), "move it away, or give another --folder"
    if not task.file:
        return
    if (job.run_dir / "checkpoint.pt").is_file():
        check_agents(load_checkpoint(job.run_dir), task, job.run_dir)
    if "return" in run:  # it has finished
        score = task.normalized_score(run["return"])
        same = math.isclose(score, run["score"], rel_tol=1e-6, abs_tol=1e-6)
        message = f"{job.run_dir} was scored by another random_return or expert_return"
        require(same, f"{message} than {task.option} has now; {advice}")


# Running it.


def check_cluster(args: Args) -> None:
    """Raises `InputError` if runs cannot be submitted as `args` say."""
    check_positive(args, "hours")
    require(args.gpus >= 0, f"--gpus must not be negative; it is {args.gpus}")
    wrong = ", ".join(option for option in args.slurm if "=" not in option)
    require(not wrong, f"--slurm takes NAME=VALUE; it has {wrong}")
    if args.cluster == "local":
        message = "--gpus and --slurm are for the jobs of --cluster slurm"
        require(not args.gpus and not args.slurm, message)
    elif not args.dry_run:  # which submits nothing
        try:
            import_module("submitit")
        except ImportError:
            raise InputError("--cluster slurm needs submitit: pip install submitit") from None
        advice = "run this on a machine of the cluster, or use --dry-run"
        require(shutil.which("sbatch"), f"--cluster slurm finds no sbatch; {advice}")


def ignore_usr2() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class SlurmJob:
    """One run, as submitit calls it: begun, or resumed from its checkpoint."""

    def __init__(self, job: Job, options: list[str]):
        self.job, self.options, self.folder = job, options, Path.cwd()

    def __call__(self) -> None:
        os.chdir(self.folder)
        command = job_command(self.job, self.options)
        # USR2 tells submitit that the time is up; some clusters send it to the run, too.
        self.process = subprocess.Popen(
            command, env=os.environ | JOB_ENVIRONMENT, preexec_fn=ignore_usr2
        )
        status = self.process.wait()
        if status in (128 + signal.SIGTERM, -signal.SIGTERM):
            # Slurm has told the run to stop, and it has saved, unless it had hardly begun. Now
            # Slurm ends this process, too; if it ended by itself, it would count as failed and not
            # as requeued.
            time.sleep(3600)
        if status:
            raise subprocess.CalledProcessError(status, command)

    def checkpoint(self):
        """When the job is preempted or its time is up, lets the run save and has the same job
        submitted again."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        with suppress(ChildProcessError):  # it has ended already
            os.waitpid(self.process.pid, 0)  # not wait(), whose lock __call__ holds meanwhile
        return DelayedSubmission(SlurmJob(self.job, self.options))  # a process cannot be pickled


def run_on_slurm(jobs: list[Job], args: Args, options: list[str]) -> None:
    """Submits an array of jobs and waits for all; says how each ended."""
    import submitit

    if not jobs:
        return
    logs = args.folder / "slurm" / "%j"
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    executor = submitit.AutoExecutor(logs, cluster="slurm")
    executor.update_parameters(
        name=f"table-{args.table}",
        timeout_min=max(1, round(60 * args.hours)),
        cpus_per_task=1,
        gpus_per_node=args.gpus,
        slurm_setup=[f"export PYTHONPATH={shlex.quote(path)}"],  # jobs import this script's modules
        slurm_additional_parameters=dict(option.split("=", 1) for option in args.slurm),
    )
    try:
        with executor.batch():  # one array of jobs
            submitted = [(executor.submit(SlurmJob(job, options)), job) for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"Slurm refuses these jobs ({reason}); change --slurm or --gpus") from None
    say(f"{len(jobs)} jobs, {submitted[0][0].job_id} and on; logs are in {logs.parent}")
    waiting = dict(submitted)
    try:
        while waiting:
            for ended in [job for job in waiting if job.done()]:
                output = f"{ended.stdout() or ''}\n{ended.stderr() or ''}"
                job = waiting.pop(ended)
                status = int(ended.exception() is not None)
                report(job, StringIO(output), status, f"{len(waiting)} to go")
            time.sleep(1)
    except KeyboardInterrupt:
        array = submitted[0][0].job_id.partition("_")[0]
        say(f"the jobs go on without this script; scancel {array} stops them. Run the same command")
        say("again when they have ended: earlier it would submit them a second time")
        sys.exit(128 + signal.SIGINT)


def load_result(path: Path) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        has_results = {"script", "score", "steps", "seconds"} <= result.keys()
        is_whole = has_results and {"task", "seed"} <= result["args"].keys()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); change its mode") from None
    except (ValueError, LookupError, AttributeError):
        is_whole = False
    advice = f"delete it, and --resume {path.parent} writes it again"
    require(is_whole, f"{path} is damaged; {advice}")
    return result


def read_result(job: Job) -> dict | None:
    path = job.run_dir / "result.json"
    return load_result(path) if path.is_file() else None


def why_it_failed(output: str, exit_status: int) -> str:
    """The run's own error lines, its world model's first; if there are none, its last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = lines[-1] if lines else "no output"
    return f"error: {'; '.join(errors)}" if errors else f"exit status {exit_status}: {last}"


def run_all(jobs: list[Job], workers: int, options: list[str], environment: dict) -> int | None:
    """Runs the jobs; returns the signal that stopped it, or None if it came to the end.

    If there are GPUs, concurrent runs are spread over them.
    """
    waiting, running, finished, stopped_by = list(jobs), {}, 0, None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    free_slots = list(range(workers))

    def stop(number, _):
        nonlocal stopped_by
        stopped_by = number

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while (waiting or running) and not stopped_by:
            while waiting and len(running) < workers:
                job, slot = waiting.pop(0), free_slots.pop(0)
                if gpus:
                    environment = environment | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
                log = tempfile.TemporaryFile("w+", errors="replace")
                command = job_command(job, options)
                redirection = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                process = subprocess.Popen(command, env=environment, **redirection)
                running[process] = (job, log, slot)
            for process in [process for process in running if process.poll() is not None]:
                job, log, slot = running.pop(process)
                free_slots.append(slot)
                finished += 1
                report(job, log, process.returncode, f"{finished} of {len(jobs)}")
            time.sleep(0.1)
    finally:
        # Only a signal or an error leaves runs behind; these save and stop.
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return stopped_by


def report(job: Job, log, exit_status: int, progress: str) -> None:
    """Prints how a run ended."""
    result = read_result(job)
    if result:
        outcome = f"score {result['score']:.3f}, {result['seconds']:.0f} s of training"
    else:
        log.seek(0)
        outcome = why_it_failed(log.read(), exit_status)
    task = find_task(job.cell.task).name
    say(f"{progress}: {job.cell.algorithm} on {task}, seed {job.seed}: {outcome}")


# Showing it.


def score_columns(results: list[dict]) -> tuple[str, str]:
    """The score, and what its error is taken over."""
    if not results:
        return "-", "no run"
    scores = [result["score"] for result in results]
    if len(scores) == 1:
        return f"{scores[0]:.3f}", f"1 run (± {results[0]['score_stderr']:.3f} over its episodes)"
    error = statistics.stdev(scores) / len(scores) ** 0.5
    return f"{statistics.mean(scores):.3f} ± {error:.3f}", f"{len(scores)} runs"


def print_table(results: dict[Cell, list[dict]], seeds: int) -> None:
    """A table in Markdown; ± is the standard error over seeds."""
    rows = [("algorithm", "task", "score", "runs", "the paper", "seconds a run")]
    for cell, finished in results.items():
        score, runs = score_columns(finished)
        if 0 < len(finished) < seeds:
            runs += f", {seeds - len(finished)} missing"
        paper = find_task(cell.task).paper_score(cell.algorithm) or "-"
        seconds = [result["seconds"] for result in finished]
        median = f"{statistics.median(seconds):.0f}" if seconds else "-"
        rows.append((cell.algorithm, find_task(cell.task).name, score, runs, paper, median))
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    say("")
    for row in rows:
        say(f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths))} |")
    say("")


def color_of(algorithm: str):
    """MOMA-PPO is black; the others cycle through twenty colours, the strong ones first.

    So do variants, which the tables do not mix with baselines other than LOGO.
    """
    if algorithm == "moma_ppo":
        return "black"
    colors = colormaps["tab20"].colors
    alike = VARIANTS if algorithm in VARIANTS else {*ALGORITHMS} - {*VARIANTS, "moma_ppo"}
    place = [name for name in ALGORITHMS if name in alike].index(algorithm)
    return [*colors[::2], *colors[1::2]][place % len(colors)]


def learning_curve(results: list[dict]) -> list[tuple[int, float, float, float]]:
    """(step, seconds, mean score, standard error over seeds) where all runs were evaluated."""
    curves = []
    for result in results:
        last = {"step": result["steps"], "seconds": result["seconds"], "score": result["score"]}
        points = [*result["evaluations"], last]
        # Leave out evaluations of a world model that is trained first.
        curves.append({point["step"]: point for point in points if "score" in point})
    points = []
    for step in sorted(set.intersection(*map(set, curves))):
        seconds = statistics.mean(curve[step]["seconds"] for curve in curves)
        scores = [curve[step]["score"] for curve in curves]
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
        points.append((step, seconds, statistics.mean(scores), deviation / len(scores) ** 0.5))
    return points


def plot_panel(axes, task: str, results: dict[str, list[dict]], over: str) -> None:
    """One task: each algorithm's curve, its score in the paper, and the dataset's mean score."""
    for algorithm, finished in results.items():
        color = color_of(algorithm)
        steps, seconds, mean, error = map(list, zip(*learning_curve(finished)))
        x = steps if over == "steps" else seconds
        axes.plot(x, mean, ".-", color=color, linewidth=1.5, markersize=5)
        low = [middle - width for middle, width in zip(mean, error)]
        high = [middle + width for middle, width in zip(mean, error)]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        paper = PAPER_SCORES.get(algorithm, {}).get(task)
        if paper:
            axes.axhline(float(paper.split()[0]), color=color, linestyle=":", linewidth=1)
        mean_return = finished[0]["dataset"]["mean_return"]
    found = find_task(task)
    dataset_score = found.normalized_score(mean_return)
    axes.axhline(dataset_score, color="grey", linestyle="--", linewidth=1)
    axes.set(title=found.name, xlabel=over)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)


def plot_curves(results: dict[Cell, list[dict]], path: Path, over: str, names=None) -> None:
    """Learning curves of all cells with a result, one panel per task, with `over` on the x axis.

    The legend calls algorithms what `names` calls them or, without it, what run folders do.
    """
    panels: dict[str, dict[str, list[dict]]] = {}
    for cell, finished in results.items():
        if finished:
            panels.setdefault(cell.task, {})[cell.algorithm] = finished
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6, 4 * columns), 0.7 + 3.5 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (task, own_results) in zip(grid, panels.items()):
        plot_panel(axes, task, own_results, over)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes in figure.axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("normalised score")

    used = [name for name in ALGORITHMS if any(name in own for own in panels.values())]
    labels = {name: name for name in used} | (names or {})
    handles = [Line2D([], [], color=color_of(name), label=labels[name]) for name in used]
    if any(task in PAPER_SCORES.get(name, {}) for task in panels for name in panels[task]):
        paper = "the paper's score (colour of its algorithm)"
        handles.append(Line2D([], [], color="grey", linestyle=":", label=paper))
    handles.append(Line2D([], [], color="grey", linestyle="--", label="the dataset's mean"))
    handles.append(Patch(color="grey", alpha=0.2, label="standard error over seeds"))
    for ncols in range(5, 0, -1):  # as many columns as there is room for
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=ncols)
        if legend.get_window_extent().width <= figure.bbox.width or ncols == 1:
            break
        legend.remove()
    figure.savefig(path, dpi=120)


def print_commands(unfinished: list[Job], options: list[str]) -> None:
    """The commands that can run now, one per line; what is left out goes to stderr."""
    prefix = " ".join(f"{name}={value}" for name, value in JOB_ENVIRONMENT.items())
    ready = [job for job in unfinished if not missing_model(job)]
    for job in ready:
        print(prefix, shlex.join(job_command(job, options)))
    to_come = [job.run_dir / "world_model.pt" for job in ready]
    for job in unfinished:
        if missing_model(job) and Path(own_options(job)[-1]) in to_come:
            note = "needs the world model of one of these; repeat --dry-run when it has ended"
            print(f"note: {job.run_dir.name} {note}", file=sys.stderr)
        elif missing_model(job):
            note = f"left out: {job.run_dir.name}, for which {missing_model(job)}"
            print(note, file=sys.stderr)


def main(args: Args) -> None:
    check_positive(args, "workers")
    check_cluster(args)
    table = TABLES[args.table]
    seeds = table.seeds if args.seeds is None else args.seeds
    require(seeds > 0, f"--seeds must be above 0; it is {seeds}")
    args.tasks = tuple(dict.fromkeys(args.tasks))  # each once
    args.algorithms = tuple(dict.fromkeys(args.algorithms))
    cells = table_cells(args)
    started = time.perf_counter()
    jobs = [
        Job(cell, seed, args.folder / f"{find_task(cell.task).name}__{cell.algorithm}__{seed}")
        for cell in cells
        for seed in range(1, seeds + 1)
    ]
    message = "two of --tasks have the same name, and would share run folders; rename one"
    require(len({job.run_dir for job in jobs}) == len(jobs), message)
    environment = os.environ | JOB_ENVIRONMENT
    options = compile_options() if table.compile else []
    for job in jobs:
        check_folder(job)
    unfinished = [job for job in jobs if not (job.run_dir / "result.json").is_file()]
    if args.dry_run:
        print_commands(unfinished, options)
        return

    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot use {args.folder} ({error.strerror}); give another --folder"
        raise InputError(message) from None
    writable = os.access(args.folder, os.W_OK)
    require(writable, f"cannot write to {args.folder}; give another --folder")
    for later in (False, True):
        now = [job for job in unfinished if needs_another_run(job.cell.algorithm) == later]
        for job in [job for job in now if missing_model(job)]:
            say(f"left out: {job.run_dir.name}, for which {missing_model(job)}")
            now.remove(job)
        if args.cluster == "slurm":
            run_on_slurm(now, args, options)
            continue
        stopped_by = run_all(now, args.workers, options, environment)
        if stopped_by:
            say("stopped; the same command resumes")
            sys.exit(128 + stopped_by)
    results = {cell: [] for cell in cells}
    for job in jobs:
        result = read_result(job)
        if result:
            results[job.cell].append(result)
    print_table(results, seeds)
    names = [find_task(task).name for task in args.tasks]
    name = "_".join(["table", args.table, *names, *args.algorithms])
    if len(name) > 200:  # for the name of a file
        name = f"table_{args.table}_{len(names)}_tasks_{len(args.algorithms)}_algorithms"
    plot_curves(results, args.folder / f"{name}.png", "seconds of training")
    plot_curves(results, args.folder / f"{name}_steps.png", "steps")
    failed = len(jobs) - sum(map(len, results.values()))
    where = "on Slurm" if args.cluster == "slurm" else f"{args.workers} runs at once"
    say(f"{time.perf_counter() - started:.0f} s, {where}")
    require(not failed, f"{failed} of {len(jobs)} runs failed; their errors are above")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
        sys.stdout.flush()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads what --dry-run prints has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
