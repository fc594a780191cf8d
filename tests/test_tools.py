"""What runs, scores and films the scripts' runs: scripts/."""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from made_up import import_script

import mamujoco_envs
from mamujoco_envs import InputError, find_task
from training_run import load_checkpoint, save

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
benchmark, evaluate, render, report, reproduce = map(
    importlib.import_module,
    ("benchmark", "evaluate", "render", "report", "reproduce"),
)


def can_render():
    backend = os.environ.get("MUJOCO_GL")
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        mamujoco_envs.parallel_env("reacher-leader-only", render_mode="rgb_array").render()
        return True
    except Exception:  # each backend fails in its own way
        return False
    finally:
        if backend is None:  # the other tests run as on the user's machine
            del os.environ["MUJOCO_GL"]


where_it_renders = pytest.mark.skipif(not can_render(), reason="this machine cannot render")


@pytest.fixture
def make_run(tmp_path):
    """Writes the checkpoint of an untrained team."""

    def make_run(script, task_name):
        module, task = import_script(script), find_task(task_name)
        args = module.Args(task=task_name)
        team = module.Team(task, torch.randn(20, task.state_dim), args)
        checkpoint = {"script": script, "args": vars(args), "step": 7, "seconds": 1.0}
        checkpoint |= {"evaluations": [], "inputs": {}, "random_states": {}}
        checkpoint["state"] = {"team": team.state_dict()}
        save(checkpoint, tmp_path / "checkpoint.pt")
        return team

    return make_run


def assert_refused(module, args, *parts):
    with pytest.raises(InputError) as error:
        module.main(args)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# Scoring a run again.


@pytest.mark.parametrize("script", ["ibc", "iql", "moma_ppo"])
def test_a_run_is_scored_as_its_own_evaluations_do_it(script, make_run, tmp_path, capsys):
    team = make_run(script, "reacher-all-observant")
    args = evaluate.Args(tmp_path, episodes=4, output=tmp_path / "scores.json")
    record = evaluate.main(args)
    expected = mamujoco_envs.evaluate(team.task, team.act_greedily, 4).returns
    np.testing.assert_allclose(record["returns"], expected)
    assert "after 7 steps" in capsys.readouterr().out
    written = json.loads(args.output.read_text())
    assert written["returns"] == record["returns"] and written["step"] == 7
    other = evaluate.main(evaluate.Args(tmp_path, episodes=4, seed=3))
    assert other["returns"] != record["returns"]
    assert_refused(evaluate, args, "exists")


def test_bad_input_of_scoring(make_run, tmp_path):
    assert_refused(evaluate, evaluate.Args(tmp_path), "no checkpoint at", tmp_path)
    make_run("ibc", "coordination-neutral")
    evaluate.main(evaluate.Args(tmp_path, episodes=1))  # has no standard error
    assert_refused(evaluate, evaluate.Args(tmp_path, episodes=0), "--episodes")
    assert_refused(evaluate, evaluate.Args(tmp_path, seed=-1), "--seed")
    for output, part in {"scores.txt": "--output", "nowhere/scores.json": "no folder"}.items():
        assert_refused(evaluate, evaluate.Args(tmp_path, output=tmp_path / output), part)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint["state"] = {"ensemble": checkpoint["state"]["team"]}
    save(checkpoint | {"script": "world_model"}, tmp_path / "checkpoint.pt")
    assert_refused(evaluate, evaluate.Args(tmp_path), "world_model.py and has no team")
    checkpoint["state"] = {"team": checkpoint["state"]["ensemble"]}
    save(checkpoint | {"script": "my_ibc"}, tmp_path / "checkpoint.pt")
    assert_refused(evaluate, evaluate.Args(tmp_path), "my_ibc.py, which is not in this repository")
    (tmp_path / "checkpoint.pt").write_text("nothing")
    assert_refused(evaluate, evaluate.Args(tmp_path), "damaged")


# Films.


@where_it_renders
@pytest.mark.parametrize(
    "script, task", [("moma_ppo", "ant-medium-po"), ("ibc", "reacher-leader-only")]
)
def test_films_and_strips(script, task, make_run, tmp_path):
    make_run(script, task)
    render.main(render.Args(run=tmp_path, steps=6))
    render.main(render.Args(run=tmp_path, steps=6, output=tmp_path / "strip.png"))
    assert imageio.imread(tmp_path / "film.gif").shape[0] == 4
    height, width, _ = imageio.imread(tmp_path / "strip.png").shape
    assert width > height > 400


@where_it_renders
def test_the_filmed_episode_is_the_evaluations(make_run, tmp_path):
    team = make_run("iql", "reacher-all-observant")
    evaluation = mamujoco_envs.evaluate(team.task, team.act_greedily, 1)
    film = render.play(render.Args(run=tmp_path, steps=100), team)
    assert len(film.frames) == 51
    assert film.episode_return == pytest.approx(evaluation.returns[0], abs=1e-4)
    assert np.ptp(film.frames[0]) > 0


def test_bad_input_of_filming(make_run, tmp_path):
    args = render.Args(run=tmp_path)
    assert_refused(render, args, "no checkpoint at")
    assert_refused(render, dataclasses.replace(args, output=tmp_path / "x.mov"), ".gif or .png")
    assert_refused(render, dataclasses.replace(args, output=tmp_path / "a" / "x.gif"), "no folder")
    assert_refused(render, dataclasses.replace(args, steps=0), "--steps")
    assert_refused(render, dataclasses.replace(args, seed=-1), "--seed")
    (tmp_path / "film.png").write_text("precious")
    assert_refused(render, dataclasses.replace(args, output=tmp_path / "film.png"), "exists")
    make_run("ibc", "coordination-neutral")
    assert_refused(render, args, "coordination-neutral cannot be filmed")
    (tmp_path / "film.gif").write_text("precious")
    assert_refused(render, args, "film.gif exists")
    assert_refused(evaluate, evaluate.Args(tmp_path, video=True), "film.gif exists")


def test_films_play_in_real_time(tmp_path):
    """GIF counts in hundredths of a second, and a step of Hopper takes 8 ms."""
    frames = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(21)]
    film = render.Film(find_task("hopper-3x1-random-fo"), frames, [0.0] * 21, 0.008, 0.0)
    render.write_gif(film, tmp_path / "film.gif")
    assert len(imageio.imread(tmp_path / "film.gif")) == 5
    assert imageio.immeta(tmp_path / "film.gif")["duration"] == 40


# Timing.


def test_bad_input_of_timing(tmp_path):
    (tmp_path / "old.json").write_text('{"machine": {}}')
    machine = {"processor": "x", "cores": 1, "threads": 1, "load": 0, "versions": {}}
    damaged = {"machine": machine, "times": {"ibc": {"median": {"update": "fast"}}}}
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    for options, part in [
        ({"rounds": 0}, "--rounds"),
        ({"updates": 5}, "--updates must be a multiple of 6"),
        ({"scripts": ()}, "--scripts needs at least one name"),
        ({"scripts": ("nothing",)}, "cannot time nothing"),
        ({"output": tmp_path / "new.txt"}, "--output must end in .json"),
        ({"output": tmp_path / "nowhere" / "new.json"}, "no folder"),
        ({"output": tmp_path / "old.json"}, "exists"),
        ({"baseline": tmp_path / "nothing.json"}, "no file"),
        ({"baseline": tmp_path / "old.json"}, "is not what this script's --output writes"),
        ({"baseline": tmp_path / "damaged.json"}, "is not what this script's --output writes"),
    ]:
        assert_refused(benchmark, benchmark.Args(**options), part)


# Tables.


def made_up_result(score, seconds=2.0):
    curve = [{"step": 0, "seconds": 0.0, "score": 0.1}, {"step": 5, "seconds": 1.0, "score": 0.2}]
    result = {"score": score, "score_stderr": 0.1, "seconds": seconds, "steps": 10}
    result |= {"script": "ibc", "args": {"task": "ant-medium-fo", "seed": 1}}
    return result | {"evaluations": curve, "dataset": {"mean_return": 4.0}}


def made_up_run(run_dir, score, **options):
    """A finished run in a folder named TASK__ALGORITHM__SEED, of defaults but for `options`."""
    task, algorithm, seed = run_dir.name.split("__")
    args = reproduce.default_options(algorithm, task) | {"task": task, "seed": int(seed)}
    args = json.loads(json.dumps(args | options, default=str))
    run_dir.mkdir(parents=True, exist_ok=True)
    result = made_up_result(score) | {"args": args, "script": reproduce.script_of(algorithm)}
    (run_dir / "result.json").write_text(json.dumps(result))
    return result


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Stands for the scripts: keeps the commands, and writes results of the scores given."""

    def stub(body):
        script = tmp_path / "stub.py"
        script.write_text(body)
        commands = []

        def job_command(job, options):
            commands.append(real(job, options)[1:])
            return [sys.executable, "-S", str(script), str(job.run_dir)]

        real = reproduce.job_command
        monkeypatch.setattr(reproduce, "job_command", job_command)
        return commands

    return stub


def test_a_table_is_run_printed_and_drawn(stub, tmp_path, capsys):
    """A finished run is read, one with a checkpoint is resumed, and the third is started."""
    result = json.dumps(made_up_result(0.5))
    commands = stub(
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\n"
        f"folder.mkdir(exist_ok=True)\n(folder / 'result.json').write_text({result!r})\n"
    )
    folder, files = tmp_path / "runs", {1: "result.json", 2: "checkpoint.pt"}
    for seed, name in files.items():
        run_dir = folder / f"ant-medium-fo__ibc__{seed}"
        made_up_run(run_dir, 1.0)
        (run_dir / "result.json").rename(run_dir / name)
    cell = {"tasks": ("ant-medium-fo",), "algorithms": ("ibc",)}
    reproduce.main(reproduce.Args("4b", 3, **cell, workers=1, folder=folder))
    assert [command[1] for command in commands] == ["--resume", "--task"]
    assert "ant-medium-fo__ibc__2" in commands[0][2] and "--seed" in commands[1]
    output = capsys.readouterr().out
    assert "0.667 ± 0.167" in output and "3 runs" in output and "0.84 ± 0.01" in output
    for name in ("table_4b_ant-medium-fo_ibc.png", "table_4b_ant-medium-fo_ibc_steps.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 7}, "holds a run with batch_size 7; move it away"),
        ({"seed": 2}, "holds a run of ibc.py on ant-medium-fo, seed 2; move it away"),
        ({"task": "ant-expert-fo"}, "holds a run of ibc.py on ant-expert-fo, seed 1"),
        ({"task": "a/pair.py:PAIR"}, "holds a run of ibc.py on a/pair.py:PAIR, seed 1"),
    ],
)
def test_the_run_of_another_command_is_not_taken_for_this_one(options, message, tmp_path):
    made_up_run(tmp_path / "ant-medium-fo__ibc__1", 1.0, **options)
    cell = {"tasks": ("ant-medium-fo",), "algorithms": ("ibc",)}
    args = reproduce.Args("4b", 1, **cell, folder=tmp_path, dry_run=True)
    assert_refused(reproduce, args, message)


@pytest.mark.parametrize("text", ['{"score": 1', '{"score": 1}', "[]", '{"args": 1}'])
def test_a_damaged_result_is_one_line(text, tmp_path):
    run_dir = tmp_path / "ant-medium-fo__ibc__1"
    made_up_run(run_dir, 1.0)
    (run_dir / "result.json").write_text(text)
    cell = {"tasks": ("ant-medium-fo",), "algorithms": ("ibc",)}
    args = reproduce.Args("4b", 1, **cell, folder=tmp_path, dry_run=True)
    assert_refused(reproduce, args, "result.json is damaged; delete it", "--resume")
    with pytest.raises(InputError, match="result.json is damaged"):
        report.add_run(run_dir, tmp_path)


def test_a_task_that_has_changed_since_its_run_is_noticed(tmp_path):
    file, run_dir = tmp_path / "own.py", tmp_path / "runs" / "PAIR__ibc__1"
    text = "from mamujoco_envs import Task, blocks\n"
    text += 'PAIR = Task("Swimmer-v5", ((0, 1), (2, 3)), blocks(1, 1), 9, expert_return=4.0)\n'
    file.write_text(text)
    task = find_task(f"{file}:PAIR")
    args = reproduce.default_options("ibc", task.option) | {"task": task.option, "seed": 1}
    args = json.loads(json.dumps(args, default=str))
    run_dir.mkdir(parents=True)
    result = made_up_result(0.5) | {"return": 2.0, "args": args}
    (run_dir / "result.json").write_text(json.dumps(result))
    names = ("script", "step", "seconds", "evaluations", "inputs", "random_states", "state")
    save(dict.fromkeys(names) | {"args": args, "split": task.split}, run_dir / "checkpoint.pt")
    cell = {"tasks": (task.option,), "algorithms": ("ibc",)}
    args = reproduce.Args("other", 1, **cell, folder=run_dir.parent, dry_run=True)
    reproduce.main(args)
    file.write_text(text.replace("4.0", "5.0"))
    assert_refused(reproduce, args, "another random_return or expert_return", "move it away")
    file.write_text(text.replace("(2, 3)", "(3, 2)"))
    assert_refused(reproduce, args, "observe or drive other dimensions")


def test_the_run_of_another_script_is_not_taken_for_this_one(tmp_path):
    """ITD3+BC and MATD3+BC have the same options."""
    made_up_run(tmp_path / "ant-medium-fo__matd3_bc__1", 1.0)
    run_dir = (tmp_path / "ant-medium-fo__matd3_bc__1").rename(
        tmp_path / "ant-medium-fo__itd3_bc__1"
    )
    cell = {"tasks": ("ant-medium-fo",), "algorithms": ("itd3_bc",)}
    args = reproduce.Args("4b", 1, **cell, folder=tmp_path, dry_run=True)
    assert_refused(reproduce, args, "holds a run of matd3_bc.py on ant-medium-fo, seed 1")
    with pytest.raises(InputError, match="is a run of matd3_bc.py on ant-medium-fo, seed 1"):
        report.add_run(run_dir, tmp_path)
    assert "lambda_g" in reproduce.changed_options("ibc", "ant-medium-fo", {"lambda_g": 1.0})


def test_how_many_points_older_runs_had_is_the_default():
    options = reproduce.default_options("icql", "ant-medium-fo")
    assert not reproduce.changed_options("icql", "ant-medium-fo", options | {"cql_points": 6})
    for points in (3, 24):
        given = options | {"cql_points": points}
        changed = reproduce.changed_options("icql", "ant-medium-fo", given)
        assert changed == f"cql_points {points}"


def test_a_run_that_fails_in_a_table_is_named(stub, tmp_path, capsys):
    stub("import sys\nprint('first line')\nsys.exit('error: no luck')\n")
    cell = {"tasks": ("coordination-neutral",), "algorithms": ("ibc",)}
    args = reproduce.Args("3", 1, **cell, workers=1, folder=tmp_path / "runs")
    assert_refused(reproduce, args, "1 of 1 runs failed")
    assert "error: no luck" in capsys.readouterr().out


def test_why_a_run_failed():
    assert reproduce.why_it_failed("a\nerror: no luck\nb\n", 1) == "error: no luck"
    both = "error: no room\nb\nerror: no world model\n"
    assert reproduce.why_it_failed(both, 1) == "error: no room; no world model"
    assert "137" in reproduce.why_it_failed("", 137)


def test_the_cells_of_the_tables_are_those_with_a_figure():
    for table in set(reproduce.TABLES) - {"other"}:  # any tasks
        for cell in reproduce.table_cells(reproduce.Args(table)):
            beyond = reproduce.TABLES[table].algorithms
            algorithm = "moma_ppo" if cell.algorithm == "inspo" else cell.algorithm
            assert beyond or cell.task in mamujoco_envs.PAPER_SCORES[algorithm]


def test_a_folder_that_cannot_be_written_to_is_told_before_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.os, "access", lambda path, mode: False)
    args = reproduce.Args("4b", 1, tasks=("ant-medium-fo",), algorithms=("ibc",), folder=tmp_path)
    assert_refused(reproduce, args, "cannot write to")


def test_bad_input_of_tables(tmp_path):
    args = reproduce.Args("4b", folder=tmp_path)
    for options, part in [
        ({"tasks": ("ant-medium",)}, "table 4b has no ant-medium"),
        ({"algorithms": ("matd3_bc",)}, "table 4b has no matd3_bc"),
        ({"tasks": ("ant-medium-po",), "algorithms": ("iql",)}, "table 4b has none"),
        ({"seeds": 0}, "--seeds"),
        ({"workers": 0}, "--workers"),
        ({"hours": 0.0, "dry_run": True}, "--hours"),
        ({"gpus": -1, "dry_run": True}, "--gpus"),
        ({"slurm": ("gpu",), "dry_run": True}, "--slurm takes NAME=VALUE"),
        ({"slurm": ("mem=4G",), "dry_run": True}, "for the jobs of --cluster slurm"),
    ]:
        assert_refused(reproduce, dataclasses.replace(args, **options), part)


def test_a_dry_run_prints_commands_that_a_shell_understands(tmp_path, capsys):
    reproduce.main(reproduce.Args("3", 1, folder=tmp_path / "runs", dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and all("--task coordination-" in line for line in lines)
    assert subprocess.run(["bash", "-n", "-c", "\n".join(lines)]).returncode == 0
    assert not (tmp_path / "runs").exists()


def test_a_stopped_table_stops_its_runs(stub, tmp_path, monkeypatch):
    stub("import time\ntime.sleep(60)\n")
    sleep, processes = reproduce.time.sleep, []

    def sleep_and_stop(seconds):
        signal.raise_signal(signal.SIGTERM)
        sleep(0)

    popen = subprocess.Popen
    monkeypatch.setattr(
        reproduce.subprocess,
        "Popen",
        lambda *a, **o: processes.append(popen(*a, **o)) or processes[-1],
    )
    monkeypatch.setattr(reproduce.time, "sleep", sleep_and_stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(reproduce.Args("3", 1, workers=2, folder=tmp_path / "runs"))
    assert stop.value.code == 128 + signal.SIGTERM
    assert [process.poll() for process in processes] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) == before


class FakeExecutor:
    """In the place of submitit's: runs a job as soon as it is submitted."""

    def __init__(self, folder, cluster):
        assert cluster == "slurm"

    def update_parameters(self, **parameters):
        FakeExecutor.parameters = parameters

    batch = contextlib.nullcontext

    def submit(self, function):
        job = mock.Mock(job_id="7_0", **{"done.return_value": True, "exception.return_value": None})
        job.stdout.return_value, job.stderr.return_value = "", "error: no luck"
        try:
            function()
        except subprocess.CalledProcessError as failed:
            job.exception.return_value = failed
        return job


def test_a_table_runs_on_slurm(stub, tmp_path, monkeypatch, capsys):
    result = json.dumps(made_up_result(0.5))
    stub(
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\n"
        "folder.name.endswith('2') and sys.exit(1)\nfolder.mkdir(exist_ok=True)\n"
        f"(folder / 'result.json').write_text({result!r})\n"
    )
    cell = {"tasks": ("ant-medium-fo",), "algorithms": ("ibc",), "folder": tmp_path / "runs"}
    args = reproduce.Args(
        "4b", 2, **cell, cluster="slurm", gpus=1, slurm=("partition=gpu", "mem=2G")
    )
    monkeypatch.setattr(reproduce.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert_refused(reproduce, args, "pip install submitit")
    monkeypatch.setitem(sys.modules, "submitit", mock.Mock(AutoExecutor=FakeExecutor))
    assert_refused(reproduce, args, "finds no sbatch")
    monkeypatch.setattr(reproduce.shutil, "which", lambda name: f"/bin/{name}")
    assert_refused(reproduce, args, "1 of 2 runs failed")
    output = capsys.readouterr().out
    assert "seed 1: score 0.500" in output and "seed 2: error: no luck" in output
    parameters = FakeExecutor.parameters
    assert parameters["timeout_min"] == 720 and parameters["gpus_per_node"] == 1
    assert parameters["slurm_additional_parameters"] == {"partition": "gpu", "mem": "2G"}
    # Whatever folder the command was started in, a job finds the modules of this repository.
    (setup,) = parameters["slurm_setup"]
    assert (
        setup.startswith("export PYTHONPATH=")
        and str(mamujoco_envs.__file__).rpartition("/")[0] in setup
    )


def test_jobs_that_slurm_refuses_are_one_line(tmp_path, monkeypatch):
    class RefusingExecutor(FakeExecutor):
        def submit(self, function):
            raise OSError("sbatch: error: no such partition\nsbatch: error: failed")

    submitit = mock.Mock(AutoExecutor=RefusingExecutor)
    submitit.core.utils.FailedJobError = OSError
    monkeypatch.setitem(sys.modules, "submitit", submitit)
    monkeypatch.setattr(reproduce.shutil, "which", lambda name: f"/bin/{name}")
    args = reproduce.Args("3", 1, folder=tmp_path, cluster="slurm", slurm=("partition=x",))
    assert_refused(reproduce, args, "no such partition", "change --slurm")


def test_a_slurm_job_that_is_told_to_stop_waits_for_its_end(stub, tmp_path, monkeypatch):
    """Ending by itself it would count as failed, and not be requeued."""
    stub("import sys\nsys.exit(128 + 15)\n")
    waits = []
    monkeypatch.setattr(reproduce.time, "sleep", waits.append)
    job = reproduce.Job(reproduce.Cell("ibc", "ant-medium-fo"), 1, tmp_path / "run")
    with pytest.raises(subprocess.CalledProcessError):
        reproduce.SlurmJob(job, [])()
    assert waits == [3600]


def test_a_slurm_job_whose_time_is_up_saves_and_is_submitted_again(stub, tmp_path, monkeypatch):
    """As submitit does it: its handler calls `checkpoint` while the job waits for its run."""
    stub(
        "import pathlib, signal, sys, time\nfolder = pathlib.Path(sys.argv[1])\n"
        "def save(*_):\n    (folder / 'saved').write_text('')\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN\n"
        "(folder / 'ready').write_text('')\n"
        "time.sleep(60)\n"
    )
    helpers = mock.Mock(DelayedSubmission=lambda job: job)
    monkeypatch.setitem(sys.modules, "submitit", mock.Mock(helpers=helpers))
    monkeypatch.setitem(sys.modules, "submitit.helpers", helpers)
    slurm_job = reproduce.SlurmJob(reproduce.Job(reproduce.Cell("ibc", "x"), 1, tmp_path), ["-x"])
    monkeypatch.setattr(reproduce, "find_task", lambda name: mock.Mock())
    again = []

    def time_is_up(*_):
        again.append(slurm_job.checkpoint())
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, time_is_up)
    threading.Thread(target=alarm_when, args=(tmp_path / "ready",), daemon=True).start()
    try:
        with pytest.raises(TimeoutError):
            slurm_job()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert (tmp_path / "saved").exists()
    assert again[0].job is slurm_job.job and again[0].options == ["-x"]


def alarm_when(path):
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGALRM)


def test_runs_take_turns_on_gpus(stub, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stub(
        "import os, pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\nfolder.mkdir(parents=True)\n"
        "(folder / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\nsys.exit(1)\n"
    )
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 2)
    cell = {"tasks": ("ant-medium-fo",), "algorithms": ("ibc",), "folder": tmp_path / "runs"}
    assert_refused(reproduce, reproduce.Args("4b", 3, **cell, workers=3), "3 of 3 runs failed")
    gpus = [path.read_text() for path in sorted(tmp_path.glob("runs/*/gpu"))]
    assert sorted(gpus) == ["0", "0", "1"]


# Published results.


@pytest.fixture(scope="module")
def published():
    return report.read_runs()


def test_published_tables_are_those_of_the_published_runs(published):
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        assert report.with_tables(text, published) == text, f"run scripts/report.py for {page.name}"


def test_a_published_score_is_the_mean_of_its_raw_returns(published):
    for runs in published.values():
        for run in runs:
            task = find_task(run["task"])
            score = task.normalized_score(np.mean(run.get("returns") or run["return"]))
            assert score == pytest.approx(run["score"], abs=1e-3)


def test_a_run_is_added_to_the_published_ones(tmp_path):
    for seed, score in ((1, 0.25), (2, 0.75), (2, 0.35)):  # the last replaces the one before
        run_dir = tmp_path / f"ant-medium-fo__ibc__{seed}"
        result = made_up_run(run_dir, score) | {"returns": [1.23456789], "more": 1}
        (run_dir / "result.json").write_text(json.dumps(result))
        report.add_run(run_dir, tmp_path)
    (runs,) = report.read_runs(tmp_path).values()
    assert runs[0]["returns"] == [1.2346] and "more" not in runs[0]
    assert report.score(runs) == "0.30 ± 0.05" and report.score(runs[:1]) == "0.25 ± 0.10*"
    page = "before\n<!-- table ibc -->\nold\n<!-- end -->\nafter"
    made = report.with_tables(page, {("ibc", "ant-medium-fo"): runs})
    row = "| `ant-medium-fo` | 10 | 2 | 0.30 ± 0.05 | 0.84 ± 0.01 | 2 |"
    assert row in made and "old" not in made and made.endswith("<!-- end -->\nafter")


def test_tables_are_of_runs_with_todays_defaults(tmp_path):
    """MOMA-PPO's calibrated options are those of the shipped world model."""
    run_dir = tmp_path / "ant-medium-fo__moma_ppo__7"
    made_up_run(run_dir, 0.5, lambda_g=12.0)
    with pytest.raises(InputError, match="has lambda_g 12.0, but tables are of defaults"):
        report.add_run(run_dir, tmp_path)
    calibrated = reproduce.calibrated("ant-medium-fo", False)
    made_up_run(run_dir, 0.5, **calibrated)
    report.add_run(run_dir, tmp_path)
    assert report.read_runs(tmp_path)
    made_up_run(run_dir, 0.5, seed=8)
    with pytest.raises(InputError, match="is a run of moma_ppo.py on ant-medium-fo, seed 8"):
        report.add_run(run_dir, tmp_path)
    made_up_run(run_dir, 0.5, ground_truth=True)
    with pytest.raises(InputError, match="has ground_truth True, but tables are of defaults"):
        report.add_run(run_dir, tmp_path)
    text = (tmp_path / "table-4b.json").read_text()
    (tmp_path / "table-4b.json").write_text(text.replace('"epochs": 2', '"epochs": 5'))
    assert not report.read_runs(tmp_path)
    with pytest.raises(InputError, match="must be named TASK__ALGORITHM__SEED"):
        report.add_run(run_dir.rename(tmp_path / "ant-medium-fo__moma_ppo__7__2026"), tmp_path)
    (tmp_path / "table-4b.json").write_text(text[:-9])
    with pytest.raises(InputError, match="table-4b.json is damaged; get it back with: git restore"):
        report.read_runs(tmp_path)


def test_intervals_are_those_of_the_seeds():
    """Of eight seeds the middle four count; a difference of constants has no width."""
    scores = [0.0, 0.1, 0.4, 0.5, 0.5, 0.6, 5.0, 9.0]
    assert report.interval(report.interquartile_mean, scores).startswith("0.50 [")
    assert report.interval(report.difference, [1.0] * 3, [0.25] * 4) == "0.75 [0.75, 0.75]"
    low, high = map(float, report.interval(report.difference, scores, [0.0] * 5)[6:-1].split(","))
    assert low < np.mean(scores) < high and high - low > 3
    task, runs = "reacher-leader-only", [{"score": score} for score in scores]
    cells = {("moma_ppo", task): runs[:3], ("ibc", task): runs[3:], ("iql", task): runs[:2]}
    cells["moma_ppo-ground-truth", task] = runs[2:5]
    rows = report.table_of_intervals(cells).splitlines()[2:]
    names = ["IBC", "MOMA-PPO", "rollouts in the true simulator"]  # IQL has two seeds only
    assert [row.split("|")[2].strip() for row in rows] == names


def test_time_is_summed_over_the_runs_of_each_part():
    runs = (
        ("ibc", "reacher-leader-only", 1800),
        ("ibc", "reacher-leader-only", 5400),
        ("moma_ppo-k5", "reacher-leader-only", 60),
        ("logo-penalty", "ant-medium-fo", 3600),
        ("ibc", "climbing-0.1", 7),
    )
    cells = {}
    for algorithm, task, seconds in runs:
        run = {"algorithm": algorithm, "task": task, "seconds": float(seconds)}
        cells.setdefault((algorithm, task), []).append(run)
    assert report.table_of_time(cells).splitlines()[2:] == [
        "| LOGO-style and its comparison | 1 | 1.0 | 3,600 | 3,600 |",
        "| Table 4 (a) | 2 | 2.0 | 3,600 | 5,400 |",
        "| Table 5, Figures 4, 8 and 9 | 1 | 0.0 | 60 | 60 |",
        "| beyond the paper | 1 | 0.0 | 7 | 7 |",
    ]


def test_a_variant_is_kept_apart_and_has_its_own_table(tmp_path):
    run_dir = tmp_path / "ant-medium-fo__moma_ppo-ground-truth__1"
    made_up_run(run_dir, 1.5)
    report.add_run(run_dir, tmp_path)
    assert (tmp_path / "table-ablations.json").is_file()
    table = report.make_table("5", report.read_runs(tmp_path))
    row = "| rollouts in the true simulator | 1 | not run | 1.50 ± 0.10* (1.68 ± 0.03) |"
    assert row in table
    report.draw_curves(report.read_runs(tmp_path), tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["curves-5.png"]
    assert set(report.VARIANT_NAMES) == {*report.NAMES, *reproduce.VARIANTS}


def test_moma_ppo_in_logos_model_follows_the_run_that_makes_it(tmp_path):
    cell = reproduce.Cell("moma_ppo-in-logo", "ant-medium-fo")
    job = reproduce.Job(cell, 2, tmp_path / "ant-medium-fo__moma_ppo-in-logo__2")
    command = reproduce.job_command(job, [])
    model = str(tmp_path / "ant-medium-fo__logo__2" / "world_model.pt")
    assert command[command.index("--world-model") + 1] == model
    assert "run logo first" in reproduce.missing_model(job)
    others = (
        job._replace(cell=cell._replace(algorithm="logo")),
        job._replace(cell=cell._replace(algorithm="moma_ppo-k5")),
    )
    assert not any(map(reproduce.missing_model, others))
    options = reproduce.default_options("moma_ppo-in-logo", "ant-medium-fo")
    kept = options | {"world_model": model}
    assert not reproduce.changed_options("moma_ppo-in-logo", "ant-medium-fo", kept | {"seed": 2})
    assert reproduce.changed_options("moma_ppo-in-logo", "ant-medium-fo", kept | {"seed": 3})


@pytest.mark.parametrize("makes_a_model", [True, False])
def test_runs_in_another_runs_model_come_last(makes_a_model, tmp_path, monkeypatch, capsys):
    phases = []
    follower = "logo-penalty" if makes_a_model else "moma_ppo-in-logo"

    def run_all(jobs, *_):
        phases.append([job.cell.algorithm for job in jobs])
        for job in jobs if makes_a_model else ():
            job.run_dir.mkdir()
            (job.run_dir / "world_model.pt").touch()

    monkeypatch.setattr(reproduce, "run_all", run_all)
    cell = {"tasks": ("reacher-leader-only",), "algorithms": (follower, "logo")}
    args = reproduce.Args("local-to-global", 1, **cell, folder=tmp_path)
    assert_refused(reproduce, args, "2 of 2 runs failed")
    assert phases == [["logo"], [follower] if makes_a_model else []]
    assert ("run logo first" in capsys.readouterr().out) != makes_a_model


def test_a_variant_with_the_defaults_of_a_task_takes_its_runs():
    cells = {("moma_ppo", task): [{"seed": 1}] for task in ("ant-medium-fo", "reacher-leader-only")}
    assert report.runs_of_variant("moma_ppo-k50", "ant-medium-fo", cells) == [{"seed": 1}]
    assert report.runs_of_variant("moma_ppo-k50", "reacher-leader-only", cells) == []
    assert report.runs_of_variant("moma_ppo-k25", "ant-medium-fo", cells) == []


@pytest.mark.parametrize(
    "table, count", [("figure-8", 1), ("figure-8", 2), ("figure-8", 5), ("figure-9", 1)]
)
def test_curves_have_a_panel_for_each_task_and_a_legend(table, count, tmp_path, monkeypatch):
    figures, figure = [], reproduce.Figure
    monkeypatch.setattr(
        reproduce, "Figure", lambda **options: figures.append(figure(**options)) or figures[-1]
    )
    tasks = [name for name in mamujoco_envs.all_tasks() if name.startswith("ant-")][:count]
    results = {
        reproduce.Cell(algorithm, task): [made_up_result(0.5)]
        for algorithm in reproduce.ABLATIONS[table]
        for task in tasks
    }
    reproduce.plot_curves(results, tmp_path / "curves.png", "steps")
    assert [axes.get_title() for axes in figures[0].axes] == tasks
    (legend,) = figures[0].legends
    assert legend.get_window_extent().width <= figures[0].bbox.width  # no name is cut off
    names = [text.get_text().partition("'")[0] for text in legend.get_texts()]
    # Figure 9 compares variants that the paper has no figure for.
    of_paper = ["the paper"] if table == "figure-8" else []
    rest = [*of_paper, "the dataset", "standard error over seeds"]
    assert names == [*reproduce.ABLATIONS[table], *rest]


def test_every_algorithm_has_a_colour():
    assert all(reproduce.color_of(algorithm) for algorithm in reproduce.ALGORITHMS)
    for compared in (*reproduce.ABLATIONS.values(), report.NAMES):
        assert len({*map(reproduce.color_of, compared)}) == len(compared)


def test_runs_of_games_beyond_the_paper_are_kept_short_and_drawn(tmp_path):
    for algorithm, seed, score in (("ibc", 1, 0.0), ("inspo", 1, 0.5), ("inspo", 2, 1.0)):
        run_dir = tmp_path / f"climbing-1__{algorithm}__{seed}"
        result = made_up_run(run_dir, score)
        result |= {"return": 10 * score, "returns": [10 * score] * 100}
        (run_dir / "result.json").write_text(json.dumps(result))
        report.add_run(run_dir, tmp_path)
    cells = report.read_runs(tmp_path)
    assert not any("returns" in run for runs in cells.values() for run in runs)
    table = report.make_table("climbing", cells)
    assert "| InSPO | 2 | not run | not run | 0.75 ± 0.25 | not run | 2 |" in table
    report.draw_figures(cells, tmp_path)
    assert (tmp_path / "agreement-climbing.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_of_adding_runs(tmp_path):
    with pytest.raises(InputError, match="cannot write .*Is a directory"):
        report.write(tmp_path, "a table")
    with pytest.raises(InputError, match="no result at"):
        report.add_run(tmp_path)
    for name in ("run", "ant-medium-fo__nothing__1", "ant-medium-fo__ibc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text("{}")
        with pytest.raises(InputError, match="must be named TASK__ALGORITHM__SEED"):
            report.add_run(tmp_path / name)
