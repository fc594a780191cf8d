"""IQL: implicit Q-learning with centralised execution, one learner that sees everything and chooses for all (Section 5.1).

Paper: Kostrikov et al., "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022; Barde et al., "A Model-Based
Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem", AAMAS 2024, where it is the upper bound of strategy agreement:
a single learner cannot disagree with itself. The policy sees the global state and the history of states and joint actions, and sets
the joint action; in the coordination game it chooses among all joint actions.

    python baselines/iql.py --task reacher-all-observant
    python baselines/iql.py --resume runs/RUN       # goes on where RUN stopped, to the bit

Deviations from the paper:
1. States are standardised by the dataset's statistics.
2. Learning rates decay to zero, for fewer steps: the paper has 1,000,000.
3. The value inside targets and advantages sees the online memory, whose value it is; target critics see the target memory.
4. Value, policy and critics take one step together instead of one after the other; so the memory is encoded and trained once.
5. The memory, 128 dimensions of noise at first, starts at a tenth of its scale.
6. On the ant rewards are scaled so that returns span 1000, as IQL does in locomotion (the paper does not say).
"""

import copy
import itertools
import json
import math
import os
import platform
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
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

PAPER_SCORES = {  # Tables 3 and 4, IQL
    "reacher-all-observant": "1.07 ± 0.01",
    "coordination-favorable": "1.00 ± 0.00",
    "coordination-neutral": "1.00 ± 0.00",
    "coordination-unfavorable": "1.00 ± 0.00",
    "ant-random-fo": "0.12 ± 0.00",
    "ant-medium-fo": "0.97 ± 0.02",
    "ant-full-replay-fo": "1.22 ± 0.02",
    "ant-expert-fo": "1.26 ± 0.01",
}


@dataclass
class Args:
    task: str = "reacher-all-observant"
    """reacher-all-observant, ant-{random,medium,full-replay,expert}-fo or coordination-{favorable,neutral,unfavorable}; what single agents see plays no role"""
    seed: int = 1
    """seed of networks and minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA GPU where there is one"""
    total_steps: int | None = None
    """gradient steps; if not given, 10,000, or 500 in the coordination game (the paper's: 1,000,000)"""
    eval_every: int | None = None
    """gradient steps between two evaluations, each followed by a checkpoint; if not given, 1,000, or 100 in the coordination game"""
    eval_episodes: int | None = None
    """greedy episodes of an evaluation, from the same start states each time; if not given, 100, or 10 on the ant (the paper's: 10); the final one has 100"""
    run_dir: Path | None = None
    """folder of the run; runs/TASK__iql__SEED__TIME if not given"""
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
    """Adam, of critics, value and policy, decayed linearly to zero (the paper's: constant)"""
    memory_learning_rate: float = 1e-4
    """Adam, of the history encoder, decayed alike"""
    gamma: float | None = None
    """discount factor; if not given, 0.99, or 0.5 in the coordination game, where a step has no consequences"""
    polyak: float = 0.005
    """how far targets move towards critics and memory at a step"""
    expectile: float = 0.7
    """expectile of the target critics that the value learns"""
    beta: float = 3.0
    """inverse temperature of advantage-weighted regression"""
    max_weight: float = 100.0
    """largest weight of a transition in advantage-weighted regression"""
    max_grad_norm: float = 1.0
    """largest norm of the gradients of the policy, of the value, of the critics and of the history encoder"""


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


class JointCategorical(NamedTuple):
    """A policy over joint discrete actions: logits [batch, 1, option], and each option's one-hot vectors [option, agent * action]."""

    logits: torch.Tensor
    options: torch.Tensor

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability of joint actions, [batch, 1, agent * action] -> [batch]."""
        chosen = (actions @ self.options.T).argmax(
            dim=-1, keepdim=True
        )  # of all options, its own agrees in most places
        return self.logits.log_softmax(dim=-1).gather(-1, chosen)[:, 0, 0]

    def greedy(self) -> torch.Tensor:
        return self.options[self.logits.argmax(dim=-1)]


def centralize(task: Task) -> Task:
    """The same environment as a task of one agent that observes the global state and sets the whole action."""
    return replace(
        task,
        observed=(tuple(range(task.state_dim)),),
        driven=(tuple(range(task.num_agents * task.action_dim)),),
    )


class Team(nn.Module):
    """Policy, value, twin critics and history encoder of the one agent of a centralised task; targets of critics and memory."""

    def __init__(self, task: Task, states: torch.Tensor, actions_per_agent: int):
        """`states` [N, state]: their mean and standard deviation standardise what the networks see."""
        super().__init__()
        self.task = task
        memory_dim = 0 if task.discrete else 128
        self.memory = (
            HistoryEncoder([task.state_dim + task.action_dim], memory_dim)
            if memory_dim
            else nn.Module()
        )
        width = memory_dim + task.state_dim
        options = (
            list(
                itertools.product(
                    torch.eye(actions_per_agent), repeat=task.action_dim // actions_per_agent
                )
            )
            if task.discrete
            else []
        )
        self.register_buffer(
            "options",
            torch.stack([torch.cat(option) for option in options]) if options else torch.zeros(0),
        )
        self.policy = MLP(
            [width], [256, 256], len(options) if task.discrete else 2 * task.action_dim
        )
        self.value = MLP([width], [256, 256], 1)
        self.critics = MLP([task.action_dim + width] * 2, [256, 256], 1)
        for name in ("memory", "critics"):
            setattr(
                self, f"target_{name}", copy.deepcopy(getattr(self, name)).requires_grad_(False)
            )
        self.register_buffer("state_mean", states.mean(0))
        std = states.std(0)
        self.register_buffer("state_std", torch.where(std < 1e-6, 1, std))

    def inputs(
        self, observations: torch.Tensor, histories: torch.Tensor, target: bool = False
    ) -> torch.Tensor:
        """h_t, what networks see: [batch, 1, state], [batch, 1, 10, pair] -> [1, batch, memory + state]."""
        mean, std = self.state_mean, self.state_std
        observations = (observations - mean) / std
        if self.task.discrete:
            return observations.transpose(0, 1)
        pair_mean, pair_std = (
            F.pad(mean, (self.task.action_dim, 0)),
            F.pad(std, (self.task.action_dim, 0), value=1.0),
        )
        histories = (histories - pair_mean) / pair_std
        memory = self.target_memory(histories) if target else self.memory(histories)
        return torch.cat([memory, observations.transpose(0, 1)], dim=-1)

    def distribution(self, inputs: torch.Tensor) -> TanhGaussian | JointCategorical:
        """The policy's distribution over joint actions."""
        outputs = self.policy(inputs).transpose(0, 1)
        if self.task.discrete:
            return JointCategorical(outputs, self.options)
        mean, log_std = outputs.chunk(2, dim=-1)
        return TanhGaussian(mean, log_std.clamp(-6, 0))

    def state_value(self, inputs: torch.Tensor) -> torch.Tensor:
        """V(h): [batch]."""
        return self.value(inputs)[0, :, 0]

    def q_values(
        self, inputs: torch.Tensor, actions: torch.Tensor, target: bool = False
    ) -> torch.Tensor:
        """Q_j(h, a) of both twins j: [twin, batch]."""
        x = torch.cat([actions.transpose(0, 1), inputs], dim=-1)
        return (self.target_critics if target else self.critics)(x.repeat(2, 1, 1))[..., 0]

    def act_greedily(self, observations: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """[batch, 1, action] in [-1, 1]."""
        return self.distribution(self.inputs(observations, histories)).greedy()


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


def normalize_rewards(dataset: OfflineDataset) -> float:
    """On the ant, scales rewards so that the best and the worst return are 1000 apart, as IQL does in locomotion; returns the factor."""
    span = float(np.ptp(dataset.episode_returns()))
    scale = 1000 / span if dataset.task.environment == "Ant-v4" and span > 0 else 1.0
    dataset.rewards = dataset.rewards * scale
    return scale


def iql_losses(team: Team, batch: Batch, args: Args) -> torch.Tensor:
    """Losses of value, policy and critics: [3]. One step follows all three at once."""
    inputs = team.inputs(batch.observations, batch.histories)
    with torch.no_grad():
        target_inputs = team.inputs(batch.observations, batch.histories, target=True)
        target_q = team.q_values(target_inputs, batch.actions, target=True).amin(0)  # [batch]
        next_inputs = team.inputs(batch.next_observations, batch.next_histories)
        td_targets = batch.rewards + args.gamma * batch.masks * team.state_value(next_inputs)

    # Expectile regression of the value to the target critics (IQL, Eq. 5).
    advantages = target_q - team.state_value(inputs)
    value_loss = ((args.expectile - (advantages < 0).float()).abs() * advantages.square()).mean()

    # Advantage-weighted regression (IQL, Eq. 7).
    weights = (args.beta * advantages.detach()).exp().clamp(max=args.max_weight)
    policy_loss = -(weights * team.distribution(inputs).log_prob(batch.actions)).mean()

    critics = team.q_values(inputs, batch.actions)  # [twin, batch]
    critic_loss = (critics - td_targets).square().mean(1).sum()  # IQL, Eq. 6
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
    check_range(args, 0, 1, "gamma", "polyak", "expectile")
    check_range(args, 0, math.inf, "beta", "max_weight")
    run_dir, checkpoint = open_run(args, "iql")
    actions_per_agent = find_task(args.task).action_dim
    task, device = centralize(find_task(args.task)), choose_device(args)
    dataset = load_dataset(
        task, args.dataset, device
    )  # before seeding: recording it draws random numbers
    normalize_rewards(dataset)
    seed_everything(args.seed, args.torch_deterministic)
    team = Team(task, dataset.states, actions_per_agent).to(device)
    groups = []
    for network in (team.policy, team.value, team.critics, team.memory):
        if parameters := list(
            network.parameters()
        ):  # agents of the coordination game have no memory
            # The learning rate is a tensor, so that a CUDA graph sees it change.
            groups.append({"params": parameters, "lr": torch.zeros((), device=device)})
    optimizer = torch.optim.Adam(groups, fused=True, capturable=args.cudagraphs)
    losses = torch.compile(iql_losses) if args.compile else iql_losses
    online, targets = [], []
    for name in ("memory", "critics"):
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
        state = {"script": "iql", "args": arguments, "step": step, "seconds": seconds}
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
    started, logged_step, loss_sum = time.perf_counter(), first_step, torch.zeros(3, device=device)
    for step in range(first_step + 1, args.total_steps + 1):
        for i, group in enumerate(optimizer.param_groups):
            learning_rate = args.memory_learning_rate if i == 3 else args.learning_rate
            group["lr"].fill_(learning_rate * (1 - (step - 1) / args.total_steps))
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
                        f"step {step} of {args.total_steps}: score {evaluations[-1]['score']:.2f}, {step / seconds:.0f} steps/s",
                        flush=True,
                    )
            save_checkpoint(step)
            started = time.perf_counter()
        if stopping:
            progress.close()
            print(
                f"stopped after step {step}; go on with: python baselines/iql.py --resume {run_dir}"
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
