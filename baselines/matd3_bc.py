"""MATD3+BC: TD3 with behavioural cloning for a team, whose critics are mixed into the team's.

Paper: Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021 (TD3+BC); Barde et al., "A Model-Based
Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem", AAMAS 2024, Section 5.1, with a mixer: the team's
value is the weighted sum of the agents', the weights given by a network of the global state and the joint action (Eq. 4 has the
state alone). Policies climb the team's value together, each from its own observations and history, and stay close to the dataset's actions.

    python baselines/matd3_bc.py --task reacher-leader-only
    python baselines/matd3_bc.py --resume runs/RUN  # goes on where RUN stopped, to the bit

Deviations from the paper, which reports this method without its details or code:
1. Observations are standardised by the dataset's statistics, as TD3+BC's states are.
2. Learning rates decay to zero, for fewer steps: the paper has 1,000,000.
3. Critics and policies take one step together: policies climb the critics of before the step.
4. A policy's loss does not reach the memory through the critic, where it could raise the value without acting better.
5. The minimum over twins is taken after mixing: mixers' weights may be negative, so a minimum of each agent's would be no bound.
6. The memory, 128 dimensions of noise at first, starts at a tenth of its scale.
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
from functools import partial
from pathlib import Path
from typing import Callable, Literal, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call
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

PAPER_SCORES = {  # Table 4, MATD3+BC
    "reacher-all-observant": "1.04 ± 0.01",
    "reacher-independent": "0.59 ± 0.03",
    "reacher-leader-only": "0.73 ± 0.02",
}


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """reacher-{all-observant,independent,leader-only} or ant-{random,medium,full-replay,expert}-{fo,po,po-other-legs}"""
    seed: int = 1
    """seed of networks, minibatches and noise"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA GPU where there is one"""
    total_steps: int = 10_000
    """gradient steps (the paper's: 1,000,000)"""
    eval_every: int = 1000
    """gradient steps between two evaluations, each followed by a checkpoint"""
    eval_episodes: int | None = None
    """greedy episodes of an evaluation, from the same start states each time; if not given, 100, or 10 on the ant (the paper's: 10); the final one has 100"""
    run_dir: Path | None = None
    """folder of the run; runs/TASK__matd3_bc__SEED__TIME if not given"""
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
    """Adam, of policies, mixer and critics, decayed linearly to zero (the paper's: constant)"""
    memory_learning_rate: float = 1e-4
    """Adam, of the history encoders, decayed alike"""
    gamma: float = 0.99
    """discount factor"""
    polyak: float = 0.005
    """how far targets move towards policies, critics, mixer and memory at a policy step"""
    policy_delay: int = 2
    """every how many steps policies and targets move"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target policies' actions"""
    noise_clip: float = 0.5
    """largest such noise"""
    max_grad_norm: float = 1.0
    """largest norm of the gradients of policies, of critics and of history encoders"""
    alpha: float = 2.5
    """lambda = alpha / mean |Q| weighs the team's value against cloning (TD3+BC, Eq. 5)"""


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
    """Policies, twin critics and history encoders of all agents, separate weights in one batch, the mixer, and a target of each."""

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
        self.critic_mixer = MLP(
            [task.state_dim + task.num_agents * task.action_dim], [256, 256], task.num_agents + 1
        )
        for name in ("memory", "policy", "critics", "critic_mixer"):
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

    def team_critics(
        self,
        inputs: torch.Tensor,
        states: torch.Tensor,
        actions: torch.Tensor,
        target: bool = False,
        for_policy: bool = False,
    ) -> torch.Tensor:
        """Q_j(s, a) = sum_i w_i(s, a) Q_ij(h_i, a_i) + b(s, a) of both twins j: [twin, batch]. Policies' losses give them no gradient."""
        critics, mixer = (
            (self.target_critics, self.target_critic_mixer)
            if target
            else (self.critics, self.critic_mixer)
        )
        if for_policy:
            critics, mixer = [
                partial(functional_call, x, {k: v.detach() for k, v in x.named_parameters()})
                for x in (critics, mixer)
            ]
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


def matd3_bc_losses(
    team: Team, batch: Batch, noise: torch.Tensor, args: Args, learn_policy: bool
) -> torch.Tensor:
    """Losses of critics and of policies: [2]. `noise` [batch, agent, action] is drawn outside, so that compiling changes nothing."""
    inputs = team.inputs(batch.observations, batch.histories)
    with torch.no_grad():  # r + gamma min_j Q'_j(s', pi'(h') + noise) (TD3, Algorithm 1)
        next_inputs = team.inputs(batch.next_observations, batch.next_histories, target=True)
        smoothing = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (team.act(next_inputs, target=True) + smoothing).clamp(-1, 1)
        next_q = team.team_critics(next_inputs, batch.next_states, next_actions, target=True).amin(
            0
        )  # [batch]
        targets = batch.rewards + args.gamma * batch.masks * next_q
    q = team.team_critics(inputs, batch.states, batch.actions)  # [twin, batch]
    critic_loss = (q - targets).square().mean(-1).sum()
    if not learn_policy:
        return torch.stack([critic_loss, torch.zeros_like(critic_loss)])

    actions = team.act(inputs)
    q = team.team_critics(inputs.detach(), batch.states, actions, for_policy=True)[0]  # [batch]
    value = args.alpha * q.mean() / q.abs().mean().detach()
    cloning = (actions - batch.actions).square().mean((0, 2)).sum()
    return torch.stack([critic_loss, cloning - value])  # TD3+BC, Eq. 3


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
    if args.eval_episodes is None:
        args.eval_episodes = 10 if args.task.startswith("ant") else 100
    check_positive(
        args, "total_steps", "eval_every", "eval_episodes", "batch_size", "max_grad_norm"
    )
    check_positive(args, "learning_rate", "memory_learning_rate", "policy_delay")
    check_range(args, 0, 1, "gamma", "polyak")
    check_range(args, 0, math.inf, "alpha", "policy_noise", "noise_clip")
    run_dir, checkpoint = open_run(args, "matd3_bc")
    task, device = find_task(args.task), choose_device(args)
    if task.discrete:
        raise InputError(
            f"{task.name} has discrete actions; matd3_bc.py learns continuous ones, ibc.py, iql.py and maiql.py both"
        )
    dataset = load_dataset(
        task, args.dataset, device
    )  # before seeding: recording it draws random numbers
    seed_everything(args.seed, args.torch_deterministic)
    team = Team(task, dataset.states).to(device)
    groups = []
    for networks in ([team.policy], [team.critics, team.critic_mixer], [team.memory]):
        parameters = [parameter for network in networks for parameter in network.parameters()]
        # The learning rate is a tensor, so that a CUDA graph sees it change.
        groups.append({"params": parameters, "lr": torch.zeros((), device=device)})
    optimizer = torch.optim.Adam(groups, fused=True, capturable=args.cudagraphs)
    losses = torch.compile(matd3_bc_losses) if args.compile else matd3_bc_losses
    online, targets = [], []
    for name in ("memory", "policy", "critics", "critic_mixer"):
        online += getattr(team, name).parameters()
        targets += getattr(team, f"target_{name}").parameters()

    def make_update(learn_policy: bool) -> Callable:
        def update(indices: torch.Tensor) -> torch.Tensor:
            batch = gather_batch(dataset, indices)
            loss = losses(team, batch, torch.randn_like(batch.actions), args, learn_policy)
            optimizer.zero_grad()
            loss.sum().backward()
            for group in optimizer.param_groups:
                if group["params"][0].grad is not None:  # policies have none between their steps
                    nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
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
        state = {"script": "matd3_bc", "args": arguments, "step": step, "seconds": seconds}
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
                f"stopped after step {step}; go on with: python baselines/matd3_bc.py --resume {run_dir}"
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
