"""Records datasets of MuJoCo locomotion by D4RL's protocol, and trains the policies behind them.

D4RL (Fu et al. 2020, arXiv 2004.07219) records its datasets with online SAC (Haarnoja et al. 2018,
arXiv 1812.05905), a single policy for the whole body, and so does this script: "random" with an
untrained policy, "medium" and "expert" with the first snapshot of training that is about as good as
D4RL's, and "full-replay", which stands for the replay buffer, with equal shares of all snapshots.

    python -m data.collect_mujoco dataset --environment ant --name medium        # minutes
    python -m data.collect_mujoco snapshots --environment ant --output ants.pt   # hours

The first command writes data/ant-medium.hdf5. Snapshots of ant and halfcheetah ship with the
repository, and scripts record a dataset when they first need it. D4RL's own: data/download_d4rl.py.
Where it differs from D4RL, why, and by how much: docs/datasets.md.
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
from dataclasses import dataclass, replace
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from mamujoco_envs import BEHAVIORS, InputError, Simulator, Task, find_task, require
from training_run import check_positive, check_range, load, say

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"

# One task of each environment. How its actions are split does not matter here.
TASKS = {
    "ant": find_task("ant-expert-fo"),
    "halfcheetah": find_task("halfcheetah-2x3-expert-fo"),
    "hopper": find_task("hopper-3x1-expert-fo"),
    "walker2d": find_task("walker2d-2x3-expert-fo"),
}
# "medium" and "expert" are recorded from the first snapshot with this score, a little below the
# means of D4RL's datasets, or from the best snapshot. The ant's means are 0.80 and 1.17 (Table 2 of
# the paper, arXiv 2305.17198).
GOOD_ENOUGH = {
    "ant": {"medium": 0.75, "expert": 1.15},
    "halfcheetah": {"medium": 0.38, "expert": 0.85},
    "hopper": {"medium": 0.42, "expert": 1.05},
    "walker2d": {"medium": 0.58, "expert": 1.05},
}


@dataclass
class Snapshots:
    """Trains one policy for the whole body by online SAC and saves it periodically."""

    environment: Literal["ant", "halfcheetah", "hopper", "walker2d"] = "ant"
    """environment of the policy"""
    seed: int = 1
    """random seed for networks, episodes and exploration"""
    total_updates: int = 400_000
    """gradient steps of the critics; the policy takes half as many"""
    updates_per_step: int = 8
    """gradient steps per step of all copies"""
    num_envs: int = 64
    """parallel copies of the environment"""
    learning_rate: float = 1e-3
    """Adam; decays linearly to 40 %"""
    batch_size: int = 256
    """transitions per gradient step"""
    buffer_size: int = 1_000_000
    """number of newest transitions kept"""
    warm_up: int = 20_000
    """transitions with uniformly random actions before the first gradient step"""
    snapshot_every: int = 20_000
    """gradient steps between snapshots"""
    output: Path | None = None
    """file to write; by default data/weights/ENVIRONMENT_snapshots.pt"""


@dataclass
class Dataset:
    """Records one of an environment's four datasets, with sampled actions."""

    environment: Literal["ant", "halfcheetah", "hopper", "walker2d"] = "ant"
    """environment of the dataset"""
    name: Literal["random", "medium", "full-replay", "expert"] = "medium"
    """which dataset"""
    transitions: int = 1_000_000
    """number of transitions"""
    seed: int = 10101
    """random seed for episodes and exploration"""
    snapshots: Path | None = None
    """file that `snapshots` wrote; by default data/weights/ENVIRONMENT_snapshots.pt"""
    output: Path | None = None
    """file to write; by default data/ENVIRONMENT-NAME.hdf5"""


# Networks. Twin critics have separate weights but run as one batched operation.


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


def actuators(task: Task) -> int:
    """Actions of the whole body."""
    return task.num_agents * task.action_dim


def make_policy(task: Task) -> MLP:
    """Mean and log standard deviation of a squashed Gaussian: [1, batch, state] -> [1, batch, 2 x
    action]. Small, because many of them ship (Deviation 8)."""
    return MLP([task.state_dim], [128, 128], 2 * actuators(task))


def make_critics(task: Task) -> MLP:
    """Q of independently initialised twins: [2, batch, state + action] -> [2, batch, 1]."""
    return MLP([task.state_dim + actuators(task)] * 2, [256, 256], 1)


# The algorithm: SAC. Equations are those of arXiv 1812.05905.


def sample_actions(policy, states, noise):
    """Actions [batch, action] and their log-densities [batch] from standard normal `noise`."""
    mean, log_std = policy(states[None])[0].chunk(2, dim=-1)
    log_std = log_std.clamp(-5, 2)
    unsquashed = mean + log_std.exp() * noise
    # Squashing by tanh subtracts log(1 - tanh(x)^2) = log(4 / (e^x + e^-x)^2) from the log-density,
    # here in a form that cannot overflow.
    log_derivative = 2 * (np.log(2) - unsquashed - F.softplus(-2 * unsquashed))
    log_probs = (-0.5 * noise.square() - log_std - 0.5 * np.log(2 * np.pi) - log_derivative).sum(-1)
    return unsquashed.tanh(), log_probs


def q_values(critics, states, actions):
    """Both critics' values [twin, batch]."""
    return critics(torch.cat([states, actions], dim=-1).expand(2, -1, -1))[..., 0]


def critic_loss(critics, target_critics, policy, log_alpha, batch, noise, gamma=0.99):
    """Soft Bellman errors of both critics (Eq. 5)."""
    states, actions, rewards, next_states, masks = batch
    with torch.no_grad():
        next_actions, next_log_probs = sample_actions(policy, next_states, noise)
        next_values = q_values(target_critics, next_states, next_actions).amin(0)
        next_values = next_values - log_alpha.exp() * next_log_probs
        targets = rewards + gamma * masks * next_values
    return (q_values(critics, states, actions) - targets).square().mean(1).sum()


def policy_loss(critics, policy, log_alpha, states, noise):
    """Losses of the policy (Eq. 7) and of the temperature (Eq. 18, with log alpha for alpha).

    The temperature keeps the policy's entropy at minus the number of actions.
    """
    actions, log_probs = sample_actions(policy, states, noise)
    values = q_values(critics, states, actions).amin(0)
    loss = (log_alpha.exp().detach() * log_probs - values).mean()
    return loss - log_alpha * (log_probs.detach().mean() - actions.shape[-1])


class SAC:
    """A policy, its critics, and how they learn."""

    def __init__(self, args: Snapshots):
        task = TASKS[args.environment]
        self.noise_shape = 2, args.batch_size, actuators(task)
        self.policy, self.critics = make_policy(task), make_critics(task)
        self.target_critics = make_critics(task).requires_grad_(False)
        self.target_critics.load_state_dict(self.critics.state_dict())
        self.log_alpha = torch.zeros((), requires_grad=True)
        actor, rate = [*self.policy.parameters(), self.log_alpha], args.learning_rate
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=rate, fused=True)
        self.policy_optimizer = torch.optim.Adam(actor, lr=rate, fused=True)
        # Deviation 7.
        self.schedules = [
            LambdaLR(optimizer, lambda update: 1 - 0.6 * update / args.total_updates)
            for optimizer in (self.critic_optimizer, self.policy_optimizer)
        ]

    def update(self, batch, with_policy: bool) -> None:
        """One gradient step of the critics and, if asked for, of policy and temperature."""
        noise = torch.randn(self.noise_shape)
        networks = self.critics, self.target_critics, self.policy, self.log_alpha
        self.critic_optimizer.zero_grad()
        critic_loss(*networks, batch, noise[0]).backward()
        self.critic_optimizer.step()
        if with_policy:
            self.policy_optimizer.zero_grad()
            self.critics.requires_grad_(False)
            policy_loss(self.critics, self.policy, self.log_alpha, batch[0], noise[1]).backward()
            self.critics.requires_grad_(True)
            self.policy_optimizer.step()
        with torch.no_grad():
            targets, sources = self.target_critics.parameters(), self.critics.parameters()
            torch._foreach_lerp_(list(targets), list(sources), 0.005)
        for schedule in self.schedules:
            schedule.step()


class Copies:
    """Many copies of the environment; each starts a new episode when one ends."""

    def __init__(self, args: Snapshots):
        self.task = TASKS[args.environment]
        self.simulator = Simulator(self.task, args.num_envs)
        self.rng = np.random.default_rng(args.seed)
        self.states = self.simulator.reset([self.rng] * args.num_envs)
        self.ages = np.zeros(args.num_envs, dtype=int)

    def step(self, actions):
        """States, actions, rewards, next states and masks of one step, [copy, ...]."""
        states = self.states
        agents_actions = self.task.split_actions(actions).numpy()
        next_states, rewards, terminals = self.simulator.step(agents_actions)
        self.states, self.ages = next_states, self.ages + 1
        ended = terminals | (self.ages == self.task.episode_length)
        if ended.any():
            self.states = self.simulator.reset([self.rng] * int(ended.sum()), where=ended)
            self.ages = np.where(ended, 0, self.ages)
        return states, actions, rewards, next_states, 1.0 - terminals


class ReplayBuffer:
    """The newest transitions: states, actions, rewards, next states and masks."""

    def __init__(self, args: Snapshots):
        # A multiple of --num-envs, so that one step of all copies never wraps around.
        self.size = args.buffer_size // args.num_envs * args.num_envs
        task = TASKS[args.environment]
        state, action = (task.state_dim,), (actuators(task),)
        shapes = (state, action, (), state, ())
        self.fields = [torch.zeros(self.size, *shape) for shape in shapes]
        self.added = 0

    def add(self, transitions) -> None:
        first, count = self.added % self.size, len(transitions[0])
        for field, values in zip(self.fields, transitions):
            field[first : first + count] = torch.as_tensor(values)
        self.added += count

    def sample(self, count: int) -> list[torch.Tensor]:
        rows = torch.randint(min(self.added, self.size), (count,))
        return [field[rows] for field in self.fields]


def train_snapshots(args: Snapshots) -> dict:
    """Trains a policy; with each snapshot, saves all so far, stacked, and their mean returns."""
    check_positive(args, "total_updates", "updates_per_step", "learning_rate", "batch_size")
    check_positive(args, "warm_up", "snapshot_every")
    check_range(args, 1, 10_000, "num_envs")
    check_range(args, 1, 10_000_000, "buffer_size")
    check_seed(args.seed)
    message = f"--buffer-size must be at least --num-envs, {args.num_envs}; it is"
    require(args.buffer_size >= args.num_envs, f"{message} {args.buffer_size}")
    task = TASKS[args.environment]
    args = replace(args, output=args.output or WEIGHTS / f"{args.environment}_snapshots.pt")
    count = math.ceil(args.total_updates / args.snapshot_every)
    check_output(args.output, size=count * 1e5)  # a policy has up to 89 kB
    torch.manual_seed(args.seed)
    learner, copies, buffer = SAC(args), Copies(args), ReplayBuffer(args)
    snapshots, returns = [], []

    say(f"training policies for {args.output}")
    while buffer.added < args.warm_up:
        buffer.add(copies.step(2 * torch.rand(args.num_envs, actuators(task)) - 1))
    started = time.perf_counter()
    with Progress(args.total_updates, "update") as progress:
        for update in range(args.total_updates):
            # Deviation 5.
            if update and update % args.updates_per_step == 0:
                states = torch.as_tensor(copies.states, dtype=torch.float32)
                with torch.no_grad():
                    noise = torch.randn(args.num_envs, actuators(task))
                    actions, _ = sample_actions(learner.policy, states, noise)
                buffer.add(copies.step(actions))
            # Deviation 6.
            learner.update(buffer.sample(args.batch_size), with_policy=update % 2 == 0)
            done = update + 1
            progress.advance(1, f"return {returns[-1]:.0f}" if returns else "")

            if done % args.snapshot_every == 0 or done == args.total_updates:
                returns.append(mean_return(task, learner.policy, progress))
                advice = "use a smaller --learning-rate"
                require(math.isfinite(returns[-1]), f"training diverged by update {done}; {advice}")
                policy = learner.policy.state_dict()
                snapshots.append({name: value.clone() for name, value in policy.items()})
                save_snapshots(args, snapshots, returns)
                score = task.normalized_score(returns[-1])
                speed = done / (time.perf_counter() - started)
                progress.bar.clear()
                say(
                    f"update {done}, {buffer.added} steps: return {returns[-1]:.0f}, "
                    f"score {score:.2f}, {speed:.0f} updates/s"
                )
    return {"returns": returns, "steps": buffer.added}


def mean_return(task: Task, policy, progress, episodes: int = 20) -> float:
    """Mean return of sampled actions, always over the same episodes."""
    simulator, generator = Simulator(task, episodes), torch.Generator().manual_seed(0)
    columns, lengths = play(policy, simulator, range(episodes), generator, progress)
    rewards = zip(columns["rewards"], lengths)
    return float(np.mean([episode[:length].sum() for episode, length in rewards]))


def save_snapshots(args: Snapshots, snapshots: list[dict], returns: list[float]) -> None:
    policies = {name: torch.stack([policy[name] for policy in snapshots]) for name in snapshots[0]}
    saved = {"policies": policies, "returns": returns, "seed": args.seed}
    with new_file(args.output) as temporary:
        torch.save(saved | {"snapshot_every": args.snapshot_every}, temporary)


# Recording.


@torch.no_grad()
def play(policy, simulator: Simulator, seeds, generator: torch.Generator, progress):
    """One whole episode per seed with sampled actions.

    Returns columns [episode, step, ...] and the episodes' lengths [episode]; rows beyond these are
    meaningless.
    """
    task, shape = simulator.task, (len(seeds), simulator.task.episode_length)
    states = simulator.reset([np.random.default_rng(seed) for seed in seeds])
    columns = empty_columns(task, *shape)
    columns["timeouts"][:, -1] = True
    alive, lengths = np.ones(len(seeds), dtype=bool), np.zeros(len(seeds), dtype=int)
    for step in range(task.episode_length):
        noise = torch.randn(len(seeds), actuators(task), generator=generator)
        actions, _ = sample_actions(policy, torch.as_tensor(states, dtype=torch.float32), noise)
        columns["observations"][:, step], columns["actions"][:, step] = states, actions
        states, rewards, terminals = simulator.step(task.split_actions(actions).numpy(), alive)
        columns["rewards"][:, step], columns["next_observations"][:, step] = rewards, states
        columns["terminals"][:, step] = terminals
        lengths += alive
        alive = alive & ~terminals
        progress.advance(0, f"step {step + 1} of {task.episode_length}")
        if not alive.any():
            break
    columns["timeouts"] &= ~columns["terminals"]
    return columns, lengths


def choose_policies(args: Dataset, task: Task) -> tuple[list[MLP], dict]:
    """The policies to record and, as attributes of the file, where they come from."""
    if args.name == "random":
        torch.manual_seed(args.seed)
        return [make_policy(task)], {}
    path = args.snapshots or WEIGHTS / f"{args.environment}_snapshots.pt"
    command = "python -m data.collect_mujoco snapshots"
    command = f"{command} --environment {args.environment} --output {path}"
    require(path.is_file(), f"no policies at {path}; make them with: {command}")
    try:
        saved = load(path)
        scores = task.normalized_score(np.array(saved["returns"]))
        policies = [make_policy(task) for _ in scores]
        for i, policy in enumerate(policies):
            policy.load_state_dict({name: value[i] for name, value in saved["policies"].items()})
    except Exception as error:
        fault = f"{path} is truncated or holds no policies of {args.environment}"
        fault = f"{fault} ({type(error).__name__})"
        raise InputError(f"{fault}; move it away and make it again with: {command}") from None
    # Deviation 9.
    chosen = list(range(len(policies)))
    if args.name != "full-replay":
        wanted = GOOD_ENOUGH[args.environment][args.name]
        good = np.flatnonzero(scores >= wanted)
        chosen = [int(good[0] if len(good) else np.argmax(scores))]
        if not len(good):
            say(f"note: no policy in {path} scores {wanted}; the best has {max(scores):.2f}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return [policies[i] for i in chosen], {"snapshots": chosen, "snapshots_sha256": digest}


def record_dataset(args: Dataset) -> None:
    """Records whole episodes, with the same number of transitions from every policy."""
    task, dataset = TASKS[args.environment], f"{args.environment}-{args.name}"
    output = args.output or FOLDER / f"{dataset}.hdf5"
    check_seed(args.seed)
    policies, attributes = choose_policies(args, task)
    least = f"--transitions must be {len(policies)} or more, one for each policy"
    require(args.transitions >= len(policies), f"{least}; it is {args.transitions}")
    check_output(output, size_of_dataset(task, args.transitions))
    # The rows at which the policies' shares end.
    ends = [args.transitions * (i + 1) // len(policies) for i in range(len(policies))]
    copies = min(math.ceil(ends[0] / task.episode_length), 200)

    say(f"recording {args.transitions} transitions of {dataset} to {output}")
    columns = empty_columns(task, args.transitions)
    returns, lengths, row, episode = [], [], 0, 0
    simulator = Simulator(task, copies)
    generator = torch.Generator().manual_seed(args.seed)
    with one_thread(), Progress(args.transitions, "transition") as progress:
        for policy, end in zip(policies, ends):
            while row < end:
                seeds = [[args.seed, episode + i] for i in range(copies)]
                played, played_lengths = play(policy, simulator, seeds, generator, progress)
                for i, length in enumerate(played_lengths.tolist()):
                    kept = min(length, end - row)
                    for name, column in columns.items():
                        column[row : row + kept] = played[name][i, :kept]
                    row, episode = row + kept, episode + 1
                    progress.advance(kept)
                    if kept == length:
                        returns.append(played["rewards"][i, :length].sum(dtype=np.float64))
                        lengths.append(length)
                    if row == end:
                        # The last episode of a share is cut short, which counts as a time-out.
                        columns["timeouts"][row - 1] = ~columns["terminals"][row - 1]
                        break

    options = f"--environment {args.environment} --name {args.name}"
    options = f"{options} --transitions {args.transitions} --seed {args.seed}"
    source = f"python -m data.collect_mujoco dataset {options} (ours, not D4RL's)"
    write_dataset(output, columns, environment=task.environment, source=source, **attributes)
    say(f"{output}: {len(returns)} whole episodes")
    if returns:
        say(f"score in %: {spread(100 * task.normalized_score(np.array(returns)))}")
        say(f"length: {spread(lengths)}")


def spread(values) -> str:
    middle = f"mean {np.mean(values):.1f}, median {np.median(values):.1f}"
    return f"min {np.min(values):.1f}, {middle}, max {np.max(values):.1f}"


def record(task: Task, path: Path) -> None:
    """Records a task's dataset for `load_dataset`, whose caller's random state is preserved."""
    known = [f"{body}-{behavior}" for body in TASKS for behavior in BEHAVIORS]
    message = f"data.collect_mujoco records {', '.join(known)}; not '{task.dataset}'"
    require(task.dataset in known, message)
    with torch.random.fork_rng(devices=[]):
        environment, _, name = task.dataset.partition("-")
        record_dataset(Dataset(environment, name, output=path))


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
        args = tyro.extras.subcommand_cli_from_dict({"snapshots": Snapshots, "dataset": Dataset})
        if isinstance(args, Snapshots):
            train_snapshots(args)
        else:
            record_dataset(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
