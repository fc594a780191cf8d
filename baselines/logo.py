"""LOGO-style: a local-to-global world model, and conservative Q-learning on its rollouts.

Paper: Li et al., "Puzzle it Out: Local-to-Global World Model for Offline Multi-Agent Reinforcement
Learning", AAMAS 2026 (arXiv 2601.07463), as far as public sources describe it. Each agent's next
observation is predicted from what it sees and does; the next global state is deduced from all these
predictions. The team learns from the data and from rollouts in this model, which count less the
more uncertain they are.

    python baselines/logo.py --task reacher-leader-only
    python baselines/logo.py --task reacher-leader-only --synthetic-share 0     # data alone: MACQL
    python baselines/logo.py --resume runs/RUN

What is ours where the sources are silent, and why: docs/logo.md. Comments refer to its items and,
for equations, to the numbers that public sources give.
"""

import copy
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep
sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from data.offline_dataset import Batch, OfflineDataset, load_dataset
from mamujoco_envs import ACTION_LIMIT, HISTORY_LENGTH, Task, command_line, evaluate, require
from training_run import (
    FINAL_EPISODES,
    Run,
    check_positive,
    check_range,
    compiled,
    load_world_model,
    main,
    save,
    say,
)

BOX_MARGIN = 0.5  # per side, in widths of the data's bounding box
MODEL_LOSSES = ("losses/predictive", "losses/deductive", "losses/auxiliary", "losses/mask")
TEAM_LOSSES = ("losses/critics", "losses/conservative", "losses/policy")


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task name from docs/tasks.md, or FILE:NAME of your own"""
    seed: int = 1
    """random seed for networks, minibatches and rollouts"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA GPU if there is one"""
    total_steps: int = 5000
    """gradient steps of the team, after those of the model"""
    eval_every: int = 500
    """gradient steps between evaluations; each is followed by a checkpoint"""
    eval_episodes: int = 100
    """greedy episodes per evaluation; the final one always has 100"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__logo__SEED__TIME"""
    resume: Path | None = None
    """run folder to resume; allows only --device, --total-steps and, for files that have moved,
    --dataset and --task"""
    compile: bool = False
    """speed up the losses: torch.compile, with CUDA graphs on a GPU"""
    dataset: Path | None = None
    """HDF5 file, Minari folder or minari:NAME; by default the task's own"""
    memory: Literal["auto", "attention", "none"] = "auto"
    """history encoder; auto leaves it out where every agent sees the whole state"""
    batch_size: int = 256
    """transitions per gradient step, of the model and of the team"""
    world_model: Path | None = None
    """file from an earlier run of this script; by default the run trains a model first"""
    model_steps: int = 5000
    """gradient steps of the world model, before the team's"""
    model_learning_rate: float = 3e-3
    """Adam, world model; decays to zero along a cosine"""
    model_width: int = 128
    """units of the world model's hidden layers"""
    embedding: int = 64
    """width of its encoders' outputs"""
    reconstruction: float = 0.1
    """weight of the losses that reconstruct the agents' pairs and predicted changes"""
    horizon: int = 15
    """steps per rollout in the model (the paper, on SMAC: 15 is best)"""
    synthetic_share: float = 0.5
    """share of a batch that comes from rollouts; 0 leaves the model out"""
    rollouts: int = 400
    """rollouts per generation, which start from random states of the data"""
    refresh_every: int = 100
    """gradient steps of the team between generations"""
    generations: int = 10
    """generations that are kept; a new one replaces the oldest"""
    exploration: float = 0.1
    """standard deviation of noise on a rollout's actions, or probability of a random option"""
    uncertainty: Literal["weighting", "penalty", "none"] = "weighting"
    """whether uncertain transitions are drawn less often, earn less, or count like all others"""
    confidence: float = 1.0
    """C: uncertainty up to which transitions count fully, in units of its 0.99 quantile on data"""
    learning_rate: float = 3e-4
    """Adam, all but the history encoders; decays linearly to zero"""
    memory_learning_rate: float = 1e-4
    """Adam, history encoders; same decay"""
    gamma: float = 0.99
    """discount factor"""
    cloning_steps: int = 1000
    """gradient steps of the team in which policies only imitate; then they climb critics, too"""
    alpha: float = 2.5
    """weight of the value relative to imitation"""
    polyak: float = 0.05
    """target update rate, at policy steps"""
    policy_delay: int = 2
    """critic updates per update of policies and targets"""
    cql_alpha: float = 0.01
    """weight of the conservative loss, for rewards with a standard deviation of 1 - gamma"""
    cql_temperature: float = 0.01
    """temperature of its soft maximum, for such rewards; smaller differences hardly count"""
    cql_points: int | None = None
    """quadrature points per action dimension; by default 24, or 6 with several dimensions"""
    cql_batch_size: int = 32
    """evenly spaced transitions of a batch that the conservative loss uses"""
    max_grad_norm: float = 1.0
    """gradient norms of the model and of each kind of team network are clipped at this value"""


DEFAULTS = {
    None: Args(),
    "Ant-v4": Args(model_steps=20_000, eval_episodes=10),
    "coordination": Args(
        total_steps=500, eval_every=250, model_steps=500, gamma=0.5, rollouts=200, refresh_every=20,
        cloning_steps=0, cql_alpha=0.1, cql_temperature=0.1,
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


# The world model.


class ModelStep(NamedTuple):
    next_states: torch.Tensor  # [batch, state]
    rewards: torch.Tensor  # [batch]
    masks: torch.Tensor  # [batch], 0 if the next state is absorbing
    uncertainty: torch.Tensor  # [batch]


class LocalToGlobal(nn.Module):
    """The world model: from local predictions to the global state.

    Networks work on standardised states, actions, rewards and changes of state; an agent's networks
    get the dimensions that it observes.
    """

    def __init__(self, task: Task, dataset: OfflineDataset, rows, args: Args):
        super().__init__()
        self.task = task
        one_layer, two_layers = [args.model_width], [args.model_width] * 2
        embedding, agents = args.embedding, task.num_agents
        widest = max(task.obs_dims)  # to which all observations are padded
        # The predictive model: from what agent i sees and does, and an embedding of the state, to
        # the change of what it sees.
        self.context = MLP([task.state_dim], two_layers, embedding, nn.SiLU)
        local_inputs = [embedding + width for width in task.pair_dims]
        self.local_encoder = MLP(local_inputs, one_layer, embedding, nn.SiLU)
        local_outputs = widest + task.action_dim + widest  # the change, and the pair again
        self.local_decoder = MLP([embedding] * agents, one_layer, local_outputs, nn.SiLU)
        # The deductive model: from all agents' changes to the state's change and the reward; the
        # mask judges the next state.
        all_changes = agents * widest
        deductive_outputs = task.state_dim + 1 + all_changes  # change, reward, the changes again
        self.deductive_encoder = MLP([all_changes + embedding], two_layers, embedding, nn.SiLU)
        self.deductive_decoder = MLP([embedding], one_layer, deductive_outputs, nn.SiLU)
        self.mask_network = MLP([task.state_dim], [128, 128], 1)
        # The auxiliary encoder: (s, a) to the deductive decoder, bypassing the agents.
        joint_dim = task.state_dim + agents * task.action_dim
        self.auxiliary_encoder = MLP([joint_dim], two_layers, embedding, nn.SiLU)
        # Statistics of the training rows, and the bounding box of all data. A change that never
        # varies has a standard deviation of 0, so its mean is predicted.
        values = {
            "state": dataset.states[rows],
            "action": dataset.actions[rows],
            "change": dataset.next_states[rows] - dataset.states[rows],
            "reward": dataset.rewards[rows, None],
        }
        for name, value in values.items():
            mean, std = value.double().mean(0), value.double().std(0)
            std = torch.where(std < 1e-6, 0 if name == "change" else 1, std)
            self.register_buffer(f"{name}_mean", mean.float())
            self.register_buffer(f"{name}_std", std.float())
        for name, bound in dataset.bounding_box().items():
            self.register_buffer(name, bound)
        self.register_buffer("uncertainty_scale", torch.ones(()))  # u's 0.99 quantile on data

    def layers(self) -> dict[str, list[tuple]]:
        """(Weight, bias) of every layer of each network, as the exported model has them."""
        networks = {}
        for name, network in self.named_children():
            layers = [layer for layer in network if isinstance(layer, BatchedLinear)]
            pairs = [(layer.weight.data, layer.bias.data) for layer in layers]
            networks[name.removesuffix("_network")] = pairs
        return networks

    def network_inputs(self, states, actions):
        """Standardised: states and actions [1, batch, state + joint], the states' embedding
        [1, batch, embedding], and each agent's action and observation [agent, batch, pair]."""
        states = (states - self.state_mean) / self.state_std
        actions = (actions - self.action_mean) / self.action_std
        pairs = torch.cat([actions, self.task.observe(states)], dim=-1).transpose(0, 1)
        joint = torch.cat([states, actions.flatten(1)], dim=-1)[None]
        return joint, self.context(states[None]), pairs

    def predict_locally(self, context, pairs):
        """Changes of every agent's observation [agent, batch, obs], and the pairs reconstructed."""
        inputs = torch.cat([context.expand(len(pairs), -1, -1), pairs], dim=-1)
        outputs = self.local_decoder(self.local_encoder(inputs))
        return outputs.tensor_split([max(self.task.obs_dims)], dim=-1)

    def deduce(self, context, changes):
        """Change of the state and reward [batch, state + 1], and `changes` again (item 3)."""
        all_changes = changes.transpose(0, 1).flatten(1)[None]
        embedding = self.deductive_encoder(torch.cat([all_changes, context], dim=-1))
        outputs = self.deductive_decoder(embedding)[0]
        deduced, reconstruction = outputs.tensor_split([self.task.state_dim + 1], dim=-1)
        return deduced, reconstruction.unflatten(1, (-1, changes.shape[-1])).transpose(0, 1)

    def predict_directly(self, joint):
        """Change of the state and reward [batch, state + 1], from the auxiliary encoder, which
        bypasses the agents."""
        outputs = self.deductive_decoder(self.auxiliary_encoder(joint))
        return outputs[0, :, : self.task.state_dim + 1]

    def predict(self, states, actions):
        """(Next state, reward) as deduced and as predicted directly, each [batch, state + 1], and
        the uncertainty u(s, a) [batch]: the distance between the two next states, in standard
        deviations of the data (Eq. 5)."""
        joint, context, pairs = self.network_inputs(states, actions)
        deduced, _ = self.deduce(context, self.predict_locally(context, pairs)[0])
        start = torch.cat([states + self.change_mean, self.reward_mean.expand(len(states), 1)], 1)
        scale = torch.cat([self.change_std, self.reward_std])
        deduced, direct = start + scale * deduced, start + scale * self.predict_directly(joint)
        uncertainty = ((direct - deduced)[:, :-1] / self.state_std).norm(dim=-1)
        return deduced, direct, uncertainty

    def clip(self, values, name):
        """States or rewards, clipped to the data's bounding box plus a margin."""
        low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
        margin = BOX_MARGIN * (high - low)
        return values.clamp(low - margin, high + margin)

    def mask_logits(self, next_states):
        """Logits [batch] that next states [batch, state] are not absorbing (item 7)."""
        return self.mask_network(((next_states - self.state_mean) / self.state_std)[None])[0, :, 0]

    @torch.no_grad()
    def step(self, states, actions):
        """A `ModelStep` from [batch, state] and [batch, agent, action]."""
        if self.task.symmetry:  # an Ant is turned to heading 0, and back
            return self.task.symmetry.at_heading_zero(self.transition, states, actions)
        return self.transition(states, actions)

    def transition(self, states, actions):
        """`step`, without turning."""
        deduced, _, uncertainty = self.predict(states, actions)
        masks = (self.mask_logits(deduced[:, :-1]) > 0).float()
        next_states = self.clip(deduced[:, :-1], "state")
        return ModelStep(next_states, self.clip(deduced[:, -1], "reward"), masks, uncertainty)


def error_cost(errors):
    """What each error costs: its size, so that small ones count, plus half its square, so that rare
    large ones do, too (item 1)."""
    return errors.abs() + 0.5 * errors.square()


def model_losses(model: LocalToGlobal, batch: Batch, mask_batch: Batch, reconstruction_weight):
    """Losses of the predictive model, of the deductive model given true and predicted changes, of
    the auxiliary encoder, and of the mask, which learns from `mask_batch`."""
    task = model.task
    joint, context, pairs = model.network_inputs(batch.states, batch.actions)
    # A change that never varies equals its mean, so its target is 0; dividing by 1 keeps it so.
    change = batch.next_states - batch.states - model.change_mean
    change = change / torch.where(model.change_std > 0, model.change_std, 1)
    reward = (batch.rewards[:, None] - model.reward_mean) / model.reward_std
    target = torch.cat([change, reward], dim=-1)
    local_target = task.observe(change).transpose(0, 1)  # [agent, batch, obs]

    def local_error(prediction, truth, dims):  # mean over true dimensions; padding learns to be 0
        return error_cost(prediction - truth).sum() / (len(batch.states) * sum(dims))

    def global_error(prediction):  # the reward counts as much as the state
        losses = error_cost(prediction - target)
        return losses[:, :-1].mean() + losses[:, -1].mean()

    # Each agent predicts how what it sees will change.
    local, pairs_again = model.predict_locally(context, pairs)
    predictive = local_error(local, local_target, task.obs_dims)
    predictive += reconstruction_weight * local_error(pairs_again, pairs, task.pair_dims)

    # State change and reward are deduced, from the true and from the predicted changes.
    deductive = 0
    for changes in (local_target, local):
        deduced, changes_again = model.deduce(context, changes)
        deductive += global_error(deduced)
        # Changes are targets here, so they are not drawn towards their reconstruction.
        error = local_error(changes_again, changes.detach(), task.obs_dims)
        deductive += reconstruction_weight * error

    # The auxiliary encoder must reach the same target without the agents. On the data the two
    # predictions agree; where they differ, the model is uncertain (Eq. 5).
    auxiliary = global_error(model.predict_directly(joint))
    logits = model.mask_logits(mask_batch.next_states)
    mask = F.binary_cross_entropy_with_logits(logits, mask_batch.masks)
    return predictive, deductive, auxiliary, mask


def with_rare(rows, rare_rows):
    """`rows` [member, batch] with one in sixteen replaced by one of `rare_rows`, if any.

    Batches of fewer than sixteen stay as they are: rare rows would be too large a share of them.
    """
    if len(rare_rows) == 0:
        return rows
    rows = rows.clone()
    sixteens = rows.shape[1] // 16
    replaced = rows[:, : 16 * sixteens : 16]
    replaced.copy_(rare_rows[torch.randint(len(rare_rows), replaced.shape, device=rows.device)])
    return rows


@torch.no_grad()
def model_errors(model: LocalToGlobal, dataset: OfflineDataset, rows) -> dict:
    """Errors on held-out rows: next state (L2) and reward (absolute), deduced and direct, shares
    of wrong masks and of missed ends, and how u correlates with the true error (both as
    logarithms)."""
    rows = rows[:: math.ceil(len(rows) / 20_000)]  # enough, and they fit into memory
    next_states, rewards = dataset.next_states[rows], dataset.rewards[rows]
    deduced, direct, uncertainty = model.predict(dataset.states[rows], dataset.actions[rows])
    errors = ((deduced[:, :-1] - next_states) / model.state_std).norm(dim=-1)
    logarithms = torch.stack([uncertainty, errors]).clamp(min=1e-9).log()
    absorbing = dataset.masks[rows] == 0
    wrong = (model.mask_logits(next_states) > 0) == absorbing
    return {
        "state_error": (deduced[:, :-1] - next_states).norm(dim=-1).mean().item(),
        "reward_error": (deduced[:, -1] - rewards).abs().mean().item(),
        "direct_state_error": (direct[:, :-1] - next_states).norm(dim=-1).mean().item(),
        "direct_reward_error": (direct[:, -1] - rewards).abs().mean().item(),
        "mask_error": wrong.float().mean().item(),
        "missed_ends": wrong[absorbing].float().mean().nan_to_num().item(),
        "uncertainty": uncertainty.mean().item(),
        "uncertainty_0.99": uncertainty.quantile(0.99).item(),
        "correlation": logarithms.corrcoef()[0, 1].nan_to_num().item(),
    }


# The team.


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
    """Policies, twin critics, their mixer and history encoders of all agents, and targets.

    Where actions are options there are no policies: an agent takes the one that its first critic
    prefers.
    """

    def __init__(self, task: Task, states, args: Args):
        """`states` [N, state]: their mean and standard deviation standardise the inputs."""
        super().__init__()
        self.task = task
        obs_mean, obs_std = observation_statistics(task, states)
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.register_buffer("state_mean", states.mean(0))
        self.register_buffer("state_std", torch.where(states.std(0) < 1e-6, 1, states.std(0)))
        self.memory = make_memory(task, args.memory, obs_mean, obs_std)  # item 8
        memory_dim = 128 if self.memory else 0
        in_dims = [memory_dim + width for width in task.obs_dims]
        critic_dims = [memory_dim + width for width in task.pair_dims]
        self.policy = None if task.discrete else MLP(in_dims, [256, 256], task.action_dim)
        # All agents' first critics, then their independently initialised twins.
        self.critics = Critics(critic_dims * 2, [256, 256], 1)
        self.mixer = MLP([task.state_dim], [256, 256], task.num_agents + 1)
        for name in ("policy", "critics", "mixer", "memory"):
            network = getattr(self, name)
            target = network and copy.deepcopy(network).requires_grad_(False)
            setattr(self, f"target_{name}", target)
        # Item 11: bounds of the TD targets, which `train` narrows.
        self.register_buffer("value_range", torch.tensor([-math.inf, math.inf]))
        # All options, or quadrature nodes for an integral over all actions.
        nodes, log_weights = torch.eye(task.action_dim), torch.zeros(task.action_dim)
        if not task.discrete:
            nodes, log_weights = quadrature(args.cql_points, task.action_dim)
        nodes = nodes[:, None, None].expand(-1, 1, task.num_agents, -1)
        self.register_buffer("nodes", nodes, persistent=False)  # [node, 1, agent, action]
        self.register_buffer("log_weights", log_weights, persistent=False)

    def inputs(self, observations, histories, target=False):
        """h_t^i, what agent i acts on: memory, then observation [agent, batch, memory + obs]."""
        observations = ((observations - self.obs_mean) / self.obs_std).transpose(0, 1)
        if self.memory is None:
            return observations
        memory = self.target_memory if target else self.memory
        return torch.cat([memory(histories), observations], dim=-1)

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

    def mixing(self, states, target=False):
        """w(s) [agent, batch], which are positive, and b(s) [batch]."""
        mixer = self.target_mixer if target else self.mixer
        outputs = mixer(((states - self.state_mean) / self.state_std)[None])[0].T
        return F.softplus(outputs[:-1]), outputs[-1]

    def act(self, inputs, target=False):
        """Every agent's greedy action: [batch, agent, action]."""
        if self.task.discrete:
            best = self.q_values(inputs, self.nodes, target)[0].argmax(1)  # [agent, batch]
            return F.one_hot(best.T, self.task.action_dim).to(inputs)
        policy = self.target_policy if target else self.policy
        return policy(inputs).tanh().transpose(0, 1)

    def act_greedily(self, observations, histories):
        """Greedy actions [batch, agent, action] in [-1, 1]."""
        return self.act(self.inputs(observations, histories))

    def explore(self, observations, histories, scale):
        """Greedy actions with normal noise of this scale, or this share of random options."""
        actions = self.act_greedily(observations, histories)
        if not self.task.discrete:
            noise = scale * torch.randn_like(actions)
            return (actions + noise).clamp(-ACTION_LIMIT, ACTION_LIMIT)
        options = torch.randint(actions.shape[-1], actions.shape[:-1], device=actions.device)
        replaced = torch.rand(options.shape, device=actions.device) < scale
        random_actions = F.one_hot(options, actions.shape[-1]).to(actions)
        return torch.where(replaced[..., None], random_actions, actions)


# Synthetic data.


class SyntheticData(nn.Module):
    """The newest rollouts in the world model, kept as a dataset of their own.

    Before each rollout comes a copy of the ten rows before its first state, for histories.
    """

    def __init__(self, dataset: OfflineDataset, args: Args):
        super().__init__()
        self.dataset, self.args = dataset, args
        shape = args.generations, args.rollouts, HISTORY_LENGTH + args.horizon
        self.rows = torch.arange(math.prod(shape), device=dataset.device).view(shape)
        self.buffer = copy.copy(dataset)  # with columns of its own, which checkpoints keep
        for name in ("states", "next_states", "actions", "rewards", "masks", "episode_starts"):
            column = getattr(dataset, name)
            self.register_buffer(name, column.new_zeros(self.rows.numel(), *column.shape[1:]))
            setattr(self.buffer, name, getattr(self, name))
        self.register_buffer("weights", torch.zeros(self.rows.numel(), device=dataset.device))

    def mixed_batch(self, with_histories: bool) -> Batch:
        """Transitions of the data, then of rollouts, which are drawn in proportion to weights."""
        count = rows_of_data(self.args)
        batch = self.dataset.batch(self.dataset.sample_rows(count), with_histories)
        if self.args.synthetic_share == 0:
            return batch
        rows = torch.multinomial(self.weights, self.args.batch_size - count, replacement=True)
        pairs = zip(batch, self.buffer.batch(rows, with_histories))
        return Batch(*[x if x is None else torch.cat([x, y]) for x, y in pairs])

    def weigh(self, uncertainty, rewards, reward_std):
        """Weights and rewards [rollout] of transitions, given their u in units of its quantile
        (item 4)."""
        if self.args.uncertainty == "weighting":  # exp(C - u), but at most 1
            return (self.args.confidence - uncertainty).clamp(-10, 0).exp(), rewards
        if self.args.uncertainty == "penalty":  # a standard deviation of the reward at the quantile
            rewards = rewards - reward_std * uncertainty.clamp(max=10)
        return torch.ones_like(rewards), rewards

    @torch.no_grad()
    def add_rollouts(self, team: Team, model: LocalToGlobal, generation: int) -> None:
        """Rolls out the current team; these rollouts replace the oldest."""
        data, buffer = self.dataset, self.buffer
        rows = self.rows[generation % len(self.rows)]  # [rollout, 10 + step]

        # Copy the past of the first states, which is shorter where an episode has just begun: then
        # rows of another episode are copied, too, and `episode_starts` hides them.
        starts = data.sample_rows(len(rows))
        past = starts[:, None] + torch.arange(-HISTORY_LENGTH, 0, device=data.device)
        buffer.states[rows[:, :HISTORY_LENGTH]] = data.states[past.clamp(min=0)]
        buffer.actions[rows[:, :HISTORY_LENGTH]] = data.actions[past.clamp(min=0)]
        ages = (starts - data.episode_starts[starts]).clamp(max=HISTORY_LENGTH)
        buffer.episode_starts[rows] = rows[:, HISTORY_LENGTH, None] - ages[:, None]

        # `alive` is 1 until a rollout has reached an absorbing state.
        states, alive = data.states[starts], torch.ones_like(data.rewards[starts])
        for now in rows[:, HISTORY_LENGTH:].T:  # [rollout]
            buffer.states[now] = states
            histories = buffer.histories(now) if team.memory else None
            observations = team.task.observe(states)
            actions = team.explore(observations, histories, self.args.exploration)
            next_states, rewards, masks, u = model.step(states, actions)
            u = u / model.uncertainty_scale
            weights, rewards = self.weigh(u, rewards, model.reward_std)
            buffer.actions[now], buffer.next_states[now] = actions, next_states
            buffer.rewards[now], buffer.masks[now] = rewards, masks
            self.weights[now] = alive * weights
            states, alive = next_states, alive * masks
        message = "the team is not finite; use a smaller --learning-rate"
        require(bool(self.weights.isfinite().all()), message)


# The learner: conservative Q-learning of mixed critics (MACQL).


def rows_of_data(args: Args) -> int:
    """How many transitions of a batch are the data's, which come first."""
    return args.batch_size - round(args.synthetic_share * args.batch_size)


@torch.no_grad()
def td_targets(team: Team, batch: Batch, args: Args):
    """y = r + gamma f min_j Q'_j(s', a') [batch], where a' is the target team's greedy action and f
    the mask, clamped to the range that returns can have (item 11)."""
    inputs = team.inputs(batch.next_observations, batch.next_histories, target=True)
    next_actions = team.act(inputs, target=True)[None]
    next_q = team.q_values(inputs, next_actions, target=True)[:, :, 0]
    weights, bias = team.mixing(batch.next_states, target=True)
    next_q = ((weights * next_q).sum(1) + bias).amin(0)
    return (batch.rewards + args.gamma * batch.masks * next_q).clamp(*team.value_range)


def conservative_loss(team: Team, inputs, weights, terms, mixture, args: Args):
    """Summed over agents and twins: T log of the integral of exp(Q_j / T) over an agent's actions,
    while the others act as in the batch, minus Q_j at the data's actions (CFCQL, COMBO; item 9).

    `terms` [twin, agent, batch] are w_i Q_ij; `mixture` [twin, 1, batch] is their sum plus b.
    """
    stride = args.batch_size // args.cql_batch_size
    rows, data_rows = slice(None, None, stride), slice(None, rows_of_data(args), stride)
    # Only w_i Q_ij depends on a_i, so the rest of the mixture stays outside the integral.
    node_q = weights[:, None, rows] * team.q_values(inputs[:, rows], team.nodes)
    logits = node_q / args.cql_temperature + team.log_weights[:, None]
    soft_maximum = args.cql_temperature * logits.logsumexp(2)  # [twin, agent, row]
    pushed_down = soft_maximum + (mixture - terms)[..., rows]
    excess = pushed_down.mean(-1) - mixture[..., data_rows].mean(-1)  # [twin, agent]
    return args.cql_alpha * excess.sum()


def policies_loss(team: Team, batch: Batch, inputs, weights, mixture, args: Args, clone: bool):
    """Policies imitate the data's actions and, unless they `clone`, maximise the mixture of the
    first critics on the whole batch, b(s) aside."""
    actions = team.act(inputs)
    errors = (actions - batch.actions)[: rows_of_data(args)].square()
    imitation_loss = errors.sum((1, 2)).mean()
    if clone:
        return imitation_loss
    own_q = team.first_q_values(inputs.detach(), actions[None])[:, 0]  # [agent, batch]
    value = (weights.detach() * own_q).sum(0).mean()
    # TD3+BC's lambda: alpha over the mean size of the team's value (item 12).
    scale = args.alpha / mixture[0].abs().mean().detach()
    return imitation_loss - scale * value


def macql_losses(team: Team, batch: Batch, args: Args, learn_policy: bool, clone: bool = False):
    """TD loss and conservative loss of the critics and, with `learn_policy`, the policies' loss.

    With `clone`, policies only imitate the data; they do not climb the critics (item 10).
    """
    inputs = team.inputs(batch.observations, batch.histories)
    weights, bias = team.mixing(batch.states)  # [agent, batch], [batch]
    terms = weights * team.q_values(inputs, batch.actions[None])[:, :, 0]  # [twin, agent, batch]
    mixture = terms.sum(1, keepdim=True) + bias
    td_loss = (mixture[:, 0] - td_targets(team, batch, args)).square().mean(1).sum()
    losses = td_loss, conservative_loss(team, inputs, weights, terms, mixture, args)
    if team.policy is None or not learn_policy:
        return losses
    return *losses, policies_loss(team, batch, inputs, weights, mixture, args, clone)


# Running it.


def exported_model(model: LocalToGlobal, args: Args, dataset: OfflineDataset, errors: dict) -> dict:
    """The model in the format of world_model.py's, for moma_ppo.py --world-model."""
    description = {"target": "delta", "activation": "silu"}
    description |= {"seed": args.seed, "total_steps": args.model_steps}
    stride = math.ceil(len(dataset.first_rows) / 1000)
    # As in world_model.py, the penalty is a standard deviation of the reward at the 0.99 quantile.
    # There a rollout is cut at ten times that quantile. Its epsilon is quadratic in how far
    # predictions differ, and u is linear, so here it is cut at sqrt(10) times the quantile.
    quantile = model.uncertainty_scale.item()
    return {
        **model.layers(),
        **dict(model.named_buffers()),
        "input_mean": model.state_mean,
        "input_std": model.state_std,
        "lambda_g": model.reward_std.item() / quantile,
        "l_epsilon": math.sqrt(10) * quantile,
        "first_states": dataset.states[dataset.first_rows[::stride]],
        "dataset": dataset.description,
        "description": description,
        "split": model.task.split,
        "errors": errors,
    }


def load_exported(model: LocalToGlobal, args: Args, device) -> None:
    """Fills `model` with what an earlier run of this script exported to --world-model."""
    task, path = model.task, args.world_model
    command = command_line("baselines/logo.py", "--task", task.option)
    advice = f"make one with: {command}"

    def fill(exported):
        require("local_encoder" in exported, f"{path} is not a model of this script; {advice}")
        message = f"{path} was made for other agents than those of {task.name}; {advice}"
        require(exported.get("split") == task.split, message)
        width, embedding = (exported["context"][layer][0].shape[-1] for layer in (0, -1))
        fits = (width, embedding) == (args.model_width, args.embedding)
        sizes = f"--model-width {width} --embedding {embedding}"
        require(fits, f"{path} has networks of other sizes; give {sizes}")
        for name, buffer in model.named_buffers():
            buffer.copy_(exported[name])
        for name, layers in model.layers().items():
            for (weight, bias), theirs in zip(layers, exported[name], strict=True):
                weight.copy_(theirs[0])
                bias.copy_(theirs[1])
        model.description = {"dataset": exported["dataset"], **exported["description"]}
        return model

    load_world_model(fill, task, path, device, command)


def finish_model(model: LocalToGlobal, args: Args, dataset: OfflineDataset, rows, run: Run) -> None:
    """Measures the trained model on held-out rows, which gives u its unit, and exports it."""
    errors = model_errors(model, dataset.at_heading_zero, rows)
    run.log({f"eval/{name}": value for name, value in errors.items()})
    quantile = errors["uncertainty_0.99"]
    message = "the world model is not finite; use a smaller --model-learning-rate"
    require(math.isfinite(quantile), message)
    model.uncertainty_scale.fill_(max(quantile, 1e-6))
    save(exported_model(model, args, dataset, errors), run.dir / "world_model.pt")


def check(args: Args) -> None:
    """Raises `InputError` if an argument makes no sense."""
    check_positive(args, "total_steps", "eval_every", "eval_episodes", "batch_size", "model_steps")
    check_positive(args, "model_learning_rate", "model_width", "embedding", "horizon", "rollouts")
    check_positive(args, "refresh_every", "generations", "learning_rate", "memory_learning_rate")
    check_positive(args, "cql_batch_size", "cql_temperature", "max_grad_norm")
    check_range(args, 1, args.total_steps, "policy_delay")  # else policies never learn
    check_range(args, 2, 1000, "cql_points")
    check_range(args, 0, 0.999999, "gamma")
    check_range(args, 0, 1, "polyak", "synthetic_share", "exploration")
    check_range(args, 0, 1e9, "reconstruction", "confidence", "cql_alpha", "alpha", "cloning_steps")
    fits = args.batch_size % args.cql_batch_size == 0
    require(fits, "--batch-size must be a multiple of --cql-batch-size")
    message = "a batch needs data and rollouts; use another --synthetic-share, or 0 for data alone"
    require(args.synthetic_share == 0 or 0 < rows_of_data(args) < args.batch_size, message)
    if args.world_model:
        message = "--synthetic-share 0 uses the data alone; leave --world-model out"
        require(args.synthetic_share > 0, message)
        advice = "put it back" if args.resume else "without --world-model the run trains one"
        there = Path(args.world_model).is_file()
        require(there, f"no world model at {args.world_model}; {advice}")
    room = args.generations * args.rollouts * (HISTORY_LENGTH + args.horizon)
    message = "--generations, --rollouts and --horizon make more steps than PyTorch can draw from"
    require(room < 2**24, f"{message}; use smaller ones")


def descend(losses, optimizer, schedule, max_grad_norm) -> None:
    """A gradient step of all networks that have gradients, each kind clipped separately."""
    optimizer.zero_grad()
    sum(losses).backward()
    for group in optimizer.param_groups:  # policies have no gradients between their steps
        nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
    schedule.step()


def reward_units(rewards, penalty_unit, args: Args):
    """The scale of rewards (item 6), and the range of returns that such rewards allow (item 11)."""
    # So that --cql-alpha and --cql-temperature mean the same on every task.
    scale = (1 - args.gamma) / max(float(rewards.std()), 1e-3)
    lowest, highest = rewards.aminmax()
    penalised = args.uncertainty == "penalty" and args.synthetic_share > 0
    largest_penalty = 10 * penalty_unit if penalised else 0
    reward_range = torch.stack([(lowest - largest_penalty).clamp(max=0), highest.clamp(min=0)])
    return scale, reward_range * scale / (1 - args.gamma)


def train(args: Args) -> dict:
    check(args)
    with Run(args, "logo") as run:
        task, device = run.task, run.device
        if not task.discrete:
            quadrature(args.cql_points, task.action_dim)  # checked before a dataset is recorded
        dataset = load_dataset(task, args.dataset, device)
        training_rows, held_out_rows = dataset.split()
        torch.manual_seed(args.seed)
        team = Team(task, dataset.states, args).to(device)
        upright = dataset.at_heading_zero  # where rollouts query the model (item 7)
        model = LocalToGlobal(task, upright, training_rows, args).to(device)
        synthetic = SyntheticData(dataset, args)
        data_alone = args.synthetic_share == 0

        # The world model, trained unless one is given or none is needed.
        inputs = {"dataset": dataset.description}
        last_model_step = 0 if data_alone or args.world_model else args.model_steps
        if args.world_model:
            load_exported(model, args, device)
            inputs["world_model"] = model.description
            same = model.description["dataset"]["sha256"] == dataset.description["sha256"]
            if not same and (args.dataset or task.own_dataset):
                say(f"note: {args.world_model} was not trained on these data")
        model_optimizer = torch.optim.Adam(model.parameters(), args.model_learning_rate, fused=True)
        quarter = 0.5 * math.pi / args.model_steps
        model_schedule = LambdaLR(model_optimizer, lambda step: math.cos(quarter * step) ** 2)
        model_loss_function = compiled(model_losses, args, device)
        absorbing_rows = training_rows[dataset.masks[training_rows] == 0]
        rewards = upright.rewards[training_rows]
        outlying_rows = training_rows[(rewards - rewards.mean()).abs() > 10 * rewards.std()]

        def update_model():
            shape = 1, args.batch_size  # [member, batch], as with_rare expects
            rows = training_rows[torch.randint(len(training_rows), shape, device=device)]
            mask_batch = upright.batch(with_rare(rows, absorbing_rows)[0], with_histories=False)
            batch = upright.batch(with_rare(rows, outlying_rows)[0], with_histories=False)
            losses = model_loss_function(model, batch, mask_batch, args.reconstruction)
            descend(losses, model_optimizer, model_schedule, args.max_grad_norm)
            run.log(dict(zip(MODEL_LOSSES, losses)))

        # The team.
        networks = team.policy, team.critics, team.mixer
        groups = [{"params": net.parameters()} for net in networks if net is not None]
        if team.memory:
            groups.append({"params": team.memory.parameters(), "lr": args.memory_learning_rate})
        optimizer = torch.optim.Adam(groups, args.learning_rate, fused=True)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)
        team_loss_function = compiled(macql_losses, args, device)
        targets = {k: v for k, v in team.named_parameters() if k.startswith("target_")}
        online = [team.get_parameter(name.removeprefix("target_")) for name in targets]
        reward_scale, value_range = reward_units(dataset.rewards, model.reward_std[0], args)
        team.value_range.copy_(value_range)

        def update_team(step):
            if not data_alone and (step - 1) % args.refresh_every == 0:
                synthetic.add_rollouts(team, model, (step - 1) // args.refresh_every)
            batch = synthetic.mixed_batch(bool(team.memory))
            batch = batch._replace(rewards=reward_scale * batch.rewards)
            learn_policy = step % args.policy_delay == 0
            clone = step <= args.cloning_steps
            if team.policy is not None and step == args.cloning_steps + 1:
                # Reset Adam's moments: they come from cloning, whose gradients are far smaller than
                # those through the critics (item 10).
                for parameter in team.policy.parameters():
                    optimizer.state.pop(parameter, None)
            losses = team_loss_function(team, batch, args, learn_policy, clone)
            descend(losses, optimizer, schedule, args.max_grad_norm)
            if learn_policy:
                with torch.no_grad():
                    torch._foreach_lerp_(list(targets.values()), online, args.polyak)
            run.log(dict(zip(TEAM_LOSSES, losses)))

        def evaluate_run(episodes):
            if run.step < last_model_step:
                return model_errors(model, upright, held_out_rows)
            return evaluate(task, team.act_greedily, episodes, device=device)

        tracked = {"team": team, "optimizer": optimizer, "schedule": schedule}
        if not data_alone:
            tracked |= {"model": model, "model_optimizer": model_optimizer}
            tracked |= {"model_schedule": model_schedule, "synthetic": synthetic}
        run.restore(inputs, **tracked)
        # First the model learns from the data, then the team from the data and from its rollouts.
        for step in run.steps(evaluate_run, last_model_step + args.total_steps):
            if step <= last_model_step:
                update_model()
            else:
                update_team(step - last_model_step)
            if step == last_model_step:
                finish_model(model, args, dataset, held_out_rows, run)

        return run.finish(evaluate_run(FINAL_EPISODES))


if __name__ == "__main__":
    main(train, DEFAULTS)
