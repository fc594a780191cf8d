"""Films one greedy episode of a trained team, for any run of any script here on Reacher or the ant.

    python render.py --run runs/RUN                          # RUN/film.gif
    python render.py --run runs/RUN --output strip.png       # eight moments of it, side by side

Machines without a screen render through EGL (Debian: libegl1, libegl-mesa0), or with MUJOCO_GL=osmesa through OSMesa (libosmesa6).
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import tyro
from tqdm import tqdm

from mamujoco_envs import HISTORY_LENGTH, InputError, ParallelEnv, append_to_histories, find_task


@dataclass
class Args:
    run: Path
    """folder of a run, with its checkpoint.pt"""
    output: Path | None = None
    """a .gif film or a .png with eight moments; film.gif in the run's folder if not given"""
    seed: int = 10102
    """seed of the episode; 10102 is the first one of an evaluation"""
    steps: int = 300
    """steps to film at most"""


def load_team(run: Path):
    """The team of a run's checkpoint and its task, by the classes of the script that trained it."""
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; --run takes the folder of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script, weights = checkpoint["script"], checkpoint["team"]
        module = importlib.import_module(script if script == "moma_ppo" else f"baselines.{script}")
        task = find_task(checkpoint["args"]["task"])
        if task.discrete:
            raise InputError(f"{task.name} has nothing to show; Reacher and the ant can be filmed")
        extra = [task.action_dim] if script == "iql" else []
        task = module.centralize(task) if script == "iql" else task
        team = module.Team(
            task, torch.zeros(2, task.state_dim), *extra
        )  # statistics come with the weights
        team.load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is not a checkpoint of a team ({type(error).__name__}); --run takes the folder of a run"
        ) from None
    return team, task


@torch.no_grad()
def film(args: Args) -> tuple[list[np.ndarray], float, float]:
    """Frames [height, width, 3] of one episode, one a step, its return so far, and the seconds of a step."""
    team, task = load_team(args.run)
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    env = ParallelEnv(task, render_mode="rgb_array")
    env.reset(seed=args.seed)
    try:
        env.render()
    except Exception as error:  # each backend fails in its own way
        raise InputError(
            f"this machine cannot render ({error}); install libegl1 and libegl-mesa0, or libosmesa6 and set MUJOCO_GL=osmesa"
        ) from None
    histories = torch.zeros(
        1, task.num_agents, HISTORY_LENGTH, max(task.obs_dims) + task.action_dim
    )
    frames, episode_return = [env.render()], 0.0
    for _ in tqdm(range(args.steps), unit="step", disable=None):
        observations = task.observe(torch.as_tensor(env.state()[None], dtype=torch.float32))
        actions = team.act_greedily(observations, histories)
        histories = append_to_histories(histories, observations, actions)
        _, rewards, *_ = env.step(dict(zip(env.agents, actions[0].numpy())))
        episode_return += next(iter(rewards.values()))
        frames.append(env.render())
        if not env.agents:
            break
    seconds = env.environment.dt
    env.close()
    return frames, episode_return, seconds


def main(args: Args) -> None:
    output = args.output or args.run / "film.gif"
    if output.suffix not in (".gif", ".png") or args.steps < 1:
        raise InputError(
            f"--output must end in .gif or .png and --steps be above 0; they are {output} and {args.steps}"
        )
    if args.output and not output.parent.is_dir():
        raise InputError(f"no folder {output.parent} to write {output.name} to")
    frames, episode_return, seconds = film(args)
    if output.suffix == ".gif":  # every second frame, as fast as in life
        imageio.imwrite(output, frames[::2], duration=2000 * seconds, loop=0)
    else:
        moments = np.linspace(0, len(frames) - 1, 8).round().astype(int)
        imageio.imwrite(output, np.hstack([frames[i] for i in moments]))
    print(f"{output}: {len(frames) - 1} steps, return {episode_return:.1f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
