"""IOMAR: independent conservative Q-learning whose policies follow the best of sampled actions.

Paper: Pan et al., "Plan Better Amid Conservatism: Offline Multi-Agent Reinforcement Learning with Actor Rectification", ICML 2022 (OMAR);
Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem", AAMAS 2024, Section 5.1.
Every agent trains conservative critics (CQL) of its own observation and action, searches for their best action with
a cross-entropy sampler, and moves its policy towards it, where the policy's own gradient might end in a poor local optimum.

    python baselines/iomar.py --task reacher-leader-only
    python baselines/iomar.py --resume runs/RUN     # goes on where RUN stopped, to the bit

Deviations from the paper:
1. Observations are standardised by the dataset's statistics.
2. Learning rates decay to zero, for fewer steps: the paper has 1,000,000.
3. Critics and policies take one step together: policies follow the critics of before the step.
4. A policy's loss does not reach the memory through the critic, where it could raise the value without acting better.
5. Samples are weighted by their log-density; the code of OMAR subtracts the density itself.
6. The conservative loss does not train the policy whose actions it samples.
7. The memory, 128 dimensions of noise at first, starts at a tenth of its scale.
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
from mamujoco_envs import (
    HISTORY_LENGTH,
    InputError,
    Task,
    append_to_histories,
    evaluate,
    find_task,
    plot_team_strategy,
)

PAPER_SCORES = {  # Table 4, IOMAR
    "reacher-all-observant": "0.73 ± 0.01",
    "reacher-independent": "0.45 ± 0.02",
    "reacher-leader-only": "0.39 ± 0.02",
    "ant-random-fo": "0.08 ± 0.00",
    "ant-medium-fo": "1.10 ± 0.03",
    "ant-full-replay-fo": "1.30 ± 0.00",
    "ant-expert-fo": "1.16 ± 0.01",
    "ant-random-po": "0.21 ± 0.02",
    "ant-medium-po": "0.06 ± 0.01",
    "ant-full-replay-po": "0.11 ± 0.02",
    "ant-expert-po": "0.10 ± 0.01",
}


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """reacher-{all-observant,independent,leader-only} or ant-{random,medium,full-replay,expert}-{fo,po,po-other-legs}"""
    seed: int = 1
    """seed of networks, minibatches and noise"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA GPU where there is one"""
    total_steps: int = 3_000
    """gradient steps (the paper's: 1,000,000); its sampled actions make each ten times as long as one of itd3_bc.py"""
    eval_every: int = 1000
    """gradient steps between two evaluations, each followed by a checkpoint"""
    eval_episodes: int | None = None
    """greedy episodes of an evaluation, from the same start states each time; if not given, 100, or 10 on the ant (the paper's: 10); the final one has 100"""
    run_dir: Path | None = None
    """folder of the run; runs/TASK__iomar__SEED__TIME if not given"""
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
    """Adam, of policies and critics, decayed linearly to zero (the paper's: constant)"""
    memory_learning_rate: float = 1e-4
    """Adam, of the history encoders, decayed alike"""
    gamma: float = 0.99
    """discount factor"""
    polyak: float = 0.005
    """how far targets move towards policies, critics and memory at a policy step"""
    policy_delay: int = 2
    """every how many steps policies and targets move"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target policies' actions"""
    noise_clip: float = 0.5
    """largest such noise"""
    max_grad_norm: float = 1.0
    """for each agent, the largest norm of the gradients of its policy, of its critics and of its history encoder"""
    cql_alpha: float | None = None
    """weight of the conservative loss; if not given, 1, or 5 on ant-expert"""
    cql_samples: int = 10
    """sampled actions of each kind: uniform ones, and near the policy's at this step and at the next"""
    cql_noise: float = 0.2
    """standard deviation of the noise on the policy's"""
    omega: float = 1.0
    """share of the sampler's action in the policy's loss; the value's gradient has the rest (OMAR's: 0.5 to 1)"""
    omar_iterations: int = 2
    """iterations of the sampler"""
    omar_samples: int = 20
    """actions sampled in each"""
    omar_elites: int = 5
    """best actions of an iteration, to which the next one's Gaussian is fitted"""
    omar_mean: float = 0.0
    """mean of the first Gaussian"""
    omar_std: float = 2.0
    """standard deviation of the first Gaussian"""
    action_penalty: float = 1e-3
    """weight of the squared actions in the policy's loss"""


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


class Team(nn.Module):
    """Policies, twin critics and history encoders of all agents, separate weights in one batch, and a target of each."""

    def __init__(self, task: Task, states: torch.Tensor):
        """`states` [N, state]: their mean and standard deviation standardise what the networks see."""
        super().__init__()
        self.task = task
        self.memory = HistoryEncoder([width + task.action_dim for width in task.obs_dims])
        input_dims = [
            128 + width for width in task.obs_dims
        ]  # an agent's input is [memory, observation]: padding comes last
        self.policy = MLP(input_dims, [256, 256], task.action_dim)
        self.critics = MLP(
            [task.action_dim + width for width in input_dims] * 2, [256, 256], 1
        )  # of all agents, then their twins
        for name in ("memory", "policy", "critics"):
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
        pair_mean, pair_std = (
            F.pad(mean, (self.task.action_dim, 0)),
            F.pad(std, (self.task.action_dim, 0), value=1.0),
        )
        histories = (histories - pair_mean[:, None]) / pair_std[:, None]
        memory = self.target_memory(histories) if target else self.memory(histories)
        return torch.cat([memory, observations.transpose(0, 1)], dim=-1)

    def act(self, inputs: torch.Tensor, target: bool = False) -> torch.Tensor:
        """[agent, batch, memory + obs] -> [batch, agent, action] in [-1, 1]."""
        return (self.target_policy if target else self.policy)(inputs).tanh().transpose(0, 1)

    def q_values(
        self,
        inputs: torch.Tensor,
        actions: torch.Tensor,
        target: bool = False,
        for_policy: bool = False,
    ) -> torch.Tensor:
        """Q_ij(h_i, a_i) of sampled actions [sample, batch, agent, action], both twins j of every agent i: [twin, agent, sample, batch].

        For a policy's loss only the first twin's, whose parameters then get no gradient. What inputs add to the first layer is the
        same for all samples of actions, so it is computed once.
        """
        agents, (samples, batch) = len(inputs), actions.shape[:2]
        layers = [
            layer
            for layer in (self.target_critics if target else self.critics)
            if isinstance(layer, BatchedLinear)
        ]
        parameters = [(layer.weight, layer.bias) for layer in layers]
        if for_policy:
            parameters = [
                (weight[:agents].detach(), bias[:agents].detach()) for weight, bias in parameters
            ]
        (weight, bias), *others = parameters
        twins = len(weight) // agents
        action_weight, input_weight = weight.split([self.task.action_dim, inputs.shape[-1]], dim=1)
        from_inputs = torch.baddbmm(
            bias, inputs.repeat(twins, 1, 1), input_weight
        )  # [twin * agent, batch, hidden]
        from_actions = (
            actions.permute(2, 0, 1, 3).flatten(1, 2).repeat(twins, 1, 1) @ action_weight
        )  # [twin * agent, sample * batch, hidden]
        x = (from_inputs[:, None] + from_actions.unflatten(1, (samples, batch))).flatten(1, 2)
        for weight, bias in others:
            x = torch.baddbmm(bias, x.relu(), weight)
        return x.view(twins, agents, samples, batch)

    def act_greedily(self, observations: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """[batch, agent, action] in [-1, 1]."""
        return self.act(self.inputs(observations, histories))


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


def td_loss(
    team: Team,
    batch: Batch,
    inputs: torch.Tensor,
    next_inputs: torch.Tensor,
    noise: torch.Tensor,
    args: Args,
) -> torch.Tensor:
    """Squared errors of every agent's twin critics to r + gamma min_j Q'_j(h', pi'(h') + noise): [] (TD3, Algorithm 1).

    `inputs` [agent, batch, memory + obs] with the online memory, `next_inputs` with the target memory; `noise` [batch, agent,
    action] is standard normal.
    """
    with torch.no_grad():
        smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (team.act(next_inputs, target=True) + smoothing).clamp(-1, 1)
        next_q = team.q_values(next_inputs, next_actions[None], target=True).amin(0)[
            :, 0
        ]  # [agent, batch]
        targets = batch.rewards + args.gamma * batch.masks * next_q
    q = team.q_values(inputs, batch.actions[None])[:, :, 0]  # [twin, agent, batch]
    return (q - targets).square().mean(-1).sum()


def conservative_loss(
    team: Team,
    batch: Batch,
    inputs: torch.Tensor,
    next_inputs: torch.Tensor,
    noise: torch.Tensor,
    args: Args,
) -> torch.Tensor:
    """log sum_a exp Q(h, a) - Q(h, a_data) of every agent's twin critics, summed over both: [] (CQL, Eq. 4).

    The sum over all actions is estimated from samples, each divided by its density: a third uniform and two thirds around the
    policy's actions here and at the next step. `noise` [sample, batch, agent, action] is uniform in [0, 1] in its first third,
    then standard normal.
    """
    uniform, here, after = noise.chunk(3)
    with torch.no_grad():
        policy_actions = [
            team.act(x) + args.cql_noise * z for x, z in ((inputs, here), (next_inputs, after))
        ]
        actions = torch.cat([2 * uniform - 1, *policy_actions]).clamp(-1, 1)
        normal = -0.5 * noise.square() - math.log(args.cql_noise * math.sqrt(2 * math.pi))
        log_densities = torch.cat(
            [torch.full_like(uniform, -math.log(2)), normal[len(uniform) :]]
        ).sum(-1)  # [sample, batch, agent]
    q = team.q_values(inputs, actions) - log_densities.permute(
        2, 0, 1
    )  # [twin, agent, sample, batch]
    data_q = team.q_values(inputs, batch.actions[None])[:, :, 0]
    return (q.logsumexp(dim=2) - data_q).mean(-1).sum()


def draw_noise(batch: Batch, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """For the target policies [batch, agent, action] and for the sampled actions [sample, batch, agent, action]; drawn outside of
    the losses, so that compiling changes nothing."""
    samples = batch.actions.expand(args.cql_samples, *batch.actions.shape)
    return torch.randn_like(batch.actions), torch.cat(
        [torch.rand_like(samples), torch.randn_like(samples), torch.randn_like(samples)]
    )


def best_sampled_actions(
    team: Team, inputs: torch.Tensor, policy_actions: torch.Tensor, noise: torch.Tensor, args: Args
) -> torch.Tensor:
    """The sampler of OMAR, for all states and agents at once: [batch, agent, action] (OMAR, Algorithm 1, lines 8 to 14).

    In each iteration actions are sampled from a Gaussian and join the elites of the one before; the best of them by the first critic
    are the new elites, and the Gaussian is fitted to them. The best elite of the last iteration is returned, or the
    policy's own action where that is better. `noise` [iteration, sample, batch, agent, action] is standard normal.
    """
    with torch.no_grad():

        def first_q(
            actions: torch.Tensor,
        ) -> torch.Tensor:  # [sample, batch, agent, action] -> [sample, batch, agent]
            return team.q_values(inputs, actions, for_policy=True)[0].permute(1, 2, 0)

        mean, std = (
            torch.full_like(policy_actions, args.omar_mean),
            torch.full_like(policy_actions, args.omar_std),
        )
        elites = noise[0, :0]
        for z in noise:
            pool = torch.cat([(mean + std * z).clamp(-1, 1), elites])
            best = first_q(pool).topk(args.omar_elites, dim=0).indices  # in descending order
            elites = pool.gather(0, best[..., None].expand(*best.shape, pool.shape[-1]))
            mean, std = elites.mean(0), elites.std(0) + 1e-6
        candidates = torch.stack([elites[0], policy_actions])
        q_sampled, q_policy = first_q(candidates)
        return torch.where((q_sampled > q_policy)[..., None], *candidates)


def iomar_losses(
    team: Team, batch: Batch, noise: tuple[torch.Tensor, ...], args: Args, learn_policy: bool
) -> torch.Tensor:
    """Losses of critics and of policies: [2]."""
    inputs = team.inputs(batch.observations, batch.histories)
    with torch.no_grad():
        next_inputs = team.inputs(batch.next_observations, batch.next_histories, target=True)
    critic_loss = td_loss(team, batch, inputs, next_inputs, noise[0], args)
    critic_loss = critic_loss + args.cql_alpha * conservative_loss(
        team, batch, inputs, next_inputs, noise[1], args
    )
    if not learn_policy:
        return torch.stack([critic_loss, torch.zeros_like(critic_loss)])

    actions = team.act(inputs)
    best_actions = best_sampled_actions(team, inputs, actions, noise[2], args)
    policy_loss = args.omega * (actions - best_actions).square().mean((0, 2)).sum()  # OMAR, Eq. 4
    policy_loss = policy_loss + args.action_penalty * actions.square().mean((0, 2)).sum()
    if args.omega < 1:
        q = team.q_values(inputs.detach(), actions[None], for_policy=True)
        policy_loss = policy_loss - (1 - args.omega) * q.mean(-1).sum()
    return torch.stack([critic_loss, policy_loss])


def clip_each_agent(parameters: list[torch.Tensor], agents: int, max_norm: float) -> None:
    """Scales the gradient of each agent's parameters, [agent, ...] or [twin * agent, ...], to a norm of at most `max_norm`."""
    gradients = [parameter.grad.unflatten(0, (-1, agents)) for parameter in parameters]
    norms = sum(
        gradient.square().transpose(0, 1).flatten(1).sum(1) for gradient in gradients
    ).sqrt()  # [agent]
    for gradient in gradients:
        gradient.mul_((max_norm / norms.clamp(min=max_norm)).view(-1, *[1] * (gradient.dim() - 2)))


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
    if args.cql_alpha is None:
        args.cql_alpha = 5.0 if args.task.startswith("ant-expert") else 1.0
    if args.eval_episodes is None:
        args.eval_episodes = 10 if args.task.startswith("ant") else 100
    check_positive(
        args, "total_steps", "eval_every", "eval_episodes", "batch_size", "max_grad_norm"
    )
    check_positive(
        args, "learning_rate", "memory_learning_rate", "policy_delay", "cql_samples", "cql_noise"
    )
    check_positive(args, "omar_iterations", "omar_elites", "omar_std")
    if not 2 <= args.omar_elites <= args.omar_samples:
        raise InputError(
            f"--omar-elites must be from 2 to --omar-samples {args.omar_samples}; it is {args.omar_elites}"
        )
    check_range(args, 0, 1, "gamma", "polyak", "omega")
    check_range(args, 0, math.inf, "cql_alpha", "policy_noise", "noise_clip", "action_penalty")
    run_dir, checkpoint = open_run(args, "iomar")
    task, device = find_task(args.task), choose_device(args)
    if task.discrete:
        raise InputError(
            f"{task.name} has discrete actions; iomar.py learns continuous ones, ibc.py, iql.py and maiql.py both"
        )
    dataset = load_dataset(
        task, args.dataset, device
    )  # before seeding: recording it draws random numbers
    seed_everything(args.seed, args.torch_deterministic)
    team = Team(task, dataset.states).to(device)
    groups = []
    for network in (team.policy, team.critics, team.memory):
        # The learning rate is a tensor, so that a CUDA graph sees it change.
        groups.append({"params": list(network.parameters()), "lr": torch.zeros((), device=device)})
    optimizer = torch.optim.Adam(groups, fused=True, capturable=args.cudagraphs)
    losses = torch.compile(iomar_losses) if args.compile else iomar_losses
    online, targets = [], []
    for name in ("memory", "policy", "critics"):
        online += getattr(team, name).parameters()
        targets += getattr(team, f"target_{name}").parameters()

    def make_update(learn_policy: bool) -> Callable:
        def update(indices: torch.Tensor) -> torch.Tensor:
            batch = gather_batch(dataset, indices)
            sampler_shape = (args.omar_iterations, args.omar_samples, *batch.actions.shape)
            sampler_noise = torch.randn(sampler_shape, device=device) if learn_policy else None
            loss = losses(
                team, batch, (*draw_noise(batch, args), sampler_noise), args, learn_policy
            )
            optimizer.zero_grad()
            loss.sum().backward()
            for group in optimizer.param_groups:
                if group["params"][0].grad is not None:  # policies have none between their steps
                    clip_each_agent(group["params"], task.num_agents, args.max_grad_norm)
            optimizer.step()
            if learn_policy:
                with torch.no_grad():
                    torch._foreach_lerp_(targets, online, args.polyak)
            return loss.detach()

        return CUDAGraph(update) if args.cudagraphs else update

    updates = [make_update(False), make_update(True)]

    first_step, seconds, evaluations = 0, 0.0, []
    if checkpoint is not None:
        team.load_state_dict(checkpoint["team"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].to(device)
        set_random_states(checkpoint["random_states"])
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
        state = {"script": "iomar", "args": arguments, "step": step, "seconds": seconds}
        state |= {"evaluations": evaluations, "random_states": random_states()}
        save_whole(
            state | {"team": team.state_dict(), "optimizer": optimizer.state_dict()},
            run_dir / "checkpoint.pt",
        )

    stop_signals: list[int] = []
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda number, _: stop_signals.append(number))
    progress = tqdm(
        total=args.total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty()
    )
    started, logged_step, loss_sum = time.perf_counter(), first_step, torch.zeros(2, device=device)
    for step in range(first_step + 1, args.total_steps + 1):
        for i, group in enumerate(optimizer.param_groups):
            learning_rate = args.memory_learning_rate if i == 2 else args.learning_rate
            group["lr"].fill_(learning_rate * (1 - (step - 1) / args.total_steps))
        update = updates[step % args.policy_delay == 0]
        loss_sum += update(torch.randint(dataset.size, (args.batch_size,), device=device))
        progress.update()
        stopping = bool(
            stop_signals
        )  # looked at once: one that comes later waits for the next step
        if step % 100 == 0 or step % args.eval_every == 0 or step == args.total_steps or stopping:
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
            writer.add_scalar("losses/critics", mean_losses[0], step)
            if policy_steps := step // args.policy_delay - logged_step // args.policy_delay:
                writer.add_scalar(
                    "losses/policy", mean_losses[1] * (step - logged_step) / policy_steps, step
                )
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
                        f"step {step} of {args.total_steps}: score {evaluations[-1]['score']:.2f}, {step / seconds:.0f} steps/s",
                        flush=True,
                    )
            save_checkpoint(step)
            started = time.perf_counter()
        if stopping:
            progress.close()
            print(
                f"stopped after step {step}; go on with: python baselines/iomar.py --resume {run_dir}"
            )
            sys.exit(128 + stop_signals[0])
    seconds += time.perf_counter() - started
    progress.close()

    evaluation, record = evaluate_team(args.total_steps, 100)
    scores = task.normalized_score(evaluation.returns)
    result = {
        "score": record["score"],
        "score_stderr": float(scores.std(ddof=1) / len(scores) ** 0.5),
        "best_score": max(entry["score"] for entry in [*evaluations, record]),
        "paper_score": PAPER_SCORES.get(task.name.removesuffix("-other-legs")),
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
        "steps_per_second": args.total_steps / seconds,
    }
    save_checkpoint(args.total_steps)
    save_whole(result, run_dir / "result.json")
    if task.environment == "Reacher-v4":
        plot_team_strategy(task, evaluation, run_dir / "strategy.png")
    writer.close()
    print(
        f"{task.name}: score {result['score']:.3f} ± {result['score_stderr']:.3f} over 100 greedy episodes (paper: {result['paper_score'] or '-'})"
    )
    print(f"{seconds:.0f} s of training; everything is in {run_dir}")
    return result


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
