"""ITD3+BC: independent TD3 with behavioural cloning, each agent from its own observations.

Papers: Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021
(TD3+BC, arXiv 2106.06860). Barde et al., "A Model-Based Solution to the Offline Multi-Agent
Reinforcement Learning Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Section 5.1, applies it
to each agent separately. An agent's critics see its own observation, history and action, so their
values average over what the other agents did in the dataset.

    python baselines/itd3_bc.py --task reacher-leader-only
    python baselines/itd3_bc.py --resume runs/RUN

Where it differs from the papers, why, and by how much: docs/itd3_bc.md.
"""

import copy
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
    total_steps: int = 5000
    """gradient steps (the paper: 1,000,000)"""
    eval_every: int = 1000
    """gradient steps between evaluations; each is followed by a checkpoint"""
    eval_episodes: int = 100
    """greedy episodes per evaluation (the paper: 10); the final one always has 100"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__itd3_bc__SEED__TIME"""
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
    policy_noise: float = 0.2
    """standard deviation of the noise that smooths the target policies' actions"""
    noise_clip: float = 0.5
    """limit at which that noise is clipped"""
    alpha: float = 0.25
    """weight of the value relative to cloning (the paper: 2.5, suited to a million steps)"""
    max_grad_norm: float = 1.0
    """clip each agent's gradient norms (policy, critics and encoder separately) at this value"""


DEFAULTS = {
    None: Args(),
    "Ant-v4": Args(eval_episodes=10),
    "coordination": Args(total_steps=500, eval_every=100, gamma=0.5, alpha=2.5),
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
        self.critics = MLP(critic_dims * 2, [256, 256], 1)
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
        """Q_ij(h_i, a_i) of both twins j of every agent i: [twin, agent, batch]."""
        critics = self.target_critics if target else self.critics
        x = torch.cat([actions.transpose(0, 1), inputs], dim=-1)  # padding stays last
        return critics(x.repeat(2, 1, 1))[..., 0].unflatten(0, (2, len(x)))

    def first_q_values(self, inputs, actions):
        """Q_i1(h_i, a_i): [agent, batch]. Gradients reach the actions, not the critics."""
        x = torch.cat([actions.transpose(0, 1), inputs], dim=-1)
        # The first half of the critics.
        weights = {name: w.detach()[: len(x)] for name, w in self.critics.named_parameters()}
        return functional_call(self.critics, weights, x)[..., 0]

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, agent, action] in [-1, 1]."""
        return self.act(self.inputs(observations, histories))


# The algorithm.


def itd3_bc_losses(team: Team, batch: Batch, noise, args: Args, learn_policy: bool):
    """Losses of the critics and, with `learn_policy`, of the policies, summed over agents.

    `noise` [batch, agent, action] is standard normal. Agents share no parameters, so each learns
    for itself.
    """
    inputs = team.inputs(batch.observations, batch.histories)

    # y_i = r + gamma min_j Q'_ij(h'_i, pi'_i(h'_i) + clipped noise) (TD3, Algorithm 1).
    with torch.no_grad():
        next_inputs = team.inputs(batch.next_observations, batch.next_histories, target=True)
        smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (team.act(next_inputs, target=True) + smoothing).clamp(-1, 1)
        next_q = team.q_values(next_inputs, next_actions, target=True).amin(0)  # [agent, batch]
        td_targets = batch.rewards + args.gamma * batch.masks * next_q

    # Both critics of an agent learn y_i.
    q = team.q_values(inputs, batch.actions)  # [twin, agent, batch]
    critic_loss = (q - td_targets).square().mean(-1).sum()
    if not learn_policy:
        return (critic_loss,)

    # Policies maximise lambda_i Q_i1(h_i, pi_i(h_i)) - (pi_i(h_i) - a_i)^2 (TD3+BC, Eq. 3) with
    # lambda_i = alpha / mean |Q_i1| (Eq. 5). Deviations 3, 4 and 6.
    actions = team.act(inputs)
    policy_q = team.first_q_values(inputs.detach(), actions)  # [agent, batch]
    scale = args.alpha / policy_q.abs().mean(-1).detach()  # [agent]: lambda_i
    cloning = (actions - batch.actions).square().mean((0, 2))  # [agent]
    return critic_loss, (cloning - scale * policy_q.mean(-1)).sum()


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
    check_range(args, 0, 1, "gamma", "polyak")
    check_range(args, 0, 1e9, "policy_noise", "noise_clip", "alpha")
    task = find_task(args.task)
    others = "ibc, iql, maiql, inspo, logo or moma_ppo"
    require(not task.discrete, f"{task.name} has discrete actions; use {others}")
    with Run(args, "itd3_bc") as run:
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
        loss_function = compiled(itd3_bc_losses, args, device)

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
            run.log(dict(zip(("losses/critics", "losses/policy"), losses)))

        return run.finish(evaluate_team(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
