"""IBC: independent behavioural cloning, each agent from its own observations and history.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Section 5.1. Each agent maximises the
likelihood of its own actions in the dataset. Nothing tells it what the others will do, so where the
data mix teams with different conventions, agents may follow different ones.

    python baselines/ibc.py --task reacher-leader-only
    python baselines/ibc.py --resume runs/RUN

Where it differs from the paper, why, and by how much: docs/ibc.md.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import (
    Independent,
    Normal,
    OneHotCategorical,
    TanhTransform,
    TransformedDistribution,
)
from torch.optim.lr_scheduler import LambdaLR

from data.offline_dataset import Batch, load_dataset
from mamujoco_envs import HISTORY_LENGTH, Task, evaluate, find_task
from training_run import FINAL_EPISODES, Run, check_positive, compiled, main


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task name from docs/tasks.md, or FILE:NAME of your own"""
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
    """run folder; by default runs/TASK__ibc__SEED__TIME"""
    resume: Path | None = None
    """run folder to resume; allows only --device, --total-steps and, for files that have moved,
    --dataset and --task"""
    compile: bool = False
    """speed up the loss: torch.compile, with CUDA graphs on a GPU"""
    dataset: Path | None = None
    """HDF5 file, Minari folder or minari:NAME; by default the task's own"""
    memory: Literal["auto", "attention", "none"] = "auto"
    """history encoder; auto leaves it out where every agent sees the whole state"""
    batch_size: int = 256
    """transitions per gradient step"""
    learning_rate: float = 3e-4
    """Adam, policies; decays linearly to zero (the paper: constant)"""
    memory_learning_rate: float = 1e-4
    """Adam, history encoders; same decay"""
    max_grad_norm: float = 1.0
    """clip each agent's gradient norms (policy and encoder separately) at this value"""


DEFAULTS = {
    None: Args(),
    "Ant-v4": Args(eval_episodes=10),
    "coordination": Args(total_steps=500, eval_every=100),
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


class Team(nn.Module):
    """Policies and history encoders of all agents."""

    def __init__(self, task: Task, states, args: Args):
        """The statistics of `states` [N, state] standardise observations (Deviation 2)."""
        super().__init__()
        self.task = task
        obs_mean, obs_std = observation_statistics(task, states)
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.memory = make_memory(task, args.memory, obs_mean, obs_std)  # Deviation 3
        memory_dim = 128 if self.memory else 0
        in_dims = [memory_dim + width for width in task.obs_dims]
        self.policy = MLP(in_dims, [256, 256], task.action_dim * (1 if task.discrete else 2))
        if not task.discrete:  # log standard deviations start inside their clamp (Deviation 4)
            self.policy[-1].bias.data[..., task.action_dim :] = -1.5

    def inputs(self, observations, histories):
        """h_t^i, what agent i acts on: memory, then observation [agent, batch, memory + obs]."""
        observations = ((observations - self.obs_mean) / self.obs_std).transpose(0, 1)
        if self.memory is None:
            return observations
        return torch.cat([self.memory(histories), observations], dim=-1)

    def distribution(self, inputs):
        """Joint distribution of the agents' actions [batch, agent, action] (Eq. 6)."""
        outputs = self.policy(inputs).transpose(0, 1)
        if self.task.discrete:
            return Independent(OneHotCategorical(logits=outputs), 1)
        mean, log_std = outputs.chunk(2, dim=-1)
        normal = Normal(mean, log_std.clamp(-6, 0).exp())
        return Independent(TransformedDistribution(normal, TanhTransform()), 2)

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, agent, action] in [-1, 1]."""
        outputs = self.policy(self.inputs(observations, histories)).transpose(0, 1)
        if self.task.discrete:
            return OneHotCategorical(logits=outputs).mode
        return outputs.chunk(2, dim=-1)[0].tanh()


# The algorithm.


def cloning_loss(team: Team, batch: Batch):
    """Mean over the batch of -sum_i log pi_i(a_i | h_i).

    Agents share no parameters, so each learns for itself.
    """
    inputs = team.inputs(batch.observations, batch.histories)
    return -team.distribution(inputs).log_prob(batch.actions).mean()


def clip_each_agent(parameters, agents, max_norm):
    """Clips each agent's (or member's) gradient norm, over all its parameters and both twins.

    Parameters are [agent, ...] or [twin * agent, ...].
    """
    gradients = [parameter.grad.unflatten(0, (-1, agents)) for parameter in parameters]
    squares = [gradient.square().transpose(0, 1).flatten(1).sum(1) for gradient in gradients]
    factors = max_norm / torch.stack(squares).sum(0).sqrt().clamp(min=max_norm)  # [agent]
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 2)))


def train(args: Args) -> dict:
    check_positive(args, "total_steps", "eval_every", "eval_episodes", "batch_size")
    check_positive(args, "learning_rate", "memory_learning_rate", "max_grad_norm")
    with Run(args, "ibc") as run:
        task, device = find_task(args.task), run.device
        dataset = load_dataset(task, args.dataset, device)
        torch.manual_seed(args.seed)
        team = Team(task, dataset.states, args).to(device)
        groups = [{"params": team.policy.parameters()}]
        if team.memory:
            groups.append({"params": team.memory.parameters(), "lr": args.memory_learning_rate})
        optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)  # Deviation 1
        inputs = {"dataset": dataset.description}
        run.restore(inputs, team=team, optimizer=optimizer, schedule=schedule)
        loss_function = compiled(cloning_loss, args, device)

        def evaluate_team(episodes):
            return evaluate(task, team.act_greedily, episodes, device=device)

        for _ in run.steps(evaluate_team):
            rows = dataset.sample_rows(args.batch_size)
            loss = loss_function(team, dataset.batch(rows, with_histories=bool(team.memory)))
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                clip_each_agent(group["params"], task.num_agents, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            run.log({"losses/cloning": loss})

        return run.finish(evaluate_team(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
