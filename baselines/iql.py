"""IQL: implicit Q-learning by one learner that sees the whole state and acts for all agents.

Papers: Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022
(arXiv 2110.06169). Barde et al., AAMAS 2024 (arXiv 2305.17198), Section 5.1, use it as the upper
bound on strategy agreement: a single learner cannot disagree with itself. In games of options, its
policy is a categorical distribution over all joint actions.

    python baselines/iql.py --task reacher-all-observant
    python baselines/iql.py --resume runs/RUN

Where it differs from the papers, why, and by how much: docs/iql.md.
"""

import copy
import itertools
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import (
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)
from torch.optim.lr_scheduler import LambdaLR

from data.offline_dataset import Batch, OfflineDataset, load_dataset
from mamujoco_envs import HISTORY_LENGTH, Task, evaluate, find_task, require
from training_run import FINAL_EPISODES, Run, check_positive, check_range, compiled, main


@dataclass
class Args:
    task: str = "reacher-all-observant"
    """any task from docs/tasks.md, whatever its agents see, or FILE:NAME of your own"""
    seed: int = 1
    """random seed for networks and minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA GPU if there is one"""
    total_steps: int = 10_000
    """gradient steps (the paper: 1,000,000)"""
    eval_every: int = 1000
    """gradient steps between evaluations; each is followed by a checkpoint"""
    eval_episodes: int = 100
    """greedy episodes per evaluation (the paper: 10); the final one always has 100"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__iql__SEED__TIME"""
    resume: Path | None = None
    """run folder to resume; allows only --device, --total-steps and, for files that have moved,
    --dataset and --task"""
    compile: bool = False
    """speed up the loss: torch.compile, with CUDA graphs on a GPU"""
    dataset: Path | None = None
    """HDF5 file, Minari folder or minari:NAME; by default the task's own"""
    memory: Literal["auto", "attention", "none"] = "auto"
    """history encoder; auto leaves it out, since this learner sees the whole state"""
    batch_size: int = 256
    """transitions per gradient step"""
    learning_rate: float = 3e-4
    """Adam, policy, value and critics; decays linearly to zero (MOMA-PPO's paper: constant)"""
    memory_learning_rate: float = 1e-4
    """Adam, history encoder; same decay"""
    gamma: float = 0.99
    """discount factor"""
    polyak: float = 0.05
    """target update rate, at every step (the paper: 0.005, suited to a million steps)"""
    expectile: float = 0.7
    """expectile of the target critics that the value learns"""
    beta: float = 3.0
    """inverse temperature of advantage-weighted regression"""
    max_weight: float = 100.0
    """largest weight of a transition in advantage-weighted regression"""
    max_grad_norm: float = 1.0
    """gradient norms of policy, value, critics and encoder are each clipped at this value"""


DEFAULTS = {
    None: Args(),
    "Ant-v4": Args(total_steps=40_000, eval_every=4000, eval_episodes=10),
    "coordination": Args(total_steps=500, eval_every=100, gamma=0.5),
}


# Networks. Agents have separate weights but run as one batched operation.


class BatchedLinear(nn.Module):
    """One `nn.Linear` per agent or ensemble member: [agent, batch, in] -> [agent, batch, out]."""

    def __init__(self, in_dims, out_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(in_dims), max(in_dims), out_dim))
        self.bias = nn.Parameter(torch.zeros(len(in_dims), 1, out_dim))
        # Each slice starts like an nn.Linear of its true width. Padding weights start at zero and,
        # as padded inputs are zero, stay there.
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


class HistoryEncoder(nn.Module):
    """Each agent's last ten (action, observation) pairs as one vector (arXiv 2305.17198, A.1).

    Observations are standardised, and pairs embedded with their positions; then come self-attention
    with a skip connection and LayerNorm, and soft attention over the ten results. Apart from
    softmax, tanh and LayerNorm's scale, all of this is linear in a token (pair, one-hot position),
    so `forward` multiplies weights together before they touch the batch: the same function with
    fewer products. docs/history_encoder.md derives it, and a test compares it with the plain form.
    """

    def __init__(self, in_dims, pair_mean, pair_std, dim=128):
        """`pair_mean`, `pair_std` [agent, pair] standardise the pairs; missing ones stay zero."""
        super().__init__()
        agents = len(in_dims)
        self.embedding = BatchedLinear(in_dims, dim)
        self.query, self.key, self.value = (BatchedLinear([dim] * agents, dim) for _ in range(3))
        # The encoder's output is noise at first, so the gain of its LayerNorm starts small.
        self.norm_weight = nn.Parameter(torch.full((agents, 1, dim), 0.1))
        self.norm_bias = nn.Parameter(torch.zeros(agents, 1, dim))
        scale = dim**-0.5
        self.soft_key = nn.Parameter(torch.empty(agents, dim, dim).uniform_(-scale, scale))
        self.soft_query = nn.Parameter(torch.randn(agents, 1, dim))
        angles = torch.arange(HISTORY_LENGTH)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
        positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("pair_mean", pair_mean[:, None])
        self.register_buffer("pair_std", pair_std[:, None])

    def forward(self, histories):
        """[batch, agent, 10, pair] -> [agent, batch, dim]."""
        batch, agents, length, width = histories.shape
        pairs = histories.transpose(0, 1)
        known = (pairs != 0).any(dim=-1, keepdim=True)
        pairs = known * (pairs - self.pair_mean[:, None]) / self.pair_std[:, None]
        one_hot = torch.eye(length, device=pairs.device).expand(agents, batch, length, length)
        tokens = torch.cat([pairs, one_hot], dim=-1)  # [agent, batch, 10, token]

        # A token times this matrix [agent, token, dim] is its embedding plus its position.
        positions = self.embedding.bias + self.positions
        embedding = torch.cat([self.embedding.weight, positions], dim=1)

        # A token has one position, and attention weights sum to 1, so the rows of positions can
        # carry a layer's bias, that of the values included.
        def fold(layer):
            bias = F.pad(layer.bias.expand(-1, length, -1), (0, 0, width, 0))
            return embedding @ layer.weight + bias

        # Self-attention: the scores are a bilinear form in the tokens.
        scale = self.soft_key.shape[-1] ** -0.5
        form = scale * fold(self.query) @ fold(self.key).transpose(1, 2)
        queries = (tokens.flatten(1, 2) @ form).view_as(tokens)
        attention = (queries @ tokens.transpose(2, 3)).softmax(dim=-1)  # [agent, batch, 10, 10]
        x = torch.cat([tokens, attention @ tokens], dim=-1).flatten(1, 2)

        # Skip connection plus attended values are x @ matrix. Its LayerNorm, without the affine
        # part, is x @ centred / sqrt(x @ gram @ x).
        matrix = torch.cat([embedding, fold(self.value)], dim=1)
        centred = matrix - matrix.mean(dim=-1, keepdim=True)
        gram = centred @ centred.transpose(1, 2) / centred.shape[-1]
        variance = ((x @ gram) * x).sum(dim=-1, keepdim=True)
        x = x * (variance + 1e-5).rsqrt()

        # Soft attention over H, what LayerNorm would give: weights from
        # tanh(H @ soft_key) @ soft_query, then the average. H itself is never formed.
        folded_key = centred @ (self.norm_weight.transpose(1, 2) * self.soft_key)
        keys = torch.baddbmm(self.norm_bias @ self.soft_key, x, folded_key).tanh()
        scores = (keys * self.soft_query).sum(dim=-1).view(agents, batch, length, 1)
        average = (scores.softmax(dim=2) * x.view(agents, batch, length, -1)).sum(dim=2)
        return (average @ centred) * self.norm_weight + self.norm_bias


def observation_statistics(task: Task, states):
    """Mean and standard deviation of what agents observe in `states` [N, state]: [agent, obs]."""
    mean, std = task.observe(states.mean(0)), task.observe(states.std(0))
    return mean, torch.where(std < 1e-6, 1, std)  # 1 for padding and constant dimensions


def make_memory(task: Task, memory: str, obs_mean, obs_std):
    """The history encoder, or None where --memory or the task does without one."""
    if memory == "none" or (memory == "auto" and not task.partially_observable):
        return None
    front = (task.action_dim, 0)  # a pair's actions come first and are not standardised
    return HistoryEncoder(task.pair_dims, F.pad(obs_mean, front), F.pad(obs_std, front, value=1))


def centralize(task: Task) -> Task:
    """The same environment with one agent that observes the state and sets the whole action."""
    joint_action = tuple(range(task.num_agents * task.action_dim))
    return replace(task, observed=(tuple(range(task.state_dim)),), driven=(joint_action,))


class Team(nn.Module):
    """Policy, value, twin critics and history encoder of the central learner, and targets."""

    def __init__(self, task: Task, states, args: Args):
        """`task` is multi-agent. The statistics of `states` standardise states (Deviation 1)."""
        super().__init__()
        if task.discrete:  # all joint actions, [option, agent * action]
            options = itertools.product(torch.eye(task.action_dim), repeat=task.num_agents)
            options = torch.stack([torch.stack(option) for option in options])
            self.register_buffer("options", task.join_actions(options))
        self.task = task = centralize(task)
        obs_mean, obs_std = observation_statistics(task, states)
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.memory = make_memory(task, args.memory, obs_mean, obs_std)  # Deviation 5
        width = task.state_dim + (128 if self.memory else 0)
        outputs = len(self.options) if task.discrete else 2 * task.action_dim
        self.policy = MLP([width], [256, 256], outputs)
        if not task.discrete:  # log standard deviations start inside their clamp (Deviation 7)
            self.policy[-1].bias.data[..., task.action_dim :] = -1.5
        self.value = MLP([width], [256, 256], 1)
        self.critics = MLP([task.action_dim + width] * 2, [256, 256], 1)  # twins
        self.target_memory = copy.deepcopy(self.memory)
        self.target_critics = copy.deepcopy(self.critics)

    def inputs(self, observations, histories, target=False):
        """h_t, what the learner acts on: memory, then state [1, batch, memory + state]."""
        observations = ((observations - self.obs_mean) / self.obs_std).transpose(0, 1)
        if self.memory is None:
            return observations
        memory = self.target_memory if target else self.memory
        return torch.cat([memory(histories), observations], dim=-1)

    def log_prob(self, inputs, actions):
        """log pi(a | h) of joint actions [batch, 1, action]: [batch]."""
        outputs = self.policy(inputs).transpose(0, 1)
        if self.task.discrete:
            # The matching one-hot option has the largest inner product with the joint action.
            chosen = (actions @ self.options.T).argmax(dim=-1)  # [batch, 1]
            return Independent(Categorical(logits=outputs), 1).log_prob(chosen)
        # Deviation 8.
        mean, log_std = outputs.chunk(2, dim=-1)
        normal = Normal(mean, log_std.clamp(-6, 0).exp())
        policy = Independent(TransformedDistribution(normal, TanhTransform()), 2)
        return policy.log_prob(actions)

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, 1, action] in [-1, 1]."""
        outputs = self.policy(self.inputs(observations, histories)).transpose(0, 1)
        if self.task.discrete:
            return self.options[outputs.argmax(dim=-1)]
        return outputs.chunk(2, dim=-1)[0].tanh()

    def state_value(self, inputs):
        """V(h): [batch]."""
        return self.value(inputs)[0, :, 0]

    def q_values(self, inputs, actions, target=False):
        """Q_j(h, a) of both twins j: [twin, batch]."""
        critics = self.target_critics if target else self.critics
        return critics(torch.cat([actions.transpose(0, 1), inputs], dim=-1).repeat(2, 1, 1))[..., 0]


# The algorithm.


def iql_losses(team: Team, batch: Batch, args: Args):
    """Losses of value, policy and critics (Deviation 4)."""
    inputs = team.inputs(batch.observations, batch.histories)
    with torch.no_grad():
        target_inputs = team.inputs(batch.observations, batch.histories, target=True)
        next_inputs = team.inputs(batch.next_observations, batch.next_histories)  # Deviation 3
        td_targets = batch.rewards + args.gamma * batch.masks * team.state_value(next_inputs)
        target_q = team.q_values(target_inputs, batch.actions, target=True).amin(0)  # [batch]

    # The value learns an expectile of the target critics (IQL, Eq. 5).
    advantages = target_q - team.state_value(inputs)
    asymmetry = (args.expectile - (advantages < 0).float()).abs()
    value_loss = (asymmetry * advantages.square()).mean()

    # Advantage-weighted regression (IQL, Eq. 7).
    weights = (args.beta * advantages.detach()).exp().clamp(max=args.max_weight)
    policy_loss = -(weights * team.log_prob(inputs, batch.actions)).mean()

    # Both critics learn the reward plus the discounted next value (IQL, Eq. 6).
    critics = team.q_values(inputs, batch.actions)  # [twin, batch]
    critic_loss = (critics - td_targets).square().mean(1).sum()
    return value_loss, policy_loss, critic_loss


def normalize_rewards(dataset: OfflineDataset) -> float:
    """Scales locomotion rewards so that the data's returns span 1000; returns the factor."""
    returns = dataset.episode_returns()
    span = float(returns.max() - returns.min())
    scale = 1000 / span if dataset.task.locomotion and span > 0 else 1.0
    dataset.rewards = dataset.rewards * scale
    return scale


def train(args: Args) -> dict:
    check_positive(args, "total_steps", "eval_every", "eval_episodes", "batch_size")
    check_positive(args, "learning_rate", "memory_learning_rate", "max_grad_norm")
    check_range(args, 0, 1, "gamma", "polyak", "expectile")
    check_range(args, 0, math.inf, "beta", "max_weight")
    with Run(args, "iql") as run:
        task, device = find_task(args.task), run.device
        options = task.action_dim**task.num_agents if task.discrete else 1
        message = f"{task.name} has {options} joint actions, too many; use inspo.py or maiql.py"
        require(options <= 2**17, message)
        dataset = load_dataset(task, args.dataset, device)
        dataset.task = centralize(task)
        dataset.actions = task.join_actions(dataset.actions)[:, None]  # of the one agent
        normalize_rewards(dataset)  # Deviation 6
        torch.manual_seed(args.seed)
        team = Team(task, dataset.states, args).to(device)
        groups = [{"params": net.parameters()} for net in (team.policy, team.value, team.critics)]
        if team.memory:
            groups.append({"params": team.memory.parameters(), "lr": args.memory_learning_rate})
        optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True)
        targets = {name: p for name, p in team.named_parameters() if name.startswith("target_")}
        online = [team.get_parameter(name.removeprefix("target_")) for name in targets]
        schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)  # Deviation 2
        inputs = {"dataset": dataset.description}
        run.restore(inputs, team=team, optimizer=optimizer, schedule=schedule)
        loss_function = compiled(iql_losses, args, device)

        def evaluate_team(episodes):
            return evaluate(team.task, team.act_greedily, episodes, device=device)

        for _ in run.steps(evaluate_team):
            rows = dataset.sample_rows(args.batch_size)
            losses = loss_function(team, dataset.batch(rows, bool(team.memory)), args)
            optimizer.zero_grad()
            sum(losses).backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(targets.values()), online, args.polyak)
            run.log(dict(zip(("losses/value", "losses/policy", "losses/critics"), losses)))

        return run.finish(evaluate_team(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
