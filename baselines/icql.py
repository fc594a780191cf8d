"""ICQL: independent conservative Q-learning, each agent from its own observations.

Papers: Kumar et al., "Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS 2020
(CQL, arXiv 2006.04779). Barde et al., "A Model-Based Solution to the Offline Multi-Agent
Reinforcement Learning Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Section 5.1, applies it
to each agent separately, on top of TD3. Critics are low wherever the dataset has no action, so the
policies that climb them stay near the data.

    python baselines/icql.py --task reacher-leader-only
    python baselines/icql.py --resume runs/RUN

Where it differs from the papers, why, and by how much: docs/icql.md.
"""

import copy
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep
sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from data.offline_dataset import Batch, load_dataset
from mamujoco_envs import HISTORY_LENGTH, Task, evaluate, find_task, require
from training_run import FINAL_EPISODES, Run, check_positive, check_range, compiled, main


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task with continuous actions from docs/tasks.md, or FILE:NAME of your own"""
    seed: int = 1
    """random seed for networks, minibatches and noise"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA GPU if there is one"""
    total_steps: int = 3000
    """gradient steps (the paper: 1,000,000)"""
    eval_every: int = 500
    """gradient steps between evaluations; each is followed by a checkpoint"""
    eval_episodes: int = 100
    """greedy episodes per evaluation (the paper: 10); the final one always has 100"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__icql__SEED__TIME"""
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
    """Adam, policies and critics; decays linearly to zero (the paper: constant)"""
    memory_learning_rate: float = 1e-4
    """Adam, history encoders; same decay"""
    gamma: float = 0.99
    """discount factor"""
    polyak: float = 0.05
    """target update rate, at policy steps (the paper: 0.005, suited to a million steps)"""
    policy_delay: int = 2
    """critic updates per update of policies and targets"""
    policy_noise: float = 0.0
    """standard deviation of noise on the target policies' actions (TD3 and the release: 0.2)"""
    noise_clip: float = 0.5
    """limit at which that noise is clipped"""
    cql_alpha: float = 1.0
    """weight of the conservative loss (the paper: 1, on ant-expert 5)"""
    cql_points: int | None = None
    """quadrature points per action dimension; by default 24, or 6 with several dimensions"""
    cql_batch_size: int = 32
    """transitions of each batch that the conservative loss uses"""
    max_grad_norm: float = 1.0
    """clip each agent's gradient norms (policy, critics and encoder separately) at this value"""


DEFAULTS = {
    None: Args(),
    "Ant-v4": Args(eval_episodes=10, cql_alpha=25.0),
    "coordination": Args(
        total_steps=400, eval_every=100, learning_rate=1e-3, gamma=0.5, cql_alpha=0.1
    ),
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


class Critics(MLP):
    """Q(h, a) for many actions a per h; h's contribution to the first layer is computed once."""

    def forward(self, inputs, actions):
        """[agent, batch, in], [agent, sample, batch or 1, action] -> [agent, sample, batch]."""
        first, *others = self
        # Actions come first, so that the padding of inputs stays last.
        action_weight, input_weight = first.weight.split([actions.shape[-1], inputs.shape[-1]], 1)
        from_actions = (actions.flatten(1, 2) @ action_weight).unflatten(1, actions.shape[1:3])
        x = from_actions + torch.baddbmm(first.bias, inputs, input_weight)[:, None]
        hidden = x.flatten(1, 2)
        for layer in others:
            hidden = layer(hidden)
        return hidden.view(x.shape[:3])


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


def quadrature(points, dims):
    """Gauss-Legendre nodes on [-1, 1]^dims, and the logarithms of their weights.

    A function's weighted sum over the nodes approximates its integral, exactly for polynomials up
    to degree 2 * points - 1 in each dimension.
    """
    require(dims <= 12, f"an agent's {dims} actions are too many for a grid; use itd3_bc.py")
    points = points or (24 if dims == 1 else 6)
    message = f"--cql-points to the power of an agent's {dims} actions is {points**dims}"
    require(points**dims <= 5000, f"{message}; use fewer points, so that it is at most 5000")
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(points))
    nodes = torch.cartesian_prod(*[nodes] * dims).view(-1, dims)
    weights = torch.cartesian_prod(*[weights] * dims).view(-1, dims)
    return nodes.float(), weights.log().sum(-1).float()  # [node, action], [node]


class Team(nn.Module):
    """Policies, twin critics and history encoders of all agents, and a target network for each."""

    def __init__(self, task: Task, states, args: Args):
        """The statistics of `states` [N, state] standardise observations (Deviation 2)."""
        super().__init__()
        self.task = task
        obs_mean, obs_std = observation_statistics(task, states)
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.memory = make_memory(task, args.memory, obs_mean, obs_std)  # Deviation 5
        memory_dim = 128 if self.memory else 0
        in_dims = [memory_dim + width for width in task.obs_dims]
        critic_dims = [memory_dim + width for width in task.pair_dims]
        self.policy = MLP(in_dims, [256, 256], task.action_dim)
        # All agents' first critics, then their independently initialised twins.
        self.critics = Critics(critic_dims * 2, [256, 256], 1)
        nodes, log_weights = quadrature(args.cql_points, task.action_dim)
        nodes = nodes[:, None, None].expand(-1, 1, task.num_agents, -1)
        self.register_buffer("nodes", nodes, persistent=False)  # [node, 1, agent, action]
        self.register_buffer("log_weights", log_weights, persistent=False)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.target_memory = self.memory and copy.deepcopy(self.memory).requires_grad_(False)

    def inputs(self, observations, histories, target=False):
        """h_t^i, what agent i acts on: memory, then observation [agent, batch, memory + obs]."""
        observations = ((observations - self.obs_mean) / self.obs_std).transpose(0, 1)
        if self.memory is None:
            return observations
        memory = self.target_memory if target else self.memory
        return torch.cat([memory(histories), observations], dim=-1)

    def act(self, inputs, target=False):
        """pi_i(h_i): [batch, agent, action] in [-1, 1]."""
        policy = self.target_policy if target else self.policy
        return policy(inputs).tanh().transpose(0, 1)

    def q_values(self, inputs, actions, target=False):
        """Q_ij(h_i, a_i) of both twins j of every agent i: [twin, agent, sample, batch].

        `actions` [sample, batch, agent, action]; with a batch of 1, all rows share them.
        """
        critics = self.target_critics if target else self.critics
        actions = actions.permute(2, 0, 1, 3).repeat(2, 1, 1, 1)
        return critics(inputs.repeat(2, 1, 1), actions).unflatten(0, (2, len(inputs)))

    def first_q_values(self, inputs, actions):
        """Q_i1(h_i, a_i): [agent, sample, batch]. Gradients reach the actions, not the critics."""
        # The first half of the critics.
        weights = {name: w.detach()[: len(inputs)] for name, w in self.critics.named_parameters()}
        return functional_call(self.critics, weights, (inputs, actions.permute(2, 0, 1, 3)))

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, agent, action] in [-1, 1]."""
        return self.act(self.inputs(observations, histories))


# The algorithm.


def critic_losses(team: Team, batch: Batch, inputs, noise, args: Args):
    """TD loss and conservative loss of the twin critics, summed over twins and agents.

    `noise` [batch, agent, action] is standard normal.
    """
    # y_i = r + gamma min_j Q'_ij(h'_i, pi'_i(h'_i) + clipped noise) (TD3, Algorithm 1), by
    # default without noise (Deviation 8).
    with torch.no_grad():
        next_inputs = team.inputs(batch.next_observations, batch.next_histories, target=True)
        smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (team.act(next_inputs, target=True) + smoothing).clamp(-1, 1)
        next_q = team.q_values(next_inputs, next_actions[None], target=True)[:, :, 0].amin(0)
        td_targets = batch.rewards + args.gamma * batch.masks * next_q  # [agent, batch]

    # Both critics of an agent learn y_i. Deviation 9.
    q = team.q_values(inputs, batch.actions[None])[:, :, 0]  # [twin, agent, batch]
    td_loss = (q - td_targets).square().mean(-1).sum()

    # They are pushed down on all actions and up on the data's: the logarithm of the integral of
    # exp Q_ij(h_i, a) over a, minus Q_ij(h_i, a_i) (CQL, Eq. 4). Deviations 6 and 7.
    rows = slice(args.cql_batch_size)
    node_q = team.q_values(inputs[:, rows], team.nodes)  # [twin, agent, node, row]
    log_integral = (node_q + team.log_weights[:, None]).logsumexp(2)
    conservative_loss = (log_integral - q[..., rows]).mean(-1).sum()
    return td_loss, args.cql_alpha * conservative_loss


def icql_losses(team: Team, batch: Batch, noise, args: Args, learn_policy: bool):
    """Losses of the critics and, with `learn_policy`, of the policies, summed over agents."""
    inputs = team.inputs(batch.observations, batch.histories)
    losses = critic_losses(team, batch, inputs, noise, args)
    if not learn_policy:
        return losses

    # Policies maximise Q_i1(h_i, pi_i(h_i)). Deviations 3 and 4.
    q = team.first_q_values(inputs.detach(), team.act(inputs)[None])  # [agent, 1, batch]
    return *losses, -q.mean(-1).sum()


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
    check_range(args, 1, args.total_steps, "policy_delay")  # else policies never learn
    check_range(args, 1, args.batch_size, "cql_batch_size")
    check_range(args, 2, 1000, "cql_points")
    check_range(args, 0, 1, "gamma", "polyak")
    check_range(args, 0, 1e9, "policy_noise", "noise_clip", "cql_alpha")
    task = find_task(args.task)
    others = "ibc, iql, maiql, inspo, logo or moma_ppo"
    require(not task.discrete, f"{task.name} has discrete actions; use {others}")
    quadrature(args.cql_points, task.action_dim)  # checked before a dataset is recorded
    with Run(args, "icql") as run:
        device = run.device
        dataset = load_dataset(task, args.dataset, device)
        torch.manual_seed(args.seed)
        team = Team(task, dataset.states, args).to(device)
        groups = [{"params": net.parameters()} for net in (team.policy, team.critics)]
        if team.memory:
            groups.append({"params": team.memory.parameters(), "lr": args.memory_learning_rate})
        optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True)
        targets = {name: p for name, p in team.named_parameters() if name.startswith("target_")}
        online = [team.get_parameter(name.removeprefix("target_")) for name in targets]
        schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)  # Deviation 1
        inputs = {"dataset": dataset.description}
        run.restore(inputs, team=team, optimizer=optimizer, schedule=schedule)
        loss_function = compiled(icql_losses, args, device)

        def evaluate_team(episodes):
            return evaluate(task, team.act_greedily, episodes, device=device)

        for step in run.steps(evaluate_team):
            rows = dataset.sample_rows(args.batch_size)
            batch = dataset.batch(rows, with_histories=bool(team.memory))
            # Noise is drawn outside the losses, so that compiling them changes no random number.
            noise = torch.randn_like(batch.actions)
            learn_policy = step % args.policy_delay == 0
            losses = loss_function(team, batch, noise, args, learn_policy)
            optimizer.zero_grad()
            sum(losses).backward()
            for group in optimizer.param_groups:
                if group["params"][0].grad is not None:  # policies have none between their steps
                    clip_each_agent(group["params"], task.num_agents, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            if learn_policy:
                with torch.no_grad():
                    torch._foreach_lerp_(list(targets.values()), online, args.polyak)
            run.log(dict(zip(("losses/critics", "losses/conservative", "losses/policy"), losses)))

        return run.finish(evaluate_team(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
