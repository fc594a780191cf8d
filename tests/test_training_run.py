"""Runs as people have them: stopped, killed, resumed, moved, started twice, given nonsense.

`Run` is the same in every script, so IBC's on a tiny dataset stand for all. Processes are few,
because importing PyTorch takes longer than the runs: signals are sent to this process.
"""

import io
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up import REACHER, recorded_columns, with_a_bit_changed, write_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training_run
from baselines import ibc
from baselines.ibc import DEFAULTS
from data.offline_dataset import OfflineDataset
from mamujoco_envs import InputError, Simulator, evaluate, find_task
from training_run import Run, load_checkpoint, load_team

ROOT = Path(__file__).parents[1]
SCRIPT = "baselines/ibc.py"
OPTIONS = {"batch_size": 16, "total_steps": 40, "eval_every": 10, "eval_episodes": 5}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def flags(**options):
    words = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return [str(word) for pair in words.items() for word in pair]


@pytest.fixture(autouse=True)
def short_end(monkeypatch):
    """A run ends with a few episodes, and without its figure."""
    monkeypatch.setattr(ibc, "FINAL_EPISODES", 10)
    monkeypatch.setattr(training_run, "find_task", lambda name: replace(find_task(name), plot=None))


@pytest.fixture
def args(reacher_file, tmp_path):
    return ibc.Args(dataset=reacher_file, run_dir=tmp_path / "run", device="cpu", **OPTIONS)


@pytest.fixture(scope="module")
def whole(reacher_file, tmp_path_factory):
    """A run that was never stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ibc, "FINAL_EPISODES", 10)
        ibc.train(ibc.Args(dataset=reacher_file, run_dir=run_dir, device="cpu", **OPTIONS))
    return run_dir


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    """Without its result, as if stopped after the last step."""
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    return tmp_path / "copy"


def result_of(run_dir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads((run_dir / "result.json").read_text(), parse_constant=refuse)


def scalars(run_dir):
    """What TensorBoard shows of a run: {tag: {step: value}}."""
    accumulator = EventAccumulator(str(run_dir))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


def without_times(result):
    """Also of its evaluations. Arguments name the folder and the number of steps."""
    times = {"seconds", "steps_per_second", "args"}
    kept = {name: value for name, value in result.items() if name not in times}
    if "evaluations" in kept:
        kept["evaluations"] = [without_times(record) for record in kept["evaluations"]]
    return kept


def assert_same_run(one, other):
    """The same returns and, to the bit, the same weights and optimizer."""
    results = [without_times(result_of(run_dir)) for run_dir in (one, other)]
    assert results[0] == results[1]
    states = [load_checkpoint(run_dir)["state"] for run_dir in (one, other)]
    for name in states[0]["team"]:
        assert torch.equal(states[0]["team"][name], states[1]["team"][name]), name
    moments = [state["optimizer"]["state"] for state in states]
    for key, moment in moments[0].items():
        assert torch.equal(moment["exp_avg"], moments[1][key]["exp_avg"])
    shown = [scalars(run_dir)["eval/return"] for run_dir in (one, other)]
    assert shown[0] == shown[1]  # none lost, none twice


def resume(run_dir, **changes):
    """As `--resume` does it, in this process."""
    words = ["--resume", str(run_dir), *flags(**changes)]
    return ibc.train(training_run.resumed_args(ibc.Args, run_dir, words))


# What a run leaves behind.


def test_result(whole, reacher_file):
    result = result_of(whole)
    assert len(result["returns"]) == 10
    scores = REACHER.normalized_score(np.array(result["returns"]))
    assert result["score"] == pytest.approx(scores.mean())
    assert result["score_stderr"] == pytest.approx(scores.std(ddof=1) / 10**0.5)
    assert [evaluation["step"] for evaluation in result["evaluations"]] == [0, 10, 20, 30]
    assert all(len(evaluation["returns"]) == 5 for evaluation in result["evaluations"])
    assert result["paper_score"] == "0.84 ± 0.02"
    assert result["args"]["dataset"] == str(reacher_file) and result["args"]["batch_size"] == 16
    assert result["args"]["run_dir"] == "RUN/."
    assert result["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "gymnasium", "mujoco"} < set(result["versions"])
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["dataset"]["transitions"] == 2000 and len(result["dataset"]["sha256"]) == 64
    assert result["steps_per_second"] == pytest.approx(40 / result["seconds"])
    assert result["script"] == "ibc" and result["steps"] == 40


def test_files_and_tensorboard(whole):
    names = {path.name for path in whole.iterdir() if not path.name.startswith("events.")}
    assert names - {".lock"} == {"checkpoint.pt", "result.json", "strategy.png"}
    assert (whole / "strategy.png").read_bytes().startswith(b"\x89PNG")
    shown = scalars(whole)
    assert {"losses/cloning", "eval/return", "eval/normalized_score", "charts/SPS"} <= set(shown)
    speed = shown["charts/SPS"][max(shown["charts/SPS"])]  # the mean of the whole run
    assert speed == pytest.approx(result_of(whole)["steps_per_second"], rel=0.01)
    assert all(map(math.isfinite, shown["losses/cloning"].values()))
    for evaluation in result_of(whole)["evaluations"]:
        got = shown["eval/normalized_score"][evaluation["step"]]
        assert got == pytest.approx(evaluation["score"])
    assert load_checkpoint(whole)["step"] == 40


def test_the_trained_team_loads(whole):
    team = load_team(whole)
    assert team.task.name == REACHER.name
    got = evaluate(team.task, team.act_greedily, 10).returns
    np.testing.assert_allclose(got, result_of(whole)["returns"])


# Folders.


def test_runs_that_start_at_once_get_folders_of_their_own():
    barrier = threading.Barrier(8)

    def start(_):
        barrier.wait()
        return Run(ibc.Args(), "ibc")

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(start, range(8)))
    assert len({run.dir for run in runs}) == 8
    assert all(run.dir.parent == Path("runs") for run in runs)
    for run in runs:
        run.lock.release()


def test_a_run_in_use_is_not_resumed_a_second_time(copy_of_whole, args):
    with Run(replace(args, run_dir=None, resume=copy_of_whole), "ibc"):
        before = sorted(copy_of_whole.iterdir())
        with pytest.raises(InputError, match="in use by a running process"):
            resume(copy_of_whole)
        with pytest.raises(InputError, match="in use by a running process"):
            ibc.train(replace(args, run_dir=copy_of_whole))
        assert sorted(copy_of_whole.iterdir()) == before
    resume(copy_of_whole)  # it is free again


def test_a_run_is_not_resumed_with_other_options(copy_of_whole, args):
    with pytest.raises(InputError, match="started with another learning_rate; take those"):
        Run(replace(args, run_dir=None, resume=copy_of_whole, learning_rate=1e-5), "ibc")


def test_a_folder_with_files_is_left_alone(args, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty; continue that run with --resume"):
        ibc.train(args)
    assert (tmp_path / "run" / "notes.txt").read_text() == "keep"
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"notes.txt", ".lock"}


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_a_file_in_the_place_of_a_folder_is_left_alone(args, tmp_path, folder):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="cannot use .*give another --run-dir"):
        ibc.train(replace(args, run_dir=tmp_path / folder))
    assert (tmp_path / "file").read_text() == "keep"


def test_an_empty_folder_is_used(args, tmp_path):
    (tmp_path / "run").mkdir()
    with Run(args, "ibc") as run:
        assert run.dir == tmp_path / "run"


def test_a_moved_run_resumes(args, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt), stopped_at_step(15):
        ibc.train(args)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    resume(moved)
    assert_same_run(moved, whole)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_data_have_moved_resumes(args, whole, tmp_path):
    (tmp_path / "here").mkdir()
    data = Path(shutil.copy(args.dataset, tmp_path / "here"))
    with pytest.raises(KeyboardInterrupt), stopped_at_step(15):
        ibc.train(replace(args, dataset=data))
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(InputError, match="no dataset at"):
        resume(args.run_dir)
    resume(args.run_dir, dataset=tmp_path / "there" / data.name)
    assert_same_run(args.run_dir, whole)


# Stopping and resuming.


@contextmanager
def stopped_at_step(step, number=signal.SIGTERM):
    """Sends this process a signal while the minibatch of the given update is sampled."""
    calls, sample_rows = itertools.count(1), OfflineDataset.sample_rows

    def sample_and_signal(dataset, *arguments):
        if next(calls) == step:
            signal.raise_signal(number)
        return sample_rows(dataset, *arguments)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(OfflineDataset, "sample_rows", sample_and_signal)
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_update_is_finished_before_a_stop(number, args, whole, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt) as stop, stopped_at_step(15, number):
        ibc.train(args)
    assert stop.value.args == (number,)
    assert load_checkpoint(tmp_path / "run")["step"] == 15
    assert f"stopped at step 15; continue with --resume {args.run_dir}" in capsys.readouterr().out
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_second_signal_does_not_keep_a_run_from_saving(args, whole, monkeypatch):
    """As when a table is stopped: it sends its runs another one after Ctrl-C."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]

    def stopped_twice(*arguments, **options):
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(ibc, "evaluate", stopped_twice)
        with pytest.raises(KeyboardInterrupt):
            ibc.train(args)
    assert [signal.getsignal(number) for number in numbers] == handlers
    resume(args.run_dir)
    assert_same_run(args.run_dir, whole)


def test_a_killed_run_resumes(args, whole, tmp_path, environment):
    """Killed as soon as it has a checkpoint, in a process of its own."""
    command = [sys.executable, ROOT / SCRIPT, "--dataset", args.dataset, "--device", "cpu"]
    command += ["--run-dir", args.run_dir, *flags(**OPTIONS)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not (args.run_dir / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (args.run_dir / "result.json").exists()
    time.sleep(1)  # TensorBoard's files are ordered by the second of their start
    resume(args.run_dir)
    assert_same_run(args.run_dir, whole)


def test_a_stop_waits_for_a_checkpoint_that_is_being_written(args, whole, monkeypatch):
    torch_save = torch.save

    def stopped_while_writing(data, file):
        signal.raise_signal(signal.SIGTERM)
        torch_save(data, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", stopped_while_writing)
        with pytest.raises(KeyboardInterrupt):
            ibc.train(args)
    assert load_checkpoint(args.run_dir)["step"] == 0
    resume(args.run_dir)
    assert_same_run(args.run_dir, whole)


def test_a_run_killed_while_it_saves_resumes(args, whole, monkeypatch):
    """A checkpoint is written whole or not at all, and debris of a killed process goes."""
    saves, torch_save = [], torch.save

    def interrupted(data, file):
        saves.append(file)
        if len(saves) == 4:
            file.write(b"half of")
            raise MemoryError  # as close to a kill as this process survives
        torch_save(data, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", interrupted)
        with pytest.raises(MemoryError):
            ibc.train(args)
    (args.run_dir / "checkpoint.pt.123.tmp").write_bytes(b"half of")
    resume(args.run_dir)
    assert not list(args.run_dir.glob("*.tmp"))
    assert_same_run(args.run_dir, whole)


def test_a_run_killed_in_its_first_checkpoint_starts_again(args, whole):
    args.run_dir.mkdir()
    (args.run_dir / ".lock").touch()
    (args.run_dir / "checkpoint.pt.123.tmp").write_bytes(b"half of")
    ibc.train(args)
    assert not list(args.run_dir.glob("*.tmp"))
    assert_same_run(args.run_dir, whole)


@pytest.mark.parametrize("saved, hint", [(0, ""), (1, "; the run can be resumed")])
def test_a_full_disk_is_one_line(saved, hint, args, monkeypatch):
    saves, save = itertools.count(), torch.save

    def full(data, file):
        if next(saves) == saved:
            raise OSError(28, "No space left on device")
        save(data, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=rf"cannot write .*\(No space left on device\){hint}$"):
        ibc.train(args)


def test_more_steps_may_be_given_on_resuming(copy_of_whole):
    result = resume(copy_of_whole, total_steps=50)
    assert result["steps"] == 50 and load_checkpoint(copy_of_whole)["step"] == 50
    assert [evaluation["step"] for evaluation in result["evaluations"]] == [0, 10, 20, 30, 40]


def test_a_figure_that_is_not_finite_is_one_line(tmp_path):
    with pytest.raises(InputError, match="x.json: a figure in it is not finite"):
        training_run.save({"score": float("nan")}, tmp_path / "x.json")
    assert not list(tmp_path.glob("x.json*"))


def test_fewer_steps_than_were_taken_are_refused(copy_of_whole):
    with pytest.raises(InputError, match="has taken 40 steps in all, more than 2"):
        resume(copy_of_whole, total_steps=2)
    assert load_checkpoint(copy_of_whole)["step"] == 40


def test_resuming_a_finished_run_finishes_again(whole, copy_of_whole):
    resume(copy_of_whole)
    assert without_times(result_of(copy_of_whole)) == without_times(result_of(whole))


def test_a_changed_dataset_is_noticed(args, tmp_path):
    columns = recorded_columns(REACHER, episodes=2, scale=1.0)
    args = replace(args, dataset=write_dataset(tmp_path / "mine.hdf5", columns), total_steps=2)
    ibc.train(args)
    columns["rewards"][3] += 1e-3
    write_dataset(args.dataset, columns)
    before = (args.run_dir / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="the dataset has changed since .* put the old one back"):
        resume(args.run_dir)
    assert (args.run_dir / "checkpoint.pt").read_bytes() == before


# Callers other than a shell.


def test_train_works_in_a_thread_and_leaves_signal_handlers_alone(args, whole):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(ibc.train, args).result()
    assert result["returns"] == result_of(whole)["returns"]
    assert_same_run(args.run_dir, whole)
    ibc.train(replace(args, run_dir=None, total_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_what_a_notebook_gives_is_kept_as_what_a_shell_gives(args, whole, reacher_file, tmp_path):
    args = replace(args, seed=np.int64(1), learning_rate=np.float64(args.learning_rate))
    args = replace(args, dataset=str(reacher_file), run_dir=str(tmp_path / "run"))
    ibc.train(args)
    assert_same_run(tmp_path / "run", whole)
    (tmp_path / "run" / "result.json").unlink()
    resume(tmp_path / "run")
    for name, value in {"device": "cuda:1", "memory": "attentive"}.items():
        with pytest.raises(InputError, match=f"{name} must be one of auto, .*; it is {value}"):
            ibc.train(replace(args, run_dir=None, **{name: value}))


def test_handlers_and_folder_are_free_again_after_an_error(args):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError):
        with Run(args, "ibc"):
            raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    ibc.train(replace(args, total_steps=1))


def test_output_without_a_reader_does_not_end_training(args, environment):
    """`python baselines/ibc.py ... | head -1`"""
    command = f'"{sys.executable}" "{ROOT / SCRIPT}" --run-dir "{args.run_dir}" --device cpu '
    command += "--task coordination-favorable --total-steps 20 --eval-every 5 | head -1"
    finished = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n") == 1 and "Traceback" not in finished.stderr
    assert (args.run_dir / "result.json").exists()


def test_long_work_says_every_half_minute_how_far_it_is(monkeypatch, capsys):
    seconds = itertools.count(step=10)
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(training_run, "time", clock)
    assert list(training_run.progress(10, "cloning")) == list(range(10))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"cloning: step {step} of 10" for step in (0, 4, 8)]


def test_a_terminal_of_ascii_characters(args, monkeypatch):
    """As with PYTHONIOENCODING=ascii; results are printed with ±."""
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    ibc.train(replace(args, total_steps=1))
    sys.stdout.flush()
    assert b"score" in buffer.getvalue() and b"?" in buffer.getvalue()


# The command line.


@pytest.fixture
def ibc_script(run_script, reacher_file, tmp_path):
    def ibc_script(*arguments, resumed=False):
        options = ["--dataset", reacher_file, "--run-dir", tmp_path / "run", *flags(**OPTIONS)]
        return run_script(SCRIPT, *([] if resumed else options), *arguments)

    return ibc_script


def assert_one_line(status, *parts):
    assert isinstance(status, str) and status.startswith("error: "), status
    assert "\n" not in status
    for part in parts:
        assert str(part) in status, status


def test_a_script_runs_resumes_and_says_where_everything_is(ibc_script, tmp_path, whole):
    status, output = ibc_script()
    assert status == 0, output
    last = output.splitlines()[-2:]
    assert "(paper: 0.84 ± 0.02)" in last[0] and "10 greedy episodes" in last[0]
    assert str(tmp_path / "run") in last[1]
    (tmp_path / "run" / "result.json").unlink()
    status, output = ibc_script("--resume", tmp_path / "run", resumed=True)
    assert status == 0, output
    assert_same_run(tmp_path / "run", whole)


def test_an_error_is_a_failure_for_the_shell(environment):
    command = [sys.executable, ROOT / SCRIPT, "--task", "reacher-leader"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: unknown task 'reacher-leader'; did you mean reacher-")
    assert finished.stderr.count("\n") == 1


def test_a_stopped_script_has_the_exit_status_of_its_signal(ibc_script):
    with stopped_at_step(5):
        status, output = ibc_script()
    assert status == 128 + signal.SIGTERM and "stopped at step 5" in output


@pytest.mark.parametrize("option", [["--seed", "2"], ["--batch-size=8"], ["--learning_rate", "1"]])
def test_other_options_with_resume_are_refused(option, ibc_script, copy_of_whole):
    before = sorted(copy_of_whole.iterdir())
    status, _ = ibc_script("--resume", copy_of_whole, *option, resumed=True)
    flag = option[0].partition("=")[0].replace("_", "-")
    assert_one_line(status, "--device, --total-steps, --dataset only", flag)
    assert sorted(copy_of_whole.iterdir()) == before


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_resuming_without_a_checkpoint_is_refused(folder, ibc_script, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _ = ibc_script("--resume", tmp_path / folder, resumed=True)
    assert_one_line(status, tmp_path / folder / "checkpoint.pt")
    assert not (tmp_path / "nowhere").exists() and not list((tmp_path / "empty").iterdir())


FAULTS = ["empty", "half", "almost whole", "a bit", "text", "a list", "no state"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_one_line(fault, ibc_script, copy_of_whole):
    path = copy_of_whole / "checkpoint.pt"
    content, checkpoint = path.read_bytes(), load_checkpoint(copy_of_whole)
    kept = {"empty": 0, "half": 0.5, "almost whole": 0.99}
    if fault in kept:
        path.write_bytes(content[: int(kept[fault] * len(content))])
    elif fault == "a bit":
        path.write_bytes(with_a_bit_changed(content))
    elif fault == "text":
        path.write_text("not a checkpoint")
    else:
        del checkpoint["state"]
        torch.save([checkpoint] if fault == "a list" else checkpoint, path)
    before = path.read_bytes()
    status, _ = ibc_script("--resume", copy_of_whole, resumed=True)
    assert_one_line(status, path, "damaged")
    assert path.read_bytes() == before


def test_the_run_of_another_script_is_refused(run_script, copy_of_whole):
    status, _ = run_script("baselines/iql.py", "--resume", copy_of_whole)
    assert_one_line(status, copy_of_whole, "is a run of ibc.py, not of iql.py")


def test_a_run_of_another_version_is_refused(ibc_script, copy_of_whole):
    checkpoint = load_checkpoint(copy_of_whole)
    checkpoint["args"]["forgotten_option"] = 1
    torch.save(checkpoint, copy_of_whole / "checkpoint.pt")
    status, _ = ibc_script("--resume", copy_of_whole, resumed=True)
    assert_one_line(status, "another version of ibc.py")


COUNTS = [(name, -1) for name in ("seed", "batch-size", "total-steps", "eval-every")]
COUNTS += [("seed", 2**32), ("batch-size", 0), ("eval-episodes", 0)]


@pytest.mark.parametrize("name, value", COUNTS)
def test_counts_out_of_range_name_their_flag(name, value, ibc_script, tmp_path):
    status, _ = ibc_script(f"--{name}", value)
    assert_one_line(status, f"--{name} ", value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["learning-rate", "memory-learning-rate", "max-grad-norm"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0"])
def test_hyperparameters_that_make_no_sense_name_their_flag(name, value, ibc_script, tmp_path):
    status, _ = ibc_script(f"--{name}", value)
    assert_one_line(status, f"--{name} ", value)
    assert not (tmp_path / "run").exists()


def test_sizes_beyond_the_memory_name_their_flag(ibc_script, monkeypatch):
    def beyond_memory(dataset, count):
        return torch.zeros(count**2, dtype=torch.long)  # at once, instead of filling 8 GB first

    monkeypatch.setattr(OfflineDataset, "sample_rows", beyond_memory)
    status, _ = ibc_script("--batch-size", 10**9, "--seed", 3)
    assert_one_line(status, "out of memory; use a smaller --batch-size")


def test_an_evaluation_that_is_not_finite_is_one_line(args, monkeypatch):
    def evaluate_badly(*arguments, **options):
        evaluation = evaluate(*arguments, **options)
        return evaluation._replace(returns=np.full_like(evaluation.returns, -math.inf))

    monkeypatch.setattr(ibc, "evaluate", evaluate_badly)
    with pytest.raises(InputError, match="score is not finite at step 0; start again with"):
        ibc.train(args)


def test_a_disk_that_is_full_of_events_is_one_line(args, monkeypatch):
    """TensorBoard raises what its own thread met, at any later call."""

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_run.SummaryWriter, "add_scalar", fail)
    monkeypatch.setattr(training_run.SummaryWriter, "close", fail)
    with pytest.raises(InputError, match="cannot write events .*No space.*can be resumed"):
        ibc.train(args)
    monkeypatch.undo()
    assert resume(args.run_dir)


def test_a_missing_dataset_is_one_line(ibc_script, tmp_path):
    status, _ = ibc_script("--dataset", tmp_path / "nowhere.hdf5")
    assert_one_line(status, tmp_path / "nowhere.hdf5")


@without_gpu
def test_a_missing_compiler_is_one_line(ibc_script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    status, _ = ibc_script("--compile")
    assert_one_line(status, "--compile needs a C++ compiler; install one")
    assert not (tmp_path / "run").exists()
    # A compiled run that was moved to such a machine goes on in eager mode.
    assert ibc_script()[0] == 0
    checkpoint = load_checkpoint(tmp_path / "run")
    checkpoint["args"]["compile"] = True
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    status, output = ibc_script("--resume", tmp_path / "run", "--total-steps", 50, resumed=True)
    assert status == 0 and "no C++ compiler, so the run goes on" in output


def test_a_missing_gpu_is_one_line(ibc_script):
    status, _ = ibc_script("--device", "cuda")
    assert_one_line(status, "--device cuda", "--device cpu")


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(ibc_script, tmp_path):
    status, _ = ibc_script("--learning-rate", 1e30, "--memory-learning-rate", 1e30)
    assert_one_line(status, "losses/cloning is not finite", "smaller learning rate")
    checkpoint = load_checkpoint(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in checkpoint["state"]["team"].values())
    assert not (tmp_path / "run" / "result.json").exists()


def test_defaults_are_those_of_the_task():
    ant = training_run.default_args(DEFAULTS, "ant-medium-po")
    assert ant.eval_episodes == 10 and ant.task == "ant-medium-po"
    game = training_run.default_args(DEFAULTS, "coordination-unfavorable-4")
    assert game.total_steps == 500
    assert training_run.default_args(DEFAULTS, "reacher-independent").total_steps == 10_000


def test_help_shows_the_defaults_of_the_task(run_script):
    status, output = run_script(SCRIPT, "--task", "coordination-neutral", "--help")
    assert status == 0 and "500" in output and "10000" not in output


def test_an_evaluation_that_is_stopped_half_way_changes_nothing(args, whole, monkeypatch):
    """One that draws random numbers, as MOMA-PPO's does in the world model."""

    def draw_and_stop(*arguments, **options):
        torch.rand(3)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(ibc, "evaluate", draw_and_stop)
        with pytest.raises(KeyboardInterrupt):
            ibc.train(args)
    resume(args.run_dir)
    assert_same_run(args.run_dir, whole)


def test_logged_values_are_means_since_they_were_last_logged(args):
    with Run(replace(args, total_steps=5), "ibc", log_every=2) as run:
        run.restore({})
        for step in run.steps(lambda episodes: {"score": 0.0}):
            run.log({"losses/step": float(step)})
    assert scalars(run.dir)["losses/step"] == {2: 1.5, 4: 3.5, 5: 5.0}


MOMENTS = {
    "the loading of data": (ibc, "load_dataset", 1),
    "an update": (OfflineDataset, "sample_rows", 13),
    "a checkpoint": (torch, "save", 4),
    "an evaluation": (Simulator, "step", 70),  # the second; each has fifty steps
    "the final evaluation": (Simulator, "step", 230),
}


@pytest.mark.parametrize("owner, name, call", MOMENTS.values(), ids=MOMENTS)
def test_a_stop_at_any_moment_changes_nothing(owner, name, call, args, whole):
    calls, function = itertools.count(1), getattr(owner, name)

    def stop_at_call(*arguments, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, stop_at_call)
        with pytest.raises(KeyboardInterrupt):
            ibc.train(args)
    resume(args.run_dir) if args.run_dir.exists() else ibc.train(args)
    assert_same_run(args.run_dir, whole)
