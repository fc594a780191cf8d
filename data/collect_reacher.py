"""Records reacher-expert-mix, the dataset of two-agent Reacher, and trains its experts.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Section 5.3. Two teams learn Reacher by online
MAPPO (Appendix A), with every agent seeing the whole state. One team settles on counter-clockwise
bends of the arm, the other on clockwise ones. The dataset has 500,000 transitions of each.

    python -m data.collect_reacher dataset             # data/reacher-expert-mix.hdf5, a minute
    python -m data.collect_reacher experts --seed 3    # data/weights/reacher_expert_3.pt, 3 minutes

Both experts ship with the repository, and scripts record the dataset when they first need it.
Where it differs from the paper, why, and by how much: docs/datasets.md.
"""

import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave a busy core to others
sys.path.append(str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions import Normal
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from mamujoco_envs import InputError, Simulator, Task, evaluate, find_task, require

TASK = find_task("reacher-all-observant")
FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"

HIDDEN = [64, 64]  # Deviation 3.
GAMMA, GAE_LAMBDA = 0.97, 0.95  # Deviation 1.
EPISODES, EPOCHS, MINIBATCH_SIZE, CLIP = 40, 5, 256, 0.2  # per learning step (Appendix B)
# Deviation 4. Brings every dimension to the order of 1: target and fingertip are within decimetres,
# and joints turn by tens of radians per second.
STATE_SCALE = torch.tensor([1, 1, 1, 1, 5, 5, 0.1, 0.1, 10, 10, 10])
RECORDED_AT_ONCE = 500  # episodes


@dataclass
class Experts:
    """Trains one team by online MAPPO and saves its policies."""

    seed: int = 1
    """seed of networks, episodes and exploration"""
    total_steps: int = 1000
    """learning steps of 2000 transitions (40 episodes)"""
    learning_rate: float = 1e-3
    """Adam; decays linearly to zero (the paper: 5e-5, constant)"""
    entropy_target: float = -3.0
    """joint entropy that the entropy bonus keeps (the paper: -4)"""
    output: Path | None = None
    """file to write; by default data/weights/reacher_expert_SEED.pt"""


@dataclass
class Dataset:
    """Records two experts of opposite bends, half of the episodes each, with sampled actions."""

    episodes: int = 20_000
    """episodes of 50 transitions"""
    seed: int = 10101
    """seed of episodes and exploration"""
    experts: tuple[Path, Path] = (WEIGHTS / "reacher_expert_1.pt", WEIGHTS / "reacher_expert_2.pt")
    """files that `experts` wrote; one team ends with theta2 > 0, the other with theta2 < 0"""
    output: Path = FOLDER / "reacher-expert-mix.hdf5"
    """file to write"""


# Networks. Agents keep separate weights, which run as one batched operation.


class BatchedLinear(nn.Module):
    """One `nn.Linear` per agent or ensemble member: [agent, batch, in] -> [agent, batch, out]."""

    def __init__(self, in_dims, out_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(in_dims), max(in_dims), out_dim))
        self.bias = nn.Parameter(torch.zeros(len(in_dims), 1, out_dim))
        # Each slice starts as an nn.Linear of its true width; weights of padding stay zero.
        for weight, bias, width in zip(self.weight.data, self.bias.data, in_dims):
            weight[:width].uniform_(-(width**-0.5), width**-0.5)
            bias.uniform_(-(width**-0.5), width**-0.5)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(nn.Sequential):
    """One perceptron per agent or ensemble member: [agent, batch, in] -> [agent, batch, out]."""

    def __init__(self, in_dims, hidden, out_dim, activation=nn.ReLU):
        layers = [BatchedLinear(in_dims, hidden[0])]
        for width_in, width_out in zip(hidden, [*hidden[1:], out_dim]):
            layers += [activation(), BatchedLinear([width_in] * len(in_dims), width_out)]
        super().__init__(*layers)


class Team(nn.Module):
    """Policies and mixed values of both agents. They see the whole state, so they need no memory."""

    def __init__(self):
        super().__init__()
        widths = [TASK.state_dim] * TASK.num_agents
        self.policy = MLP(widths, HIDDEN, 2 * TASK.action_dim)
        self.value = MLP(widths, HIDDEN, 1)
        self.mixer = MLP([TASK.state_dim], HIDDEN, TASK.num_agents + 1)
        # Torques start near zero, with a deviation that is well inside its clamp.
        self.policy[-1].weight.data.mul_(0.1)
        self.policy[-1].bias.data.copy_(torch.tensor([0.0, -1.0]))

    def distribution(self, states):
        """Distribution of the agents' actions [batch, agent, action] in `states` [batch, state]."""
        x = (states * STATE_SCALE).expand(TASK.num_agents, -1, -1)
        mean, log_std = self.policy(x).transpose(0, 1).chunk(2, dim=-1)
        return Normal(mean, log_std.clamp(-6, 0).exp())

    def team_value(self, states):
        """V(s) = sum_i w_i(s) V_i(s) + b(s) (Eq. 4): [batch, state] -> [batch]."""
        x = (states * STATE_SCALE).expand(TASK.num_agents, -1, -1)
        weights, bias = self.mixer(x[:1])[0].split([TASK.num_agents, 1], dim=-1)
        return (weights * self.value(x)[..., 0].T).sum(-1) + bias[:, 0]


# The algorithm: online MAPPO.


def generalized_advantages(rewards, values, next_values, masks, time_out_masks, gamma, gae_lambda):
    """Returns and advantages [time, rollout] (Appendix A).

    A terminal (mask 0) stops the bootstrap, a time-out does not.
    """
    returns, advantages = torch.empty_like(rewards), torch.empty_like(rewards)
    running_return, running_advantage = next_values[-1], torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        bootstrap = torch.where(time_out_masks[t] > 0, running_return, next_values[t])
        running_return = rewards[t] + gamma * masks[t] * bootstrap
        delta = rewards[t] + gamma * masks[t] * next_values[t] - values[t]
        decay = gamma * gae_lambda * masks[t] * time_out_masks[t]
        running_advantage = delta + decay * running_advantage
        returns[t], advantages[t] = running_return, running_advantage
    return returns, advantages


class Experience(NamedTuple):
    """The transitions of a learning step, or some of them."""

    states: torch.Tensor  # [batch, state]
    actions: torch.Tensor  # [batch, agent, action]
    log_probs: torch.Tensor  # [batch], of joint actions
    values: torch.Tensor  # [batch]
    returns: torch.Tensor  # [batch]
    advantages: torch.Tensor  # [batch]


@torch.no_grad()
def collect_experience(team: Team, simulator: Simulator, generators):
    """Plays one whole episode per generator with sampled actions; also gives their mean return."""
    length, episodes = TASK.episode_length, len(generators)
    states = torch.zeros(length + 1, episodes, TASK.state_dim)
    actions = torch.zeros(length, episodes, TASK.num_agents, TASK.action_dim)
    rewards = torch.zeros(length, episodes)
    states[0] = torch.as_tensor(simulator.reset(generators))
    for t in range(length):
        actions[t] = team.distribution(states[t]).sample()
        next_states, reward, _ = simulator.step(actions[t].numpy())
        states[t + 1], rewards[t] = torch.as_tensor(next_states), torch.as_tensor(reward)

    # Reacher has no terminal states: episodes end by time-out, and the last value bootstraps.
    masks, time_out_masks = torch.ones_like(rewards), torch.ones_like(rewards)
    time_out_masks[-1] = 0
    values = team.team_value(states.flatten(0, 1)).view(length + 1, episodes)
    returns, advantages = generalized_advantages(
        rewards, values[:-1], values[1:], masks, time_out_masks, GAMMA, GAE_LAMBDA
    )
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-3)

    distribution = team.distribution(states[:-1].flatten(0, 1))
    log_probs = distribution.log_prob(actions.flatten(0, 1)).sum((1, 2)).view_as(rewards)
    fields = (states[:-1], actions, log_probs, values[:-1], returns, advantages)
    return Experience(*[x.flatten(0, 1) for x in fields]), float(rewards.sum(0).mean())


def mappo_terms(team: Team, batch: Experience):
    """Actor loss, critic loss, entropy and action penalty (Appendix A.1)."""
    distribution, values = team.distribution(batch.states), team.team_value(batch.states)
    log_probs = distribution.log_prob(batch.actions).sum((1, 2))
    ratio = (log_probs - batch.log_probs).clamp(max=10).exp()
    clipped_ratio = ratio.clamp(1 - CLIP, 1 + CLIP)
    actor_loss = -torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages).mean()

    clipped_values = batch.values + (values - batch.values).clamp(-CLIP, CLIP)
    errors = [(v - batch.returns).square().mean() for v in (clipped_values, values)]
    critic_loss = torch.max(*errors)

    entropy = torch.min((-ratio * log_probs).mean(), (-clipped_ratio * log_probs).mean())
    excess = (distribution.mean.abs() - 1).clamp(min=0).square().sum((1, 2))
    penalty = torch.max((ratio * excess).mean(), (clipped_ratio * excess).mean())
    return actor_loss, critic_loss, entropy, penalty


def train_expert(args: Experts) -> dict:
    """Trains and saves a team; returns what is known of it."""
    check_positive(args, "total_steps", "learning_rate")
    check_seed(args.seed)
    output = args.output or WEIGHTS / f"reacher_expert_{args.seed}.pt"
    check_output(output, size=1e6)
    torch.manual_seed(args.seed)
    team = Team()
    optimizer = torch.optim.Adam(team.parameters(), lr=args.learning_rate, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)
    simulator = Simulator(TASK, EPISODES)
    generators = [np.random.default_rng([args.seed, i]) for i in range(EPISODES)]

    say(f"training an expert for {output}")
    progress, entropy_alpha = Progress(args.total_steps, "step"), 0.0
    for _ in range(args.total_steps):
        experience, mean_return = collect_experience(team, simulator, generators)
        for _ in range(EPOCHS):
            # The last minibatch, which is smaller, is dropped.
            for rows in torch.randperm(len(experience.states)).split(MINIBATCH_SIZE)[:-1]:
                batch = Experience(*[x[rows] for x in experience])
                actor_loss, critic_loss, entropy, penalty = mappo_terms(team, batch)
                # The dual variable grows while the entropy is below its target (Deviation 2).
                gap = args.entropy_target - entropy.item()
                entropy_alpha = max(0.0, entropy_alpha + 0.001 * gap)
                loss = actor_loss + 0.5 * critic_loss - entropy_alpha * entropy + penalty
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(team.parameters(), 1.0)
                optimizer.step()
        schedule.step()
        progress.advance(1, f"return {mean_return:.2f}, entropy {entropy.item():.2f}")
    progress.close()

    evaluation = evaluate(TASK, lambda _, histories: greedy(team, histories), 1000)
    return {}


if __name__ == "__main__":
    pass
