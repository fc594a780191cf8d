"""Makes `reacher-expert-mix`, the offline dataset of two-agent Reacher (Section 5.3): experts of opposite arm bends, half each.

    python -m data.collect_reacher experts --seed 1    # online MAPPO (3 minutes): data/reacher_expert_1.pt
    python -m data.collect_reacher experts --seed 2    # settles on the opposite bend: data/reacher_expert_2.pt
    python -m data.collect_reacher dataset             # a million transitions (1 minute): data/reacher-expert-mix.hdf5

The dataset is recorded from the shipped experts the first time a script needs it. Training is online MAPPO (Appendix A)
on `reacher-all-observant`, where an agent sees everything, so these agents have no memory. Deviations from the paper:
1. Learning rate 1e-3 decayed to zero, gamma 0.97 and lambda 0.95 instead of 5e-5, 0.99 and 0.98: minutes instead of days.
2. An entropy target of -3 instead of -4, so that the mean return of the stochastic teams comes near the paper's -4.24.
3. Two hidden layers of 64 units instead of 256: the experts ship with the repository.
"""

import hashlib
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import h5py
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

from mamujoco_envs import InputError, Simulator, evaluate, find_task

TASK = find_task("reacher-all-observant")
FOLDER = Path(__file__).parent
DATASET = FOLDER / "reacher-expert-mix.hdf5"
# How large the state's dimensions are, roughly: target and fingertip in decimetres, angular velocities in tens of rad/s.
STATE_SCALE = torch.tensor([1, 1, 1, 1, 5, 5, 0.1, 0.1, 10, 10, 10])


@dataclass
class Experts:
    """Trains one team by online MAPPO and saves its policies."""

    seed: int = 1
    """seed of networks, episodes and exploration"""
    total_steps: int = 1000
    """learning steps of 2000 transitions (40 episodes)"""
    learning_rate: float = 1e-3
    """Adam, decayed linearly to zero"""
    entropy_target: float = -3.0
    """joint entropy of the two torques that the entropy bonus keeps (Appendix A.1)"""
    output: Path | None = None
    """file to write; data/reacher_expert_SEED.pt if not given"""


@dataclass
class Dataset:
    """Records the mixture of two experts of opposite bends, with stochastic actions."""

    episodes: int = 20_000
    """episodes of 50 transitions, half from each team"""
    seed: int = 10101
    """seed of episodes and exploration"""
    experts: tuple[Path, Path] = (FOLDER / "reacher_expert_1.pt", FOLDER / "reacher_expert_2.pt")
    """weights that `experts` saved; one team bends the arm to theta2 > 0, the other to theta2 < 0"""
    output: Path = DATASET
    """file to write"""


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


class Team(nn.Module):
    """Fully observant policies, values and the value mixer (Eq. 4) of both agents."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        widths = [TASK.state_dim] * TASK.num_agents
        self.policy = MLP(widths, [hidden] * 2, 2)
        self.value = MLP(widths, [hidden] * 2, 1)
        self.mixer = MLP([TASK.state_dim], [hidden] * 2, TASK.num_agents + 1)
        self.policy[-1].weight.data.mul_(0.1)
        self.policy[-1].bias.data.copy_(torch.tensor([0.0, -1.0]))

    def distribution(self, states: torch.Tensor) -> torch.distributions.Normal:
        """States [B, state] -> the policies' Gaussians over [B, agent, 1]."""
        x = (states * STATE_SCALE).expand(TASK.num_agents, -1, -1)
        mean, log_std = self.policy(x).transpose(0, 1).chunk(2, dim=-1)
        return torch.distributions.Normal(mean, log_std.clamp(-6, 0).exp())

    def team_value(self, states: torch.Tensor) -> torch.Tensor:
        """V(s) = sum_i w_i(s) V_i(s) + b(s), Eq. (4): [B, state] -> [B]."""
        x = (states * STATE_SCALE).expand(TASK.num_agents, -1, -1)
        weights, bias = self.mixer(x[:1])[0].split([TASK.num_agents, 1], dim=-1)
        return (weights * self.value(x)[..., 0].T).sum(-1) + bias[:, 0]


def generalized_advantages(
    rewards, values, next_values, masks, time_out_masks, discount, gae_lambda
):
    """Returns and advantages [time, rollout], Appendix A: a terminal (mask 0) stops the bootstrap, a time-out does not."""
    returns, advantages = torch.empty_like(rewards), torch.empty_like(rewards)
    running_return, running_advantage = next_values[-1], torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        bootstrap = torch.where(time_out_masks[t] > 0, running_return, next_values[t])
        running_return = rewards[t] + discount * masks[t] * bootstrap
        delta = rewards[t] + discount * masks[t] * next_values[t] - values[t]
        running_advantage = (
            delta + discount * gae_lambda * masks[t] * time_out_masks[t] * running_advantage
        )
        returns[t], advantages[t] = running_return, running_advantage
    return returns, advantages


def train_expert(args: Experts) -> dict:
    """Online MAPPO with 40 whole episodes a learning step; saves the policies, returns the greedy evaluation."""
    torch.manual_seed(args.seed)
    team, episodes, length = Team(), 40, TASK.episode_length
    optimizer = torch.optim.Adam(team.parameters(), lr=args.learning_rate, fused=True)
    simulator, generators = (
        Simulator(TASK, episodes),
        [np.random.default_rng([args.seed, i]) for i in range(episodes)],
    )
    entropy_alpha = 0.0
    progress = tqdm(range(args.total_steps), desc="experts", mininterval=1, disable=None)
    for step in progress:
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.total_steps)
        # Collect 40 episodes with sampled actions, [time, episode].
        states = torch.zeros(length + 1, episodes, TASK.state_dim)
        actions, rewards = torch.zeros(length, episodes, 2, 1), torch.zeros(length, episodes)
        states[0] = torch.as_tensor(simulator.reset(generators))
        with torch.no_grad():
            for t in range(length):
                actions[t] = team.distribution(states[t]).sample()
                next_states, reward, _ = simulator.step(actions[t].numpy())
                states[t + 1], rewards[t] = torch.as_tensor(next_states), torch.as_tensor(reward)
            values = team.team_value(states.flatten(0, 1)).view(length + 1, episodes)
            time_out_masks = torch.ones_like(rewards)
            time_out_masks[-1] = 0
            returns, advantages = generalized_advantages(
                rewards,
                values[:-1],
                values[1:],
                torch.ones_like(rewards),
                time_out_masks,
                0.97,
                0.95,
            )
            old_log_probs = (
                team.distribution(states[:-1].flatten(0, 1))
                .log_prob(actions.flatten(0, 1))
                .sum((1, 2))
            )
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-3)
        batch = [
            x.flatten(0, 1) for x in (states[:-1], actions, returns, advantages, values[:-1])
        ] + [old_log_probs]
        for _ in range(5):
            for indices in torch.randperm(length * episodes).split(256)[
                :-1
            ]:  # the rest, less than 256, is dropped
                s, a, target, advantage, old_value, old_log_prob = [x[indices] for x in batch]
                distribution, value = team.distribution(s), team.team_value(s)
                log_prob = distribution.log_prob(a).sum((1, 2))
                ratio = (log_prob - old_log_prob).clamp(max=10).exp()
                clipped = ratio.clamp(0.8, 1.2)
                actor_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                clipped_value = old_value + (value - old_value).clamp(-0.2, 0.2)
                critic_loss = torch.max(
                    (clipped_value - target).square().mean(), (value - target).square().mean()
                )
                entropy = torch.min((-ratio * log_prob).mean(), (-clipped * log_prob).mean())
                entropy_alpha = max(
                    0.0, entropy_alpha + 0.001 * (args.entropy_target - entropy.item())
                )
                excess = (distribution.mean.abs() - 1).clamp(min=0).square().sum((1, 2))
                penalty = torch.max((ratio * excess).mean(), (clipped * excess).mean())
                optimizer.zero_grad()
                (actor_loss + 0.5 * critic_loss - entropy_alpha * entropy + penalty).backward()
                nn.utils.clip_grad_norm_(team.parameters(), 1.0)
                optimizer.step()
        progress.set_postfix_str(
            f"return {rewards.sum(0).mean():.2f}, entropy {entropy.item():.2f}"
        )
    evaluation = evaluate(
        TASK, lambda observations, _: team.distribution(observations[:, 0]).mean, 1000
    )
    bends = np.arctan2(evaluation.last_states[:, 3], evaluation.last_states[:, 1])
    result = {
        "greedy_return": float(evaluation.returns.mean()),
        "share_of_positive_bends": float((bends > 0).mean()),
    }
    output = args.output or FOLDER / f"reacher_expert_{args.seed}.pt"
    temporary = output.with_suffix(".tmp")
    torch.save(
        {
            "policy": team.policy.state_dict(),
            "seed": args.seed,
            "total_steps": args.total_steps,
            **result,
        },
        temporary,
    )
    temporary.replace(output)
    print(f"stochastic return {rewards.sum(0).mean():.3f}", result)
    return result


def load_experts(paths: Sequence[Path]) -> list[Team]:
    """The two teams; raises `InputError` unless they bend the arm to opposite sides."""
    teams, shares = [], []
    for seed, path in enumerate(paths, start=1):
        command = f"python -m data.collect_reacher experts --seed {seed} --output {path}"
        if not path.is_file():
            raise InputError(f"no expert at {path}; make it with: {command}")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            teams.append(Team())
            teams[-1].policy.load_state_dict(saved["policy"])
            shares.append(saved["share_of_positive_bends"])
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError):
            raise InputError(
                f"{path} is truncated or no expert; make it again with: {command}"
            ) from None
    if not min(shares) < 0.05 < 0.95 < max(shares):
        raise InputError(
            f"the experts bend the arm to theta2 > 0 in {shares} of episodes; train others with --seed"
        )
    return teams


@torch.no_grad()
def record_dataset(args: Dataset) -> None:
    """Records whole episodes of the first team, then as many of the second, into one D4RL file, written whole or not at all."""
    batch, length = 500, TASK.episode_length
    if args.episodes <= 0 or args.episodes % (2 * batch):
        raise InputError(
            f"--episodes must be a multiple of {2 * batch}, half from each team; it is {args.episodes}"
        )
    if not args.output.parent.is_dir():
        raise InputError(f"no folder {args.output.parent} to write {args.output.name} to")
    teams = load_experts(args.experts)
    generator, simulator = torch.Generator().manual_seed(args.seed), Simulator(TASK, batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same file to the bit, whatever the number of threads
    size = args.episodes * length
    shapes = {
        "observations": (size, 11),
        "actions": (size, 2),
        "rewards": (size,),
        "next_observations": (size, 11),
    }
    columns = {name: np.empty(shape, dtype=np.float32) for name, shape in shapes.items()}
    returns = []
    print(f"recording {args.episodes} episodes to {args.output}", flush=True)
    for first in tqdm(
        range(0, args.episodes, batch),
        unit_scale=batch,
        unit="episode",
        mininterval=1,
        disable=None,
    ):  # a bar in a terminal only
        team = teams[first >= args.episodes // 2]
        states = simulator.reset(
            [np.random.default_rng([args.seed, first + i]) for i in range(batch)]
        )
        rows = {
            name: np.empty((batch, length, *shape[1:]), dtype=np.float32)
            for name, shape in shapes.items()
        }
        for t in range(length):
            distribution = team.distribution(torch.as_tensor(states, dtype=torch.float32))
            noise = torch.randn(distribution.mean.shape, generator=generator)
            actions = (distribution.mean + distribution.stddev * noise).clamp(-1, 1)
            rows["observations"][:, t], rows["actions"][:, t] = states, actions[..., 0]
            states, rows["rewards"][:, t], _ = simulator.step(actions.numpy())
            rows["next_observations"][:, t] = states
        returns.append(rows["rewards"].sum(1))
        for name, column in columns.items():
            column[first * length : (first + batch) * length] = rows[name].reshape(
                batch * length, *shapes[name][1:]
            )
    torch.set_num_threads(threads)
    columns["terminals"] = np.zeros(size, dtype=bool)
    columns["timeouts"] = np.arange(1, size + 1) % length == 0
    temporary = args.output.with_suffix(
        f".{os.getpid()}.tmp"
    )  # scripts that start together may record at once
    with h5py.File(temporary, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column)
        file.attrs.update(
            environment=TASK.environment,
            source=f"python -m data.collect_reacher dataset --episodes {args.episodes} --seed {args.seed}",
            experts_sha256=[hashlib.sha256(path.read_bytes()).hexdigest() for path in args.experts],
            mean_return=float(np.mean(returns)),
        )
    temporary.replace(args.output)
    returns = np.concatenate(returns)
    print(
        f"{args.output}: {size} transitions, return {returns.mean():.3f}, from {returns.min():.2f} to {returns.max():.2f}"
    )


if __name__ == "__main__":
    try:
        args = tyro.extras.subcommand_cli_from_dict({"experts": Experts, "dataset": Dataset})
        train_expert(args) if isinstance(args, Experts) else record_dataset(args)
    except InputError as error:
        sys.exit(f"error: {error}")
