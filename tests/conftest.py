"""Fixtures of many tests: a folder of their own, small data, and scripts run in this process."""

import io
import os
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# Networks are so small here that a second thread only waits; processes inherit this.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from made_up import ANT, REACHER, recorded_columns, write_dataset

import training_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind():
    def made_by_runs():
        return {*ROOT.glob("runs/*"), *ROOT.glob("data/*.hdf5"), *ROOT.glob("data/weights/*")}

    before = made_by_runs()
    yield
    assert made_by_runs() == before


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs go to runs/ in the current folder, so each test has one of its own, and a seed."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    torch.manual_seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def reacher_file(tmp_path_factory):
    """Forty episodes of random actions, as a dataset file."""
    path = tmp_path_factory.mktemp("data") / "reacher.hdf5"
    return write_dataset(path, recorded_columns(REACHER, episodes=40, scale=1.0))


@pytest.fixture(scope="session")
def ant_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ant.hdf5"
    return write_dataset(path, recorded_columns(ANT, episodes=12, length=20))


@pytest.fixture
def run_script(monkeypatch):
    """Runs a script in this process, from its first line to its main block.

    Returns what the shell would see: the exit status, 0 or a message, and what was printed. The
    final evaluation has ten episodes. Importing PyTorch would take longer than most of these runs.
    """

    def run_script(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(training_run, "FINAL_EPISODES", 10)
        output, status, path = io.StringIO(), 0, list(sys.path)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with redirect_stdout(output), redirect_stderr(output):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            status = error.code or 0
        finally:
            sys.path[:] = path
            for number, handler in handlers.items():  # scripts that record set them and end
                signal.signal(number, handler)
        return status, output.getvalue()

    return run_script


@pytest.fixture
def environment():
    """For processes: this one's, with the repository as the place of modules."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
