"""MOMA-PPO: offline multi-agent RL by interaction in a learned world model (Algorithm 1).

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198). Each learning step rolls the team out for k
steps from states of the dataset, in the ensemble world model that world_model.py trained
(Section 3.1), and trains the team on these transitions with multi-agent PPO (Section 3.2,
Appendix A).

    python moma_ppo.py --task reacher-leader-only
    python moma_ppo.py --task ant-medium-fo --ground-truth                 # Table 5
    python moma_ppo.py --task reacher-leader-only --penalty none           # Figure 8
    python moma_ppo.py --resume runs/RUN

Where it differs from the paper, why, and by how much: docs/moma_ppo.md.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Independent, Normal, OneHotCategorical
from torch.optim.lr_scheduler import LambdaLR

import coordination_game
from data.offline_dataset import load_dataset
from mamujoco_envs import (
    HISTORY_LENGTH,
    Task,
    append_to_histories,
    command_line,
    evaluate,
    require,
    with_model_errors,
)
from training_run import (
    FINAL_EPISODES,
    Run,
    check_positive,
    check_range,
    compiled,
    load_world_model,
    main,
    progress,
    say,
)

BOX_MARGIN = 0.5  # per side, in widths of the data's bounding box


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task name from docs/tasks.md, or FILE:NAME of your own"""
    seed: int = 1
    """random seed for networks, rollouts and minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA GPU if there is one"""
    total_steps: int = 900
    """learning steps (the paper: 100,000)"""
    eval_every: int = 100
    """learning steps between evaluations; each is followed by a checkpoint"""
    eval_episodes: int = 100
    """greedy episodes per evaluation (the paper: 5); the final one always has 100"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__moma_ppo__SEED__TIME"""
    resume: Path | None = None
    """run folder to resume; allows only --device, --total-steps and, for files that have moved,
    --dataset and --task"""
    compile: bool = False
    """speed up rollout step and loss: torch.compile, with CUDA graphs on a GPU"""
    dataset: Path | None = None
    """HDF5 file, Minari folder or minari:NAME; by default the task's own"""
    world_model: Path | None = None
    """file from world_model.py or logo.py; by default the shipped one, the one next to your task's
    own dataset or, in games, one that is trained first"""
    memory: Literal["auto", "attention", "none"] = "auto"
    """history encoder; auto leaves it out where every agent sees the whole state"""
    ground_truth: bool = False
    """roll out in the true simulator instead of the world model (Table 5)"""
    next_states: Literal["sample", "mean"] = "sample"
    """a next state is a sample from a random member's Gaussian, or its mean (the release)"""
    start_states: Literal["first", "any"] = "first"
    """start rollouts from first states of episodes, or from any state (the paper)"""
    rollout_length: int = 50
    """k: steps per rollout (the paper: 10; in its Figure 9, 5 to 50 perform alike)"""
    penalty: Literal["epistemic", "aleatoric", "none"] = "epistemic"
    """uncertainty penalty subtracted from the reward (Figures 4 and 8)"""
    lambda_r: float = 0.05
    """weight of eps_r, the ensemble's variance of the reward; with --penalty epistemic"""
    lambda_g: float | None = None
    """weight of eps_g, with --penalty epistemic; by default calibrated with the world model"""
    lambda_a: float = 1.0
    """with --penalty aleatoric: weight of eps_a, the aleatoric uncertainty (MOPO), in units of the
    data's variance; l_eps does not limit it"""
    max_uncertainty: float | None = None
    """l_eps: a rollout is cut when eps_g reaches it, and the penalty counts eps_r and eps_g only up
    to it; calibrated by default, inf means neither cuts nor such limits"""
    cloning_steps: int = 0
    """gradient steps of behavioural cloning before the first learning step (the paper: 0)"""
    transitions: int = 2000
    """transitions per learning step; a tenth of their rollouts is held out (Deviation 16)"""
    epochs: int = 2
    """passes over these transitions (the paper: 5)"""
    minibatch_size: int = 256
    """transitions per gradient step, also in cloning; an incomplete last minibatch is dropped"""
    learning_rate: float = 1e-3
    """Adam; decays linearly to zero (the paper: 5e-5, memory 1e-4, constant)"""
    gamma: float = 0.97
    """discount factor (the paper: 0.99)"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation (the paper: 0.98)"""
    clip: float = 0.2
    """clipping range of the probability ratio and of the value"""
    critic_coefficient: float = 0.5
    """weight of the critic loss"""
    entropy_coefficient: float = 0.001
    """step size of the dual variable that keeps the entropy from falling below its target"""
    action_penalty: float = 1.0
    """weight of the penalty on greedy actions outside [-1, 1]"""
    max_grad_norm: float = 1.0
    """the gradient norm of all parameters together is clipped at this value"""


DEFAULTS = {
    None: Args(),
    "Reacher-v4": Args(next_states="mean"),
    "Ant-v4": Args(
        total_steps=2000, eval_every=200, eval_episodes=20, start_states="any",
        cloning_steps=3000, learning_rate=1e-4, gamma=0.99,
    ),
    # In games, pay-offs do not depend on the state (Deviation 17).
    "coordination": Args(
        total_steps=40, eval_every=4, start_states="any", rollout_length=1,
        penalty="none", max_uncertainty=math.inf, epochs=5, gamma=0.5,
    ),
    # Gaussian policies get narrow, and more epochs would push them off their peak again. Longer
    # rollouts reach the states that the team itself visits.
    "continuous": Args(
        total_steps=80, eval_every=8, start_states="any", rollout_length=10,
        penalty="none", max_uncertainty=math.inf, epochs=1, gamma=0.5,
    ),
}  # fmt: skip


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
    """Policies, values and history encoders of all agents, and the value mixer."""

    def __init__(self, task: Task, states, args: Args):
        """`states` [N, state]: their mean and standard deviation standardise the inputs."""
        super().__init__()
        self.task = task
        obs_mean, obs_std = observation_statistics(task, states)
        state_std = states.std(0)
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.register_buffer("state_mean", states.mean(0))
        self.register_buffer("state_std", torch.where(state_std < 1e-6, 1, state_std))
        self.register_buffer("entropy_alpha", torch.zeros(()))
        self.register_buffer("cloned", torch.zeros((), dtype=torch.bool))

        # A memory only where some agent does not see the whole state (Deviation 9).
        self.memory = make_memory(task, args.memory, obs_mean, obs_std)
        memory_dim = 128 if self.memory else 0
        in_dims = [memory_dim + width for width in task.obs_dims]
        outputs = task.action_dim * (1 if task.discrete else 2)
        self.policy = MLP(in_dims, [256, 256], outputs)
        self.value = MLP(in_dims, [256, 256], 1)
        self.mixer = MLP([task.state_dim], [256, 256], task.num_agents + 1)
        # Deviation 5. At first the networks ignore the history embedding, which is noise.
        for network in (self.policy, self.value):
            for weight, width in zip(network[0].weight.data, task.obs_dims):
                weight[:memory_dim] = 0
                weight[memory_dim : memory_dim + width].uniform_(-(width**-0.5), width**-0.5)
        # Deviation 4. Exploration starts at the scale of actions that the world model has seen.
        self.policy[-1].weight.data.mul_(0.1)
        self.policy[-1].bias.data.zero_()
        if not task.discrete:
            self.policy[-1].bias.data[..., task.action_dim :] = -1.5

    def inputs(self, observations, histories):
        """h_t^i, what agent i acts on: memory, then observation [agent, batch, memory + obs]."""
        # Standardised by the dataset's statistics (Deviation 2).
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
        return Independent(Normal(mean, log_std.clamp(-6, 0).exp()), 2)

    def team_value(self, inputs, states):
        """V(s) = sum_i w_i(s) V_i(h_i) + b(s): [batch] (Section 3.2)."""
        weights = self.mixer(((states - self.state_mean) / self.state_std)[None])[0]
        return (weights[:, :-1] * self.value(inputs)[..., 0].T).sum(-1) + weights[:, -1]

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, agent, action] in [-1, 1]."""
        return self.distribution(self.inputs(observations, histories)).mode.clamp(-1, 1)


# The world model (Section 3.1): inference only; world_model.py trains and exports it.


class Step(NamedTuple):
    next_states: torch.Tensor  # [batch, state]
    rewards: torch.Tensor  # [batch]
    masks: torch.Tensor  # [batch], 0 if the next state is absorbing
    epsilon_r: torch.Tensor  # [batch], epistemic uncertainty of the reward
    epsilon_g: torch.Tensor  # [batch], epistemic uncertainty of next state and reward
    epsilon_a: torch.Tensor  # [batch], aleatoric uncertainty


class WorldModel:
    """An exported ensemble. Networks map standardised inputs to standardised outputs."""

    def __init__(self, task: Task, exported: dict, next_states="sample"):
        self.task, self.model, self.next_states = task, exported, next_states
        self.lambda_g, self.max_uncertainty = exported["lambda_g"], exported["l_epsilon"]
        self.description = {"dataset": exported["dataset"], **exported["description"]}
        first_weight, _ = exported["mask"][0]  # [member, in, out]
        self.members = len(first_weight)
        self.delta = self.description["target"] == "delta"
        self.activation = {"silu": F.silu, "relu": F.relu}[self.description["activation"]]

    def network(self, name, x, activation):
        """One network of every member: [member, batch, in] -> [member, batch, out]."""
        *hidden_layers, (weight, bias) = self.model[name]
        for hidden_weight, hidden_bias in hidden_layers:
            x = activation(torch.baddbmm(hidden_bias, x, hidden_weight))
        return torch.baddbmm(bias, x, weight)

    def predict(self, states, actions):
        """Means and standard deviations of (next state, reward) [member, batch, state + 1] from
        [batch, state] and [batch, agent, action]."""
        m = self.model
        x = torch.cat([states, self.task.join_actions(actions.clamp(-1, 1))], dim=-1)
        x = ((x - m["input_mean"]) / m["input_std"]).expand(self.members, -1, -1)
        state, state_log_std = self.network("state", x, self.activation).chunk(2, dim=-1)
        reward, reward_log_std = self.network("reward", x, F.relu).chunk(2, dim=-1)
        log_std = torch.cat([state_log_std, reward_log_std], dim=-1).clamp(-10, 2)
        scale = torch.cat([m["target_std"], m["reward_std"]])
        shift = torch.cat([m["target_mean"], m["reward_mean"]])
        start = F.pad(self.delta * states, (0, 1))  # with "delta", networks predict changes
        mean = torch.cat([state, reward], dim=-1)
        return start + mean * scale + shift, log_std.exp() * scale

    def clip(self, values, name):
        """States or rewards, clipped to the data's bounding box plus a margin (Deviation 14)."""
        low, high = self.model[f"{name}_min"], self.model[f"{name}_max"]
        margin = BOX_MARGIN * (high - low)
        return values.clamp(low - margin, high + margin)

    def masks(self, next_states):
        """The members' majority vote: 0 where a next state is absorbing [batch]."""
        width = self.task.state_dim  # input statistics hold states first, then actions
        mean, std = self.model["input_mean"][:width], self.model["input_std"][:width]
        x = ((next_states - mean) / std).expand(self.members, -1, -1)
        logits = self.network("mask", x, F.relu)[..., 0]
        return ((logits > 0).float().mean(0) > 0.5).float()

    @torch.no_grad()
    def step(self, states, actions, generator=None):
        """One step from [batch, state] and [batch, agent, action] (Section 3.1)."""
        if self.task.symmetry:  # Deviation 15: an Ant is turned to heading 0, and back
            return self.task.symmetry.at_heading_zero(self.transition, states, actions, generator)
        return self.transition(states, actions, generator)

    def transition(self, states, actions, generator):
        """`step`, without turning."""
        means, stds = self.predict(states, actions)
        scale, device = self.model["scale"], states.device

        # eps_g = ||cov||_F over members = ||X X^T||_F / (N - 1) for centred predictions X.
        centred = ((means - means.mean(0)) / scale).transpose(0, 1)
        gram = centred @ centred.transpose(1, 2)  # [batch, member, member]
        epsilon_g = gram.square().sum((1, 2)).sqrt() / (self.members - 1)

        # eps_a = max over members of ||diag(sigma^2)||_F (MOPO).
        epsilon_a = (stds / scale).pow(4).sum(-1).sqrt().amax(0)

        # Next states come from random members, rewards from all of them (Deviations 11 and 12).
        member = torch.randint(self.members, states.shape[:1], device=device, generator=generator)
        row = torch.arange(len(states), device=device)
        next_states, rewards = means[member, row, :-1], means[..., -1]
        if self.next_states == "sample":
            noise = torch.randn(states.shape, device=device, generator=generator)
            next_states = next_states + stds[member, row, :-1] * noise

        # The mask judges the unclipped state: clipping could hide a fall (Deviation 13).
        return Step(
            next_states=self.clip(next_states, "state"),
            rewards=self.clip(rewards.mean(0), "reward"),
            masks=self.masks(next_states),
            epsilon_r=rewards.var(0),
            epsilon_g=epsilon_g,
            epsilon_a=epsilon_a,
        )


class LocalToGlobalModel(WorldModel):
    """A world model exported by baselines/logo.py; its uncertainty u takes the place of eps_g."""

    def both_ways(self, states, actions):
        """(Next state, reward) as deduced from the agents' predictions and as predicted directly
        [2, batch, state + 1], from [batch, state] and [batch, agent, action]."""
        m = self.model
        x = (states - m["state_mean"]) / m["state_std"]
        actions = (actions.clamp(-1, 1) - m["action_mean"]) / m["action_std"]
        context = self.network("context", x[None], F.silu)

        # Each agent's network predicts its observation's change, from its own pair and the context.
        pairs = torch.cat([actions, self.task.observe(x)], dim=-1).transpose(0, 1)
        inputs = torch.cat([context.expand(len(pairs), -1, -1), pairs], dim=-1)
        local = self.network("local_decoder", self.network("local_encoder", inputs, F.silu), F.silu)
        changes = local[..., : max(self.task.obs_dims)].transpose(0, 1).flatten(1)[None]

        # One decoder reads both encodings: of all agents' changes, and of state and joint action.
        deduced = torch.cat([changes, context], dim=-1)
        deduced = self.network("deductive_encoder", deduced, F.silu)
        joint = torch.cat([x, actions.flatten(1)], dim=-1)[None]
        direct = self.network("auxiliary_encoder", joint, F.silu)
        both = torch.cat([deduced, direct], dim=1)
        both = self.network("deductive_decoder", both, F.silu)[0, :, : self.task.state_dim + 1]
        change, reward = both.view(2, len(states), -1).split([self.task.state_dim, 1], dim=-1)
        next_states = states + change * m["change_std"] + m["change_mean"]
        return torch.cat([next_states, reward * m["reward_std"] + m["reward_mean"]], dim=-1)

    def predict(self, states, actions):
        """The deduced prediction, shaped like an ensemble of one, with standard deviations of 0."""
        means = self.both_ways(states, actions)[:1]
        return means, torch.zeros_like(means)

    def transition(self, states, actions, generator):
        """`step`, without turning; deterministic."""
        deduced, direct = self.both_ways(states, actions)
        uncertainty = ((direct - deduced)[:, :-1] / self.model["state_std"]).norm(dim=-1)
        zeros = torch.zeros_like(uncertainty)
        next_states = self.clip(deduced[:, :-1], "state")
        rewards = self.clip(deduced[:, -1], "reward")
        masks = self.masks(deduced[:, :-1])  # of the unclipped state, as above
        return Step(next_states, rewards, masks, zeros, uncertainty, zeros)


def open_world_model(task: Task, path: Path, device, next_states="sample") -> WorldModel:
    """Loads the model that world_model.py or baselines/logo.py exported to `path`."""

    def make(exported):
        if "local_encoder" not in exported:
            return WorldModel(task, exported, next_states)
        advice = f"make one with: {command_line('baselines/logo.py', '--task', task.option)}"
        message = f"{path} was made for other agents than those of {task.name}; {advice}"
        require(exported.get("split") == task.split, message)
        return LocalToGlobalModel(task, exported, next_states)

    return load_world_model(make, task, path, device)


class GroundTruth:
    """The true simulator with the interface of `WorldModel`; its uncertainty is zero."""

    lambda_g, max_uncertainty = 0.0, math.inf

    def __init__(self, task: Task, num_envs: int):
        # Otherwise torch.compile would trace the simulator's NumPy code, with graph breaks.
        self.step_from = torch.compiler.disable(task.make_simulator(num_envs).step_from)
        self.description = {"name": f"the simulator of {task.environment_name}", "sha256": None}

    def step(self, states, actions, generator=None):
        next_states, rewards, terminals = self.step_from(states, actions)
        zeros = torch.zeros_like(rewards)
        return Step(next_states, rewards, 1 - terminals, zeros, zeros, zeros)


# Algorithm 1.


class Rollouts(NamedTuple):
    """The buffer R: [time, column, ...]. A column holds one rollout after another."""

    states: torch.Tensor
    observations: torch.Tensor
    histories: torch.Tensor | None
    actions: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    next_states: torch.Tensor
    rewards: torch.Tensor
    masks: torch.Tensor  # f: 0 if the next state is absorbing
    time_out_masks: torch.Tensor  # zeta: 0 if the rollout is cut here
    returns: torch.Tensor | None = None  # set by `make_batch`, as are advantages
    advantages: torch.Tensor | None = None

    def rows(self, rows):
        return Rollouts(*[None if x is None else x[rows] for x in self])


def draw_starts(team, dataset, args, count):
    """States and histories of the dataset, from which rollouts start."""
    rows = dataset.sample_rows(count, first=args.start_states == "first")
    return dataset.states[rows], dataset.histories(rows) if team.memory else None


def rollout_step(team, model, dataset, args, states, histories):
    """One pass through the inner loop of Algorithm 1, for all rollouts at once."""
    # Sample a_j^i ~ pi_i(a^i | h_j^i). Normal.sample would check its scale, which stalls a GPU.
    observations = dataset.task.observe(states)
    inputs = team.inputs(observations, histories)
    distribution = team.distribution(inputs)
    actions = distribution.rsample() if distribution.has_rsample else distribution.sample()

    # Sample s_{j+1}, r_j, f_j, eps_r, eps_g ~ M(. | s_j, a_j).
    step = model.step(states, actions)

    # r~_j = r_j - lambda_r eps_r - lambda_g eps_g (Section 3.2); l_eps caps eps_r and eps_g.
    penalty = torch.zeros_like(step.rewards)
    if args.penalty == "epistemic":
        penalty = args.lambda_r * step.epsilon_r.clamp(max=args.max_uncertainty)
        penalty = penalty + args.lambda_g * step.epsilon_g.clamp(max=args.max_uncertainty)
    elif args.penalty == "aleatoric":
        penalty = args.lambda_a * step.epsilon_a

    # zeta_j = 1 - I(j = t + k - 1 or eps_g >= l_eps), with the raw eps_g (Deviation 10). The first
    # condition holds at the last step, where `generate_rollouts` sets zeta to 0.
    uncertain = step.epsilon_g >= args.max_uncertainty

    # Add (h_j, a_j, r~_j, f_j, zeta_j, s_{j+1}) to the buffer.
    transition = Rollouts(
        states=states,
        observations=observations,
        histories=histories,
        actions=actions,
        log_probs=distribution.log_prob(actions),
        values=team.team_value(inputs, states),
        next_states=step.next_states,
        rewards=step.rewards - penalty,
        masks=step.masks,
        time_out_masks=1 - uncertain.float(),
    )
    report = {
        "reward": step.rewards.mean(),
        "penalty": penalty.mean(),
        "epsilon_g": step.epsilon_g.mean(),
        "uncertain": uncertain.float().mean(),
    }

    # Get h_{j+1} and set s_{j+1}. A rollout that ended is replaced by a new one, so that shapes
    # never change (Deviation 3).
    ended = uncertain | (step.masks == 0)
    new_states, new_histories = draw_starts(team, dataset, args, len(states))
    states = torch.where(ended[:, None], new_states, step.next_states)
    if team.memory:
        histories = append_to_histories(histories, observations, actions)
        histories = torch.where(ended[:, None, None, None], new_histories, histories)
    return transition, report, (states, histories)


@torch.no_grad()
def generate_rollouts(step_function, team, model, dataset, args):
    """Algorithm 1, "generate synthetic data": at most --transitions steps of rollouts."""
    count = args.transitions // args.rollout_length
    carry = draw_starts(team, dataset, args, count)  # states and histories
    transitions, reports = [], []
    for _ in range(args.rollout_length):
        transition, report, carry = step_function(team, model, dataset, args, *carry)
        transitions.append(transition)
        reports.append(report)
    rollouts = Rollouts(*[None if x[0] is None else torch.stack(x) for x in zip(*transitions)])
    rollouts.time_out_masks[-1] = 0  # all end here, even those begun along the way
    means = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
    return rollouts, means


def generalized_advantages(rewards, values, next_values, masks, time_out_masks, gamma, gae_lambda):
    """Returns and advantages [time, column] (Appendix A.1).

    Returns are discounted sums of rewards up to a bootstrapped value, not lambda-returns: lambda
    affects the advantages alone. A terminal (mask 0) stops bootstrapping, a time-out does not.
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


@torch.no_grad()
def make_batch(team, rollouts, args, reward_scale):
    """The transitions that train the team, and those held out (Deviation 16).

    Both are [time * column, ...], with returns and advantages.
    """
    # V(s_{j+1}) is the value at the next step of the column. Where a rollout is cut, V(s_{j+1}) is
    # computed here. After an absorbing state, the next step belongs to another rollout, and the
    # mask removes its value.
    next_values = rollouts.values.roll(-1, dims=0)
    cut = rollouts.time_out_masks == 0
    last = rollouts.rows(cut)
    histories = None
    if team.memory:
        histories = append_to_histories(last.histories, last.observations, last.actions)
    inputs = team.inputs(team.task.observe(last.next_states), histories)
    next_values[cut] = team.team_value(inputs, last.next_states)

    returns, advantages = generalized_advantages(
        reward_scale * rollouts.rewards, rollouts.values, next_values, rollouts.masks,
        rollouts.time_out_masks, args.gamma, args.gae_lambda,
    )  # fmt: skip
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-3)  # Deviation 19
    rollouts = rollouts._replace(returns=returns, advantages=advantages)

    def flat(columns):
        return Rollouts(*[None if x is None else x[:, columns].flatten(0, 1) for x in rollouts])

    count = rollouts.rewards.shape[1]
    kept = count - count // 10
    return flat(slice(kept)), flat(slice(kept, None))


def ppo_loss(team, batch, args):
    """The loss of actor and critic, with entropy bonus and action penalty (Appendix A.1), and what
    to log. Also updates the entropy's weight."""
    inputs = team.inputs(batch.observations, batch.histories)
    distribution = team.distribution(inputs)
    log_probs = distribution.log_prob(batch.actions)
    log_ratio = (log_probs - batch.log_probs).clamp(max=10)  # Deviation 19
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip, 1 + args.clip)
    actor_loss = -torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages).mean()

    values = team.team_value(inputs, batch.states)
    clipped_values = batch.values + (values - batch.values).clamp(-args.clip, args.clip)
    errors = [(v - batch.returns).square().mean() for v in (clipped_values, values)]
    critic_loss = torch.max(*errors)  # max of two means, not mean of maxima (Deviation 19)

    # E[-log pi], estimated from the old policies' actions. Its weight, a dual variable, is updated
    # here: it grows while the entropy is below its target.
    entropy = torch.min((-ratio * log_probs).mean(), (-clipped_ratio * log_probs).mean())
    with torch.no_grad():
        gap = team.task.entropy_target - entropy
        team.entropy_alpha.add_(args.entropy_coefficient * gap).clamp_(min=0)

    # Applies to the policies' means (Deviation 18). As for the critic, the larger of two averages.
    excess = (distribution.mode.abs() - 1).clamp(min=0).square().sum((1, 2))
    action_penalty = torch.max((ratio * excess).mean(), (clipped_ratio * excess).mean())

    loss = actor_loss + args.critic_coefficient * critic_loss
    loss = loss - team.entropy_alpha * entropy + args.action_penalty * action_penalty
    metrics = {
        "actor": actor_loss,
        "critic": critic_loss,
        "entropy": entropy,
        "entropy_alpha": team.entropy_alpha.clone(),
        "action_penalty": action_penalty,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": ((ratio - 1).abs() > args.clip).float().mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def cloning_and_value_loss(team, batch, returns):
    """Behavioural-cloning loss plus squared error of the value against the data's returns."""
    inputs = team.inputs(batch.observations, batch.histories)
    value_error = team.team_value(inputs, batch.states) - returns
    log_probs = team.distribution(inputs).log_prob(batch.actions)
    return value_error.square().mean() - log_probs.mean()


def clone(team, dataset, args, reward_scale):
    """Clones the data's behaviour, and fits values to the data's returns (Deviation 6)."""
    returns = reward_scale * dataset.discounted_returns(args.gamma)
    optimizer = torch.optim.Adam(team.parameters(), lr=1e-3, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / args.cloning_steps)
    loss_function = compiled(cloning_and_value_loss, args, dataset.device)
    for _ in progress(args.cloning_steps, "behavioural cloning"):
        rows = dataset.sample_rows(args.minibatch_size)
        batch = dataset.batch(rows, with_histories=bool(team.memory))
        optimizer.zero_grad()
        loss_function(team, batch, returns[rows]).backward()
        nn.utils.clip_grad_norm_(team.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
    team.cloned.fill_(True)


# Running it.


@torch.no_grad()
def surrogate_gain(team, batch):
    """How much an update raised the surrogate objective, E[(ratio - 1) A].

    On held-out rollouts, this is the part of the gain that is not overfitting.
    """
    distribution = team.distribution(team.inputs(batch.observations, batch.histories))
    ratio = (distribution.log_prob(batch.actions) - batch.log_probs).clamp(max=10).exp()
    return ((ratio - 1) * batch.advantages).mean()


def find_world_model(args, task):
    """The model's file; None if the true simulator or a model trained in this run replaces it."""
    if args.ground_truth or (task.columns and not args.world_model):
        return None
    path = args.world_model or task.world_model_path
    data, output = (), path
    if args.dataset and not args.world_model:  # data that are not the task's own
        data, output = ("--dataset", args.dataset), f"{task.name}.pt"
    command = command_line("world_model.py", "--task", task.option, *data, "--output", output)
    advice = f"name one with --world-model, or make it with: {command}"
    advice = "put it back" if args.resume else advice
    require(path.is_file(), f"no world model at {path}; {advice}")
    return path


def make_model(path, dataset, args, run):
    """What rollouts run in: the world model at `path`, or what replaces it."""
    task = dataset.task
    if args.ground_truth:
        message = f"--ground-truth needs a simulator of {task.name} that starts anywhere"
        require(task.continues_from_states, message)
        return GroundTruth(task, args.transitions // args.rollout_length)
    if not path:  # a game's world model is trained first
        folder, train_model = run.dir / "world_model", coordination_game.train_world_model
        path = train_model(task, args.seed, run.device.type, folder, args.dataset)
    model = open_world_model(task, path, run.device, args.next_states)
    message = f"{path} predicts no variances, which --penalty aleatoric needs"
    require(args.penalty != "aleatoric" or type(model) is WorldModel, message)
    same = model.description["dataset"]["sha256"] == dataset.description["sha256"]
    if not same and (args.dataset or task.own_dataset):
        say(f"note: {path} was trained on other data than these")
    return model


def compare_lengths(args, task):
    """Warns if the rollout length does not suit the episodes of a task of your own."""
    rollout, episode = args.rollout_length, task.episode_length
    if task.file and rollout > episode:
        say(f"note: rollouts have {rollout} steps; give --rollout-length {episode}, as in episodes")
    if task.file and rollout < episode and args.start_states == "first":
        message = f"rollouts from first states never see what follows step {rollout} of {episode}"
        say(f"note: {message}; give --start-states any, or the task defaults='Ant-v4'")


def check(args):
    """Raises `InputError` if an argument makes no sense."""
    check_positive(args, "total_steps", "eval_every", "eval_episodes", "epochs")
    check_positive(args, "rollout_length", "minibatch_size", "learning_rate", "max_grad_norm")
    check_range(args, 2, 1e9, "transitions")  # one advantage has no standard deviation
    check_range(args, 0, 1e9, "lambda_r", "lambda_g", "lambda_a", "cloning_steps", "clip")
    check_range(args, 0, 1e9, "critic_coefficient", "entropy_coefficient", "action_penalty")
    check_range(args, 0, 0.999999, "gamma")
    check_range(args, 0, 1, "gae_lambda")
    check_range(args, 0, math.inf, "max_uncertainty")
    count = args.transitions // args.rollout_length  # rollouts, a tenth of which is held out
    trained = (count - count // 10) * args.rollout_length
    message = f"only {trained} of --transitions are trained on (rollouts of --rollout-length steps,"
    message += f" less a held-out tenth); raise it, or lower --minibatch-size {args.minibatch_size}"
    require(trained >= args.minibatch_size, message)
    message = "--ground-truth is instead of a world model; leave --world-model out"
    require(not (args.ground_truth and args.world_model), message)
    message = "the simulator of --ground-truth predicts no variances for --penalty aleatoric"
    require(not (args.ground_truth and args.penalty == "aleatoric"), message)


def train(args: Args) -> dict:
    check(args)
    with Run(args, "moma_ppo", log_every=10) as run:
        task, device = run.task, run.device
        path = find_world_model(args, task)  # before a missing dataset takes minutes to record
        dataset = load_dataset(task, args.dataset, device)
        model = make_model(path, dataset, args, run)
        compare_lengths(args, task)
        # Deviation 8. Both are calibrated with the world model.
        if args.lambda_g is None:
            args = replace(args, lambda_g=model.lambda_g)
        if args.max_uncertainty is None:
            args = replace(args, max_uncertainty=model.max_uncertainty)
        run.args = args
        if args.ground_truth:
            run.algorithm = "moma_ppo-ground-truth"  # its name in PAPER_SCORES
        torch.manual_seed(args.seed)
        # Initialize the MAPPO policies and the value function.
        team = Team(task, dataset.states, args).to(device)
        optimizer = torch.optim.Adam(team.parameters(), lr=args.learning_rate, fused=True)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)
        inputs = {"dataset": dataset.description, "world_model": model.description}
        run.restore(inputs, team=team, optimizer=optimizer, schedule=schedule)

        # Deviation 7. The critic's clip range is in units of the value, which should be about 1.
        reward_scale = (1 - args.gamma) / max(float(dataset.rewards.abs().mean()), 1e-3)
        if args.cloning_steps and not team.cloned:
            clone(team, dataset, args, reward_scale)
        step_function = compiled(rollout_step, args, device)
        loss_function = compiled(ppo_loss, args, device)

        def evaluate_team(episodes):
            evaluation = evaluate(task, team.act_greedily, episodes, device=device)
            if args.ground_truth:
                return evaluation
            return with_model_errors(evaluation, model, team.act_greedily)

        for _ in run.steps(evaluate_team):
            # Generate synthetic data.
            rollouts, report = generate_rollouts(step_function, team, model, dataset, args)
            run.log({f"world_model/{name}": value for name, value in report.items()})

            # Train agents.
            batch, held_out = make_batch(team, rollouts, args, reward_scale)
            size = len(batch.rewards)
            for _ in range(args.epochs):
                order = torch.randperm(size, device=device)
                for rows in order.split(args.minibatch_size)[: size // args.minibatch_size]:
                    loss, metrics = loss_function(team, batch.rows(rows), args)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(team.parameters(), args.max_grad_norm)
                    optimizer.step()
                    run.log({f"losses/{name}": value for name, value in metrics.items()})
            schedule.step()
            if len(held_out.rewards):
                seen = surrogate_gain(team, batch.rows(order[: len(held_out.rewards)]))
                unseen = surrogate_gain(team, held_out)
                run.log({"losses/gain": seen, "losses/held_out_gain": unseen})

        return run.finish(evaluate_team(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
