"""Times one update of every script, eager and compiled, and compares it with an earlier run.

    python scripts/benchmark.py --output before.json
    python scripts/benchmark.py --baseline before.json --scripts ibc maiql

Each script's own train() runs in a process with one thread, unless OMP_NUM_THREADS says otherwise;
the timed update is what its loop does between two steps. The processes of a task take turns, a few
updates each, so that a busy spell of the machine hits all of them. The figure is the median over
rounds of the process's CPU time per update. More: docs/benchmark.md.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from data.offline_dataset import dataset_path
from mamujoco_envs import InputError, available_cores, find_task, require
from training_run import (
    PACKAGES,
    Run,
    check_output,
    check_positive,
    compiled,
    default_args,
    save,
    say,
)

BASELINES = ("iql", "maiql", "matd3_bc", "ibc", "itd3_bc", "icql", "iomar", "inspo", "logo")
SCRIPTS = ("world_model", "moma_ppo", *BASELINES)
MODES = ("eager", "compiled")
# Scripts with one learner that sees the whole state are timed on the fully observable task.
CENTRALIZED = ("world_model", "iql")
OBSERVANT = {"reacher-leader-only": "reacher-all-observant", "ant-medium-po": "ant-medium-fo"}
# MOMA-PPO's update is a learning step; its cloning, like InSPO's and LOGO's, is not timed. Six
# updates contain one turn of InSPO and one generation of LOGO's rollouts, sized in proportion.
OVERRIDES = {
    "moma_ppo": {"cloning_steps": 0},
    "inspo": {"cloning_share": 0.0, "turn_steps": 6, "pool_size": 1200},
    "logo": {"model_steps": 1, "cloning_steps": 0, "refresh_every": 6, "rollouts": 24},
}
WARM_UP = 6  # updates, in which torch.compile compiles


@dataclass
class Args:
    tasks: tuple[str, ...] = ("reacher-leader-only", "ant-medium-po", "ant-medium-fo")
    """tasks; those whose dataset is missing are left out"""
    scripts: tuple[str, ...] = SCRIPTS
    """scripts, without .py"""
    modes: tuple[str, ...] = MODES
    """eager, compiled or both"""
    rounds: int = 5
    """rounds, over which the median is taken"""
    updates: int = 6
    """consecutive updates per round: a multiple of 6, for whole turns of InSPO and LOGO"""
    baseline: Path | None = None
    """an earlier --output to compare with"""
    output: Path | None = None
    """a .json file for the figures"""


class Cell(NamedTuple):
    script: str
    task: str
    mode: str


# In the process that is timed.


class TimedRun(Run):
    """A run whose updates are timed, as many at a time as the other end of `pipe` asks for."""

    pipe = None
    parts = {}
    """CPU seconds spent in each function that goes through `compiled`"""

    def steps(self, evaluate, total=None):
        """Yields like `Run.steps`, but never evaluates, saves or ends."""
        while True:
            count = self.pipe.recv()
            self.parts.clear()
            started = time.process_time()
            for _ in range(count):
                self.step += 1
                yield self.step
            seconds = {"update": time.process_time() - started} | self.parts
            self.pipe.send({name: 1000 * spent / count for name, spent in seconds.items()})


def timed_compiled(function, args, device):
    """`compiled`, but records the CPU time of its calls."""
    fast, parts = compiled(function, args, device), TimedRun.parts

    def call(*inputs):
        started = time.process_time()
        outputs = fast(*inputs)
        spent = time.process_time() - started
        parts[function.__name__] = parts.get(function.__name__, 0) + spent
        return outputs

    return call


def serve(cell: Cell, run_dir: Path, pipe) -> None:
    """Runs a script's train() with `TimedRun` in place of `Run`, until it is terminated."""
    sys.stdout = open(os.devnull, "w")
    module = import_module(f"baselines.{cell.script}" if cell.script in BASELINES else cell.script)
    TimedRun.pipe = pipe
    module.Run, module.compiled = TimedRun, timed_compiled
    own = {"device": "cpu", "compile": cell.mode == "compiled", "run_dir": run_dir}
    own |= OVERRIDES.get(cell.script, {})
    try:
        module.train(replace(default_args(module.DEFAULTS, cell.task), **own))
    except InputError as error:
        pipe.send(str(error))
    except (KeyboardInterrupt, EOFError, ConnectionError):  # stopped, or the parent has ended
        pass


# In the process that asks.


class Worker:
    """A process that times one cell."""

    def __init__(self, cell: Cell, folder: Path):
        self.cell, self.blocks = cell, []
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        run_dir = folder / "__".join(cell)
        self.process = context.Process(target=serve, args=(cell, run_dir, other_end), daemon=True)
        self.process.start()
        other_end.close()

    def time(self, updates: int) -> dict[str, float]:
        """CPU milliseconds per update and in its parts."""
        try:
            self.pipe.send(updates)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            answer = "its process died; the reason is above"
        name = " ".join(self.cell)
        require(isinstance(answer, dict), f"{name}: {answer}")
        return answer


def choose_cells(args: Args) -> dict[str, list[Cell]]:
    """The cells of each task whose dataset exists."""
    cells = {}
    for name in args.tasks:
        task = find_task(name)
        if task.recorder and not dataset_path(task).is_file():
            say(f"{name} is left out: there is no {dataset_path(task)}")
            continue
        for script in args.scripts:
            own_task = OBSERVANT.get(name, name) if script in CENTRALIZED else name
            for mode in args.modes:
                cells[Cell(script, own_task, mode)] = name
    require(cells, "nothing to time; record the datasets named above, as in docs/datasets.md")
    return {task: [cell for cell in cells if cells[cell] == task] for task in cells.values()}


def time_task(cells: list[Cell], args: Args, folder: Path) -> dict[str, dict]:
    """Milliseconds of every cell; their processes take turns."""
    workers = []
    for cell in cells:
        say(f"starting {' '.join(cell)}")
        workers.append(Worker(cell, folder))
        workers[-1].time(WARM_UP)
    for _ in range(args.rounds):
        for worker in workers:
            worker.blocks.append(worker.time(args.updates))
    for worker in workers:
        worker.process.terminate()
        worker.process.join()
    times = {}
    for worker in workers:
        medians = {
            part: statistics.median(block[part] for block in worker.blocks)
            for part in worker.blocks[0]
        }
        updates = [block["update"] for block in worker.blocks]
        times[" ".join(worker.cell)] = {"median": medians, "update": updates}
    return times


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine() -> dict:
    return {
        "processor": processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def machine_line(machine: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    use = f"{machine['cores']} cores, {machine['threads']} threads, load {machine['load']}"
    return f"{machine['processor']}, {use}; {versions}"


def print_times(times: dict[str, dict], before: dict[str, float]) -> None:
    """A table in Markdown: milliseconds, their spread, the baseline's and the ratio."""
    header = ["script", "task", "mode", "ms", "spread", "of which"]
    if before:
        header += ["before", "before / now"]
    print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for name, cell in times.items():
        milliseconds = cell["median"]["update"]
        spread = (max(cell["update"]) - min(cell["update"])) / milliseconds
        parts = [f"{part} {ms:.1f}" for part, ms in cell["median"].items() if part != "update"]
        script, rest = name.split(maxsplit=1)
        task, mode = rest.rsplit(maxsplit=1)
        row = [script, task, mode, f"{milliseconds:.1f}", f"{spread:.0%}", ", ".join(parts)]
        if before:
            earlier = before.get(name)
            row += [f"{earlier:.1f}", f"{earlier / milliseconds:.2f}"] if earlier else ["-", "-"]
        print(f"| {' | '.join(row)} |")


def main(args: Args) -> None:
    check_positive(args, "rounds", "updates")
    require(args.updates % 6 == 0, f"--updates must be a multiple of 6; it is {args.updates}")
    for name in ("tasks", "scripts", "modes"):
        require(getattr(args, name), f"--{name} needs at least one name; leave it out for all")
    for names, known in ((args.scripts, SCRIPTS), (args.modes, MODES)):
        unknown = ", ".join(name for name in names if name not in known)
        require(not unknown, f"cannot time {unknown}; take one of {', '.join(known)}")
    if args.output:
        require(args.output.suffix == ".json", f"--output must end in .json; it is {args.output}")
        check_output(args.output)
    before, earlier = {}, {}
    if args.baseline:
        require(args.baseline.is_file(), f"no file {args.baseline} to compare with")
        try:
            before = json.loads(args.baseline.read_text(encoding="utf-8"))
            machine_line(before["machine"])  # raises what is caught below
            earlier = {name: cell["median"]["update"] for name, cell in before["times"].items()}
            sum(earlier.values())  # so does this, if one is no number
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{args.baseline} is not what this script's --output writes") from None
    machine, times = describe_machine(), {}
    with tempfile.TemporaryDirectory() as folder:
        for cells in choose_cells(args).values():
            times |= time_task(cells, args, Path(folder))
            if args.output:  # a later task may be stopped
                save({"machine": machine, "times": times}, args.output)
    print_times(times, earlier)
    print("\nCPU milliseconds per update; the spread is (slowest - fastest round) / median")
    print(f"now: {machine_line(machine)}")
    if args.baseline:
        print(f"before: {machine_line(before['machine'])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
