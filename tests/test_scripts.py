"""The scripts as people run them, on a dataset and a world model so small that a run takes seconds.

Whole runs, stops and resumes are processes of their own. Command lines that must end at once with one line are given to the
same scripts inside this process, because importing PyTorch takes longer than refusing them.
"""

import ast
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "baselines/*.py", "data/*.py")
    for path in ROOT.glob(pattern)
    if "\nif __name__ ==" in path.read_text()
)
TRAINING = [script for script in SCRIPTS if "\ndef train(" in (ROOT / script).read_text()]
TINY = {
    "moma_ppo.py": [
        "--transitions",
        "300",
        "--epochs",
        "1",
        "--total-steps",
        "8",
        "--eval-every",
        "1",
        "--eval-episodes",
        "10",
    ],
    "world_model.py": [
        "--hidden",
        "16",
        "16",
        "--reward-hidden",
        "16",
        "--mask-hidden",
        "16",
        "--total-steps",
        "60",
        "--eval-every",
        "20",
    ],
    "baselines/ibc.py": [
        "--batch-size",
        "32",
        "--total-steps",
        "60",
        "--eval-every",
        "20",
        "--eval-episodes",
        "10",
    ],
}
BASELINES = [script for script in TRAINING if script.startswith("baselines/")]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def command(script, *arguments):
    module = (
        ["-m", script.removesuffix(".py").replace("/", ".")]
        if script.startswith("data")
        else [script]
    )
    return [sys.executable, *module, *map(str, arguments)]


def run(script, *arguments):
    """A script in a process of its own."""
    return subprocess.run(
        command(script, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def run_here(script, *arguments, monkeypatch):
    """A script in this process, from its first line to its main block: exit status or message, and what it printed."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    output, status = io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        status = error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        (
            random.setstate(random_states[0]),
            np.random.set_state(random_states[1]),
            torch.set_rng_state(random_states[2]),
        )
        torch.use_deterministic_algorithms(False)
    return status, output.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The first and the last 40 episodes of a small recording: both experts."""
    folder = tmp_path_factory.mktemp("dataset")
    recorded = run(
        "data/collect_reacher.py",
        "dataset",
        "--episodes",
        1000,
        "--output",
        folder / "recording.hdf5",
    )
    assert recorded.returncode == 0, recorded.stderr
    with (
        h5py.File(folder / "recording.hdf5") as recording,
        h5py.File(folder / "dataset.hdf5", "w") as small,
    ):
        for name, column in recording.items():
            small[name] = np.concatenate([column[:2000], column[-2000:]])
    (folder / "recording.hdf5").unlink()
    return folder / "dataset.hdf5"


@pytest.fixture(scope="module")
def world_model_run(dataset, tmp_path_factory):
    """A run of world_model.py that was never stopped."""
    run_dir = tmp_path_factory.mktemp("world_model") / "run"
    finished = run(
        "world_model.py", "--dataset", dataset, "--run-dir", run_dir, *TINY["world_model.py"]
    )
    assert finished.returncode == 0, finished.stderr
    return run_dir


@pytest.fixture(scope="module")
def world_model(world_model_run):
    return world_model_run / "world_model.pt"


@pytest.fixture(scope="module")
def moma_run(dataset, world_model, tmp_path_factory):
    """A run of moma_ppo.py that was never stopped."""
    run_dir = tmp_path_factory.mktemp("moma_ppo") / "run"
    finished = run(
        "moma_ppo.py",
        "--dataset",
        dataset,
        "--world-model",
        world_model,
        "--run-dir",
        run_dir,
        *TINY["moma_ppo.py"],
    )
    assert finished.returncode == 0, finished.stderr
    assert (
        "score" in finished.stdout.splitlines()[-3] and "1.00 ± 0.01" in finished.stdout
    )  # beside the paper's
    return run_dir


@pytest.fixture(scope="module")
def ibc_run(dataset, tmp_path_factory):
    """A run of a baseline that was never stopped."""
    run_dir = tmp_path_factory.mktemp("ibc") / "run"
    finished = run(
        "baselines/ibc.py", "--dataset", dataset, "--run-dir", run_dir, *TINY["baselines/ibc.py"]
    )
    assert finished.returncode == 0, finished.stderr
    return run_dir


@pytest.fixture
def moma_here(dataset, world_model, tmp_path, monkeypatch):
    """moma_ppo.py in this process, two learning steps unless told otherwise; its result and its TensorBoard scalars."""

    def moma_here(*arguments):
        run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shared = [
            "--dataset",
            dataset,
            "--run-dir",
            run_dir,
            *TINY["moma_ppo.py"],
            "--total-steps",
            2,
            "--eval-every",
            2,
        ]
        if "--ground-truth" not in arguments:
            shared += ["--world-model", world_model]
        status, output = run_here("moma_ppo.py", *shared, *arguments, monkeypatch=monkeypatch)
        assert status == 0, output
        return json.loads((run_dir / "result.json").read_text()), scalars(run_dir)

    return moma_here


def scalars(run_dir):
    """What TensorBoard shows of a run: {tag: {step: value}}."""
    accumulator = EventAccumulator(str(run_dir))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }


# --- Runs ---


def test_result_of_moma_ppo(moma_run):
    result = json.loads((moma_run / "result.json").read_text())
    assert len(result["returns"]) == 100
    scores = (np.array(result["returns"]) + 11.144625) / (-4.2370844 + 11.144625)
    assert result["score"] == pytest.approx(scores.mean())
    assert result["score_stderr"] == pytest.approx(scores.std(ddof=1) / 10)
    assert [evaluation["step"] for evaluation in result["evaluations"]] == list(range(1, 9))
    assert all(len(evaluation["returns"]) == 10 for evaluation in result["evaluations"])
    assert result["best_score"] == max(
        [result["score"]] + [evaluation["score"] for evaluation in result["evaluations"]]
    )
    assert (
        len({tuple(evaluation["returns"]) for evaluation in result["evaluations"]}) == 8
    )  # the team changes
    assert result["args"]["transitions"] == 300 and result["args"]["lambda_g"] > 0  # as calibrated
    assert result["versions"]["torch"] == torch.__version__
    assert result["dataset"]["transitions"] == 4000
    assert (
        result["world_model"]["dataset"] == "reacher-expert-mix"
        and result["world_model"]["total_steps"] == 60
    )
    assert result["seconds"] > 0 and result["steps_per_second"] == pytest.approx(
        8 / result["seconds"]
    )


def test_files_of_moma_ppo(moma_run):
    names = {path.name for path in moma_run.iterdir() if not path.name.startswith("events.")}
    assert names == {"checkpoint.pt", "result.json", "strategy.png"}
    assert (moma_run / "strategy.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = torch.load(moma_run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 8
    assert all(tensor.isfinite().all() for tensor in checkpoint["team"].values())


def test_tensorboard_of_moma_ppo(moma_run):
    shown = scalars(moma_run)
    names = {
        "charts": ["SPS"],
        "eval": ["return", "normalized_score"],
        "world_model": ["penalty", "epsilon_g", "rollout_length"],
    }
    names["losses"] = ["actor", "critic", "entropy", "action_penalty"]
    for group, tags in names.items():
        for tag in tags:
            assert all(map(math.isfinite, shown[f"{group}/{tag}"].values())), tag
    assert list(shown["eval/return"]) == list(range(1, 9))
    result = json.loads((moma_run / "result.json").read_text())
    for evaluation in result["evaluations"][:-1]:  # the last step has the final evaluation, too
        assert shown["eval/normalized_score"][evaluation["step"]] == pytest.approx(
            evaluation["score"]
        )


def test_run_of_world_model(world_model_run):
    result = json.loads((world_model_run / "result.json").read_text())
    errors = np.array(result["member_errors"])
    assert sorted(result["elites"]) == sorted(errors[:, :2].sum(1).argsort()[:5])
    assert result["state_error"] == pytest.approx(errors[result["elites"], 0].mean())
    shown = scalars(world_model_run)
    assert list(shown["validation/state_error"]) == [20, 40, 60]
    assert shown["validation/state_error"][60] < shown["validation/state_error"][20]
    exported = torch.load(world_model_run / "world_model.pt", weights_only=True)
    assert exported["elites"] == result["elites"] and exported["dataset"]["transitions"] == 4000
    assert torch.load(world_model_run / "checkpoint.pt", weights_only=True)["step"] == 60


# --- Stopping and resuming ---


def start_until_it_reports(script, *arguments):
    """Starts a script and returns when it has printed its first "step ..." line."""
    process = subprocess.Popen(
        command(script, *arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step "):
            return process
    raise AssertionError(f"ended with {process.wait()} before its first step")


def stop_resume_kill_resume(script, run_dir, *arguments):
    """Asked to stop, resumed, killed, resumed again, each time after the first evaluation."""
    process = start_until_it_reports(script, *arguments, "--run-dir", run_dir, *TINY[script])
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143  # 128 + SIGTERM, as a shell reports it
    assert output.splitlines()[-1].endswith(f"go on with: python {script} --resume {run_dir}")
    process = start_until_it_reports(script, "--resume", run_dir)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run_dir / "result.json").exists()
    finished = run(script, "--resume", run_dir)
    assert finished.returncode == 0, finished.stderr


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_moma_ppo_resumes_to_the_bit(dataset, world_model, moma_run, tmp_path):
    run_dir = tmp_path / "run"
    stop_resume_kill_resume(
        "moma_ppo.py", run_dir, "--dataset", dataset, "--world-model", world_model
    )
    one, other = [
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run_dir, moma_run)
    ]
    assert_same_tensors(one["team"], other["team"])
    one, other = [
        json.loads((folder / "result.json").read_text()) for folder in (run_dir, moma_run)
    ]
    for name in ("score", "returns", "model_returns"):
        assert one[name] == other[name]
    for evaluation, expected in zip(one["evaluations"], other["evaluations"], strict=True):
        for name in ("step", "score", "returns", "model_returns"):
            assert evaluation[name] == expected[name]
    assert (
        scalars(run_dir)["eval/return"] == scalars(moma_run)["eval/return"]
    )  # none lost, none twice


def test_world_model_resumes_to_the_bit(dataset, world_model_run, tmp_path):
    run_dir = tmp_path / "run"
    stop_resume_kill_resume("world_model.py", run_dir, "--dataset", dataset)
    one, other = [
        torch.load(folder / "world_model.pt", weights_only=True)
        for folder in (run_dir, world_model_run)
    ]
    assert_same_tensors(one["weights"], other["weights"])
    assert one["validation"] == other["validation"]
    assert (
        scalars(run_dir)["validation/state_error"]
        == scalars(world_model_run)["validation/state_error"]
    )


def test_a_baseline_resumes_to_the_bit(dataset, ibc_run, tmp_path):
    """Asked to stop and resumed; killed it is in the next test."""
    run_dir = tmp_path / "run"
    process = start_until_it_reports(
        "baselines/ibc.py", "--dataset", dataset, "--run-dir", run_dir, *TINY["baselines/ibc.py"]
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143 and output.splitlines()[-1].endswith(
        f"go on with: python baselines/ibc.py --resume {run_dir}"
    )
    finished = run("baselines/ibc.py", "--resume", run_dir)
    assert finished.returncode == 0, finished.stderr
    one, other = [
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run_dir, ibc_run)
    ]
    assert_same_tensors(one["team"], other["team"])
    one, other = [json.loads((folder / "result.json").read_text()) for folder in (run_dir, ibc_run)]
    assert one["returns"] == other["returns"] and len(one["returns"]) == 100


@pytest.mark.parametrize(
    "script, options",
    [
        *[(script, []) for script in BASELINES],
        ("baselines/maiql.py", ["--finetune", "--rollout-every", 3]),
    ],
)
def test_every_baseline_resumes_to_the_bit_and_compiles(
    script, options, dataset, tmp_path, monkeypatch
):
    """Killed as soon as its first checkpoint is whole; and traced as --compile does it, but run without generated code."""
    whole, killed, compiled = tmp_path / "whole", tmp_path / "killed", tmp_path / "compiled"
    arguments = [
        "--dataset",
        dataset,
        "--seed",
        5,
        "--batch-size",
        8,
        "--total-steps",
        6,
        "--eval-episodes",
        5,
    ]
    arguments += [
        "--task",
        "reacher-leader-only",
        "--eval-every",
        8 if options else 2,
        *options,
    ]  # fine-tuning starts after step 6
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for run_dir, option in ((whole, []), (compiled, ["--compile"])):
        status, output = run_here(
            script, *arguments, "--run-dir", run_dir, *option, monkeypatch=monkeypatch
        )
        assert status == 0, output
    with monkeypatch.context() as patched:
        replace = Path.replace
        patched.setattr(
            Path, "replace", lambda path, target: replace(path, target) and sys.exit("killed")
        )
        status, _ = run_here(script, *arguments, "--run-dir", killed, monkeypatch=patched)
    assert status == "killed" and torch.load(killed / "checkpoint.pt", weights_only=True)[
        "step"
    ] == (8 if options else 2)
    status, output = run_here(script, "--resume", killed, monkeypatch=monkeypatch)
    assert status == 0, output
    one, other, third = [
        torch.load(folder / "checkpoint.pt", weights_only=True)["team"]
        for folder in (whole, killed, compiled)
    ]
    assert_same_tensors(one, other)
    for name in one:
        torch.testing.assert_close(one[name], third[name], rtol=1e-3, atol=1e-4, msg=name)
    if (
        script != "baselines/iql.py"
    ):  # the second agent sees two dimensions less than the first: their weights stay zero
        for name in ("memory.embedding", "policy.0", "value.0", "critics.0", "target_critics.0"):
            if f"{name}.weight" in one:
                narrow = one[f"{name}.weight"][1::2]  # of the agent, and of its twin critics
                assert (narrow[:, -2:] == 0).all() and (narrow[:, -3] != 0).any()
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    for name in ("score", "returns", "best_score"):
        assert results[0][name] == results[1][name]
    assert scalars(killed)["eval/return"] == scalars(whole)["eval/return"]


@pytest.mark.parametrize("script", BASELINES)
def test_who_plays_the_coordination_game(script, tmp_path, monkeypatch):
    arguments = [
        "--task",
        "coordination-neutral",
        "--batch-size",
        8,
        "--total-steps",
        2,
        "--run-dir",
        tmp_path / "run",
    ]
    status, output = run_here(script, *arguments, monkeypatch=monkeypatch)
    if script in ("baselines/ibc.py", "baselines/iql.py", "baselines/maiql.py"):
        assert status == 0, output
    else:
        assert_one_line(status, "coordination-neutral", "discrete")


@pytest.mark.parametrize(
    "script, run_dir",
    [
        ("moma_ppo.py", "moma_run"),
        ("world_model.py", "world_model_run"),
        ("baselines/ibc.py", "ibc_run"),
    ],
)
def test_resuming_a_finished_run_finishes_again(script, run_dir, request, tmp_path, monkeypatch):
    """As after a stop between the last checkpoint and the result."""
    finished, again = request.getfixturevalue(run_dir), tmp_path / "run"
    again.mkdir()
    (again / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    status, output = run_here(script, "--resume", again, monkeypatch=monkeypatch)
    assert status == 0, output
    one, other = [json.loads((folder / "result.json").read_text()) for folder in (again, finished)]
    for name in ("member_errors", "elites") if script == "world_model.py" else ("returns", "score"):
        assert one[name] == other[name]


# --- Options ---


@pytest.mark.parametrize("penalty", ["aleatoric", "none"])
def test_other_penalties(penalty, moma_here):
    result, shown = moma_here("--penalty", penalty, "--lambda-a", 5)
    assert (shown["world_model/penalty"][2] > 0) == (penalty == "aleatoric")
    assert math.isfinite(result["score"])


def test_no_adaptive_rollouts(moma_here):
    _, shown = moma_here(
        "--max-uncertainty",
        "inf",
        "--lambda-g",
        0.1,
        "--task",
        "reacher-independent",
        "--no-torch-deterministic",
    )
    assert shown["world_model/uncertain"][2] == 0
    assert shown["world_model/rollout_length"][2] == pytest.approx(50)


def test_adaptive_rollouts_with_short_bounds(moma_here):
    _, shown = moma_here("--max-uncertainty", 0, "--task", "reacher-all-observant")
    assert shown["world_model/uncertain"][2] == 1
    assert shown["world_model/rollout_length"][2] == pytest.approx(1)


def test_rollouts_in_the_true_simulator(moma_here):
    result, shown = moma_here("--ground-truth", "--rollout-length", 50)
    assert result["world_model"] is None and result["model_returns"] is None
    assert shown["world_model/penalty"][2] == shown["world_model/epsilon_g"][2] == 0
    assert shown["world_model/rollout_length"][2] == pytest.approx(50)


def test_seeds_differ_and_repeat(moma_here):
    returns = [moma_here("--seed", seed)[0]["returns"] for seed in (2, 2, 3)]
    assert returns[0] == returns[1] != returns[2]


def test_compile_computes_what_eager_mode_computes(moma_here, monkeypatch):
    """Traced as --compile does it, update and rollout, random numbers included, but run without generated code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    (eager, eager_shown), (compiled, compiled_shown) = moma_here(), moma_here("--compile")
    np.testing.assert_allclose(compiled["returns"], eager["returns"], rtol=1e-3)
    for tag in ("losses/critic", "losses/entropy", "world_model/penalty", "world_model/reward"):
        assert compiled_shown[tag][2] == pytest.approx(eager_shown[tag][2], rel=1e-3), tag


def test_compile_of_the_world_model(dataset, world_model_run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    arguments = [
        "--dataset",
        dataset,
        *TINY["world_model.py"],
        "--run-dir",
        tmp_path / "run",
        "--compile",
    ]
    status, output = run_here("world_model.py", *arguments, monkeypatch=monkeypatch)
    assert status == 0, output
    one, other = [
        json.loads((folder / "result.json").read_text())
        for folder in (tmp_path / "run", world_model_run)
    ]
    np.testing.assert_allclose(one["member_errors"], other["member_errors"], rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("script", BASELINES)
@pytest.mark.parametrize("option", ["--cudagraphs", "--compile"])
def test_baselines_on_a_gpu_compute_what_eager_mode_computes(
    option, script, dataset, tmp_path, monkeypatch
):
    arguments = [
        "--dataset",
        dataset,
        "--device",
        "cuda",
        "--total-steps",
        20,
        "--eval-every",
        10,
    ]  # graphs are captured at steps 4 and 8
    teams = []
    for run_dir, options in ((tmp_path / "eager", []), (tmp_path / "fast", [option])):
        status, output = run_here(
            script, *arguments, "--run-dir", run_dir, *options, monkeypatch=monkeypatch
        )
        assert status == 0, output
        teams.append(torch.load(run_dir / "checkpoint.pt", weights_only=True)["team"])
    for name in teams[0]:
        torch.testing.assert_close(teams[0][name], teams[1][name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("option", ["--cudagraphs", "--compile"])
def test_options_for_a_gpu_compute_what_eager_mode_computes(option, moma_here):
    arguments = [
        "--device",
        "cuda",
        "--epochs",
        5,
    ]  # ten updates: a graph is captured at the fourth
    (eager, eager_shown), (fast, fast_shown) = moma_here(*arguments), moma_here(*arguments, option)
    np.testing.assert_allclose(fast["returns"], eager["returns"], rtol=1e-2)
    assert fast_shown["losses/critic"][2] == pytest.approx(
        eager_shown["losses/critic"][2], rel=1e-2
    )


def test_a_world_model_of_other_networks_is_read_as_well(dataset, moma_here, tmp_path, monkeypatch):
    """Every flag of the architecture, the other way round."""
    output, folder = tmp_path / "other.pt", tmp_path / "world_model"
    arguments = [
        "--trunk",
        "shared",
        "--target",
        "absolute",
        "--activation",
        "relu",
        "--no-normalize",
        "--no-decay",
        "--members",
        3,
    ]
    arguments += ["--elites", 2, "--dataset", dataset, "--run-dir", folder, "--output", output]
    status, printed = run_here(
        "world_model.py", *TINY["world_model.py"], *arguments, monkeypatch=monkeypatch
    )
    assert status == 0, printed
    result, _ = moma_here("--world-model", output)
    assert result["world_model"]["trunk"] == "shared" and math.isfinite(result["score"])


@pytest.fixture(scope="module")
def ant(tmp_path_factory):
    """A small recording of an untrained ant, and a small world model of it."""
    folder = tmp_path_factory.mktemp("ant")
    recorded = run(
        "data/collect_ant.py",
        "dataset",
        "--name",
        "random",
        "--transitions",
        600,
        "--output",
        folder / "ant.hdf5",
    )
    assert recorded.returncode == 0, recorded.stderr
    arguments = [
        "--task",
        "ant-random-po",
        "--dataset",
        folder / "ant.hdf5",
        *TINY["world_model.py"],
        "--output",
        folder / "ant.pt",
    ]
    learned = run("world_model.py", *arguments, "--run-dir", folder / "run")
    assert learned.returncode == 0, learned.stderr
    return folder


ANT_RUNS = [(script, []) for script in BASELINES] + [
    ("baselines/maiql.py", ["--finetune"]),
    ("moma_ppo.py", []),
    ("moma_ppo.py", ["--ground-truth"]),
]


@pytest.mark.parametrize(
    "script, options", ANT_RUNS, ids=[" ".join([script, *options]) for script, options in ANT_RUNS]
)
def test_every_script_learns_on_the_ant(script, options, ant, tmp_path, monkeypatch):
    """Four agents with two actions each, observations of different widths, episodes that end."""
    name = "ant-random-fo" if script == "baselines/iql.py" else "ant-random-po"
    tasks = script_module("mamujoco_envs").TASKS
    monkeypatch.setitem(
        tasks, name, dataclasses.replace(tasks[name], episode_length=12)
    )  # evaluations take as long as they do
    arguments = [
        "--task",
        name,
        "--dataset",
        ant / "ant.hdf5",
        "--run-dir",
        tmp_path / "run",
        "--total-steps",
        4,
        "--eval-every",
        2,
    ]
    if script == "moma_ppo.py":
        arguments += [
            "--transitions",
            300,
            "--epochs",
            1,
            "--cloning-steps",
            2,
            *([] if options else ["--world-model", ant / "ant.pt"]),
        ]
    else:
        arguments += ["--batch-size", 16]
    status, output = run_here(script, *arguments, *options, monkeypatch=monkeypatch)
    assert status == 0, output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["returns"]) == 100 and np.isfinite(result["returns"]).all()
    assert len(result["evaluations"][0]["returns"]) == (20 if script == "moma_ppo.py" else 10)
    assert "ours, not D4RL's" in result["dataset"]["source"]
    if script != "moma_ppo.py":
        module = script_module(script)
        assert result["paper_score"] == (
            module.FINETUNED_PAPER_SCORES if options else module.PAPER_SCORES
        ).get(name)
    else:
        assert (
            result["args"]["start_states"],
            result["args"]["rollout_length"],
            result["args"]["gamma"],
        ) == ("any", 50, 0.99)
        assert [entry["step"] for entry in result["evaluations"]] == [0, 2, 4]
        assert 0 < result["args"]["reward_scale"] < 1
        if not options:
            assert "ours, not D4RL's" in result["world_model"]["source"]


def test_a_cloned_team_is_not_cloned_again(ant, tmp_path, monkeypatch):
    """Killed as soon as the checkpoint that follows the cloning is whole."""
    tasks = script_module("mamujoco_envs").TASKS
    monkeypatch.setitem(
        tasks, "ant-random-po", dataclasses.replace(tasks["ant-random-po"], episode_length=12)
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [
        "--task",
        "ant-random-po",
        "--dataset",
        ant / "ant.hdf5",
        "--world-model",
        ant / "ant.pt",
        "--transitions",
        300,
        "--epochs",
        1,
    ]
    arguments += ["--cloning-steps", 3, "--total-steps", 2, "--eval-every", 2]
    status, output = run_here(
        "moma_ppo.py", *arguments, "--run-dir", whole, monkeypatch=monkeypatch
    )
    assert status == 0 and "after behavioural cloning" in output, output
    with monkeypatch.context() as patched:
        replace = Path.replace
        patched.setattr(
            Path, "replace", lambda path, target: replace(path, target) and sys.exit("killed")
        )
        assert (
            run_here("moma_ppo.py", *arguments, "--run-dir", killed, monkeypatch=patched)[0]
            == "killed"
        )
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["step"] == 0
    status, output = run_here("moma_ppo.py", "--resume", killed, monkeypatch=monkeypatch)
    assert status == 0 and "after behavioural cloning" not in output, output
    one, other = [
        torch.load(folder / "checkpoint.pt", weights_only=True)["team"]
        for folder in (whole, killed)
    ]
    assert_same_tensors(one, other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    assert [entry["step"] for entry in results[1]["evaluations"]] == [0, 2] and results[0][
        "returns"
    ] == results[1]["returns"]
    assert scalars(killed)["eval/return"] == scalars(whole)["eval/return"]


def test_a_world_model_of_another_recording_is_noticed(ant, tmp_path, monkeypatch):
    tasks = script_module("mamujoco_envs").TASKS
    monkeypatch.setitem(
        tasks, "ant-random-fo", dataclasses.replace(tasks["ant-random-fo"], episode_length=12)
    )
    with h5py.File(ant / "ant.hdf5") as ours, h5py.File(tmp_path / "d4rl.hdf5", "w") as other:
        for name, column in ours.items():
            other[name] = column[()]
    arguments = [
        "--task",
        "ant-random-fo",
        "--dataset",
        tmp_path / "d4rl.hdf5",
        "--world-model",
        ant / "ant.pt",
        "--run-dir",
        tmp_path / "run",
    ]
    arguments += ["--total-steps", 1, "--transitions", 300, "--epochs", 1, "--cloning-steps", 0]
    status, output = run_here("moma_ppo.py", *arguments, monkeypatch=monkeypatch)
    assert (
        status == 0
        and "the world model learned from 'python -m data.collect_ant" in output
        and "the dataset is 'd4rl.hdf5'" in output
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch):
    status, output = run_here(script, "--help", monkeypatch=monkeypatch)
    assert status == 0 and "usage" in output


def script_module(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def parse(script, arguments):
    module = script_module(script)
    if hasattr(module, "Args"):
        return tyro.cli(module.Args, args=arguments)
    commands = {
        name.lower(): getattr(module, name)
        for name in ("Experts", "Snapshots", "Dataset")
        if hasattr(module, name)
    }
    return tyro.extras.subcommand_cli_from_dict(commands, args=arguments)


@pytest.mark.parametrize("script", TRAINING)
def test_each_boolean_flag_goes_both_ways(script):
    flags = [
        name for name, kind in script_module(script).Args.__annotations__.items() if kind is bool
    ]
    assert flags
    for name in flags:
        option = name.replace("_", "-")
        assert getattr(parse(script, [f"--{option}"]), name) is True
        assert getattr(parse(script, [f"--no-{option}"]), name) is False


def documented_commands():
    """Lines that start with `python ` in the README's code blocks and in the scripts' own documentation."""
    readme = ROOT / "README.md"
    texts = readme.read_text().split("```")[1::2] if readme.exists() else []
    texts += [ast.get_docstring(ast.parse((ROOT / script).read_text())) or "" for script in SCRIPTS]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip().startswith("python ")))


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line):
    _, script, *arguments = shlex.split(line, comments=True)
    if script == "-m":
        module, *arguments = arguments
        if module == "pytest":
            pytest.skip("the tests themselves")
        script = module.replace(".", "/") + ".py"
    assert script in SCRIPTS
    parse(script, arguments)


# --- Bad input ---


def assert_one_line(status, *parts):
    assert isinstance(status, str) and status.startswith("error: "), status
    assert "\n" not in status and "Traceback" not in status
    for part in parts:
        assert str(part) in status, status


@pytest.fixture
def refused(dataset, world_model, tmp_path, monkeypatch):
    """Runs a script inside this process that must end with one line that holds all `parts`."""

    def refused(script, *arguments, parts):
        shared = (
            []
            if "--resume" in arguments
            else ["--dataset", dataset, "--run-dir", tmp_path / "refused", *TINY.get(script, [])]
        )
        if script == "moma_ppo.py" and shared:
            shared += ["--world-model", world_model]
        status, _ = run_here(script, *shared, *arguments, monkeypatch=monkeypatch)
        assert_one_line(status, *parts)
        assert not (tmp_path / "refused" / "checkpoint.pt").exists()

    return refused


each_script = pytest.mark.parametrize("script", TINY)


def test_an_error_is_one_line_and_a_failure_for_the_shell():
    finished = run("moma_ppo.py", "--task", "reacher-leader")
    assert finished.returncode == 1
    assert finished.stderr.startswith(
        "error: unknown task 'reacher-leader'; did you mean reacher-leader-only"
    )
    assert finished.stderr.count("\n") == 1


@each_script
def test_unknown_task(script, refused):
    refused(
        script, "--task", "reacher-leadr-only", parts=["reacher-leadr-only", "reacher-leader-only"]
    )


@each_script
def test_missing_dataset(script, refused, tmp_path):
    refused(
        script,
        "--dataset",
        tmp_path / "nowhere.hdf5",
        parts=[tmp_path / "nowhere.hdf5", "python -m data.collect_reacher dataset"],
    )


@each_script
@pytest.mark.parametrize(
    "fault, part",
    [
        ("truncated", "truncated"),
        ("nan", "'actions'"),
        ("ant", "(4000, 27)"),
        ("no rewards", "'rewards'"),
    ],
)
def test_bad_dataset(script, fault, part, refused, dataset, tmp_path):
    path = tmp_path / "bad.hdf5"
    path.write_bytes(dataset.read_bytes()[: 100_000 if fault == "truncated" else None])
    if fault != "truncated":
        with h5py.File(path, "a") as file:
            if fault == "nan":
                file["actions"][1234, 1] = np.nan
            if fault == "no rewards":
                del file["rewards"]
            if fault == "ant":
                for name in ("observations", "next_observations"):
                    del file[name]
                    file[name] = np.zeros((4000, 27))
    refused(script, "--dataset", path, parts=[path, part])


def test_missing_world_model(refused, tmp_path):
    path = tmp_path / "nowhere.pt"
    refused(
        "moma_ppo.py",
        "--world-model",
        path,
        parts=[path, f"python world_model.py --task reacher-leader-only --output {path}"],
    )


def bad_world_model(path, fault, world_model):
    """A copy of the world model with a fault; returns what the message must name."""
    content = world_model.read_bytes()
    if fault in ("empty", "text", "truncated"):
        path.write_bytes(
            {"empty": b"", "text": b"not a world model", "truncated": content[: len(content) // 2]}[
                fault
            ]
        )
        return []
    saved, named = torch.load(world_model, weights_only=True), []
    if fault == "another dataset":
        saved["dataset"]["name"] = "ant-expert"
        named = ["ant-expert", "reacher-expert-mix"]
    elif fault == "a list":
        saved = [saved]
    elif fault.startswith("no "):
        del saved[fault.removeprefix("no ")]
    elif fault == "older networks":
        saved["architecture"] = {
            "state_dim": 11,
            "action_dim": 2,
            "members": 7,
            "width": 16,
            "layers": 2,
        }
    elif fault == "other shapes":
        saved["architecture"]["hidden"]["state"] = [32, 32]
    elif fault == "nan weights":
        name = next(name for name in saved["weights"] if name.endswith("weight"))
        saved["weights"][name][0, 0, 0] = math.nan
        named = [name]
    elif fault == "nan scale":
        saved["scale"][3] = math.nan
        named = ["scale"]
    elif fault == "nan box":
        saved["bounding_box"]["state_min"][3] = math.nan
        named = ["state_min"]
    torch.save(saved, path)
    return named


@pytest.mark.parametrize(
    "fault",
    [
        "empty",
        "text",
        "truncated",
        "a list",
        "another dataset",
        "nan weights",
        "nan scale",
        "nan box",
    ]
    + [
        "no weights",
        "no elites",
        "no scale",
        "no bounding_box",
        "no epsilon_g",
        "older networks",
        "other shapes",
    ],
)
def test_bad_world_model(fault, refused, world_model, tmp_path):
    path = tmp_path / "bad.pt"
    named = bad_world_model(path, fault, world_model)
    refused("moma_ppo.py", "--world-model", path, parts=[path, "python world_model.py", *named])


def test_a_checkpoint_is_no_world_model(refused, moma_run):
    path = moma_run / "checkpoint.pt"
    refused("moma_ppo.py", "--world-model", path, parts=[path])


@each_script
@without_gpu
def test_no_gpu(script, refused):
    refused(script, "--device", "cuda", parts=["--device cuda"])
    refused(script, "--cudagraphs", parts=["--cudagraphs"])


@each_script
def test_a_run_dir_in_use_is_left_alone(script, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    refused(script, "--run-dir", tmp_path / "mine", parts=[tmp_path / "mine"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@each_script
def test_a_file_as_run_dir(script, refused, tmp_path):
    (tmp_path / "file").write_text("keep")
    refused(script, "--run-dir", tmp_path / "file", parts=[tmp_path / "file"])
    assert (tmp_path / "file").read_text() == "keep"


@each_script
@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_resume_without_a_checkpoint(script, folder, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(script, "--resume", tmp_path / folder, parts=[tmp_path / folder / "checkpoint.pt"])
    assert not (tmp_path / "nowhere").exists() and not any((tmp_path / "empty").iterdir())


RUNS = {
    "moma_ppo.py": "moma_run",
    "world_model.py": "world_model_run",
    "baselines/ibc.py": "ibc_run",
}


@each_script
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_resume_of_a_truncated_checkpoint(script, kept, refused, request, tmp_path):
    content = (request.getfixturevalue(RUNS[script]) / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: int(kept * len(content))])
    refused(script, "--resume", tmp_path, parts=[tmp_path / "checkpoint.pt"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@each_script
def test_resume_of_the_other_scripts_run(script, refused, request, tmp_path):
    other = next(run for name, run in RUNS.items() if name != script)
    (tmp_path / "checkpoint.pt").write_bytes(
        (request.getfixturevalue(other) / "checkpoint.pt").read_bytes()
    )
    refused(script, "--resume", tmp_path, parts=[tmp_path])


def test_resume_of_a_script_with_the_same_arguments(refused, tmp_path):
    args = importlib.import_module("baselines.itd3_bc").Args(run_dir=None)
    saved = {name: value for name, value in vars(args).items() if name != "resume"}
    torch.save({"script": "itd3_bc", "args": saved}, tmp_path / "checkpoint.pt")
    refused("baselines/matd3_bc.py", "--resume", tmp_path, parts=[tmp_path, "matd3_bc.py"])


def test_finetuning_that_would_need_too_many_simulators(tmp_path, monkeypatch, dataset):
    columns = importlib.import_module("data.offline_dataset").load_dataset(
        importlib.import_module("mamujoco_envs").TASKS["reacher-leader-only"], dataset
    )
    columns.size = 10**6
    maiql = importlib.import_module("baselines.maiql")
    with pytest.raises(ValueError, match="total-steps"):
        maiql.OnlineData(columns.task, columns, maiql.Args(total_steps=100))


def test_an_existing_world_model_is_not_overwritten(refused, world_model):
    before = world_model.read_bytes()
    refused("world_model.py", "--output", world_model, parts=[world_model])
    assert world_model.read_bytes() == before


def test_output_in_a_missing_folder_is_refused_before_the_training(refused, tmp_path):
    refused(
        "world_model.py", "--output", tmp_path / "nowhere" / "x.pt", parts=[tmp_path / "nowhere"]
    )


NONSENSE = [
    *[
        ("moma_ppo.py", "transitions", value) for value in (-400, 0, 5, 200)
    ],  # 200 is less than one minibatch
    *[
        ("moma_ppo.py", name, 0)
        for name in ("rollout_length", "minibatch_size", "epochs", "eval_episodes")
    ],
    ("moma_ppo.py", "cloning_steps", -1),
    *[("moma_ppo.py", "gamma", value) for value in (-0.1, 1, "nan")],
    *[("moma_ppo.py", "rollout_length", value) for value in (-1, 301)],
    *[("world_model.py", name, 0) for name in ("batch_size", "members", "elites")],
    ("world_model.py", "elites", 1),  # no variance
    ("world_model.py", "elites", 8),  # of seven
    *[
        (script, name, value)
        for script in TINY
        for name in ("total_steps", "eval_every")
        for value in (0, -1)
    ],
    *[(script, "learning_rate", value) for script in TINY for value in (-1, "nan")],
    *[(script, "batch_size", 0) for script in BASELINES],
    *[
        (f"baselines/{script}.py", "polyak", 1.5)
        for script in ("iql", "maiql", "itd3_bc", "matd3_bc", "icql", "iomar")
    ],
    *[(f"baselines/{script}.py", "expectile", -0.1) for script in ("iql", "maiql")],
    *[
        (f"baselines/{script}.py", name, 0)
        for script in ("icql", "iomar")
        for name in ("policy_delay", "cql_samples")
    ],
    *[
        ("baselines/iomar.py", "omar_elites", value) for value in (1, 21)
    ],  # one has no variance; of twenty samples
    ("baselines/iomar.py", "omega", 1.1),
    ("baselines/maiql.py", "rollout_every", 0),
]


@pytest.mark.parametrize("script, name, value", NONSENSE)
def test_nonsense_numbers(script, name, value, refused):
    option = "--" + name.replace("_", "-")
    refused(script, option, value, parts=[option])


@each_script
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(script, request, refused, tmp_path):
    finished, path = request.getfixturevalue(RUNS[script]), tmp_path / "checkpoint.pt"
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    checkpoint["args"] |= {"learning_rate": 1e30, "total_steps": 200, "eval_every": 200} | (
        {"epochs": 5} if script == "moma_ppo.py" else {}
    )
    torch.save(checkpoint, path)
    before = path.read_bytes()
    refused(
        script,
        "--resume",
        tmp_path,
        parts=[
            "finite",
            f"step {checkpoint['step'] + 1}" if script == "moma_ppo.py" else "steps",
            path,
        ],
    )
    assert path.read_bytes() == before and not (tmp_path / "result.json").exists()


def test_a_first_loss_that_is_not_finite_promises_no_checkpoint(
    dataset, world_model, tmp_path, monkeypatch
):
    arguments = [
        "--dataset",
        dataset,
        "--world-model",
        world_model,
        "--run-dir",
        tmp_path / "run",
        *TINY["moma_ppo.py"],
    ]
    status, _ = run_here(
        "moma_ppo.py", *arguments, "--learning-rate", 1e30, "--epochs", 5, monkeypatch=monkeypatch
    )
    assert_one_line(status, "step 1 ", "finite")
    assert "checkpoint.pt" not in status and not (tmp_path / "run" / "checkpoint.pt").exists()


@each_script
def test_no_checkpoint_ever_holds_weights_that_are_not_finite(
    script, dataset, world_model, tmp_path, monkeypatch
):
    """Evaluated and saved after each step, as soon as the weights, but not yet a loss, have gone wrong."""
    arguments = [
        "--dataset",
        dataset,
        "--run-dir",
        tmp_path / "run",
        *TINY[script],
        "--eval-every",
        1,
        "--total-steps",
        5,
    ]
    arguments += ["--world-model", world_model] if script == "moma_ppo.py" else []
    status, _ = run_here(script, *arguments, "--learning-rate", 1e30, monkeypatch=monkeypatch)
    assert_one_line(status, "finite")
    if (tmp_path / "run" / "checkpoint.pt").exists():
        checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        for tensor in checkpoint["ensemble" if script == "world_model.py" else "team"].values():
            assert tensor.isfinite().all()


# --- Tables ---


def test_a_table_is_drawn_whatever_runs_finished(tmp_path):
    curve = [{"seconds": 1.0, "score": 0.1}, {"seconds": 2.0, "score": 0.2}]
    results = {
        ("iql", "coordination-neutral", 1): None,
        ("iql", "coordination-neutral", 2): {"evaluations": curve, "dataset": {"mean_return": 0.4}},
        ("ibc", "coordination-neutral", 1): {"evaluations": [], "dataset": {"mean_return": 0.4}},
        ("ibc", "coordination-favorable", 1): {
            "evaluations": curve,
            "dataset": {"mean_return": 0.4},
        },
    }
    importlib.import_module("reproduce").plot_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_cells_of_a_table(tmp_path, monkeypatch, capsys):
    """Only those asked for, and none that the table does not have."""
    reproduce, started = importlib.import_module("reproduce"), []
    result = {
        "score": 0.5,
        "score_stderr": 0.1,
        "seconds": 1.0,
        "paper_score": "0.84",
        "evaluations": [{"seconds": 1.0, "score": 0.1}],
        "dataset": {"mean_return": 0.4},
    }
    monkeypatch.setattr(reproduce, "run", lambda *job: started.append(job[:3]) or result)
    reproduce.main(
        reproduce.Args(
            table="4b",
            tasks=("ant-medium-fo",),
            algorithms=("ibc", "moma_ppo"),
            seeds=1,
            workers=1,
            folder=tmp_path,
        )
    )
    assert started == [("ibc", "ant-medium-fo", 1), ("moma_ppo", "ant-medium-fo", 1)]
    assert "0.500 ± 0.100" in capsys.readouterr().out
    for arguments in (
        {"tasks": ("ant-medium",)},
        {"algorithms": ("matd3_bc",)},
        {"tasks": ("ant-medium-po",), "algorithms": ("iql",)},
    ):
        with pytest.raises(SystemExit, match="table 4b has no"):
            reproduce.main(reproduce.Args(table="4b", folder=tmp_path, **arguments))


def test_a_table_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A finished run is read, one with a checkpoint resumed, one killed before its first checkpoint started again."""
    reproduce, started = importlib.import_module("reproduce"), []

    def run(command, **_):
        started.append([str(part) for part in command[2:]])
        folder = tmp_path / f"task__ibc__{len(started) + 1}"
        folder.mkdir(exist_ok=True)
        (folder / "result.json").write_text('{"score": 0.5}')
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    for seed, name in ((1, "result.json"), (2, "checkpoint.pt"), (3, "events")):
        (tmp_path / f"task__ibc__{seed}").mkdir()
        (tmp_path / f"task__ibc__{seed}" / name).write_text('{"score": 1.0}')
    scores = [
        reproduce.run("ibc", "task", seed, tmp_path, ["--compile"])["score"] for seed in (1, 2, 3)
    ]
    assert scores == [1.0, 0.5, 0.5]
    assert started[0] == ["--resume", str(tmp_path / "task__ibc__2")]
    assert started[1] == [
        "--run-dir",
        str(tmp_path / "task__ibc__3"),
        "--task",
        "task",
        "--seed",
        "3",
        "--compile",
    ]
    assert not (tmp_path / "task__ibc__3" / "events").exists()


def test_a_run_that_fails_in_a_table_is_named(tmp_path, monkeypatch, capsys):
    reproduce = importlib.import_module("reproduce")
    for stderr, reason in (
        ("first line\nerror: no luck\n", "error: no luck"),
        ("", "exit status 137"),
    ):
        monkeypatch.setattr(
            reproduce.subprocess,
            "run",
            lambda command, **_: subprocess.CompletedProcess(command, 137, "", stderr),
        )
        assert reproduce.run("ibc", "task", 1, tmp_path, []) is None
        assert reason in "".join(capsys.readouterr())
