"""MAIQL: implicit Q-learning for a team whose values and critics are mixed.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Section 5.1 and Appendix A.1, after IQL
(Kostrikov et al., ICLR 2022, arXiv 2110.06169). Mixers turn the agents' values and twin critics
into the team's; they see the global state and, for critics, the joint action (Deviation 6).
Policies imitate the data, weighted by advantage.

    python baselines/maiql.py --task reacher-leader-only
    python baselines/maiql.py --task ant-medium-fo --finetune    # MAIQL-ft, in the true simulator
    python baselines/maiql.py --resume runs/RUN

Where it differs from the paper, why, and by how much: docs/maiql.md.
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
from torch.optim.lr_scheduler import LambdaLR

from data.offline_dataset import Batch, OfflineDataset, load_dataset
from mamujoco_envs import ACTION_LIMIT, HISTORY_LENGTH, Task, evaluate, find_task, require
from training_run import FINAL_EPISODES, Run, check_positive, check_range, compiled, main


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task name from docs/tasks.md, or FILE:NAME of your own"""
    seed: int = 1
    """random seed for networks, minibatches and rollouts"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA GPU if there is one"""
    total_steps: int = 10_000
    """gradient steps (the paper: 1,000,000); --finetune adds as many again"""
    eval_every: int = 1000
    """gradient steps between evaluations; each is followed by a checkpoint"""
    eval_episodes: int = 100
    """greedy episodes per evaluation (the paper: 10); the final one always has 100"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__maiql__SEED__TIME"""
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
    """target update rate, at every step (the paper: 0.005, suited to a million steps)"""
    expectile: float = 0.7
    """expectile of the target critics that the value learns"""
    beta: float = 3.0
    """inverse temperature of advantage-weighted regression (the paper: 3)"""
    max_weight: float = 100.0
    """largest weight of a transition in advantage-weighted regression"""
    max_grad_norm: float = 1.0
    """gradient norms of policies, values, critics (with their mixers) and encoders, each taken over
    all agents, are clipped at this value"""
    finetune: bool = False
    """MAIQL-ft: train for as many steps again, on the dataset and a growing set of rollouts"""
    rollout_length: int = 10
    """with --finetune: steps per rollout, each from a random state of the dataset"""
    rollout_every: int = 10
    """with --finetune: gradient steps between batches of rollouts"""


DEFAULTS = {
    None: Args(),
    "Ant-v4": Args(eval_episodes=10, beta=1.0),  # Deviation 11
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
    """Policies, values, twin critics, mixers and history encoders of all agents, and targets."""

    def __init__(self, task: Task, states, args: Args):
        """The statistics of `states` [N, state] standardise inputs (Deviation 1)."""
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
        mixer_dim = task.state_dim + task.num_agents * task.action_dim  # Deviation 6
        self.policy = MLP(in_dims, [256, 256], task.action_dim * (1 if task.discrete else 2))
        if not task.discrete:  # log standard deviations start inside their clamp (Deviation 10)
            self.policy[-1].bias.data[..., task.action_dim :] = -1.5
        self.value = MixedValues(in_dims, task.state_dim, task.num_agents)
        # All agents' first critics, then their independently initialised twins.
        self.critics = MixedValues(critic_dims * 2, mixer_dim, task.num_agents)
        self.target_memory = copy.deepcopy(self.memory)
        self.target_critics = copy.deepcopy(self.critics)

    def inputs(self, observations, histories, target=False):
        """h_t^i, what agent i acts on: memory, then observation [agent, batch, memory + obs]."""
        observations = ((observations - self.obs_mean) / self.obs_std).transpose(0, 1)
        if self.memory is None:
            return observations
        memory = self.target_memory if target else self.memory
        return torch.cat([memory(histories), observations], dim=-1)

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

    def team_value(self, inputs, states):
        """V(s): [batch]."""
        return self.value(inputs, (states - self.state_mean) / self.state_std)[0]

    def team_critics(self, inputs, states, actions, target=False):
        """Q_j(s, a) of both twins j: [twin, batch]."""
        critics = self.target_critics if target else self.critics
        states = (states - self.state_mean) / self.state_std
        inputs = torch.cat([actions.transpose(0, 1), inputs], dim=-1)  # padding stays last
        return critics(inputs.repeat(2, 1, 1), torch.cat([states, actions.flatten(1)], dim=-1))


# The algorithm.


def maiql_losses(team: Team, batch: Batch, args: Args):
    """Losses of the values, the policies and the critics (Deviation 5)."""
    inputs = team.inputs(batch.observations, batch.histories)
    with torch.no_grad():
        target_inputs = team.inputs(batch.observations, batch.histories, target=True)
        next_inputs = team.inputs(batch.next_observations, batch.next_histories)  # Deviation 4
        next_values = team.team_value(next_inputs, batch.next_states)
        td_targets = batch.rewards + args.gamma * batch.masks * next_values
        target_q = team.team_critics(target_inputs, batch.states, batch.actions, target=True)
        target_q = target_q.amin(0)  # [batch] (Deviation 2)

    # The team's value learns an expectile of the target critics (IQL, Eq. 5).
    advantages = target_q - team.team_value(inputs, batch.states)
    asymmetry = (args.expectile - (advantages < 0).float()).abs()
    value_loss = (asymmetry * advantages.square()).mean()

    # Advantage-weighted regression, with one weight for all agents (Eq. 7).
    weights = (args.beta * advantages.detach()).exp().clamp(max=args.max_weight)
    policy_loss = -(weights * team.distribution(inputs).log_prob(batch.actions)).mean()

    # Both critics learn the reward plus the discounted next value (IQL, Eq. 6).
    critics = team.team_critics(inputs, batch.states, batch.actions)  # [twin, batch]
    critic_loss = (critics - td_targets).square().mean(1).sum()
    return value_loss, policy_loss, critic_loss


def normalize_rewards(dataset: OfflineDataset) -> float:
    """Scales locomotion rewards so that the data's returns span 1000; returns the factor."""
    returns = dataset.episode_returns()
    span = float(returns.max() - returns.min())
    scale = 1000 / span if dataset.task.locomotion and span > 0 else 1.0
    dataset.rewards = dataset.rewards * scale
    return scale


class OnlineData:
    """The dataset, then about as many transitions from the true simulator (Deviation 8).

    Before each rollout comes a copy of the ten rows before its first state, for histories.
    """

    COLUMNS = ("states", "next_states", "actions", "rewards", "masks", "episode_starts")

    def __init__(self, dataset: OfflineDataset, args: Args, reward_scale: float):
        self.dataset, self.reward_scale, self.next_row = dataset, reward_scale, dataset.size
        self.total_steps, self.rollout_every = args.total_steps, args.rollout_every
        rollouts = math.ceil(dataset.size / args.rollout_length)
        self.collections = self.collections_until(2 * args.total_steps)
        at_once = math.ceil(rollouts / self.collections)
        advice = "lower --rollout-every or raise --total-steps"
        require(at_once <= 2000, f"{at_once} rollouts at once are too many; {advice}")
        self.simulator = dataset.task.make_simulator(at_once)
        length = HISTORY_LENGTH + args.rollout_length
        for name in self.COLUMNS:
            column = getattr(dataset, name)
            room = column.new_zeros(rollouts * length, *column.shape[1:])
            setattr(dataset, name, torch.cat([column, room]))
        self.offsets = torch.arange(at_once * length, device=dataset.device).view(at_once, length)
        # Rows to learn from: the data's, later also those of rollouts, without their copied pasts.
        self.rows = torch.arange(dataset.size, device=dataset.device)

    def collections_until(self, step: int) -> int:
        """How many collections are due by `step`, which counts the offline steps, too."""
        return step // self.rollout_every - self.total_steps // self.rollout_every

    def sample_rows(self, count: int):
        """Random rows [count] of the dataset and the rollouts."""
        return self.rows[torch.randint(len(self.rows), (count,), device=self.rows.device)]

    @torch.no_grad()
    def collect(self, team: Team, step: int) -> None:
        """Records rollouts with sampled actions, each until its first terminal; skips some calls,
        so that the data grow evenly.

        `step` counts gradient steps, the offline ones included.
        """
        dataset, rows = self.dataset, self.next_row + self.offsets  # [rollout, 10 + step]
        # Rollouts per collection are rounded up, so some collections are skipped to save room.
        filled = self.next_row + rows.numel() - dataset.size
        room = len(dataset.states) - dataset.size
        if filled * self.collections > room * self.collections_until(step):
            return
        self.next_row += rows.numel()

        # Copy the past of the first states, which is shorter where an episode has just begun: then
        # rows of another episode are copied, too, and `episode_starts` hides them.
        starts = dataset.sample_rows(len(rows))
        past = starts[:, None] + torch.arange(-HISTORY_LENGTH, 0, device=dataset.device)
        for column in (dataset.states, dataset.actions):
            column[rows[:, :HISTORY_LENGTH]] = column[past.clamp(min=0)]
        ages = (starts - dataset.episode_starts[starts]).clamp(max=HISTORY_LENGTH)
        dataset.episode_starts[rows] = rows[:, HISTORY_LENGTH, None] - ages[:, None]

        states, recorded = dataset.states[starts], [self.rows]
        alive = torch.ones_like(starts, dtype=torch.bool)
        for now in rows[:, HISTORY_LENGTH:].T:  # [rollout]
            dataset.states[now] = states
            histories = dataset.histories(now) if team.memory else None
            inputs = team.inputs(team.task.observe(states), histories)
            actions = team.distribution(inputs).sample()
            if not team.task.discrete:
                actions = actions.clamp(-ACTION_LIMIT, ACTION_LIMIT)
            states, rewards, terminals = self.simulator.step_from(states, actions)
            dataset.actions[now], dataset.next_states[now] = actions, states
            dataset.rewards[now], dataset.masks[now] = rewards * self.reward_scale, 1 - terminals
            recorded.append(now[alive])
            alive &= terminals == 0
        self.rows = torch.cat(recorded)

    def state_dict(self) -> dict:
        new = slice(self.dataset.size, self.next_row)
        columns = {name: getattr(self.dataset, name)[new].clone() for name in self.COLUMNS}
        return columns | {"rows": self.rows, "total_steps": self.total_steps}

    def load_state_dict(self, saved: dict) -> None:
        same = saved["total_steps"] == self.total_steps
        require(same, "--total-steps cannot change in a run with --finetune; leave it out")
        self.rows = saved["rows"].to(self.rows)
        self.next_row = self.dataset.size + len(saved["states"])
        for name in self.COLUMNS:
            getattr(self.dataset, name)[self.dataset.size : self.next_row] = saved[name]


def train(args: Args) -> dict:
    check_positive(args, "total_steps", "eval_every", "eval_episodes", "batch_size")
    check_positive(args, "learning_rate", "memory_learning_rate", "max_grad_norm")
    check_positive(args, "rollout_length", "rollout_every")
    check_range(args, 0, 1, "gamma", "polyak", "expectile")
    check_range(args, 0, math.inf, "beta", "max_weight")
    with Run(args, "maiql") as run:
        task, device = find_task(args.task), run.device
        if args.finetune:
            message = f"{task.name} has no simulator that starts anywhere; leave out --finetune"
            require(task.continues_from_states, message)
            check_range(args, 1, args.total_steps, "rollout_every")  # else there are no rollouts
        dataset = load_dataset(task, args.dataset, device)
        reward_scale = normalize_rewards(dataset)  # Deviation 9
        torch.manual_seed(args.seed)
        team = Team(task, dataset.states, args).to(device)
        groups = [{"params": net.parameters()} for net in (team.policy, team.value, team.critics)]
        if team.memory:
            groups.append({"params": team.memory.parameters(), "lr": args.memory_learning_rate})
        optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True)
        targets = {name: p for name, p in team.named_parameters() if name.startswith("target_")}
        online = [team.get_parameter(name.removeprefix("target_")) for name in targets]
        total_steps = 2 * args.total_steps if args.finetune else args.total_steps
        schedule = LambdaLR(optimizer, lambda step: 1 - step / total_steps)  # Deviation 3
        tracked = {"team": team, "optimizer": optimizer, "schedule": schedule}
        data = OnlineData(dataset, args, reward_scale) if args.finetune else dataset
        if args.finetune:
            tracked["online_data"] = data
            run.algorithm = "maiql_ft"  # its name in PAPER_SCORES
        run.restore({"dataset": dataset.description}, **tracked)
        loss_function = compiled(maiql_losses, args, device)

        def evaluate_team(episodes):
            return evaluate(task, team.act_greedily, episodes, device=device)

        for step in run.steps(evaluate_team, total_steps):
            if step > args.total_steps and step % args.rollout_every == 0:
                data.collect(team, step)
            rows = data.sample_rows(args.batch_size)
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
