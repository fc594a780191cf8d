"""Films of runs, on machines that can render."""

import os

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import mamujoco_envs
import moma_ppo
import render
from baselines import ibc, iql
from mamujoco_envs import TASKS, InputError

backend = os.environ.get("MUJOCO_GL")
os.environ.setdefault("MUJOCO_GL", "egl")
try:
    mamujoco_envs.parallel_env("reacher-leader-only", render_mode="rgb_array").render()
    renders = True
except Exception:  # each backend fails in its own way
    renders = False
if backend is None:
    del os.environ["MUJOCO_GL"]  # the other tests are to run as on the user's machine


def run_of(tmp_path, module, script, task_name):
    task = TASKS[task_name]
    states = torch.randn(20, task.state_dim)
    team = (
        module.Team(iql.centralize(task), states, task.action_dim)
        if module is iql
        else module.Team(task, states)
    )
    torch.save(
        {"script": script, "args": {"task": task_name}, "team": team.state_dict()},
        tmp_path / "checkpoint.pt",
    )
    return team


@pytest.mark.skipif(not renders, reason="this machine cannot render off-screen")
@pytest.mark.parametrize(
    "module, script, task_name",
    [(moma_ppo, "moma_ppo", "ant-medium-po"), (ibc, "ibc", "reacher-leader-only")],
)
def test_films_and_pictures(tmp_path, module, script, task_name):
    run_of(tmp_path, module, script, task_name)
    render.main(render.Args(run=tmp_path, steps=6))
    render.main(render.Args(run=tmp_path, steps=6, output=tmp_path / "strip.png"))
    assert imageio.imread(tmp_path / "film.gif").shape[0] == 4
    assert imageio.imread(tmp_path / "strip.png").shape == (480, 8 * 480, 3)


@pytest.mark.skipif(not renders, reason="this machine cannot render off-screen")
def test_the_filmed_episode_is_the_evaluations(tmp_path):
    team = run_of(tmp_path, iql, "iql", "reacher-all-observant")
    evaluation = mamujoco_envs.evaluate(
        iql.centralize(TASKS["reacher-all-observant"]), team.act_greedily, 1
    )
    frames, episode_return, _ = render.film(render.Args(run=tmp_path, steps=100))
    assert len(frames) == 51 and episode_return == pytest.approx(evaluation.returns[0], abs=1e-4)
    assert np.ptp(frames[0]) > 0


def test_bad_input(tmp_path):
    (tmp_path / "checkpoint.pt").write_text("nothing")
    for args, message in [
        (render.Args(run=tmp_path / "nowhere"), "no checkpoint at"),
        (render.Args(run=tmp_path), "is not a checkpoint of a team"),
        (
            render.Args(run=tmp_path, output=tmp_path / "film.mov"),
            "--output must end in .gif or .png",
        ),
        (render.Args(run=tmp_path, output=tmp_path / "nowhere" / "film.gif"), "no folder"),
    ]:
        with pytest.raises(InputError, match=message):
            render.main(args)
    torch.save(
        {"script": "ibc", "args": {"task": "coordination-neutral"}, "team": {}},
        tmp_path / "checkpoint.pt",
    )
    with pytest.raises(
        InputError,
        match="coordination-neutral has nothing to show; Reacher and the ant can be filmed",
    ):
        render.main(render.Args(run=tmp_path))
    run_of(tmp_path, moma_ppo, "ibc", "ant-medium-po")  # another script's weights
    with pytest.raises(InputError, match="is not a checkpoint of a team"):
        render.main(render.Args(run=tmp_path))
