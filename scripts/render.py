"""Films one greedy episode of a trained team, for any script's run in a gymnasium environment.

    python scripts/render.py --run runs/RUN                       # a film: runs/RUN/film.gif
    python scripts/render.py --run runs/RUN --output strip.png    # eight moments of the episode

Machines without a screen render through EGL (Debian: libegl1, libegl-mesa0) or, with
MUJOCO_GL=osmesa, through OSMesa (libosmesa6).
"""

import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import imageio.v3 as imageio
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

try:
    from mamujoco_envs import (
        EVALUATION_SEED,
        InputError,
        ParallelEnv,
        Task,
        append_to_histories,
        require,
    )
    from training_run import load_team
except Exception as error:  # importing mujoco loads the backend that MUJOCO_GL names
    if "MUJOCO_GL" not in os.environ:
        raise
    backend = os.environ["MUJOCO_GL"]
    sys.exit(f"error: MUJOCO_GL={backend} does not work on this machine ({error}); unset it")

MOMENTS = 8


@dataclass
class Args:
    run: Path
    """run folder; its checkpoint.pt is filmed"""
    output: Path | None = None
    """a .gif film or a .png of eight moments; by default film.gif in the run folder"""
    seed: int = EVALUATION_SEED
    """random seed for the episode; the default is the first episode of an evaluation"""
    steps: int = 300
    """film at most this many steps"""
    task: str | None = None
    """FILE:NAME of your own task, if its file has moved; by default, as the run knows it"""


class Film(NamedTuple):
    """An episode from its first state to its last: `steps + 1` frames."""

    task: Task
    frames: list[np.ndarray]  # [height, width, 3] each
    positions: list[float]  # of a runner along x, in metres
    step_seconds: float
    episode_return: float


def open_environment(task: Task) -> ParallelEnv:
    """The task's environment, after a test that this machine renders it."""
    can_be_filmed = task.has_environment and not task.columns
    require(can_be_filmed, f"{task.name} cannot be filmed; it has no gymnasium environment")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    backend = os.environ.get("MUJOCO_GL", "glfw")
    try:
        with warnings.catch_warnings(action="ignore"):
            # A missing backend fails here; gymnasium would add a traceback of its own.
            importlib.import_module(f"mujoco.{backend}").GLContext(64, 64).free()
            env = ParallelEnv(task, render_mode="rgb_array")
            env.reset()
            frame = env.render()
    except InputError:  # of an environment that takes no render_mode, for example
        raise
    except Exception as error:  # each backend fails in its own way
        reason = " ".join(str(error).split())
        advice = "install libegl1 and libegl-mesa0 and set MUJOCO_GL=egl, or libosmesa6 and osmesa"
        raise InputError(f"this machine cannot render ({reason}); {advice}") from None
    message = f"{task.environment_name} gives no frame with render_mode='rgb_array'"
    require(isinstance(frame, np.ndarray), message)
    return env


@torch.no_grad()
def play(args: Args, team) -> Film:
    """Lets the team act greedily, as an evaluation does, and keeps a frame of every step."""
    task = team.task
    env = open_environment(task)
    env.reset(seed=args.seed)
    histories = torch.zeros(1, *task.history_shape)
    frames, positions, episode_return = [env.render()], [position_of(env)], 0.0
    for _ in tqdm(range(args.steps), unit="step", disable=None):
        observations = task.observe(torch.as_tensor(env.state()[None], dtype=torch.float32))
        actions = team.act_greedily(observations, histories)
        histories = append_to_histories(histories, observations, actions)
        _, rewards, *_ = env.step(dict(zip(env.agents, actions[0].numpy())))
        episode_return += next(iter(rewards.values()))
        frames.append(env.render())
        positions.append(position_of(env))
        if not env.agents:
            break
    step_seconds = 1 / env.metadata["render_fps"]
    env.close()
    return Film(task, frames, positions, step_seconds, episode_return)


def position_of(env: ParallelEnv) -> float:
    """The first coordinate of MuJoCo's qpos, a runner's x; 0 in other environments."""
    data = getattr(env.environment.unwrapped, "data", None)
    return float(data.qpos[0]) if hasattr(data, "qpos") else 0.0


def write_gif(film: Film, path: Path) -> None:
    """Every second frame, or fewer where steps are short, in real time."""
    stride = max(2, round(0.04 / film.step_seconds))  # GIF counts in hundredths of a second
    milliseconds = round(1000 * stride * film.step_seconds)
    imageio.imwrite(path, film.frames[::stride], duration=milliseconds, loop=0)


def write_strip(film: Film, path: Path) -> None:
    """Eight moments from the first state to the last, with their times."""
    figure = Figure(figsize=(12, 6.9), layout="constrained")
    moments = np.linspace(0, len(film.frames) - 1, MOMENTS).round().astype(int)
    for axes, moment in zip(figure.subplots(2, MOMENTS // 2).flat, moments):
        label = f"{moment * film.step_seconds:.2f} s"
        if film.task.locomotion:
            label += f", {film.positions[moment] - film.positions[0]:.1f} m"
        axes.imshow(film.frames[moment])
        axes.set_title(label, fontsize=16)
        axes.set_axis_off()
    title = f"{film.task.name}: {len(film.frames) - 1} steps, return {film.episode_return:.1f}"
    figure.suptitle(title, fontsize=18)
    figure.savefig(path, dpi=100)


WRITERS = {".gif": write_gif, ".png": write_strip}


def check(args: Args, team=None):
    """Raises `InputError` where an option makes no sense or the episode cannot be rendered.

    Returns `team`, or by default that of the run's checkpoint.
    """
    output = args.output or args.run / "film.gif"
    require(output.suffix in WRITERS, f"--output must end in .gif or .png; it is {output}")
    require(args.steps > 0, f"--steps must be above 0; it is {args.steps}")
    require(0 <= args.seed < 2**32, f"--seed must be from 0 to {2**32 - 1}; it is {args.seed}")
    if args.output:
        require(output.parent.is_dir(), f"no folder {output.parent} to write {output.name} to")
    require(not output.exists(), f"{output} exists; rename or delete it")
    team = team or load_team(args.run, args.task)
    require(os.access(output.parent, os.W_OK), f"cannot write to {output.parent}; change its mode")
    open_environment(team.task).close()
    return team


def main(args: Args, team=None) -> None:
    team = team or check(args)  # evaluate.py has checked the film before it scores the team
    output = args.output or args.run / "film.gif"
    episode = play(args, team)
    try:
        WRITERS[output.suffix](episode, output)
    except BaseException as error:
        output.unlink(missing_ok=True)  # half a film
        if isinstance(error, OSError):
            raise InputError(f"cannot write {output} ({error.strerror})") from None
        raise
    print(f"{output}: {len(episode.frames) - 1} steps, return {episode.episode_return:.1f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
