"""Makes the four offline datasets of four-agent Ant by D4RL's protocol (Fu et al. 2020), for where D4RL's own cannot be had.

    python -m data.collect_ant snapshots                # online SAC (1.5 hours on one core): data/ant_snapshots.pt
    python -m data.collect_ant dataset --name medium    # a million transitions (minutes): data/ant-medium.hdf5

`random` is recorded from an untrained policy, `medium` and `expert` from the first snapshot of the training that is about as good as
D4RL's (or else the best), and `full-replay` from all snapshots in equal shares, which stands for the replay buffer of the whole
training. The snapshots ship with the repository, so the first command is needed only to make others; a script that needs a
dataset records it by itself.

Online SAC (Haarnoja et al. 2018) with a single policy for all legs, as D4RL's. Many ants run at once, with fewer updates than steps.
"""

import hashlib
import os
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, Sequence

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from mamujoco_envs import InputError, Simulator, find_task

TASK = find_task("ant-expert-fo")
FOLDER = Path(__file__).parent
STATE_DIM, ACTION_DIM = TASK.state_dim, TASK.num_agents * TASK.action_dim
HIDDEN = 128  # units of both hidden layers of the policy: small enough to ship many
GOOD_ENOUGH = {
    "medium": 0.75,
    "expert": 1.15,
}  # scores of the policies behind datasets; the means of D4RL's are 0.80 and 1.17 (Table 2)


@dataclass
class Snapshots:
    """Trains one policy for the whole ant by online SAC and saves it every now and then."""

    seed: int = 1
    """seed of networks, episodes and exploration"""
    total_updates: int = 400_000
    """gradient steps of the critics; the policy takes every second one"""
    updates_per_step: int = 8
    """gradient steps for each step of all ants"""
    num_envs: int = 64
    """ants at once"""
    learning_rate: float = 1e-3
    """Adam, decayed linearly to 40 %"""
    batch_size: int = 256
    """transitions of a gradient step"""
    buffer_size: int = 1_000_000
    """transitions kept, the newest"""
    warm_up: int = 20_000
    """transitions with uniform actions before the first update"""
    snapshot_every: int = 20_000
    """gradient steps between two snapshots"""
    output: Path = FOLDER / "ant_snapshots.pt"
    """file to write"""


@dataclass
class Dataset:
    """Records one of the four datasets, with sampled actions."""

    name: Literal["random", "medium", "full-replay", "expert"] = "medium"
    """which one"""
    transitions: int = 1_000_000
    """its size"""
    seed: int = 10101
    """seed of episodes and exploration"""
    snapshots: Path = FOLDER / "ant_snapshots.pt"
    """policies that `snapshots` saved"""
    output: Path | None = None
    """file to write; data/ant-NAME.hdf5 if not given"""


class BatchedLinear(nn.Module):
    """One `nn.Linear` per agent (or member) as one batched operation: [agent, batch, in] -> [agent, batch, out]."""

    def __init__(self, in_dims: Sequence[int], out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(in_dims), max(in_dims), out_dim))
        self.bias = nn.Parameter(torch.zeros(len(in_dims), 1, out_dim))
        for weight, bias, width in zip(
            self.weight.data, self.bias.data, in_dims
        ):  # padded inputs keep zero weights
            weight[:width].uniform_(-(width**-0.5), width**-0.5)
            bias.uniform_(-(width**-0.5), width**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Sequential):
    """One MLP per agent (or member): [agent, batch, in] -> [agent, batch, out]."""

    def __init__(
        self,
        in_dims: Sequence[int],
        hidden: Sequence[int],
        out_dim: int,
        activation: Callable = nn.ReLU,
    ):
        widths = [*hidden, out_dim]
        layers = [BatchedLinear(in_dims, widths[0])]
        for width_in, width_out in zip(widths, widths[1:]):
            layers += [activation(), BatchedLinear([width_in] * len(in_dims), width_out)]
        super().__init__(*layers)


def make_policy() -> MLP:
    """Mean and log standard deviation of a tanh-Gaussian: [1, batch, state] -> [1, batch, 2 * action]."""
    return MLP([STATE_DIM], [HIDDEN] * 2, 2 * ACTION_DIM)


def sample_actions(
    policy: MLP, states: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions [batch, action], squashed by tanh, and their log-densities [batch], for standard normal `noise` [batch, action]."""
    mean, log_std = policy(states[None])[0].chunk(2, dim=-1)
    log_std = log_std.clamp(-5, 2)
    unsquashed = mean + log_std.exp() * noise
    # log of the tanh's derivative, 1 - tanh^2 x = 4 / (e^x + e^-x)^2, without overflow
    log_derivative = 2 * (np.log(2) - unsquashed - F.softplus(-2 * unsquashed))
    log_probs = (-0.5 * noise.square() - log_std - 0.5 * np.log(2 * np.pi) - log_derivative).sum(-1)
    return unsquashed.tanh(), log_probs


def critic_loss(
    critics, target_critics, policy, log_alpha, batch, noise, gamma: float = 0.99
) -> torch.Tensor:
    states, actions, rewards, next_states, masks = batch
    with torch.no_grad():
        next_actions, next_log_probs = sample_actions(policy, next_states, noise)
        next_inputs = torch.cat([next_states, next_actions], dim=-1).expand(2, -1, -1)
        next_values = target_critics(next_inputs)[..., 0].amin(0) - log_alpha.exp() * next_log_probs
        targets = rewards + gamma * masks * next_values
    values = critics(torch.cat([states, actions], dim=-1).expand(2, -1, -1))[..., 0]
    return (values - targets).square().mean(1).sum()


def policy_loss(critics, policy, log_alpha, states, noise) -> torch.Tensor:
    """Of the policy, and of the temperature, which keeps the entropy at minus the number of actions."""
    actions, log_probs = sample_actions(policy, states, noise)
    values = critics(torch.cat([states, actions], dim=-1).expand(2, -1, -1))[..., 0].amin(0)
    loss = (log_alpha.exp().detach() * log_probs - values).mean()
    return loss - log_alpha * (log_probs.detach().mean() - ACTION_DIM)


@torch.no_grad()
def play(
    policy: MLP, simulator: Simulator, seeds: Sequence, generator: torch.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One whole episode of each copy of the simulator, with sampled actions: D4RL's columns [copy, step, ...] and the lengths [copy]."""
    states, copies, length = (
        simulator.reset([np.random.default_rng(seed) for seed in seeds]),
        len(seeds),
        TASK.episode_length,
    )
    widths = {
        "observations": STATE_DIM,
        "actions": ACTION_DIM,
        "rewards": 1,
        "next_observations": STATE_DIM,
        "terminals": 1,
        "timeouts": 1,
    }
    columns = {
        name: np.zeros((copies, length, width), dtype=bool if "t" == name[0] else np.float32)
        for name, width in widths.items()
    }
    alive, lengths = np.ones(copies, dtype=bool), np.zeros(copies, dtype=int)
    for age in range(length):
        noise = torch.randn(copies, ACTION_DIM, generator=generator)
        actions, _ = sample_actions(policy, torch.as_tensor(states, dtype=torch.float32), noise)
        next_states, rewards, terminals = simulator.step(TASK.split_actions(actions).numpy(), alive)
        time_outs = ~terminals & (age == length - 1)
        values = (
            states,
            actions,
            rewards[:, None],
            next_states,
            terminals[:, None],
            time_outs[:, None],
        )
        for column, value in zip(columns.values(), values):
            column[:, age] = value
        states, lengths, alive = next_states, lengths + alive, alive & ~terminals
        if not alive.any():
            break
    return columns, lengths


def mean_return(policy: MLP, episodes: int = 20) -> float:
    columns, lengths = play(
        policy, Simulator(TASK, episodes), range(episodes), torch.Generator().manual_seed(0)
    )
    return float(
        np.mean([rewards[:length].sum() for rewards, length in zip(columns["rewards"], lengths)])
    )


def train_snapshots(args: Snapshots) -> dict:
    """Online SAC; saves the policies of all snapshots, stacked, with the mean return of each over 20 episodes with sampled actions."""
    for name in (
        "total_updates",
        "updates_per_step",
        "num_envs",
        "learning_rate",
        "batch_size",
        "snapshot_every",
    ):
        if not getattr(args, name) > 0:
            raise InputError(
                f"--{name.replace('_', '-')} must be above 0; it is {getattr(args, name)}"
            )
    if args.buffer_size < args.num_envs:
        raise InputError(
            f"--buffer-size must be --num-envs {args.num_envs} or more; it is {args.buffer_size}"
        )
    if args.output.exists():
        raise InputError(f"{args.output} exists; give another --output, or move it away")
    if not args.output.parent.is_dir():
        raise InputError(f"no folder {args.output.parent} to write {args.output.name} to")
    torch.manual_seed(args.seed)
    policy = make_policy()
    critics = MLP([STATE_DIM + ACTION_DIM] * 2, [256, 256], 1)  # twins: different from the start
    target_critics = MLP([STATE_DIM + ACTION_DIM] * 2, [256, 256], 1)
    target_critics.load_state_dict(critics.state_dict())
    target_critics.requires_grad_(False)
    log_alpha = torch.zeros((), requires_grad=True)
    critic_optimizer = torch.optim.Adam(critics.parameters(), lr=args.learning_rate, fused=True)
    policy_optimizer = torch.optim.Adam(
        [*policy.parameters(), log_alpha], lr=args.learning_rate, fused=True
    )

    def update(batch: list[torch.Tensor], with_policy: bool) -> None:
        noise = torch.randn(2, args.batch_size, ACTION_DIM)
        critic_optimizer.zero_grad()
        critic_loss(critics, target_critics, policy, log_alpha, batch, noise[0]).backward()
        critic_optimizer.step()
        if with_policy:
            policy_optimizer.zero_grad()
            critics.requires_grad_(False)
            policy_loss(critics, policy, log_alpha, batch[0], noise[1]).backward()
            critics.requires_grad_(True)
            policy_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(target_critics.parameters()), list(critics.parameters()), 0.005
            )

    simulator, rng = Simulator(TASK, args.num_envs), np.random.default_rng(args.seed)
    states, ages = simulator.reset([rng] * args.num_envs), np.zeros(args.num_envs, dtype=int)
    size = args.buffer_size // args.num_envs * args.num_envs
    buffer = [
        torch.zeros(size, *shape) for shape in ((STATE_DIM,), (ACTION_DIM,), (), (STATE_DIM,), ())
    ]
    updates, steps, snapshots, returns, started = 0, 0, [], [], time.perf_counter()
    progress = tqdm(
        total=args.total_updates, unit="update", mininterval=1, disable=not sys.stderr.isatty()
    )
    while updates < args.total_updates:
        with torch.no_grad():
            if steps < args.warm_up:
                actions = 2 * torch.rand(args.num_envs, ACTION_DIM) - 1
            else:
                actions, _ = sample_actions(
                    policy,
                    torch.as_tensor(states, dtype=torch.float32),
                    torch.randn(args.num_envs, ACTION_DIM),
                )
        next_states, rewards, terminals = simulator.step(TASK.split_actions(actions).numpy())
        for field, values in zip(buffer, (states, actions, rewards, next_states, 1.0 - terminals)):
            field[steps % size : steps % size + args.num_envs] = torch.as_tensor(values)
        states, steps, ages = next_states, steps + args.num_envs, ages + 1
        ended = terminals | (ages == TASK.episode_length)
        if ended.any():
            states, ages = (
                simulator.reset([rng] * ended.sum(), where=ended),
                np.where(ended, 0, ages),
            )
        for _ in range(args.updates_per_step if steps >= args.warm_up else 0):
            rate = args.learning_rate * (1 - 0.6 * updates / args.total_updates)
            critic_optimizer.param_groups[0]["lr"] = policy_optimizer.param_groups[0]["lr"] = rate
            indices = torch.randint(min(steps, size), (args.batch_size,))
            update([field[indices] for field in buffer], with_policy=updates % 2 == 0)
            updates += 1
            progress.update()
            if updates % args.snapshot_every == 0 or updates == args.total_updates:
                snapshots.append(
                    {name: value.clone() for name, value in policy.state_dict().items()}
                )
                returns.append(mean_return(policy))
                score, speed = (
                    TASK.normalized_score(returns[-1]),
                    updates / (time.perf_counter() - started),
                )
                tqdm.write(
                    f"update {updates}, {steps} steps: return {returns[-1]:.0f}, score {score:.2f}, {speed:.0f} updates/s"
                )
                stacked = {
                    name: torch.stack([snapshot[name] for snapshot in snapshots])
                    for name in snapshots[0]
                }
                temporary = args.output.with_suffix(".tmp")
                torch.save(
                    {
                        "policies": stacked,
                        "returns": returns,
                        "seed": args.seed,
                        "snapshot_every": args.snapshot_every,
                    },
                    temporary,
                )
                temporary.replace(args.output)
            if updates == args.total_updates:
                break
    progress.close()
    return {"returns": returns, "steps": steps}


def choose_policies(args: Dataset) -> dict[int, MLP]:
    """The policies that the dataset is recorded from, by the number of their snapshot; an untrained one for `random`."""
    if args.name == "random":
        torch.manual_seed(args.seed)
        return {-1: make_policy()}
    command = f"python -m data.collect_ant snapshots --output {args.snapshots}"
    if not args.snapshots.is_file():
        raise InputError(f"no policies at {args.snapshots}; make them with: {command}")
    try:
        saved = torch.load(args.snapshots, map_location="cpu", weights_only=True)
        scores = TASK.normalized_score(np.array(saved["returns"]))
        policies = {i: make_policy() for i in range(len(scores))}
        for i, policy in policies.items():
            policy.load_state_dict({name: value[i] for name, value in saved["policies"].items()})
    except (
        OSError,
        EOFError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        pickle.UnpicklingError,
    ):
        raise InputError(
            f"{args.snapshots} is truncated or holds no policies; move it away and make it again with: {command}"
        ) from None
    if args.name == "full-replay":
        return policies
    good = np.flatnonzero(scores >= GOOD_ENOUGH[args.name])
    chosen = int(good[0]) if len(good) else int(np.argmax(scores))
    return {chosen: policies[chosen]}


def record_dataset(args: Dataset) -> None:
    """Records whole episodes, as many transitions from each policy, into one D4RL file, written whole or not at all."""
    output = args.output or FOLDER / f"ant-{args.name}.hdf5"
    if not output.parent.is_dir():
        raise InputError(f"no folder {output.parent} to write {output.name} to")
    policies = choose_policies(args)
    if args.transitions < len(policies):
        raise InputError(
            f"--transitions must be {len(policies)} or more, the number of policies; it is {args.transitions}"
        )
    ends = [
        args.transitions * (i + 1) // len(policies) for i in range(len(policies))
    ]  # of the policies' shares
    copies = min(-(-ends[0] // TASK.episode_length), 200)
    generator, simulator = torch.Generator().manual_seed(args.seed), Simulator(TASK, copies)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same file to the bit, whatever the number of threads
    columns, returns, lengths, row, episode = None, [], [], 0, 0
    print(f"recording {args.transitions} transitions of ant-{args.name} to {output}", flush=True)
    progress = tqdm(
        total=args.transitions, unit="step", unit_scale=True, mininterval=1, disable=None
    )  # a bar in a terminal only
    for end, policy in zip(ends, policies.values()):
        while row < end:
            played, ages = play(
                policy, simulator, [[args.seed, episode + i] for i in range(copies)], generator
            )
            columns = columns or {
                name: np.empty((args.transitions, x.shape[2]), dtype=x.dtype)
                for name, x in played.items()
            }
            for i, age in enumerate(ages):
                steps = min(age, end - row)  # the last episode of a share is cut
                for name, column in columns.items():
                    column[row : row + steps] = played[name][i, :steps]
                row, episode = row + steps, episode + 1
                progress.update(int(steps))
                if steps == age:
                    returns.append(played["rewards"][i, :steps].sum(dtype=np.float64))
                    lengths.append(int(steps))
                if row == end:
                    columns["timeouts"][row - 1] = ~columns["terminals"][row - 1]
                    break
            if progress.disable:
                print(f"{row} of {args.transitions}", flush=True)
    progress.close()
    torch.set_num_threads(threads)
    source = f"python -m data.collect_ant dataset --name {args.name} --transitions {args.transitions} --seed {args.seed}"
    temporary = output.with_suffix(
        f".{os.getpid()}.tmp"
    )  # scripts that start together may record at once
    with h5py.File(temporary, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column if column.shape[1] > 1 else column[:, 0])
        file.attrs.update(environment=TASK.environment, source=f"{source} (ours, not D4RL's)")
        if args.name != "random":
            file.attrs.update(
                snapshots=list(policies),
                snapshots_sha256=hashlib.sha256(args.snapshots.read_bytes()).hexdigest(),
            )
    temporary.replace(output)
    scores = 100 * TASK.normalized_score(np.array(returns))
    print(f"{output}: {len(scores)} whole episodes")
    for name, values in (
        {"score in %": scores, "length": np.array(lengths)}.items() if returns else ()
    ):
        print(
            f"{name}: min {min(values):.1f}, mean {np.mean(values):.1f}, median {np.median(values):.1f}, max {max(values):.1f}"
        )


if __name__ == "__main__":
    try:
        args = tyro.extras.subcommand_cli_from_dict({"snapshots": Snapshots, "dataset": Dataset})
        train_snapshots(args) if isinstance(args, Snapshots) else record_dataset(args)
    except InputError as error:
        sys.exit(f"error: {error}")
