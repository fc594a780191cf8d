"""MAIQL: implicit Q-learning for a team, with mixed values (Section 5.1, Appendix A.1, Eq. 7).

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem",
AAMAS 2024; Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022. Each agent has twin critics, a value and
a policy of its own observations and history. Mixers turn critics and values into the team's, from the global state and, for
the critics, the joint action. Policies are learned by advantage-weighted regression of the actions of the dataset.

    python baselines/maiql.py --task reacher-leader-only
    python baselines/maiql.py --task reacher-leader-only --finetune   # MAIQL-ft: then with rollouts in the true simulator
    python baselines/maiql.py --resume runs/RUN                       # goes on where RUN stopped, to the bit

Deviations from the paper:
1. Observations are standardised by the dataset's statistics.
2. The minimum over twins is taken after mixing: mixers' weights may be negative, so a minimum of each agent's would be no bound.
3. Learning rates decay to zero, for fewer steps: the paper has 1,000,000.
4. The value inside targets and advantages sees the online memory, whose value it is; target critics see the target memory.
5. Values, policies and critics take one step together instead of one after the other; so the memory is encoded and trained once.
6. The critics' mixer sees the joint action, too (Eq. 4 has the state alone): otherwise no team value could tell agreement from
   disagreement. beta multiplies the whole mixed advantage (Eq. 7 has none), as in IQL.
7. The memory, 128 dimensions of noise at first, starts at a tenth of its scale.
8. MAIQL-ft collects about as many transitions as the dataset has, whatever the number of steps: at the paper's 1,000,000 one a
   step. The learning rate decays over both halves, so the first one is not MAIQL's run.
9. On the ant rewards are scaled so that returns span 1000, as IQL does in locomotion (the paper does not say).
"""

import copy
import json
import math
import os
import platform
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import coordination_game  # noqa: F401, its tasks
from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import ACTION_LIMIT, HISTORY_LENGTH, InputError, Task, append_to_histories
from mamujoco_envs import evaluate, find_task, make_simulator, plot_team_strategy

PAPER_SCORES = {  # Tables 3 and 4, MAIQL
    "reacher-all-observant": "0.96 ± 0.05",
    "reacher-independent": "0.92 ± 0.04",
    "reacher-leader-only": "0.80 ± 0.05",
    "coordination-favorable": "1.00 ± 0.00",
    "coordination-neutral": "0.90 ± 0.10",
    "coordination-unfavorable": "0.00 ± 0.00",
    "ant-random-fo": "0.28 ± 0.01",
    "ant-medium-fo": "0.85 ± 0.02",
    "ant-full-replay-fo": "0.77 ± 0.21",
    "ant-expert-fo": "1.24 ± 0.00",
    "ant-random-po": "0.31 ± 0.00",
    "ant-medium-po": "0.14 ± 0.02",
    "ant-full-replay-po": "0.18 ± 0.02",
    "ant-expert-po": "-0.16 ± 0.01",
}


FINETUNED_PAPER_SCORES = {  # Table 4, MAIQL-ft
    "ant-random-fo": "0.28 ± 0.03",
    "ant-medium-fo": "0.81 ± 0.02",
    "ant-full-replay-fo": "0.95 ± 0.13",
    "ant-expert-fo": "1.06 ± 0.07",
    "ant-random-po": "0.34 ± 0.04",
    "ant-medium-po": "0.11 ± 0.01",
    "ant-full-replay-po": "-0.07 ± 0.10",
    "ant-expert-po": "-0.23 ± 0.02",
}


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """reacher-{all-observant,independent,leader-only}, ant-{random,medium,full-replay,expert}-{fo,po,po-other-legs} or coordination-{favorable,neutral,unfavorable}"""
    seed: int = 1
    """seed of networks, minibatches and rollouts"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA GPU where there is one"""
    total_steps: int | None = None
    """gradient steps; if not given, 10,000, or 500 in the coordination game (the paper's: 1,000,000)"""
    eval_every: int | None = None
    """gradient steps between two evaluations, each followed by a checkpoint; if not given, 1,000, or 100 in the coordination game"""
    eval_episodes: int | None = None
    """greedy episodes of an evaluation, from the same start states each time; if not given, 100, or 10 on the ant (the paper's: 10); the final one has 100"""
    run_dir: Path | None = None
    """folder of the run; runs/TASK__maiql__SEED__TIME if not given"""
    resume: Path | None = None
    """folder of a run to go on with; all other arguments are then the run's own"""
    compile: bool = False
    """compile the losses with torch.compile"""
    cudagraphs: bool = False
    """capture the update as a CUDA graph"""
    torch_deterministic: bool = True
    """only deterministic algorithms"""

    dataset: Path | None = None
    """HDF5 file in D4RL's layout; the task's own if not given"""
    batch_size: int = 256
    """transitions of a gradient step"""
    learning_rate: float = 3e-4
    """Adam, of critics, values, policies and mixers, decayed linearly to zero (the paper's: constant)"""
    memory_learning_rate: float = 1e-4
    """Adam, of the history encoders, decayed alike"""
    gamma: float | None = None
    """discount factor; if not given, 0.99, or 0.5 in the coordination game, where a step has no consequences"""
    polyak: float = 0.005
    """how far targets move towards critics, mixer and memory at a step"""
    expectile: float = 0.7
    """expectile of the target critics that the value learns"""
    beta: float = 3.0
    """inverse temperature of advantage-weighted regression"""
    max_weight: float = 100.0
    """largest weight of a transition in advantage-weighted regression"""
    max_grad_norm: float = 1.0
    """largest norm of the gradients of policies, of values, of critics and of history encoders"""
    finetune: bool = False
    """after total_steps as many again, on the dataset and a growing set of rollouts in the true simulator (MAIQL-ft)"""
    rollout_length: int = 10
    """steps of such a rollout, which starts from any state of the dataset"""
    rollout_every: int = 10
    """gradient steps from rollouts to rollouts"""


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


class HistoryEncoder(nn.Module):
    """Each agent's ten past pairs to one embedding (Appendix A.1): self-attention, then soft attention.

    Embedding, query, key and value are linear in a pair x and its position p (one-hot), so they are multiplied out before they
    touch the batch: with E = [embedding; positions] the scores are (x, p) E Wq (E Wk)^T (x, p)^T, and the skip connection
    plus the attended values are [(x, p), attention (x, p)] [E; E Wv]. Exactly the same function, in less time.
    """

    def __init__(self, in_dims: Sequence[int], dim: int = 128):
        super().__init__()
        agents = len(in_dims)
        self.embedding = BatchedLinear(in_dims, dim)
        self.query, self.key, self.value = [BatchedLinear([dim] * agents, dim) for _ in range(3)]
        self.norm_weight = nn.Parameter(
            torch.full((agents, 1, dim), 0.1)
        )  # noise at first: not to drown the observation
        self.norm_bias = nn.Parameter(torch.zeros(agents, 1, dim))
        self.soft_key = nn.Parameter(
            torch.empty(agents, dim, dim).uniform_(-(dim**-0.5), dim**-0.5)
        )
        self.soft_query = nn.Parameter(torch.randn(agents, dim, 1))
        angles = torch.arange(HISTORY_LENGTH)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
        self.register_buffer(
            "positions",
            torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1),
            persistent=False,
        )

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """[batch, agent, 10, pair] -> [agent, batch, dim]."""
        batch, agents, time, width = histories.shape
        one_hot = torch.eye(time, device=histories.device).expand(agents, batch, time, time)
        tokens = torch.cat(
            [histories.transpose(0, 1), one_hot], dim=-1
        )  # (x, p): [agent, batch, 10, pair + 10]
        embedding = torch.cat(
            [self.embedding.weight, self.embedding.bias + self.positions], dim=1
        )  # E: [agent, pair + 10, dim]

        def fold(
            layer: BatchedLinear,
        ) -> torch.Tensor:  # the bias joins the positions, of which every token has one
            return embedding @ layer.weight + F.pad(
                layer.bias.expand(-1, time, -1), (0, 0, width, 0)
            )

        form = fold(self.query) @ fold(self.key).transpose(1, 2) / self.soft_key.shape[-1] ** 0.5
        queries = (tokens.flatten(1, 2) @ form).view_as(tokens)
        attention = (queries @ tokens.transpose(2, 3)).softmax(dim=-1)  # [agent, batch, 10, 10]
        pair_and_attended = torch.cat([tokens, attention @ tokens], dim=-1).flatten(1, 2)
        hidden = pair_and_attended @ torch.cat(
            [embedding, fold(self.value)], dim=1
        )  # [agent, batch * 10, dim]
        hidden = F.layer_norm(hidden, hidden.shape[-1:])  # its affine map is multiplied out, too
        soft_key = self.norm_weight.transpose(1, 2) * self.soft_key
        keys = torch.baddbmm(self.norm_bias @ self.soft_key, hidden, soft_key).tanh()
        weights = (keys @ self.soft_query).view(agents * batch, 1, time).softmax(dim=-1)
        summary = (weights @ hidden.view(agents * batch, time, -1)).view(agents, batch, -1)
        return summary * self.norm_weight + self.norm_bias


class TanhGaussian(NamedTuple):
    """Policies of continuous actions: means and log standard deviations before the tanh, [batch, agent, action]."""

    mean: torch.Tensor
    log_std: torch.Tensor

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Joint log-density of the agents' actions inside +-1: [batch, agent, action] -> [batch]."""
        normalized = (actions.atanh() - self.mean) * (-self.log_std).exp()
        log_density = -0.5 * normalized.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return (log_density - (1 - actions.square() + 1e-5).log()).sum((1, 2))

    def greedy(self) -> torch.Tensor:
        return self.mean.tanh()


class OneHotCategorical(NamedTuple):
    """Policies of discrete actions, which are one-hot vectors: logits [batch, agent, action]."""

    logits: torch.Tensor

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Joint log-probability of the agents' actions, Eq. (6): [batch, agent, action] -> [batch]."""
        return (actions * self.logits.log_softmax(dim=-1)).sum((1, 2))

    def greedy(self) -> torch.Tensor:
        return F.one_hot(self.logits.argmax(dim=-1), self.logits.shape[-1]).to(self.logits)


class Team(nn.Module):
    """Policies, values, twin critics, history encoders and mixers; targets of critics, critics' mixer and memory."""

    def __init__(self, task: Task, states: torch.Tensor):
        """`states` [N, state]: their mean and standard deviation standardise what the networks see."""
        super().__init__()
        self.task = task
        memory_dim = 0 if task.discrete else 128
        self.memory = (
            HistoryEncoder([width + task.action_dim for width in task.obs_dims], memory_dim)
            if memory_dim
            else nn.Module()
        )
        input_dims = [
            memory_dim + width for width in task.obs_dims
        ]  # an agent's input is [memory, observation]: padding comes last
        self.policy = MLP(
            input_dims, [256, 256], task.action_dim if task.discrete else 2 * task.action_dim
        )
        self.value = MLP(input_dims, [256, 256], 1)
        self.value_mixer = MLP([task.state_dim], [256, 256], task.num_agents + 1)
        self.critics = MLP(
            [task.action_dim + width for width in input_dims] * 2, [256, 256], 1
        )  # of all agents, then their twins
        self.critic_mixer = MLP(
            [task.state_dim + task.num_agents * task.action_dim], [256, 256], task.num_agents + 1
        )
        for name in ("memory", "critics", "critic_mixer"):
            setattr(
                self, f"target_{name}", copy.deepcopy(getattr(self, name)).requires_grad_(False)
            )
        self.register_buffer("state_mean", states.mean(0))
        std = states.std(0)
        self.register_buffer("state_std", torch.where(std < 1e-6, 1, std))

    def inputs(
        self, observations: torch.Tensor, histories: torch.Tensor, target: bool = False
    ) -> torch.Tensor:
        """h_t^i, what networks see: [batch, agent, obs], [batch, agent, 10, pair] -> [agent, batch, memory + obs]."""
        mean = self.task.observe(self.state_mean)  # [agent, obs]
        std = self.task.observe(self.state_std)
        std = std + (std == 0)
        observations = (observations - mean) / std
        if self.task.discrete:
            return observations.transpose(0, 1)
        pair_mean, pair_std = (
            F.pad(mean, (self.task.action_dim, 0)),
            F.pad(std, (self.task.action_dim, 0), value=1.0),
        )
        histories = (histories - pair_mean[:, None]) / pair_std[:, None]
        memory = self.target_memory(histories) if target else self.memory(histories)
        return torch.cat([memory, observations.transpose(0, 1)], dim=-1)

    def distribution(self, inputs: torch.Tensor) -> TanhGaussian | OneHotCategorical:
        """The policies' distributions over actions."""
        outputs = self.policy(inputs).transpose(0, 1)
        if self.task.discrete:
            return OneHotCategorical(outputs)
        mean, log_std = outputs.chunk(2, dim=-1)
        return TanhGaussian(mean, log_std.clamp(-6, 0))

    def team_value(self, inputs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """V(s) = sum_i w_i(s) V_i(h_i) + b(s) (Section 3.2, Eq. 4): [batch]."""
        weights = self.value_mixer(((states - self.state_mean) / self.state_std)[None])[0]
        return (weights[:, :-1] * self.value(inputs)[..., 0].T).sum(-1) + weights[:, -1]

    def team_critics(
        self,
        inputs: torch.Tensor,
        states: torch.Tensor,
        actions: torch.Tensor,
        target: bool = False,
    ) -> torch.Tensor:
        """Q_j(s, a) = sum_i w_i(s, a) Q_ij(h_i, a_i) + b(s, a) of both twins j: [twin, batch]."""
        critics, mixer = (
            (self.target_critics, self.target_critic_mixer)
            if target
            else (self.critics, self.critic_mixer)
        )
        x = torch.cat(
            [actions.transpose(0, 1), inputs], dim=-1
        )  # the action first: padding comes last
        values = critics(x.repeat(2, 1, 1))[..., 0].unflatten(
            0, (2, self.task.num_agents)
        )  # [twin, agent, batch]
        mixer_inputs = torch.cat(
            [(states - self.state_mean) / self.state_std, actions.flatten(1)], dim=-1
        )
        weights = mixer(mixer_inputs[None])[0].T  # [agent + 1, batch]
        return (weights[:-1] * values).sum(1) + weights[-1]

    def act_greedily(self, observations: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """[batch, agent, action] in [-1, 1]."""
        return self.distribution(self.inputs(observations, histories)).greedy()

    def sample_actions(self, observations: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """Sampled actions [batch, agent, action]."""
        distribution = self.distribution(self.inputs(observations, histories))
        if self.task.discrete:
            gumbel = -torch.empty_like(distribution.logits).exponential_().log()
            return distribution._replace(logits=distribution.logits + gumbel).greedy()
        actions = distribution.mean + distribution.log_std.exp() * torch.randn_like(
            distribution.mean
        )
        return actions.tanh().clamp(-ACTION_LIMIT, ACTION_LIMIT)


class Batch(NamedTuple):
    states: torch.Tensor  # [batch, state]
    observations: torch.Tensor  # [batch, agent, obs]
    histories: torch.Tensor  # [batch, agent, 10, pair]
    actions: torch.Tensor  # [batch, agent, action]
    rewards: torch.Tensor  # [batch]
    masks: torch.Tensor  # [batch], 0 if the next state is absorbing
    next_states: torch.Tensor
    next_observations: torch.Tensor
    next_histories: torch.Tensor


def gather_batch(dataset: OfflineDataset, indices: torch.Tensor) -> Batch:
    """Rows `indices` [batch] of the dataset, with the agents' histories before them and after them."""
    task, states, next_states = dataset.task, dataset.states[indices], dataset.next_states[indices]
    observations, histories, actions = (
        task.observe(states),
        dataset.histories(indices),
        dataset.actions[indices],
    )
    next_histories = append_to_histories(histories, observations, actions)
    columns = (dataset.rewards[indices], dataset.masks[indices])
    return Batch(
        states,
        observations,
        histories,
        actions,
        *columns,
        next_states,
        task.observe(next_states),
        next_histories,
    )


class OnlineData:
    """Rollouts of the team in the true simulator, written behind the rows of the dataset (MAIQL-ft, Section 5.1).

    A rollout follows a copy of the ten rows before the state it starts from, so that histories are read as everywhere.
    At the end there are about as many transitions as in the dataset. `rows[:filled]` are the row numbers of those recorded so far.
    """

    def __init__(self, task: Task, dataset: OfflineDataset, args: Args, reward_scale: float = 1.0):
        self.dataset, self.length, self.filled, self.next_row = (
            dataset,
            args.rollout_length,
            0,
            dataset.size,
        )
        self.reward_scale = reward_scale
        batches = math.ceil(args.total_steps / args.rollout_every)
        self.rollouts = math.ceil(dataset.size / batches / self.length)
        if self.rollouts > 2000:
            raise InputError(
                f"--finetune would need {self.rollouts} rollouts at once; take more --total-steps or a longer --rollout-length"
            )
        self.simulator = make_simulator(task, self.rollouts)
        self.columns = ("states", "next_states", "actions", "rewards", "masks", "episode_starts")
        for name in self.columns:
            column = getattr(dataset, name)
            room = column.new_zeros(
                (batches * self.rollouts * (HISTORY_LENGTH + self.length), *column.shape[1:])
            )
            setattr(dataset, name, torch.cat([column, room]))
        self.rows = torch.zeros(
            batches * self.rollouts * self.length, dtype=torch.int64, device=dataset.device
        )

    @torch.no_grad()
    def collect(self, team: Team) -> None:
        """One more batch of rollouts, with sampled actions; each ends early at a terminal."""
        dataset, past = self.dataset, torch.arange(-HISTORY_LENGTH, 0, device=self.dataset.device)
        starts = torch.randint(dataset.size, (self.rollouts,), device=dataset.device)
        first = (
            self.next_row
            + HISTORY_LENGTH
            + (HISTORY_LENGTH + self.length) * torch.arange(self.rollouts, device=dataset.device)
        )
        copied, copies = (starts[:, None] + past).clamp(min=0), first[:, None] + past
        dataset.states[copies], dataset.actions[copies] = (
            dataset.states[copied],
            dataset.actions[copied],
        )
        episode_starts = first - (starts - dataset.episode_starts[starts]).clamp(max=HISTORY_LENGTH)
        states = self.simulator.set_states(dataset.states[starts].cpu().numpy())
        alive = torch.ones_like(starts, dtype=torch.bool)
        for rows in first + torch.arange(self.length, device=dataset.device)[:, None]:
            dataset.states[rows], dataset.episode_starts[rows] = (
                torch.as_tensor(states).to(dataset.states),
                episode_starts,
            )
            actions = team.sample_actions(
                dataset.task.observe(dataset.states[rows]), dataset.histories(rows)
            )
            states, rewards, terminals = self.simulator.step(actions.cpu().numpy())
            terminals = torch.as_tensor(terminals, device=dataset.device)
            dataset.actions[rows], dataset.rewards[rows] = (
                actions,
                torch.as_tensor(rewards * self.reward_scale).to(dataset.rewards),
            )
            dataset.next_states[rows], dataset.masks[rows] = (
                torch.as_tensor(states).to(dataset.states),
                1 - terminals.float(),
            )
            recorded = rows[alive]
            self.rows[self.filled : self.filled + len(recorded)] = recorded
            self.filled += len(recorded)
            alive &= ~terminals
        self.next_row += self.rollouts * (HISTORY_LENGTH + self.length)

    def sample(self, count: int) -> torch.Tensor:
        """Rows [count], each of the dataset's or of the rollouts' with the same chance."""
        draws = torch.randint(self.dataset.size + self.filled, (count,), device=self.dataset.device)
        return torch.where(
            draws < self.dataset.size, draws, self.rows[(draws - self.dataset.size).clamp(min=0)]
        )

    def state_dict(self) -> dict:
        columns = {
            name: getattr(self.dataset, name)[self.dataset.size : self.next_row].clone()
            for name in self.columns
        }
        return {
            "columns": columns,
            "rows": self.rows[: self.filled].clone(),
            "next_row": self.next_row,
        }

    def load_state_dict(self, saved: dict) -> None:
        self.next_row, self.filled = saved["next_row"], len(saved["rows"])
        self.rows[: self.filled] = saved["rows"]
        for name, column in saved["columns"].items():
            getattr(self.dataset, name)[self.dataset.size : self.next_row] = column


def normalize_rewards(dataset: OfflineDataset) -> float:
    """On the ant, scales rewards so that the best and the worst return are 1000 apart, as IQL does in locomotion; returns the factor."""
    span = float(np.ptp(dataset.episode_returns()))
    scale = 1000 / span if dataset.task.environment == "Ant-v4" and span > 0 else 1.0
    dataset.rewards = dataset.rewards * scale
    return scale


def maiql_losses(team: Team, batch: Batch, args: Args) -> torch.Tensor:
    """Losses of values, policies and critics of the team: [3]. One step follows all three at once."""
    inputs = team.inputs(batch.observations, batch.histories)
    with torch.no_grad():
        target_inputs = team.inputs(batch.observations, batch.histories, target=True)
        target_q = team.team_critics(target_inputs, batch.states, batch.actions, target=True).amin(
            0
        )  # [batch]
        next_inputs = team.inputs(batch.next_observations, batch.next_histories)
        td_targets = batch.rewards + args.gamma * batch.masks * team.team_value(
            next_inputs, batch.next_states
        )

    # Expectile regression of the value to the target critics (IQL, Eq. 5).
    advantages = target_q - team.team_value(inputs, batch.states)
    value_loss = ((args.expectile - (advantages < 0).float()).abs() * advantages.square()).mean()

    # Advantage-weighted regression of the team's actions, one weight for all agents (Eq. 7).
    weights = (args.beta * advantages.detach()).exp().clamp(max=args.max_weight)
    policy_loss = -(weights * team.distribution(inputs).log_prob(batch.actions)).mean()

    critics = team.team_critics(inputs, batch.states, batch.actions)  # [twin, batch]
    critic_loss = (critics - td_targets).square().mean(1).sum()
    return torch.stack([value_loss, policy_loss, critic_loss])


class CUDAGraph:
    """Replays a function of tensors with fixed shapes as one CUDA graph, after three eager calls that warm it up."""

    def __init__(self, function: Callable):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs: torch.Tensor):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.calls == 4:
            self.inputs = [x.clone() for x in inputs]
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        for static, x in zip(self.inputs, inputs):
            static.copy_(x)
        self.graph.replay()
        return self.outputs


def check_positive(args, *names: str) -> None:
    for name in names:
        if not getattr(args, name) > 0:
            raise InputError(
                f"--{name.replace('_', '-')} must be above 0; it is {getattr(args, name)}"
            )


def check_range(args, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(args, name) <= high:
            raise InputError(
                f"--{name.replace('_', '-')} must be from {low} to {high}; it is {getattr(args, name)}"
            )


def choose_device(args) -> torch.device:
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise InputError(
            "--device cuda: this machine has no CUDA GPU that PyTorch can use; take --device auto or cpu"
        )
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    if args.cudagraphs and device.type == "cpu":
        raise InputError("--cudagraphs needs a CUDA GPU; leave it out on this machine")
    return device


def seed_everything(seed: int, deterministic: bool) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be from 0 to {2**32 - 1}; it is {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def random_states() -> dict:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu())


def save_whole(data, path: Path) -> None:
    """Writes a checkpoint or a result so that `path` holds the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1)) if path.name == "result.json" else torch.save(
        data, temporary
    )
    temporary.replace(path)


def make_folder(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {run_dir} ({error.strerror}); give another --run-dir"
        ) from None


def open_run(args, script: str) -> tuple[Path, dict | None]:
    """The run's folder and, if it is resumed, its checkpoint, from which `args` are taken."""
    if args.resume is None:
        run_dir = (
            args.run_dir
            or Path("runs")
            / f"{args.task}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        )
        if run_dir.is_file() or run_dir.exists() and any(run_dir.iterdir()):
            raise InputError(
                f"{run_dir} is in use; go on with that run by --resume {run_dir}, or give another --run-dir"
            )
        return run_dir, None
    path = args.resume / "checkpoint.pt"
    if not path.is_file():
        raise InputError(
            f"no checkpoint at {path}; --resume takes the folder of a run that was started before"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, started_by = checkpoint["args"], checkpoint["script"]
    except Exception as error:
        raise InputError(
            f"{path} is not a whole checkpoint ({type(error).__name__}); start the run again"
        ) from None
    if started_by != script or saved.keys() | {"resume"} != vars(args).keys():
        raise InputError(
            f"{args.resume} is not a run of this {script}.py; resume it with the script and version that started it"
        )
    for name, value in saved.items():
        paths = ("dataset", "world_model", "output", "run_dir")
        setattr(args, name, Path(value) if name in paths and value is not None else value)
    return path.parent, checkpoint


def train(args: Args) -> dict:
    if args.total_steps is None:
        args.total_steps = 500 if args.task.startswith("coordination") else 10_000
    if args.gamma is None:
        args.gamma = 0.5 if args.task.startswith("coordination") else 0.99
    if args.eval_every is None:
        args.eval_every = 100 if args.task.startswith("coordination") else 1000
    if args.eval_episodes is None:
        args.eval_episodes = 10 if args.task.startswith("ant") else 100
    check_positive(
        args,
        "total_steps",
        "eval_every",
        "eval_episodes",
        "batch_size",
        "learning_rate",
        "memory_learning_rate",
        "max_grad_norm",
    )
    check_positive(args, "rollout_length", "rollout_every")
    check_range(args, 0, 1, "gamma", "polyak", "expectile")
    check_range(args, 0, math.inf, "beta", "max_weight")
    run_dir, checkpoint = open_run(args, "maiql")
    task, device = find_task(args.task), choose_device(args)
    dataset = load_dataset(
        task, args.dataset, device
    )  # before seeding: recording it draws random numbers
    reward_scale = normalize_rewards(dataset)
    seed_everything(args.seed, args.torch_deterministic)
    team = Team(task, dataset.states).to(device)
    online_data = OnlineData(task, dataset, args, reward_scale) if args.finetune else None
    last_step = 2 * args.total_steps if args.finetune else args.total_steps
    groups = []
    for networks in (
        [team.policy],
        [team.value, team.value_mixer],
        [team.critics, team.critic_mixer],
        [team.memory],
    ):
        if parameters := [
            parameter for network in networks for parameter in network.parameters()
        ]:  # agents of the coordination game have no memory
            # The learning rate is a tensor, so that a CUDA graph sees it change.
            groups.append({"params": parameters, "lr": torch.zeros((), device=device)})
    optimizer = torch.optim.Adam(groups, fused=True, capturable=args.cudagraphs)
    losses = torch.compile(maiql_losses) if args.compile else maiql_losses
    online, targets = [], []
    for name in ("memory", "critics", "critic_mixer"):
        online += getattr(team, name).parameters()
        targets += getattr(team, f"target_{name}").parameters()

    def update(indices: torch.Tensor) -> torch.Tensor:
        loss = losses(team, gather_batch(dataset, indices), args)
        optimizer.zero_grad()
        loss.sum().backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(targets, online, args.polyak)
        return loss.detach()

    if args.cudagraphs:
        update = CUDAGraph(update)

    first_step, seconds, evaluations = 0, 0.0, []
    if checkpoint is not None:
        team.load_state_dict(checkpoint["team"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].to(device)
        set_random_states(checkpoint["random_states"])
        if online_data:
            online_data.load_state_dict(checkpoint["online_data"])
        first_step, seconds, evaluations = (
            checkpoint["step"],
            checkpoint["seconds"],
            checkpoint["evaluations"],
        )
    make_folder(run_dir)
    writer = SummaryWriter(str(run_dir), purge_step=first_step + 1)
    writer.add_text(
        "arguments", "\n".join(f"- {name}: {value}" for name, value in vars(args).items())
    )
    print(f"{run_dir}: {task.name}, seed {args.seed}, on {device}")

    def evaluate_team(step: int, episodes: int):
        evaluation = evaluate(task, team.act_greedily, episodes, device=device)
        record = {"step": step, "returns": evaluation.returns.tolist(), "seconds": seconds}
        record["score"] = float(task.normalized_score(evaluation.returns.mean()))
        writer.add_scalar("eval/return", evaluation.returns.mean(), step)
        writer.add_scalar("eval/normalized_score", record["score"], step)
        return evaluation, record

    def save_checkpoint(step: int) -> None:
        writer.flush()  # what is logged up to here is never logged again
        arguments = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name != "resume"
        }
        state = {"script": "maiql", "args": arguments, "step": step, "seconds": seconds}
        state |= {"evaluations": evaluations, "random_states": random_states()}
        state |= {"online_data": online_data.state_dict()} if online_data else {}
        save_whole(
            state | {"team": team.state_dict(), "optimizer": optimizer.state_dict()},
            run_dir / "checkpoint.pt",
        )

    stop_signals: list[int] = []
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda number, _: stop_signals.append(number))
    progress = tqdm(
        total=last_step, initial=first_step, unit="step", disable=not sys.stderr.isatty()
    )
    started, logged_step, loss_sum = time.perf_counter(), first_step, torch.zeros(3, device=device)
    for step in range(first_step + 1, last_step + 1):
        for i, group in enumerate(optimizer.param_groups):
            learning_rate = args.memory_learning_rate if i == 3 else args.learning_rate
            group["lr"].fill_(learning_rate * (1 - (step - 1) / last_step))
        finetuning = online_data and step > args.total_steps and online_data.filled < dataset.size
        if finetuning and (step - args.total_steps - 1) % args.rollout_every == 0:
            online_data.collect(team)
        rows = (
            online_data.sample(args.batch_size)
            if online_data
            else torch.randint(dataset.size, (args.batch_size,), device=device)
        )
        loss_sum += update(rows)
        progress.update()
        stopping = bool(
            stop_signals
        )  # looked at once: one that comes later waits for the next step
        if step % 100 == 0 or step % args.eval_every == 0 or step == last_step or stopping:
            mean_losses = (loss_sum / (step - logged_step)).tolist()
            if not math.isfinite(sum(mean_losses)):
                last_good = (
                    f"; {run_dir}/checkpoint.pt is the last good one"
                    if (run_dir / "checkpoint.pt").exists()
                    else ""
                )
                raise InputError(
                    f"a loss of steps {logged_step + 1} to {step} is not finite{last_good}"
                )
            for name, value in zip(("value", "policy", "critics"), mean_losses):
                writer.add_scalar(f"losses/{name}", value, step)
            logged_step = step
            loss_sum.zero_()
        if step % args.eval_every == 0 or stopping:
            seconds += time.perf_counter() - started
            writer.add_scalar("charts/SPS", step / seconds, step)
            if step % args.eval_every == 0:
                evaluations.append(evaluate_team(step, args.eval_episodes)[1])
                progress.set_postfix_str(f"score {evaluations[-1]['score']:.2f}")
                if progress.disable:
                    print(
                        f"step {step} of {last_step}: score {evaluations[-1]['score']:.2f}, {step / seconds:.0f} steps/s",
                        flush=True,
                    )
            save_checkpoint(step)
            started = time.perf_counter()
        if stopping:
            progress.close()
            print(
                f"stopped after step {step}; go on with: python baselines/maiql.py --resume {run_dir}"
            )
            sys.exit(128 + stop_signals[0])
    seconds += time.perf_counter() - started
    progress.close()

    evaluation, record = evaluate_team(last_step, 100)
    scores = task.normalized_score(evaluation.returns)
    paper_score = (FINETUNED_PAPER_SCORES if args.finetune else PAPER_SCORES).get(
        task.name.removesuffix("-other-legs")
    )
    result = {
        "score": record["score"],
        "score_stderr": float(scores.std(ddof=1) / len(scores) ** 0.5),
        "best_score": max(entry["score"] for entry in [*evaluations, record]),
        "paper_score": paper_score,
        "returns": record["returns"],
        "evaluations": evaluations,
        "args": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "dataset": dataset.description,
        "seconds": seconds,
        "steps_per_second": last_step / seconds,
    }
    save_checkpoint(last_step)
    save_whole(result, run_dir / "result.json")
    if task.environment == "Reacher-v4":
        plot_team_strategy(task, evaluation, run_dir / "strategy.png")
    writer.close()
    print(
        f"{task.name}: score {result['score']:.3f} ± {result['score_stderr']:.3f} over 100 greedy episodes (paper: {paper_score or '-'})"
    )
    print(f"{seconds:.0f} s of training; everything is in {run_dir}")
    return result


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
