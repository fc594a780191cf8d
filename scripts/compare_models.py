"""Compares world models of a task: errors on and off the data, uncertainty, speed.

    python baselines/logo.py --task reacher-leader-only --run-dir runs/logo
    python scripts/compare_models.py --task reacher-leader-only \\
        --models data/weights/reacher-expert-mix.pt runs/logo/world_model.pt

Models start from held-out states of the data and are compared with the true simulator for ten
steps, with the data's own actions, with noise of 0.3 on them, and with uniformly random ones. An
ensemble's next state is a random member's mean. "correlation" is between the logarithms of the
uncertainty (eps_g, which is quadratic and includes the reward, or u) and of the true one-step error
of the state, in standard deviations of the data. "worst dimension" is the lowest correlation, over
all dimensions of the state that move, between predicted and true changes after one step: a model
may be good on average and blind in one.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import tyro

import moma_ppo
import world_model
from data.offline_dataset import load_dataset
from mamujoco_envs import InputError, find_task, require
from training_run import check_range, say


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task name from docs/tasks.md, or FILE:NAME of your own"""
    models: tuple[Path, ...] = ()
    """files that world_model.py or baselines/logo.py wrote"""
    dataset: Path | None = None
    """HDF5 file, Minari folder or minari:NAME; by default the task's own"""
    starts: int = 1000
    """states of held-out episodes to start from"""


def worst_correlation(predicted, true) -> float:
    """The lowest correlation of a column of `predicted` [N, state] with that of `true`.

    A column whose prediction is constant counts as 0.
    """
    moves = true.std(0) > 1e-6
    columns = torch.stack([predicted[:, moves].T, true[:, moves].T], dim=1)  # [dimension, 2, N]
    correlations = [pair.corrcoef()[0, 1].nan_to_num().item() for pair in columns.double()]
    return min(correlations, default=math.nan)


@torch.no_grad()
def errors(model, dataset, rows, behavior: str) -> dict[str, float]:
    """State and reward errors after one and ten steps, and how well they were foreseen."""
    task = dataset.task
    # Models draw from a generator of their own, so that all get the same actions.
    generator, own_generator = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    states, simulator = dataset.states[rows], task.make_simulator(len(rows))
    simulator.set_states(states.numpy())
    std = dataset.states.std(0)
    std = torch.where(std < 1e-6, 1, std)
    alive = torch.ones(len(rows), dtype=torch.bool)
    state_errors, reward_errors = [], []
    for t in range(world_model.open_loop_length(dataset, rows)):
        actions = world_model.disturb(task, dataset.actions[rows + t], behavior, generator)
        step = model.step(states, actions, own_generator)
        true_states, rewards, terminals = map(torch.as_tensor, simulator.step(actions.numpy()))
        error = step.next_states - true_states
        state_errors.append(error.norm(dim=1)[alive].mean().item())
        reward_errors.append((step.rewards - rewards).abs()[alive].mean().item())
        if t == 0:
            foreseen, found = step.epsilon_g, (error / std).norm(dim=1)
            worst = worst_correlation(step.next_states - states, true_states - states)
        states = step.next_states
        alive &= ~terminals
        if not alive.any():
            break
    pair = torch.stack([foreseen.double(), found.double()]).clamp(min=1e-12).log()
    return {
        "state, 1 step": state_errors[0],
        "reward, 1 step": reward_errors[0],
        f"state, {len(state_errors)} steps": state_errors[-1],
        f"reward, {len(reward_errors)} steps": reward_errors[-1],
        "correlation": pair.corrcoef()[0, 1].item(),
        "worst dimension": worst,
    }


@torch.no_grad()
def milliseconds(model, dataset, count: int = 400, repeats: int = 30) -> float:
    """Median time of one step of 400 rollouts."""
    rows, times = torch.arange(count) % dataset.size, []
    for _ in range(repeats):
        started = time.perf_counter()
        model.step(dataset.states[rows], dataset.actions[rows])
        times.append(time.perf_counter() - started)
    return 1000 * sorted(times)[repeats // 2]


def main(args: Args) -> None:
    check_range(args, 2, 10_000, "starts")  # each has its own simulator
    require(args.models, "give --models, files of world_model.py or baselines/logo.py")
    task = find_task(args.task)
    message = f"{task.name} has no simulator that starts from the data's states"
    require(task.continues_from_states, message)
    models = {
        path: moma_ppo.open_world_model(task, path, "cpu", next_states="mean")
        for path in args.models
    }
    dataset = load_dataset(task, args.dataset)
    rows = world_model.open_loop_starts(dataset, dataset.split()[1])[: args.starts]
    for path, model in models.items():
        same = model.description["dataset"]["sha256"] == dataset.description["sha256"]
        if not same and (args.dataset or task.own_dataset):
            say(f"note: {path} was trained on other data, so it may have seen these states")
        say(f"{path}: {milliseconds(model, dataset):.1f} ms for a step of 400 rollouts")
        for behavior in world_model.BEHAVIORS:
            found = errors(model, dataset, rows, behavior)
            say(f"  {behavior:10}" + "".join(f"  {k}: {v:.4g}" for k, v in found.items()))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
