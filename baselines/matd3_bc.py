"""MATD3+BC: TD3 with behavioural cloning for a team, whose critics are mixed into one value.

Papers: Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021
(TD3+BC, arXiv 2106.06860). Barde et al., "A Model-Based Solution to the Offline Multi-Agent
Reinforcement Learning Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Section 5.1, trains it
centrally: a mixer weighs the agents' critics (Eq. 4; here it also sees the joint action, Deviation
5). All policies climb the team's value and stay close to the data's actions.

    python baselines/matd3_bc.py --task reacher-leader-only
    python baselines/matd3_bc.py --resume runs/RUN

Where it differs from the papers, why, and by how much: docs/matd3_bc.md.
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
    """run folder; by default runs/TASK__matd3_bc__SEED__TIME"""
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
    """Adam, all but the history encoders; decays linearly to zero (the paper: constant)"""
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
    """gradient norms of policies, critics with mixer, and encoders are each clipped at this"""


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


class MixedValues(nn.Module):
    """The team's values, sum_i w_i V_i(h_i) + b; a mixer computes w and b (Eq. 4)."""

    def __init__(self, in_dims, mixer_dim, agents):
        super().__init__()
        self.values = MLP(in_dims, [256, 256], 1)
        self.mixer = MLP([mixer_dim], [256, 256], agents + 1)

    def forward(self, inputs, mixer_inputs):
        """[twin * agent, batch, in], [batch, mixer] -> [twin, batch]; twins share the mixer."""
        outputs = self.mixer(mixer_inputs[None])[0].T  # [agent + 1, batch]
        weights, bias = outputs[:-1], outputs[-1]
        values = self.values(inputs)[..., 0].unflatten(0, (-1, len(weights)))
        return (weights * values).sum(1) + bias


class Team(nn.Module):
    """Policies, twin critics and history encoders of all agents, a mixer, and targets of all."""

    def __init__(self, task: Task, states, args: Args):
        """The statistics of `states` [N, state] standardise inputs (Deviation 2)."""
        super().__init__()
        self.task = task
        obs_mean, obs_std = observation_statistics(task, states)
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.register_buffer("state_mean", states.mean(0))
        self.register_buffer("state_std", torch.where(states.std(0) < 1e-6, 1, states.std(0)))
        self.memory = make_memory(task, args.memory, obs_mean, obs_std)  # Deviation 7
        memory_dim = 128 if self.memory else 0
        in_dims = [memory_dim + width for width in task.obs_dims]
        critic_dims = [memory_dim + width for width in task.pair_dims]
        mixer_dim = task.state_dim + task.num_agents * task.action_dim  # Deviation 5
        self.policy = MLP(in_dims, [256, 256], task.action_dim)
        # All agents' first critics, then their independently initialised twins.
        self.critics = MixedValues(critic_dims * 2, mixer_dim, task.num_agents)
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

    def critic_inputs(self, inputs, states, actions):
        """What critics [agent, batch, action + memory + obs] and mixer [batch, mixer] see."""
        inputs = torch.cat([actions.transpose(0, 1), inputs], dim=-1)  # padding stays last
        states = (states - self.state_mean) / self.state_std
        return inputs, torch.cat([states, actions.flatten(1)], dim=-1)

    def team_critics(self, inputs, states, actions, target=False):
        """Q_j(s, a) of both twins j: [twin, batch]."""
        critics = self.target_critics if target else self.critics
        inputs, mixer_inputs = self.critic_inputs(inputs, states, actions)
        return critics(inputs.repeat(2, 1, 1), mixer_inputs)

    def first_team_critic(self, inputs, states, actions):
        """Q_1(s, a): [batch]. Gradients reach the actions, but neither critics nor mixer."""
        inputs, mixer_inputs = self.critic_inputs(inputs, states, actions)
        # The first half of the critics, and the mixer, which is a single network.
        weights = {name: w.detach()[: len(inputs)] for name, w in self.critics.named_parameters()}
        return functional_call(self.critics, weights, (inputs, mixer_inputs))[0]

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, agent, action] in [-1, 1]."""
        return self.act(self.inputs(observations, histories))


# The algorithm.


def matd3_bc_losses(team: Team, batch: Batch, noise, args: Args, learn_policy: bool):
    """Losses of the critics and, with `learn_policy`, of the policies.

    `noise` [batch, agent, action] is standard normal.
    """
    inputs = team.inputs(batch.observations, batch.histories)

    # y = r + gamma min_j Q'_j(s', pi'(h') + clipped noise) (TD3, Algorithm 1). Deviation 6.
    with torch.no_grad():
        next_inputs = team.inputs(batch.next_observations, batch.next_histories, target=True)
        smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (team.act(next_inputs, target=True) + smoothing).clamp(-1, 1)
        next_q = team.team_critics(next_inputs, batch.next_states, next_actions, target=True)
        td_targets = batch.rewards + args.gamma * batch.masks * next_q.amin(0)  # [batch]

    # Both mixed critics learn y.
    q = team.team_critics(inputs, batch.states, batch.actions)  # [twin, batch]
    critic_loss = (q - td_targets).square().mean(-1).sum()
    if not learn_policy:
        return (critic_loss,)

    # Policies maximise lambda Q_1(s, pi(h)) - sum_i (pi_i(h_i) - a_i)^2 (TD3+BC, Eq. 3) with
    # lambda = alpha / mean |Q_1| (Eq. 5). Deviations 3, 4, 8 and 9.
    actions = team.act(inputs)
    policy_q = team.first_team_critic(inputs.detach(), batch.states, actions)  # [batch]
    scale = args.alpha / policy_q.abs().mean().detach()  # lambda
    cloning = (actions - batch.actions).square().mean((0, 2)).sum()
    return critic_loss, cloning - scale * policy_q.mean()


def train(args: Args) -> dict:
    check_positive(args, "total_steps", "eval_every", "eval_episodes", "batch_size")
    check_positive(args, "learning_rate", "memory_learning_rate", "max_grad_norm")
    check_range(args, 1, args.total_steps, "policy_delay")  # else policies never learn
    check_range(args, 0, 1, "gamma", "polyak")
    check_range(args, 0, 1e9, "policy_noise", "noise_clip", "alpha")
    task = find_task(args.task)
    others = "ibc, iql, maiql, inspo, logo or moma_ppo"
    require(not task.discrete, f"{task.name} has discrete actions; use {others}")
    with Run(args, "matd3_bc") as run:
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
        loss_function = compiled(matd3_bc_losses, args, device)

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
                nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
            optimizer.step()
            schedule.step()
            if learn_policy:
                with torch.no_grad():
                    torch._foreach_lerp_(list(targets.values()), online, args.polyak)
            run.log(dict(zip(("losses/critics", "losses/policy"), losses)))

        return run.finish(evaluate_team(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
