"""InSPO: in-sample sequential policy optimisation, agents updated one after another.

Paper: Liu et al., "Offline Multi-Agent Reinforcement Learning via In-Sample Sequential Policy
Optimization", AAAI 2025 (arXiv 2412.07639). Agents take turns in random order. Each imitates its
best actions in data reweighted by the others' current policies, as if it had played with them.

    python baselines/inspo.py --task coordination-unfavorable
    python baselines/inspo.py --resume runs/RUN

Where it differs from the paper, why, and what could not be verified: docs/inspo.md.
"""

import copy
import math
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
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from data.offline_dataset import Batch, OfflineDataset, load_dataset
from mamujoco_envs import HISTORY_LENGTH, Task, evaluate, find_task, require
from training_run import FINAL_EPISODES, Run, check_positive, check_range, compiled, main


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task name from docs/tasks.md, or FILE:NAME of your own"""
    seed: int = 1
    """random seed for networks, minibatches, noise and turns"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA GPU if there is one"""
    total_steps: int = 10_000
    """gradient steps, including those of cloning"""
    eval_every: int = 1000
    """gradient steps between evaluations; each is followed by a checkpoint"""
    eval_episodes: int = 100
    """greedy episodes per evaluation; the final one always has 100"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__inspo__SEED__TIME"""
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
    cloning_share: float = 0.25
    """share of the steps that clone and evaluate the data's policies; at least one step"""
    turn_steps: int = 50
    """gradient steps of a turn; in the first half only the critics learn"""
    pool_size: int = 10_000
    """random transitions from which a turn's minibatches are resampled"""
    learning_rate: float = 3e-4
    """Adam, policies and critics; decays linearly to zero"""
    memory_learning_rate: float = 1e-4
    """Adam, history encoders; same decay"""
    gamma: float = 0.99
    """discount factor"""
    polyak: float = 0.05
    """update rate of the target critics, at every step"""
    alpha: float = 10.0
    """temperature, in units of the agent's mean absolute advantage"""
    max_weight: float = 100.0
    """upper limit of importance ratios and of exp(advantage / temperature)"""
    policy_samples: int = 4
    """sampled actions that estimate a value, where actions are continuous"""
    max_grad_norm: float = 1.0
    """clip each agent's gradient norms (policy, critics and encoder separately) at this value"""


DEFAULTS = {
    None: Args(),
    "Ant-v4": Args(eval_episodes=10),
    "coordination": Args(
        total_steps=600, eval_every=100, turn_steps=20, learning_rate=1e-3, gamma=0.5, alpha=0.1
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


def call_slices(network, members, x):
    """Applies only the slices of these agents (or twins) of a batched network, to their inputs."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    # What has three dimensions has a slice per member; the encoder's positions are shared.
    slices = {name: tensor[members] for name, tensor in tensors if tensor.dim() == 3}
    return functional_call(network, slices, x)


class Team(nn.Module):
    """Policies and encoders, frozen copies of both that stand for the data's policies once these
    have been cloned, and twin critics of the state and an agent's own action."""

    def __init__(self, task: Task, states, args: Args):
        """The statistics of `states` [N, state] standardise inputs (Deviation 9)."""
        super().__init__()
        self.task = task
        obs_mean, obs_std = observation_statistics(task, states)
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.register_buffer("state_mean", states.mean(0))
        self.register_buffer("state_std", torch.where(states.std(0) < 1e-6, 1, states.std(0)))
        self.register_buffer("everyone", torch.arange(task.num_agents))
        self.memory = make_memory(task, args.memory, obs_mean, obs_std)  # Deviation 9
        memory_dim = 128 if self.memory else 0
        in_dims = [memory_dim + width for width in task.obs_dims]
        critic_dims = [task.state_dim + task.action_dim] * task.num_agents
        self.policy = MLP(in_dims, [256, 256], task.action_dim * (1 if task.discrete else 2))
        if not task.discrete:  # log standard deviations start inside their clamp
            self.policy[-1].bias.data[..., task.action_dim :] = -1.5
        # All agents' first critics, then their independently initialised twins.
        self.critics = MLP(critic_dims * 2, [256, 256], 1)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.behavior = copy.deepcopy(self.policy).requires_grad_(False)
        self.behavior_memory = self.memory and copy.deepcopy(self.memory).requires_grad_(False)

    def freeze_behavior(self):
        """Keeps a copy of the cloned policies, to stand for the data's from then on."""
        self.behavior.load_state_dict(self.policy.state_dict())
        if self.memory:
            self.behavior_memory.load_state_dict(self.memory.state_dict())

    def inputs(self, observations, histories, agents=slice(None), behavior=False):
        """h_t^i, what agent i acts on: memory, then observation [agent, batch, memory + obs]."""
        observations = ((observations - self.obs_mean) / self.obs_std).transpose(0, 1)[agents]
        if self.memory is None:
            return observations
        memory = self.behavior_memory if behavior else self.memory
        return torch.cat([call_slices(memory, agents, histories[:, agents]), observations], dim=-1)

    def distribution(self, inputs, agents, behavior=False):
        """pi_i(. | h_i) of these agents, or the data's: a batch [batch, agent] of distributions."""
        policy = self.behavior if behavior else self.policy
        outputs = call_slices(policy, agents, inputs).transpose(0, 1)
        if self.task.discrete:
            return OneHotCategorical(logits=outputs)
        mean, log_std = outputs.chunk(2, dim=-1)
        normal = Normal(mean, log_std.clamp(-6, 0).exp())
        return Independent(TransformedDistribution(normal, TanhTransform()), 1)

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, agent, action] in [-1, 1]."""
        outputs = self.policy(self.inputs(observations, histories)).transpose(0, 1)
        if self.task.discrete:
            return OneHotCategorical(logits=outputs).mode
        return outputs.chunk(2, dim=-1)[0].tanh()

    def q_values(self, states, actions, agents, target=False):
        """Q_ij(s, a_i) of both twins j of these agents: [twin, batch, agent] (Deviation 6)."""
        critics = self.target_critics if target else self.critics
        states = ((states - self.state_mean) / self.state_std).expand(len(agents), -1, -1)
        x = torch.cat([states, actions.transpose(0, 1)], dim=-1).repeat(2, 1, 1)
        twins = torch.cat([agents, agents + self.task.num_agents])
        return call_slices(critics, twins, x)[..., 0].unflatten(0, (2, -1)).transpose(1, 2)

    def values(self, states, distribution, noise, agents, target=False):
        """V_i(s), the mean over a_i ~ pi_i of the smaller Q_ij(s, a_i): [batch, agent].

        Exact for discrete actions; otherwise over samples that `noise` [sample, batch, agent,
        action] yields (Deviation 7).
        """
        if self.task.discrete:
            options = torch.eye(self.task.action_dim, device=states.device)
            actions = options[:, None, None].expand(-1, *distribution.batch_shape, -1)
            shares = distribution.probs.movedim(-1, 0)  # [option, batch, agent]
        else:
            normal = distribution.base_dist.base_dist
            actions = (normal.loc + normal.scale * noise).tanh()
            shares = torch.full_like(noise[..., 0], 1 / len(noise))
        states, flat_actions = states.repeat(len(actions), 1), actions.flatten(0, 1)
        q = self.q_values(states, flat_actions, agents, target).amin(0)
        return (shares * q.unflatten(0, (len(actions), -1))).sum(0)


# The algorithm.


def importance_weights(team: Team, batch: Batch, max_weight: float):
    """prod_{k != i} pi_k(a_k | h_k) / mu_k(a_k | h_k), clipped: [batch, agent i] (Deviation 8)."""

    def log_probs(behavior):
        inputs = team.inputs(batch.observations, batch.histories, behavior=behavior)
        return team.distribution(inputs, team.everyone, behavior).log_prob(batch.actions)

    log_ratios = log_probs(behavior=False) - log_probs(behavior=True)  # [batch, agent]
    others = log_ratios.sum(1, keepdim=True) - log_ratios
    ratios = others.clamp(-math.log(1e6), math.log(max_weight)).exp()
    return ratios.nan_to_num(1.0)  # if policies are not finite, the losses will say so


class Turns(nn.Module):
    """When turns begin, their order, and the pool of rows a turn learns from (Deviation 2)."""

    def __init__(self, agents, pool_size, cloning_steps=0):
        super().__init__()
        self.register_buffer("cloning_steps", torch.tensor(cloning_steps))
        self.register_buffer("order", torch.arange(agents))
        self.register_buffer("rows", torch.zeros(pool_size, dtype=torch.long))
        self.register_buffer("weights", torch.ones(pool_size))

    @torch.no_grad()
    def begin(self, turn: int, team: Team, dataset: OfflineDataset, max_weight: float):
        """Draws and weights rows for the agent whose turn it is; a round starts with turn 0."""
        if turn == 0:
            self.order.copy_(torch.randperm(len(self.order), device=self.order.device))
        self.rows.copy_(dataset.sample_rows(len(self.rows)))
        for rows, weights in zip(self.rows.split(2048), self.weights.split(2048)):
            batch = dataset.batch(rows, with_histories=bool(team.memory))
            weights.copy_(importance_weights(team, batch, max_weight)[:, self.order[turn]])

    def sample_rows(self, count: int):
        """Rows [count] in proportion to their weights: in these the others act as they do now."""
        return self.rows[torch.multinomial(self.weights, count, replacement=True)]


def inspo_losses(team: Team, batch: Batch, learners, noise, args: Args, phase: str):
    """Losses of critics and policies, summed over `learners` [learner].

    In the phase "clone" all agents learn the data's policies and their values; then the agent
    whose turn it is first evaluates ("critics") and then also improves its policy ("improve").
    `noise` [2, sample, batch, learner, action] is standard normal.
    """
    actions = batch.actions[:, learners]

    # Q_i(s, a_i) learns r + gamma V_i(s').
    with torch.no_grad():
        next_inputs = team.inputs(batch.next_observations, batch.next_histories, learners)
        next_policies = team.distribution(next_inputs, learners)
        next_values = team.values(batch.next_states, next_policies, noise[0], learners, target=True)
        td_targets = batch.rewards[:, None] + args.gamma * batch.masks[:, None] * next_values
    q = team.q_values(batch.states, actions, learners)  # [twin, batch, learner]
    critic_loss = (q - td_targets).square().mean(1).sum()
    if phase == "critics":  # Deviation 4
        return (critic_loss,)

    inputs = team.inputs(batch.observations, batch.histories, learners)
    distribution = team.distribution(inputs, learners)
    log_probs = distribution.log_prob(actions)
    if phase == "clone":
        return critic_loss, -log_probs.mean(0).sum()

    # The data's policy, reweighted by exp(A_i / temperature), learned by maximum likelihood.
    with torch.no_grad():
        advantages = q.amin(0) - team.values(batch.states, distribution, noise[1], learners)
        temperature = args.alpha * advantages.abs().mean(0) + 1e-6  # Deviation 3
        preferences = (advantages / temperature).exp().clamp(max=args.max_weight)
    return critic_loss, -(preferences * log_probs).mean(0).sum()


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
    check_positive(args, "total_steps", "eval_every", "eval_episodes", "batch_size", "max_weight")
    check_positive(args, "learning_rate", "memory_learning_rate", "max_grad_norm", "alpha")
    check_range(args, 1, 2**24, "pool_size", "turn_steps", "policy_samples")
    check_range(args, 0, 1, "gamma", "polyak", "cloning_share")
    # Importance ratios need the data's policies, so at least one step clones them.
    cloning_steps = max(1, round(args.cloning_share * args.total_steps))
    remaining = args.total_steps - cloning_steps  # if 0, the run only clones
    message = f"--turn-steps must be smaller: no policy would learn in the {remaining} steps left"
    require(not remaining or args.turn_steps // 2 < remaining, message)
    with Run(args, "inspo") as run:
        task, device = find_task(args.task), run.device
        dataset = load_dataset(task, args.dataset, device)
        torch.manual_seed(args.seed)
        team = Team(task, dataset.states, args).to(device)
        turns = Turns(task.num_agents, args.pool_size, cloning_steps).to(device)
        groups = [{"params": net.parameters()} for net in (team.policy, team.critics)]
        if team.memory:
            groups.append({"params": team.memory.parameters(), "lr": args.memory_learning_rate})
        # Deviation 5. Without momentum, agents stay as they are between their turns.
        optimizer = torch.optim.Adam(groups, args.learning_rate, betas=(0.0, 0.999), fused=True)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)  # Deviation 1
        tracked = {"team": team, "turns": turns, "optimizer": optimizer, "schedule": schedule}
        run.restore({"dataset": dataset.description}, **tracked)
        cloning_steps = int(turns.cloning_steps)  # unchanged if --resume changes --total-steps
        targets, online = (list(x.parameters()) for x in (team.target_critics, team.critics))
        loss_function = compiled(inspo_losses, args, device)

        def evaluate_team(episodes):
            return evaluate(task, team.act_greedily, episodes, device=device)

        for step in run.steps(evaluate_team):
            if step <= cloning_steps:
                learners, phase = team.everyone, "clone"
                rows = dataset.sample_rows(args.batch_size)
            else:
                block, place = divmod(step - cloning_steps - 1, args.turn_steps)
                turn = block % task.num_agents
                if step == cloning_steps + 1:
                    team.freeze_behavior()
                if place == 0:
                    turns.begin(turn, team, dataset, args.max_weight)
                # Critics learn what the others do now before the policy follows the critics.
                phase = "critics" if place < args.turn_steps // 2 else "improve"
                learners, rows = turns.order[turn : turn + 1], turns.sample_rows(args.batch_size)

            batch = dataset.batch(rows, with_histories=bool(team.memory))
            # Noise is drawn outside the losses, so that compiling them changes no random number.
            shape = 2, args.policy_samples, len(rows), len(learners), task.action_dim
            noise = torch.randn(shape, device=device)
            losses = loss_function(team, batch, learners, noise, args, phase)
            optimizer.zero_grad()
            sum(losses).backward()
            for group in optimizer.param_groups:
                if group["params"][0].grad is not None:  # policies have none while critics learn
                    clip_each_agent(group["params"], task.num_agents, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_lerp_(targets, online, args.polyak)
            run.log(dict(zip(("losses/critics", "losses/policy"), losses)))

        return run.finish(evaluate_team(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
