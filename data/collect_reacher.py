"""Records reacher-expert-mix, the dataset of two-agent Reacher, and trains its experts.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198), Section 5.3. Two teams learn Reacher by online
MAPPO (Appendix A), with every agent seeing the whole state. One team settles on counter-clockwise
bends of the arm, the other on clockwise ones. The dataset has 500,000 transitions of each.

    python -m data.collect_reacher dataset             # data/reacher-expert-mix.hdf5, half a minute
    python -m data.collect_reacher experts --seed 3    # data/weights/reacher_expert_3.pt, 3 minutes

Both experts ship with the repository, and scripts record the dataset when they first need it.
Where it differs from the paper, why, and by how much: docs/datasets.md.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder's inspect.py would shadow Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import errno
import hashlib
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep

import h5py
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions import Normal
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from mamujoco_envs import InputError, Simulator, Task, evaluate, find_task, require
from training_run import check_positive, load, say

TASK = find_task("reacher-all-observant")
FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"

HIDDEN = [64, 64]  # Deviation 3.
GAMMA, GAE_LAMBDA = 0.97, 0.95  # Deviation 1.
EPISODES, EPOCHS, MINIBATCH_SIZE, CLIP = 40, 5, 256, 0.2  # per learning step (Appendix A.2)
# Deviation 4. Scales every dimension to order 1: target and fingertip are within decimetres,
# and joints turn by tens of radians per second.
STATE_SCALE = torch.tensor([1, 1, 1, 1, 5, 5, 0.1, 0.1, 10, 10, 10])
RECORDED_AT_ONCE = 500  # episodes


@dataclass
class Experts:
    """Trains one team by online MAPPO and saves its policies."""

    seed: int = 1
    """random seed for networks, episodes and exploration"""
    total_steps: int = 1000
    """learning steps of 2000 transitions (40 episodes)"""
    learning_rate: float = 1e-3
    """Adam; decays linearly to zero (the paper: 5e-5, constant)"""
    entropy_target: float = -3.0
    """joint entropy that the entropy bonus maintains (the paper: -4)"""
    output: Path | None = None
    """file to write; by default data/weights/reacher_expert_SEED.pt"""


@dataclass
class Dataset:
    """Records two experts with opposite bends, half of the episodes each, with sampled actions."""

    episodes: int = 20_000
    """episodes of 50 transitions"""
    seed: int = 10101
    """random seed for episodes and exploration"""
    experts: tuple[Path, Path] = (WEIGHTS / "reacher_expert_1.pt", WEIGHTS / "reacher_expert_2.pt")
    """files that `experts` wrote; one team ends with theta2 > 0, the other with theta2 < 0"""
    output: Path = FOLDER / "reacher-expert-mix.hdf5"
    """file to write"""


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


class Team(nn.Module):
    """Policies and mixed values of both agents, who see the whole state and need no memory."""

    def __init__(self):
        super().__init__()
        widths = [TASK.state_dim] * TASK.num_agents
        self.policy = MLP(widths, HIDDEN, 2 * TASK.action_dim)
        self.value = MLP(widths, HIDDEN, 1)
        self.mixer = MLP([TASK.state_dim], HIDDEN, TASK.num_agents + 1)
        # Torques start near zero, with a standard deviation well inside its clamp.
        self.policy[-1].weight.data.mul_(0.1)
        self.policy[-1].bias.data.copy_(torch.tensor([0.0, -1.0]))

    def distribution(self, states):
        """Distribution of the agents' actions [batch, agent, action] in `states` [batch, state]."""
        x = (states * STATE_SCALE).expand(TASK.num_agents, -1, -1)
        mean, log_std = self.policy(x).transpose(0, 1).chunk(2, dim=-1)
        return Normal(mean, log_std.clamp(-6, 0).exp(), validate_args=False)

    def team_value(self, states):
        """V(s) = sum_i w_i(s) V_i(s) + b(s) (Section 3.2): [batch, state] -> [batch]."""
        x = (states * STATE_SCALE).expand(TASK.num_agents, -1, -1)
        weights, bias = self.mixer(x[:1])[0].split([TASK.num_agents, 1], dim=-1)
        return (weights * self.value(x)[..., 0].T).sum(-1) + bias[:, 0]


# The algorithm: online MAPPO.


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


class Experience(NamedTuple):
    """The transitions of a learning step, or some of them."""

    states: torch.Tensor  # [batch, state]
    actions: torch.Tensor  # [batch, agent, action]
    log_probs: torch.Tensor  # [batch], of joint actions
    values: torch.Tensor  # [batch]
    returns: torch.Tensor  # [batch]
    advantages: torch.Tensor  # [batch]


@torch.no_grad()
def collect_experience(team: Team, simulator: Simulator, generators):
    """Plays one whole episode per generator with sampled actions; also gives their mean return."""
    length, episodes = TASK.episode_length, len(generators)
    states = torch.zeros(length + 1, episodes, TASK.state_dim)
    actions = torch.zeros(length, episodes, TASK.num_agents, TASK.action_dim)
    rewards = torch.zeros(length, episodes)
    states[0] = torch.as_tensor(simulator.reset(generators))
    for t in range(length):
        actions[t] = team.distribution(states[t]).sample()
        next_states, reward, _ = simulator.step(actions[t].numpy())
        states[t + 1], rewards[t] = torch.as_tensor(next_states), torch.as_tensor(reward)

    # Reacher has no terminal states: episodes end by time-out, and the last value bootstraps.
    masks, time_out_masks = torch.ones_like(rewards), torch.ones_like(rewards)
    time_out_masks[-1] = 0
    values = team.team_value(states.flatten(0, 1)).view(length + 1, episodes)
    returns, advantages = generalized_advantages(
        rewards, values[:-1], values[1:], masks, time_out_masks, GAMMA, GAE_LAMBDA
    )
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-3)

    distribution = team.distribution(states[:-1].flatten(0, 1))
    log_probs = distribution.log_prob(actions.flatten(0, 1)).sum((1, 2)).view_as(rewards)
    fields = (states[:-1], actions, log_probs, values[:-1], returns, advantages)
    return Experience(*[x.flatten(0, 1) for x in fields]), float(rewards.sum(0).mean())


def mappo_terms(team: Team, batch: Experience):
    """Actor loss, critic loss, entropy and action penalty (Appendix A.1)."""
    distribution, values = team.distribution(batch.states), team.team_value(batch.states)
    log_probs = distribution.log_prob(batch.actions).sum((1, 2))
    ratio = (log_probs - batch.log_probs).clamp(max=10).exp()
    clipped_ratio = ratio.clamp(1 - CLIP, 1 + CLIP)
    actor_loss = -torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages).mean()

    clipped_values = batch.values + (values - batch.values).clamp(-CLIP, CLIP)
    errors = [(v - batch.returns).square().mean() for v in (clipped_values, values)]
    critic_loss = torch.max(*errors)

    entropy = torch.min((-ratio * log_probs).mean(), (-clipped_ratio * log_probs).mean())
    excess = (distribution.mean.abs() - 1).clamp(min=0).square().sum((1, 2))
    penalty = torch.max((ratio * excess).mean(), (clipped_ratio * excess).mean())
    return actor_loss, critic_loss, entropy, penalty


def train_expert(args: Experts) -> dict:
    """Trains and saves a team; returns the results of a greedy evaluation."""
    check_positive(args, "total_steps", "learning_rate")
    check_seed(args.seed)
    output = args.output or WEIGHTS / f"reacher_expert_{args.seed}.pt"
    check_output(output, size=1e6)
    torch.manual_seed(args.seed)
    team = Team()
    optimizer = torch.optim.Adam(team.parameters(), lr=args.learning_rate, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / args.total_steps)
    simulator = Simulator(TASK, EPISODES)
    generators = [np.random.default_rng([args.seed, i]) for i in range(EPISODES)]

    say(f"training an expert for {output}")
    entropy_alpha = 0.0
    with Progress(args.total_steps, "step") as progress:
        for step in range(args.total_steps):
            experience, mean_return = collect_experience(team, simulator, generators)
            for _ in range(EPOCHS):
                # The last minibatch, which is smaller than the others, is dropped.
                for rows in torch.randperm(len(experience.states)).split(MINIBATCH_SIZE)[:-1]:
                    batch = Experience(*[x[rows] for x in experience])
                    actor_loss, critic_loss, entropy, penalty = mappo_terms(team, batch)
                    # The dual variable grows while the entropy is below its target.
                    gap = args.entropy_target - entropy.item()  # Deviation 2.
                    entropy_alpha = max(0.0, entropy_alpha + 0.001 * gap)
                    loss = actor_loss + 0.5 * critic_loss - entropy_alpha * entropy + penalty
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(team.parameters(), 1.0)
                    optimizer.step()
            schedule.step()
            advice = "use a smaller --learning-rate"
            finite = math.isfinite(mean_return + entropy.item())
            require(finite, f"training diverged by step {step + 1}; {advice}")
            progress.advance(1, f"return {mean_return:.2f}, entropy {entropy.item():.2f}")

    # On this task an agent's observation is the state.
    evaluation = evaluate(TASK, lambda observed, _: team.distribution(observed[:, 0]).mean, 1000)
    bends = np.arctan2(evaluation.last_states[:, 3], evaluation.last_states[:, 1])
    result = {
        "greedy_return": float(evaluation.returns.mean()),
        "share_of_positive_bends": float((bends > 0).mean()),
    }
    expert = {"policy": team.policy.state_dict(), "seed": args.seed}
    with new_file(output) as temporary:
        torch.save(expert | {"total_steps": args.total_steps} | result, temporary)
    say(f"{output}: stochastic return {mean_return:.3f}, {result}")
    return result


# Recording.


def load_experts(paths) -> list[Team]:
    """The two teams; raises `InputError` unless they bend the arm to opposite sides."""
    teams, shares = [], []
    for seed, path in enumerate(paths, start=1):
        command = f"python -m data.collect_reacher experts --seed {seed} --output {path}"
        require(path.is_file(), f"no expert at {path}; make it with: {command}")
        try:
            saved = load(path)
            teams.append(Team())
            teams[-1].policy.load_state_dict(saved["policy"])
            shares.append(float(saved["share_of_positive_bends"]))
        except Exception as error:
            fault = f"{path} is truncated or holds no expert ({type(error).__name__})"
            raise InputError(f"{fault}; move it away and make it again with: {command}") from None
    opposite = min(shares) < 0.05 and max(shares) > 0.95
    in_percent = " and ".join(f"{share:.0%}" for share in shares)
    message = f"the experts end with theta2 > 0 in {in_percent} of their episodes"
    require(opposite, f"{message}; train others with --seed")
    return teams


@torch.no_grad()
def record_dataset(args: Dataset) -> None:
    """Records whole episodes of the first team, then as many of the second."""
    whole, length = 2 * RECORDED_AT_ONCE, TASK.episode_length
    message = f"--episodes must be a positive multiple of {whole}; it is {args.episodes}"
    require(args.episodes > 0 and args.episodes % whole == 0, message)
    check_seed(args.seed)
    rows = args.episodes * length
    check_output(args.output, size_of_dataset(TASK, rows))
    teams = load_experts(args.experts)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in args.experts]

    say(f"recording {args.episodes} episodes to {args.output}")
    columns = empty_columns(TASK, args.episodes, length)
    columns["timeouts"][:, -1] = True
    simulator = Simulator(TASK, RECORDED_AT_ONCE)
    generator = torch.Generator().manual_seed(args.seed)
    with one_thread(), Progress(args.episodes, "episode") as progress:
        for first in range(0, args.episodes, RECORDED_AT_ONCE):
            team = teams[first >= args.episodes // 2]
            episodes = range(first, first + RECORDED_AT_ONCE)
            here = slice(episodes.start, episodes.stop)
            states = simulator.reset([np.random.default_rng([args.seed, i]) for i in episodes])
            for t in range(length):
                distribution = team.distribution(torch.as_tensor(states, dtype=torch.float32))
                noise = torch.randn(distribution.mean.shape, generator=generator)
                actions = (distribution.mean + distribution.stddev * noise).clamp(-1, 1)
                columns["observations"][here, t] = states
                columns["actions"][here, t] = TASK.join_actions(actions)
                states, columns["rewards"][here, t], _ = simulator.step(actions.numpy())
                columns["next_observations"][here, t] = states
            progress.advance(RECORDED_AT_ONCE)

    returns = columns["rewards"].sum(axis=1)
    options = f"--episodes {args.episodes} --seed {args.seed}"
    write_dataset(
        args.output,
        {name: column.reshape(rows, *column.shape[2:]) for name, column in columns.items()},
        environment=TASK.environment,
        source=f"python -m data.collect_reacher dataset {options}",
        experts_sha256=hashes,
        mean_return=float(returns.mean()),
    )
    spread = f"return {returns.mean():.3f}, from {returns.min():.2f} to {returns.max():.2f}"
    say(f"{args.output}: {rows} transitions, {spread}")


def record(task: Task, path: Path) -> None:
    """Records a task's dataset for `load_dataset`, whose caller's random state is preserved."""
    message = f"data.collect_reacher records {TASK.dataset}; not '{task.dataset}'"
    require(task.dataset == TASK.dataset, message)
    with torch.random.fork_rng(devices=[]):
        record_dataset(Dataset(output=path))


def empty_columns(task: Task, *shape: int) -> dict[str, np.ndarray]:
    """D4RL's columns, all zero, for transitions [*shape]."""
    states, joint_actions = (*shape, task.state_dim), (*shape, task.num_agents * task.action_dim)
    return {
        "observations": np.zeros(states, dtype=np.float32),
        "actions": np.zeros(joint_actions, dtype=np.float32),
        "rewards": np.zeros(shape, dtype=np.float32),
        "next_observations": np.zeros(states, dtype=np.float32),
        "terminals": np.zeros(shape, dtype=bool),
        "timeouts": np.zeros(shape, dtype=bool),
    }


def size_of_dataset(task: Task, rows: int) -> int:
    """Bytes of a file with that many transitions, to within a few kB."""
    return rows * sum(column.nbytes for column in empty_columns(task, 1).values())


def write_dataset(path: Path, columns: dict[str, np.ndarray], **attributes) -> None:
    """Writes columns [row, ...] and where they come from in D4RL's layout."""
    with new_file(path) as temporary, h5py.File(temporary, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column)
        file.attrs.update(attributes)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs PyTorch on one thread: sums have a fixed order, so datasets match bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Bookkeeping.


def check_seed(seed: int) -> None:
    require(0 <= seed < 2**32, f"--seed must be from 0 to {2**32 - 1}; it is {seed}")


def check_output(path: Path, size: float) -> None:
    """Raises `InputError` unless a new file of `size` bytes can be written to `path`."""
    folder = path.parent
    require(not os.path.lexists(path), f"{path} exists; move it away or give another --output")
    require(folder.is_dir(), f"no folder {folder} to write {path.name} to; create it")
    require(os.access(folder, os.W_OK | os.X_OK), f"cannot write to {folder}; change its mode")
    check_room(path, size)


def check_room(path: Path, size: float) -> None:
    """Raises `InputError` unless `size` more bytes can be written to `path`."""
    needed, free = size + 1e6, shutil.disk_usage(path.parent).free
    shortage = f"{path} needs {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free"
    require(free >= needed, f"{shortage}; make room")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block is done, or is removed if it fails."""
    for debris in path.parent.glob(f"{path.name}.*.tmp"):
        if time.time() - debris.stat().st_mtime > 3600:  # left by a killed process
            debris.unlink(missing_ok=True)
    # The name contains the process id, so that several scripts can record at the same time.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # On a full disk PyTorch raises RuntimeError, and h5py's OSError message has two lines.
        reason = os.strerror(getattr(error, "errno", None) or errno.ENOSPC)
        raise InputError(f"cannot write {path} ({reason}); make room and try again") from None
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """Progress of a long command: a bar in a terminal, elsewhere a line at least every 30 s."""

    def __init__(self, total: int, unit: str, done: int = 0):
        self.total, self.unit, self.done, self.said = total, unit, done, time.monotonic()
        options = {"unit_scale": True, "mininterval": 1, "miniters": 0, "disable": None}
        self.bar = tqdm(total=total, initial=done, unit=unit, **options)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def advance(self, count: int, note: str = "") -> None:
        """Advances by `count`; `note` says what is happening."""
        self.done += count
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.said > 20:
            done, total = (tqdm.format_sizeof(number) for number in (self.done, self.total))
            say(f"{done} of {total} {self.unit}s{', ' if note else ''}{note}")
            self.said = time.monotonic()


def interrupt(number, _) -> None:
    """Makes SIGTERM end a script as Ctrl-C does, so that it removes its temporary files."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        args = tyro.extras.subcommand_cli_from_dict({"experts": Experts, "dataset": Dataset})
        if isinstance(args, Experts):
            train_expert(args)
        else:
            record_dataset(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
