"""Everything around an algorithm: command line, run folder, logs, checkpoints, Ctrl-C.

Nothing here is specific to an algorithm, and every script uses it the same way:

    def train(args: Args) -> dict:
        with Run(args, "ibc") as run:
            ...                                       # make dataset, networks and optimizer
            run.restore({"dataset": dataset.description}, team=team, optimizer=optimizer)
            for step in run.steps(evaluate_team):     # evaluates and saves on the way
                ...                                   # one update
                run.log({"losses/cloning": loss})
            return run.finish(evaluate_team(FINAL_EPISODES))

A run writes `runs/{task}__{script}__{seed}__{time}/`: TensorBoard events, `checkpoint.pt` from step
0 on, and finally `result.json`. `--resume RUN` continues as if never stopped: bit for bit on CPU.
"""

import ctypes
import dataclasses
import errno
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import typing
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import torch
import tyro
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mamujoco_envs import (
    Evaluation,
    InputError,
    available_cores,
    command_line,
    find_task,
    require,
)

torch.distributions.Distribution.set_default_validate_args(False)  # checks would stall a GPU

FINAL_EPISODES = 100
REPOSITORY = Path(__file__).resolve().parent
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco")


# The command line.


@dataclasses.dataclass
class Selection:
    """The two options that decide the defaults, read before the others."""

    task: str | None = None
    resume: Path | None = None


def default_args(defaults: dict, task: str):
    """The default `Args` of a task: those of its environment, or of one like it."""
    found = find_task(task)
    keys = (found.environment_name, found.defaults, None)
    known = next(key for key in keys if key in defaults)
    return dataclasses.replace(defaults[known], task=task)


def main(train: Callable, defaults: dict) -> None:
    """Runs `train` on the command line's arguments; bad input ends with one clear line.

    `defaults` maps an environment to its `Args`; None stands for all others.
    """
    args = None
    try:
        selection, _ = tyro.cli(Selection, return_unknown_args=True, add_help=False)
        if selection.resume:
            args = resumed_args(type(defaults[None]), selection.resume, sys.argv[1:])
        else:
            args = default_args(defaults, selection.task or defaults[None].task)
            args = tyro.cli(type(args), default=args)
        train(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        usual = args and default_args(defaults, args.task)
        sys.exit(f"error: {too_large(args, usual) if args else 'out of memory'}")
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; PyTorch reports a failed CPU allocation as a RuntimeError."""
    known = re.search("allocate memory|out of memory|Storage size", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(known))


def too_large(args, usual) -> str:
    """What to do when memory runs out: names the options that are larger than usual."""
    names = []
    for name, value in vars(args).items():
        takes_no_memory = name in ("seed", "eval_every") or name.endswith("_steps")
        is_size = type(value) in (int, tuple) and not takes_no_memory
        if is_size and value > (getattr(usual, name) or 0):
            names.append(f"--{name.replace('_', '-')}")
    usual_size = "--minibatch-size" if hasattr(args, "minibatch_size") else "--batch-size"
    advice = ", ".join(names) or f"{usual_size}, or a larger machine"
    return f"out of memory; use a smaller {advice}"


def resumed_args(args_type: type, run_dir: Path, words: list[str]):
    """The arguments of the run in `run_dir`; `words` may change its device and total steps, and
    tell where its dataset and the file of your own task are now.

    From Python: `train(resumed_args(Args, RUN, ["--resume", str(RUN)]))`.
    """
    flags = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    checkpoint = load_checkpoint(run_dir)
    saved, started_by = checkpoint["args"], checkpoint["script"]
    free = ["--device", "--total-steps", "--dataset"]
    if ":" in saved["task"]:  # FILE:NAME, whose file may have moved
        free.append("--task")
    others = ", ".join(sorted(flags - {"--resume", "--help", *free}))
    require(not others, f"--resume goes with {', '.join(free)} only, not with {others}")
    script = Path(sys.modules[args_type.__module__].__file__).stem
    require(started_by == script, f"{run_dir} is a run of {started_by}.py, not of {script}.py")
    fields = {field.name: field.type for field in dataclasses.fields(args_type)}
    require(
        saved.keys() == fields.keys(), f"{run_dir} was started by another version of {script}.py"
    )
    for name, value in saved.items():
        saved[name] = restored(value, run_dir)
        if value is not None and Path in typing.get_args(fields[name]):
            saved[name] = Path(saved[name])
    return tyro.cli(args_type, args=words, default=args_type(**saved))


def make_plain(args) -> None:
    """Converts what a notebook may pass to what the command line would: `Args` checks nothing."""
    for field in dataclasses.fields(args):
        value, options = getattr(args, field.name), typing.get_args(field.type)
        if isinstance(value, np.generic):  # PyTorch would not read it from a checkpoint
            setattr(args, field.name, value.item())
        elif isinstance(value, str) and Path in options:
            setattr(args, field.name, Path(value))
        elif typing.get_origin(field.type) is typing.Literal:
            names = ", ".join(map(str, options))
            require(value in options, f"{field.name} must be one of {names}; it is {value}")


def portable(value, run_dir: Path):
    """Makes paths inside the run or the repository relative to it, so that both can be moved.

    In FILE:NAME, a task of your own, this applies to FILE.
    """
    if isinstance(value, str) and ".py:" in value:
        file, name = value.rsplit(":", 1)
        return f"{portable(Path(file), run_dir)}:{name}"
    if not isinstance(value, Path):
        return value
    if str(value).startswith("minari:"):  # a name, not a path
        return str(value)
    path = value.resolve()
    for name, base in (("RUN", run_dir.resolve()), ("REPOSITORY", REPOSITORY)):
        if path.is_relative_to(base):
            return f"{name}/{path.relative_to(base)}"
    return str(path)


def restored(value, run_dir: Path):
    """Reverses `portable` for the value of an option."""
    if not isinstance(value, str):
        return value
    base, slash, rest = value.partition("/")
    bases = {"RUN": Path(run_dir), "REPOSITORY": REPOSITORY}
    return f"{bases[base]}/{rest}" if slash and base in bases else value


def check_positive(args, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        bound = "at most 1e9" if isinstance(value, int) else "finite"
        good = 0 < value <= 1e9 if isinstance(value, int) else 0 < value < float("inf")
        require(good, f"{flag} must be above 0 and {bound}; it is {value}")


def check_range(args, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        value = low if value is None else value  # None: a default that is determined later
        bounds = f"from {low:.10g} to {high:.10g}"
        require(low <= value <= high, f"{flag} must be {bounds}; it is {value}")


def check_output(path: Path) -> None:
    """Raises `InputError` unless a new file can be written there."""
    folder = path.absolute().parent
    require(folder.is_dir(), f"no folder {folder} to write to")
    require(os.access(folder, os.W_OK), f"cannot write to {folder}; give another --output")
    require(not path.exists(), f"{path} exists; give another --output, or move it away")


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" takes a CUDA GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    require(name != "cuda" or has_gpu, "--device cuda: PyTorch finds no CUDA GPU; use --device cpu")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def keep_freed_memory() -> None:
    """Keeps freed memory in the process: returning it to the system costs page faults.

    Tensors of a few MB come and go at every step. Affects glibc's malloc only.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Older versions refuse a threshold above 32 MB. The other call alone would make things worse.
    if mallopt and (mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)):
        mallopt(trim_threshold, 2**31 - 1)


def find_compiler() -> str | None:
    """A C++ compiler, which --compile needs."""
    compilers = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return next(filter(shutil.which, filter(None, compilers)), None)


def compiled(function: Callable, args, device: torch.device) -> Callable:
    """Compiles a function of tensors for this device, if --compile is given.

    On a GPU, kernels are launched from CUDA graphs. Random numbers stay those of eager mode.
    """
    if not args.compile:
        return function
    torch._inductor.config.fallback_random = True
    if device.type != "cuda":
        return torch.compile(function)
    graph = torch.compile(function, mode="reduce-overhead")

    def replay(*inputs):
        # The next replay writes over the outputs of this one, so the caller gets copies.
        torch.compiler.cudagraph_mark_step_begin()
        outputs = graph(*inputs)
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, outputs)

    return replay


# Files.


def save(data, path: Path) -> None:
    """Writes a checkpoint or a result atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")
        else:
            with open(temporary, "wb") as file:  # given a path, PyTorch hides why it failed
                torch.save(data, file)
        temporary.replace(path)
    except ValueError:
        raise InputError(f"cannot write {path}: a figure in it is not finite") from None
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, device="cpu"):
    """Reads what `save` wrote; raises an error if a byte of it has changed since."""
    with zipfile.ZipFile(path) as archive:  # PyTorch itself compares no checksums
        changed = archive.testzip()
        if changed:
            raise zipfile.BadZipFile(changed)
    return torch.load(path, map_location=device, weights_only=True)


def load_world_model(make: Callable, task, path: Path, device, command: str = ""):
    """`make(exported)` for what world_model.py or logo.py wrote to `path`, tried on one step.

    `command` makes such a file; by default, a command for world_model.py.
    """
    words = "world_model.py", "--task", task.option, "--output"
    message = f"no world model at {path}; make it with: {command or command_line(*words, path)}"
    require(path.is_file(), message)
    command = command or command_line(*words, "NEW.pt")
    try:
        exported = load(path, device)
        exported["description"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        made_for, model = exported["dataset"]["name"], make(exported)
        actions = torch.zeros(1, task.num_agents, task.action_dim, device=device)
        trial = model.step(torch.zeros(1, task.state_dim, device=device), actions)
        finite = all(x.isfinite().all() for x in trial)
        require(finite, f"{path} predicts what is not finite; make one with: {command}")
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); change its mode") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"is not a world model of {task.dataset} ({type(error).__name__})"
        raise InputError(f"{path} {reason}; make one with: {command}") from None
    message = f"{path} is a world model of {made_for}, not of {task.dataset}"
    same = Path(made_for).name == Path(task.dataset).name  # your own folder may have moved
    require(same, f"{message}; make one with: {command}")
    return model


def load_checkpoint(run_dir: Path) -> dict:
    path = Path(run_dir) / "checkpoint.pt"
    require(path.is_file(), f"no checkpoint at {path}; give the folder of a run")
    try:
        checkpoint = load(path)
        names = ("script", "args", "step", "seconds", "evaluations", "inputs", "random_states")
        for name in (*names, "state"):
            checkpoint[name]
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); change its mode") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{path} is damaged ({type(error).__name__}); start the run again"
        ) from None
    return checkpoint


def check_agents(checkpoint: dict, task, run_dir: Path) -> None:
    """Raises `InputError` if the agents of your own task have changed since its run started."""
    same = checkpoint.get("split", task.split) == task.split  # older checkpoints do not say
    message = f"agents of {task.option} observe or drive other dimensions than when {run_dir}"
    require(same, f"{message} started; put the old ones back, or start another run")


def check_scale(checkpoint: dict, task, run_dir: Path) -> None:
    """Raises `InputError` if the scoring of your own task has changed since its run started."""
    same = checkpoint.get("scale", task.scale) == task.scale  # older checkpoints do not say
    message = f"returns or episode_length of {task.option} are not what they were when {run_dir}"
    require(same, f"{message} started; put the old ones back, or start another run")


def load_team(run_dir: Path, task: str | None = None, checkpoint: dict | None = None):
    """The trained team of any script's run, on the CPU; `team.task` is its task.

    `team.act_greedily(observations, histories)` gives actions [batch, agent, action]. Give `task`,
    FILE:NAME, if the file that defines it has moved since, and `checkpoint` if the run's has
    already been read.
    """
    checkpoint = checkpoint or load_checkpoint(run_dir)
    script, saved = checkpoint["script"], checkpoint["args"]
    require("team" in checkpoint["state"], f"{run_dir} is a run of {script}.py and has no team")
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    name = script if (REPOSITORY / f"{script}.py").is_file() else f"baselines.{script}"
    message = f"{run_dir} is a run of {script}.py, which is not in this repository"
    require(importlib.util.find_spec(name), message)
    module = importlib.import_module(name)
    saved["task"] = task or restored(saved["task"], run_dir)
    task = find_task(saved["task"])
    check_agents(checkpoint, task, run_dir)
    try:
        # The statistics that standardise observations come with the weights.
        team = module.Team(task, torch.zeros(2, task.state_dim), module.Args(**saved))
        team.load_state_dict(checkpoint["state"]["team"])
    except (TypeError, RuntimeError):
        message = f"{run_dir} does not fit {task.option}, or is of another version of {script}.py"
        raise InputError(message) from None
    return team.eval()


def say(text: str) -> None:
    """Prints; neither a closed pipe nor a terminal that lacks characters may cost a result."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def progress(total: int, work: str) -> Iterator[int]:
    """Yields 0, 1, ...; a terminal shows a bar, redirected output a line every half minute."""
    interactive, last_said = sys.stderr.isatty(), -math.inf
    for step in tqdm(range(total), work, unit="step", disable=not interactive):
        now = time.perf_counter()
        if not interactive and now - last_said > 30:
            say(f"{work}: step {step} of {total}")
            last_said = now
        yield step


class Run:
    """One training run: its folder, which no other process can use meanwhile, and its progress."""

    def __init__(self, args, script: str, log_every: int = 100):
        """Logged values are averaged over `log_every` steps."""
        make_plain(args)
        check_range(args, 0, 2**32 - 1, "seed")
        if hasattr(args, "eval_episodes"):  # each has its own simulator
            check_range(args, 1, 10_000, "eval_episodes")
        self.args, self.script, self.device = args, script, find_device(args.device)
        self.log_every = log_every
        self.algorithm = script  # as PAPER_SCORES names it
        self.task = find_task(args.task)
        is_shipped = self.task.continues_from_states and not self.task.file
        if hasattr(args, "eval_episodes") and not is_shipped:
            self.task.make_simulator(1)  # reports what is missing before any long work
            message = f"{self.task.name} has no environment, so its data are those beside the model"
            has_environment = self.task.has_environment or not args.dataset
            require(has_environment, f"{message}; name them in the task, not with --dataset")
        self.checkpoint = load_checkpoint(args.resume) if args.resume else None
        self.step, self.seconds, self.evaluations = 0, 0.0, []
        self.tracked, self.inputs, self.sums, self.counts = {}, {}, {}, {}
        self.updating, self.started, self.signal, self.writer = False, False, None, None
        if self.checkpoint:
            started_by, saved = self.checkpoint["script"], self.checkpoint["args"]
            require(started_by == script, f"{args.resume} is a run of {started_by}.py")
            free = "device", "total_steps", "dataset", "run_dir", "resume"
            given = [(name, value) for name, value in vars(args).items() if name not in free]
            given = {name: portable(value, Path(args.resume)) for name, value in given}
            for options in (given, saved):  # FILE:NAME, whose file may have moved
                options["task"] = options["task"].rpartition(":")[2]
            changed = ", ".join(name for name in given if given[name] != saved.get(name))
            advice = "take those of training_run.resumed_args"
            require(not changed, f"{args.resume} was started with another {changed}; {advice}")
        if args.compile:
            compiler = find_compiler()
            advice = "install one (Debian: g++) or leave it out"
            require(compiler or args.resume, f"--compile needs a C++ compiler; {advice}")
            if compiler:
                os.environ["CXX"] = compiler  # which PyTorch reads
            else:
                args.compile = False
                say("note: there is no C++ compiler, so the run goes on without --compile")
        self.dir, self.lock = self._open_folder()
        if args.resume:  # whoever held the lock until now may have saved since
            self.checkpoint = load_checkpoint(args.resume)

    def _open_folder(self) -> tuple[Path, filelock.FileLock]:
        args = self.args
        stamp = time.strftime("%Y%m%d-%H%M%S")
        default = Path("runs") / f"{self.task.name}__{self.script}__{args.seed}__{stamp}"
        asked_for = args.resume or args.run_dir
        for attempt in itertools.count(1):
            suffix = f"-{attempt}" if attempt > 1 else ""
            run_dir = Path(asked_for or f"{default}{suffix}")
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                if not os.access(run_dir, os.W_OK):  # an existing lock could still be acquired
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                lock = filelock.FileLock(run_dir / ".lock", blocking=False)
                lock.acquire()
            except filelock.Timeout:
                message = f"{run_dir} is in use by a running process; wait for it or stop it"
                require(not asked_for, message)
                continue
            except OSError as error:
                advice = "change its mode" if args.resume else "give another --run-dir"
                raise InputError(f"cannot use {run_dir} ({error.strerror}); {advice}") from None
            for name in ("checkpoint.pt", "result.json", "world_model.pt"):
                for half_written in run_dir.glob(f"{name}.*.tmp"):  # by a killed process
                    half_written.unlink()
            # A game's world model, whole or half-trained, may already be in a new run's folder.
            new = {path.name for path in run_dir.iterdir()} <= {".lock", "world_model"}
            if args.resume or new:
                return run_dir, lock
            lock.release()
            advice = f"continue that run with --resume {run_dir}, or give another --run-dir"
            require(not asked_for, f"{run_dir} is not empty; {advice}")

    # Ctrl-C and SIGTERM: an update is finished first, anything else is interrupted at once.

    def __enter__(self) -> "Run":
        keep_freed_memory()
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number, _) -> None:
        first, self.signal = self.signal is None, number
        if first and not self.updating:  # a second signal must not interrupt __exit__
            raise KeyboardInterrupt(number)

    def __exit__(self, kind, error, traceback) -> None:
        consistent = self.started and not self.updating
        self.updating = True  # a second signal waits for the checkpoint
        try:
            if kind is KeyboardInterrupt and self.writer:
                if consistent:
                    self.save()
                say(f"stopped at step {self.step}; continue with --resume {self.dir}")
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.writer:
                with suppress(OSError):  # already reported if the disk is full
                    self.writer.close()
            if not any(path.name != ".lock" for path in self.dir.glob("*")):
                shutil.rmtree(self.dir, ignore_errors=True)  # nothing has begun yet
            self.lock.release()

    # The course of a run.

    def restore(self, inputs: dict, **tracked) -> None:
        """Registers what checkpoints hold, and loads it if the run is resumed.

        `tracked` are networks, optimizers and whatever else has `state_dict` and `load_state_dict`;
        `inputs` describes dataset and world model, whose "sha256" must not change during a run.
        """
        if hasattr(self.args, "eval_episodes") and not self.task.has_environment:
            path = self.task.world_model_path
            model = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            inputs = inputs | {"evaluation_model": model}
            if load(path)["dataset"]["sha256"] != inputs["dataset"]["sha256"]:
                say(f"note: {path}, in which teams are scored, was trained on other data")
        self.inputs, self.tracked = inputs, tracked
        resumed = self.checkpoint is not None
        if resumed:
            check_agents(self.checkpoint, self.task, self.dir)
            check_scale(self.checkpoint, self.task, self.dir)
            for name, description in inputs.items():
                before = self.checkpoint["inputs"].get(name, description)["sha256"]
                name = name.replace("_", " ")
                message = f"the {name} has changed since {self.dir} started; put the old one back"
                require(description["sha256"] == before, message)
            try:
                for name, module in tracked.items():
                    module.load_state_dict(self.checkpoint["state"][name])
            except InputError:
                raise
            except (LookupError, RuntimeError, ValueError):
                message = f"{self.dir} was started by another version of {self.script}.py"
                raise InputError(f"{message}; start the run again") from None
            for schedule in tracked.values():
                if isinstance(schedule, LambdaLR):  # --total-steps may have changed
                    groups = schedule.optimizer.param_groups
                    for group, rate, decay in zip(groups, schedule.base_lrs, schedule.lr_lambdas):
                        group["lr"] = rate * decay(schedule.last_epoch)
            self.step, self.seconds = self.checkpoint["step"], self.checkpoint["seconds"]
            self.evaluations = self.checkpoint["evaluations"]
            torch.set_rng_state(self.checkpoint["random_states"]["cpu"])
            cuda_state = self.checkpoint["random_states"]["cuda"]
            if self.device.type == "cuda" and cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state)
            self.checkpoint = None  # frees its memory
        if not resumed:
            self.save()
        size = (self.dir / "checkpoint.pt").stat().st_size
        enough = shutil.disk_usage(self.dir).free > 4 * size  # old, new, result and logs
        advice = f"make room for {4 * size / 1e6:.0f} MB"
        advice += "" if resumed else ", or give another --run-dir"
        require(enough, f"the disk of {self.dir} is almost full; {advice}")
        if resumed:
            time.sleep(1)  # TensorBoard orders event files by the second in which they were made
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1)
        arguments = "\n".join(f"- {name}: {value}" for name, value in vars(self.args).items())
        self.writer.add_text("arguments", arguments)
        self.clock = time.perf_counter()  # training time counts from here
        say(f"{self.dir}: {self.task.name}, seed {self.args.seed}, on {self.device}")
        if hasattr(self.args, "eval_episodes") and not self.task.has_environment:
            model = self.task.world_model_path
            say(f"note: {self.task.name} has no environment; scores are those of {model} alone")

    def save(self) -> None:
        cuda_state = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        args = {name: portable(value, self.dir) for name, value in vars(self.args).items()}
        checkpoint = {
            "script": self.script,
            "algorithm": self.algorithm,
            "split": self.task.split,
            "scale": self.task.scale,
            "args": args | {"resume": None},
            "step": self.step,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "inputs": self.inputs,
            "random_states": {"cpu": torch.get_rng_state(), "cuda": cuda_state},
            "state": {name: module.state_dict() for name, module in self.tracked.items()},
        }
        self._write(checkpoint, "checkpoint.pt")
        if self.writer:
            with self._writing_events():
                self.writer.flush()

    @contextmanager
    def _writing_events(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"cannot write events in {self.dir} ({error.strerror})"
            raise InputError(f"{message}; the run can be resumed") from None

    def _write(self, data: dict, name: str) -> None:
        # A signal waits until the file is whole: else PyTorch would turn it into its own error.
        updating, self.updating = self.updating, True
        try:
            save(data, self.dir / name)
        except InputError as error:
            kept = (self.dir / "checkpoint.pt").is_file()
            raise InputError(f"{error}{'; the run can be resumed' if kept else ''}") from None
        finally:
            self.updating = updating
        if self.signal and not updating:
            raise KeyboardInterrupt(self.signal)

    def steps(self, evaluate: Callable, total: int | None = None) -> Iterator[int]:
        """Yields 1, 2, ..., `total`; between updates logs, evaluates, saves, or stops.

        `evaluate(episodes)` returns an `Evaluation`, or a dict of what to keep, whose numbers are
        logged. The last step is not evaluated here: the final evaluation has more episodes.
        """
        self.started, total = True, total or self.args.total_steps
        message = f"{self.dir} has taken {self.step} steps in all, more than {total}"
        require(self.step <= total, f"{message}; give a larger --total-steps")
        interactive = sys.stderr.isatty()
        bar = tqdm(total=total, initial=self.step, unit="step", disable=not interactive)
        last_said = time.perf_counter()
        while True:
            evaluated = self._between_updates(evaluate, total)
            bar.set_postfix_str(self._headline(), refresh=False)
            if self.step >= total:
                bar.close()
                return
            quiet = time.perf_counter() - last_said
            if not interactive and (evaluated or quiet > 30):
                speed = self.step / (self.seconds + time.perf_counter() - self.clock)
                say(f"step {self.step} of {total}: {self._headline()}, {speed:.3g} steps/s")
                last_said = time.perf_counter()

            self.updating = True
            yield self.step + 1
            self.step += 1
            self.updating = False
            bar.update()

    def _between_updates(self, evaluate: Callable, total: int) -> bool:
        """Logs, evaluates, saves or stops when due; returns whether it evaluated."""
        last = self.step >= total
        already = self.evaluations and self.evaluations[-1]["step"] == self.step
        due = self.step % self.args.eval_every == 0 and not already
        if due or last or self.signal or self.step % self.log_every == 0:
            self._write_logs()
            if due or last:
                self.save()
            if due and not last and not self.signal:
                self._evaluate(evaluate)
                self.save()
            self.clock = time.perf_counter()
        if self.signal:
            raise KeyboardInterrupt(self.signal)
        return due and not last

    def log(self, values: dict[str, torch.Tensor | float]) -> None:
        """Accumulates means for TensorBoard, without waiting for the GPU to compute the values."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def _write_logs(self) -> None:
        # Reading the sums waits for the GPU, so the clock is read only then.
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.seconds += time.perf_counter() - self.clock
        for name, mean in means.items():
            good = abs(mean) < float("inf") or not name.startswith("losses/")
            advice = "start again with a smaller learning rate"
            require(good, f"{name} is not finite before step {self.step}; {advice}")
            self._add_scalar(name, mean)
        if means:
            self._add_scalar("charts/SPS", self.step / self.seconds)
        self.sums, self.counts = {}, {}

    def _add_scalar(self, tag: str, value: float) -> None:
        with self._writing_events():
            self.writer.add_scalar(tag, value, self.step)

    def _headline(self) -> str:
        """The first figure of the last evaluation: a team's score, a world model's error."""
        if not self.evaluations:
            return ""
        name = next(name for name in self.evaluations[-1] if name not in ("step", "seconds"))
        return f"{name.replace('_', ' ')} {self.evaluations[-1][name]:.3g}"

    def _evaluate(self, evaluate: Callable) -> None:
        # An evaluation that is stopped half-way and repeated must not change what comes after it.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            record = evaluate(getattr(self.args, "eval_episodes", None))
        record = record.record() if isinstance(record, Evaluation) else record
        advice = "start again with a smaller learning rate, or look at the environment's rewards"
        for name, value in record.items():
            good = not isinstance(value, float) or math.isfinite(value)
            require(good, f"{name} is not finite at step {self.step}; {advice}")
        self.log_evaluation(record)
        self.evaluations.append({"step": self.step, "seconds": self.seconds} | record)

    def log_evaluation(self, record: dict) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)):
                tag = "normalized_score" if name == "score" else name
                self._add_scalar(f"eval/{tag}", value)

    def finish(self, evaluation: Evaluation) -> dict:
        """Writes result.json from the final evaluation, draws the task's figure, and returns it."""
        final = evaluation.record()
        advice = "start again with a smaller learning rate"
        require(math.isfinite(final["score"]), f"the final score is not finite; {advice}")
        self.log_evaluation(final)
        result = final | {
            "paper_score": self.task.paper_score(self.algorithm),
            "steps": self.step,
            "evaluations": self.evaluations,
        }
        self.write_result(result)
        score = f"{final['score']:.3f} ± {final['score_stderr']:.3f}"
        episodes = f"{len(final['returns'])} greedy episodes"
        paper = result["paper_score"] or "no figure"
        where = f" in {evaluation.evaluated_in}" if evaluation.evaluated_in else ""
        say(f"{self.task.name}: score {score} over {episodes}{where} (paper: {paper})")
        say(f"{self.seconds:.0f} s of training; everything is in {self.dir}")
        if self.task.plot:
            self.task.plot(evaluation, self.dir / "strategy.png")
        return result

    def write_result(self, result: dict) -> None:
        """Adds where the numbers come from, and writes result.json."""
        args = {name: portable(value, self.dir) for name, value in vars(self.args).items()}
        args = {
            name: str(value) if value == float("inf") else value for name, value in args.items()
        }
        result |= {
            "script": self.script,
            "algorithm": self.algorithm,
            "args": args,
            **self.inputs,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "machine": {
                "device": self.device.type,
                "name": torch.cuda.get_device_name() if self.device.type == "cuda" else None,
                "cores": available_cores(),
                "threads": torch.get_num_threads(),
            },
            "seconds": self.seconds,
            "steps_per_second": self.step / max(self.seconds, 1e-9),
        }
        self._write(result, "result.json")
