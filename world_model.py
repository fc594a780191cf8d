"""Trains the ensemble world model of MOMA-PPO (Section 3.1) on an offline dataset and exports it as plain tensors.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem",
AAMAS 2024. Seven members predict the next state, the reward and whether the next state is absorbing from the global state
and the joint action; the five best on held-out data are the elites. All members train at once as one batched network,
each on minibatches of its own. Tasks that share a dataset share its world model.

    python world_model.py --task reacher-leader-only            # the defaults below
    python world_model.py --task reacher-leader-only --paper    # the paper's networks, targets, learning rate and budget
    python world_model.py --resume runs/RUN

Deviations from the paper, the first three behind flags; figures on Reacher after 2000 steps with --beta 0 --learning-rate 1e-3:
1. Members predict the change of the state, and inputs and targets are standardised by the training data; dimensions that
   never change are copied. The paper's predict the next state itself, from raw inputs. Held-out error of the state 0.0077
   instead of 0.0151, of the reward 0.0024 instead of 0.0089.
2. Smaller networks: 3 layers of 256 SiLU units for the state (0.0077; 128: 0.0133, 512: 0.0060 at three times the cost, ReLU: 0.0138), 2
   of 128 ReLU units for reward and mask; the paper has ReLU networks of 4 layers of 1024. The reward's has weight decay, so that
   it reads only what explains the reward: re-targeting error 0.0042 instead of 0.0059 after 9000 steps. A shared trunk is worse (0.0183).
3. Learning rate 4e-3, decayed to zero along a cosine, for fewer steps, and the state's likelihood weighed by the predicted standard
   deviation (beta-NLL); the paper has 3e-5 throughout. README.md has figures of the ant, where legs hit the ground.
4. One reward and one mask for the team instead of a copy for each agent.
5. Elites are chosen by mean predictions on the whole validation set, which is less noisy than sampled ones on a part of it.
"""

import json
import math
import os
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

import coordination_game  # noqa: F401, its tasks
from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import InputError, Task, find_task, make_simulator

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """a task whose dataset is learned"""
    seed: int = 1
    """seed of networks and minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA GPU where there is one"""
    total_steps: int | None = None
    """gradient steps of every member; if not given, 9,000, or 27,000 on the ant; the paper's 3,000,000 with --paper"""
    eval_every: int = 1000
    """gradient steps between two evaluations, each followed by a checkpoint"""
    run_dir: Path | None = None
    """folder of the run; runs/TASK__world_model__SEED__TIME if not given"""
    resume: Path | None = None
    """folder of a run to go on with; all other arguments are then the run's own"""
    compile: bool = False
    """compile the loss with torch.compile"""
    cudagraphs: bool = False
    """capture the update as a CUDA graph"""
    torch_deterministic: bool = True
    """only deterministic algorithms"""

    dataset: Path | None = None
    """HDF5 file in D4RL's layout; the task's own if not given"""
    output: Path | None = None
    """file to export the world model to; world_model.pt in the run's folder if not given"""
    paper: bool = False
    """the paper's setting: absolute raw targets, separate ReLU networks of 4 x 1024 (mask: 2), learning rate 3e-5, 3,000,000 steps"""
    members: int = 7
    """trained networks"""
    elites: int = 5
    """networks kept"""
    target: Literal["delta", "absolute"] = "delta"
    """predict the change of the state, or the next state"""
    normalize: bool = True
    """standardise inputs, targets and rewards by the training data"""
    trunk: Literal["separate", "shared"] = "separate"
    """one network each for state, reward and mask, or one for everything"""
    hidden: tuple[int, ...] = (256, 256, 256)
    """units of the state network's hidden layers, or of the shared trunk's"""
    reward_hidden: tuple[int, ...] = (128, 128)
    """units of the reward network's hidden layers, always ReLU"""
    mask_hidden: tuple[int, ...] = (128, 128)
    """units of the mask network's hidden layers, always ReLU"""
    activation: Literal["silu", "relu"] = "silu"
    """non-linearity of the state network or the shared trunk"""
    batch_size: int = 256
    """transitions in each member's own minibatch"""
    learning_rate: float = 4e-3
    """AdamW"""
    beta: float = 0.5
    """exponent of the predicted variance that each dimension's likelihood is weighed by (beta-NLL); 0 is the likelihood itself"""
    reward_weight_decay: float = 0.3
    """AdamW, of the reward network alone, so that it reads only the dimensions that explain the reward"""
    decay: bool = True
    """decay the learning rate to zero along a cosine"""
    max_grad_norm: float = 1.0
    """largest norm of the gradient of a member"""


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


class Prediction(NamedTuple):
    """What each member predicts, in the units of the data: two Gaussians and a Bernoulli."""

    next_states: torch.Tensor  # means [member, batch, state]
    state_log_stds: torch.Tensor  # [member, batch, state]
    rewards: torch.Tensor  # means [member, batch]
    reward_log_stds: torch.Tensor  # [member, batch]
    mask_logits: torch.Tensor  # [member, batch]; above 0 if the next state is not absorbing


class Ensemble(nn.Module):
    """The members of the world model as one batched network (Section 3.1)."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        members: int,
        target: str,
        trunk: str,
        hidden: dict,
        activation: str,
    ):
        """`hidden` gives the widths of hidden layers for "state", "reward" and "mask"; a shared trunk has the state's."""
        super().__init__()
        self.target, activate = target, {"relu": nn.ReLU, "silu": nn.SiLU}[activation]
        self.sizes = [state_dim, state_dim, 1, 1, 1]  # the fields of a prediction
        in_dims = [state_dim + action_dim] * members
        if trunk == "shared":
            self.networks = nn.ModuleList(
                [MLP(in_dims, hidden["state"], sum(self.sizes), activate)]
            )
        else:
            self.networks = nn.ModuleList([MLP(in_dims, hidden["state"], 2 * state_dim, activate)])
            self.networks.extend(
                [MLP(in_dims, hidden["reward"], 2), MLP(in_dims, hidden["mask"], 1)]
            )
        for name, size in {
            "input": state_dim + action_dim,
            "target": state_dim,
            "reward": 1,
        }.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> Prediction:
        """States [member, batch, state] and joint actions [member, batch, agent * action]."""
        x = (torch.cat([states, actions], dim=-1) - self.input_mean) / self.input_std
        outputs = torch.cat([network(x) for network in self.networks], dim=-1)
        state, state_log_std, reward, reward_log_std, mask_logit = outputs.split(self.sizes, dim=-1)
        next_states = state * self.target_std + self.target_mean
        return Prediction(
            next_states=states + next_states if self.target == "delta" else next_states,
            state_log_stds=state_log_std.clamp(-6, 2) + self.target_std.log(),
            rewards=(reward * self.reward_std + self.reward_mean)[..., 0],
            reward_log_stds=(reward_log_std.clamp(-6, 2) + self.reward_std.log())[..., 0],
            mask_logits=mask_logit[..., 0],
        )


def epistemic_uncertainty(
    prediction: Prediction, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """eps_r, the variance of the reward over members, and eps_g, the Frobenius norm of the members' covariance: [batch] each.

    The covariance is that of (next state, reward) in units of `scale` [state + 1]. With X the centred predictions
    [member, state + 1], ||X^T X||_F = ||X X^T||_F: a Gram matrix over members instead of one over dimensions.
    """
    x = torch.cat([prediction.next_states, prediction.rewards[..., None]], dim=-1) / scale
    x = (x - x.mean(0)).transpose(0, 1)  # [batch, member, state + 1]
    epsilon_g = (x @ x.transpose(1, 2)).square().sum((1, 2)).sqrt() / (x.shape[1] - 1)
    return prediction.rewards.var(0), epsilon_g


def member_losses(
    ensemble: Ensemble, batch: Sequence[torch.Tensor], changes: torch.Tensor, beta: float
) -> torch.Tensor:
    """Gaussian negative log-likelihoods of next state and reward and cross-entropy of the mask (Section 3.1): [member, 3].

    `batch` is states, joint actions, next states, rewards and masks, [member, batch, ...]; `changes` [state] tells the
    dimensions that are learned. The likelihood is averaged over dimensions, its constant dropped. That of the state is weighed by the
    predicted variance to the power of `beta`: otherwise what is hard to predict is given up as noise (Seitzer et al., ICLR 2022).
    """
    states, actions, next_states, rewards, masks = batch
    prediction = ensemble(states, actions)
    state_log_stds = prediction.state_log_stds[..., changes]
    state_error = (next_states - prediction.next_states)[..., changes] * (-state_log_stds).exp()
    weight = (
        (2 * beta * (state_log_stds - ensemble.target_std[changes].log())).exp().detach()
    )  # in standardised units
    state_loss = (weight * (state_log_stds + 0.5 * state_error.square())).mean((1, 2))
    reward_error = (rewards - prediction.rewards) * (-prediction.reward_log_stds).exp()
    reward_loss = (prediction.reward_log_stds + 0.5 * reward_error.square()).mean(1)
    mask_loss = F.binary_cross_entropy_with_logits(
        prediction.mask_logits, masks, reduction="none"
    ).mean(1)
    return torch.stack([state_loss, reward_loss, mask_loss], dim=1)


def clip_member_gradients(ensemble: Ensemble, max_norm: float) -> None:
    """Scales each member's gradient to a norm of at most `max_norm`."""
    gradients = [parameter.grad for parameter in ensemble.parameters()]
    norms = sum(gradient.square().sum((1, 2)) for gradient in gradients).sqrt()
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)[:, None, None]
    torch._foreach_mul_(gradients, [scale] * len(gradients))


@torch.no_grad()
def standardize(ensemble: Ensemble, dataset: OfflineDataset, rows: torch.Tensor) -> None:
    """Sets the ensemble's input, target and reward statistics to those of the training rows."""
    states, next_states = dataset.states[rows], dataset.next_states[rows]
    inputs = torch.cat([states, dataset.task.join_actions(dataset.actions[rows])], dim=1)
    targets = next_states - states if ensemble.target == "delta" else next_states
    for name, values in {
        "input": inputs,
        "target": targets,
        "reward": dataset.rewards[rows, None],
    }.items():
        mean, std = values.double().mean(0), values.double().std(0)
        constant = std < 1e-6
        getattr(ensemble, f"{name}_mean").copy_(mean)
        getattr(ensemble, f"{name}_std").copy_(
            torch.where(constant, 0 if name == "target" else 1, std)
        )


@torch.no_grad()
def validate(ensemble: Ensemble, dataset: OfflineDataset, rows: torch.Tensor) -> torch.Tensor:
    """Errors of mean predictions: next state (L2), reward (absolute), mask (share of wrong ones), [member, 3]."""
    members, sums = ensemble.networks[0][0].weight.shape[0], 0
    for part in rows.split(4096):
        joint = dataset.task.join_actions(dataset.actions[part])
        prediction = ensemble(
            dataset.states[part].expand(members, -1, -1), joint.expand(members, -1, -1)
        )
        state_error = (prediction.next_states - dataset.next_states[part]).norm(dim=-1)
        wrong_masks = (prediction.mask_logits > 0) != (dataset.masks[part] > 0)
        errors = [
            state_error,
            (prediction.rewards - dataset.rewards[part]).abs(),
            wrong_masks.float(),
        ]
        sums = sums + torch.stack(errors, dim=-1).sum(1)
    return sums / len(rows)


def disturb(
    task: Task, actions: torch.Tensor, behavior: str, generator: torch.Generator
) -> torch.Tensor:
    """Actions [batch, agent, action] of the data as they are, perturbed, or replaced by uniformly random ones."""
    if behavior == "held-out":
        return actions
    if task.discrete:  # perturbed: three in ten are random
        choices = torch.randint(task.action_dim, actions.shape[:-1], generator=generator)
        replaced = torch.rand(choices.shape, generator=generator) < (
            0.3 if behavior == "perturbed" else 1
        )
        return torch.where(
            replaced[..., None], F.one_hot(choices, task.action_dim).to(actions), actions
        )
    if behavior == "perturbed":
        return (actions + 0.3 * torch.randn(actions.shape, generator=generator)).clamp(-1, 1)
    return 2 * torch.rand(actions.shape, generator=generator) - 1


def ten_step_starts(dataset: OfflineDataset, rows: torch.Tensor) -> torch.Tensor:
    """Those of `rows` from which an episode goes on for ten steps."""
    rows = rows[rows + 9 < dataset.size]
    return rows[dataset.episode_starts[rows] == dataset.episode_starts[rows + 9]]


@torch.no_grad()
def open_loop(
    ensemble: Ensemble,
    dataset: OfflineDataset,
    rows: torch.Tensor,
    scale,
    behavior: str,
    steps: int = 10,
) -> dict:
    """Rolls the elites out from `rows` beside the true simulator, with the dataset's actions, perturbed or random ones.

    Errors of the state (L2) after one and after all steps (or the last one that any true episode takes), of the return, its bias
    (positive: the model promises too much), and the quantiles of eps_g on the way, all until the true episode ends.
    """
    task, device = dataset.task, dataset.device
    members, generator = ensemble.networks[0][0].weight.shape[0], torch.Generator().manual_seed(0)
    simulator, states = make_simulator(task, len(rows)), dataset.states[rows]
    simulator.set_states(states.cpu().numpy())
    model_return, true_return, epsilons, errors = (
        torch.zeros(len(rows)),
        torch.zeros(len(rows)),
        [],
        [],
    )
    alive = torch.ones(len(rows), dtype=torch.bool)  # what comes after a terminal is in no episode
    for t in range(steps):
        actions = disturb(task, dataset.actions[rows + t].cpu(), behavior, generator)
        joint = task.join_actions(actions).to(device)
        prediction = ensemble(states.expand(members, -1, -1), joint.expand(members, -1, -1))
        epsilons.append(epistemic_uncertainty(prediction, scale)[1][alive])
        member = torch.randint(members, (len(rows),), generator=generator).to(device)
        states = prediction.next_states[member, torch.arange(len(rows), device=device)]
        true_states, true_rewards, terminals = simulator.step(actions.numpy())
        errors.append(
            (states.cpu() - torch.as_tensor(true_states)).norm(dim=1)[alive].mean().item()
        )
        model_return += torch.where(alive, prediction.rewards.mean(0).cpu(), 0)
        true_return += torch.where(alive, torch.as_tensor(true_rewards), 0)
        alive &= ~torch.as_tensor(terminals)
        if not alive.any():
            break
    quantiles = torch.cat(epsilons).quantile(torch.tensor(QUANTILES, device=device)).tolist()
    return {
        "one_step_error": errors[0],
        "ten_step_error": errors[-1],
        "return_error": (model_return - true_return).abs().mean().item(),
        "return_bias": (model_return - true_return).mean().item(),
        "epsilon_g": dict(zip(map(str, QUANTILES), quantiles)),
    }


@torch.no_grad()
def retargeting_error(ensemble: Ensemble, dataset: OfflineDataset, rows: torch.Tensor) -> float:
    """Reacher: mean error of the elites' mean reward for arms of the data with the target of another episode and no torque.

    Experts are almost never still and off target, so "still means on target" fits the data; a team then learns to stop short.
    """
    states, other = dataset.states[rows].clone(), dataset.states[rows.roll(1)]
    states[:, 8:10] += states[:, 4:6] - other[:, 4:6]
    states[:, 4:6] = other[:, 4:6]
    members = ensemble.networks[0][0].weight.shape[0]
    rewards = ensemble(
        states.expand(members, -1, -1), torch.zeros(members, len(rows), 2, device=states.device)
    ).rewards
    return (rewards.mean(0) + states[:, 8:10].norm(dim=1)).abs().mean().item()


def select_members(ensemble: Ensemble, architecture: dict, members: list[int]) -> Ensemble:
    """A copy with these members alone."""
    selected = Ensemble(**architecture | {"members": len(members)}).to(ensemble.input_mean.device)
    weights = {
        name: value[members] if value.dim() == 3 else value
        for name, value in ensemble.state_dict().items()
    }
    selected.load_state_dict(weights)
    return selected


def evaluate_ensemble(
    ensemble: Ensemble, architecture: dict, args: Args, dataset: OfflineDataset, rows, scale
) -> dict:
    """Held-out errors, the elites by them, and how far the elites can be trusted off the data."""
    errors = validate(ensemble, dataset, rows)
    elites = (errors[:, 0] + errors[:, 1]).argsort()[: args.elites].tolist()
    best = select_members(ensemble, architecture, elites)
    starts = ten_step_starts(dataset, rows)[:1000]
    result = {"elites": elites, "member_errors": errors.tolist()}
    result |= dict(
        zip(["state_error", "reward_error", "mask_error"], errors[elites].mean(0).tolist())
    )
    result |= {
        behavior: open_loop(best, dataset, starts, scale, behavior)
        for behavior in ("held-out", "perturbed", "random")
    }
    if dataset.task.environment == "Reacher-v4":
        result["retargeting_error"] = retargeting_error(best, dataset, rows[:5000])
    return result


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
        args.total_steps = (
            3_000_000 if args.paper else 27_000 if args.task.startswith("ant") else 9000
        )
    check_positive(
        args, "total_steps", "eval_every", "members", "batch_size", "learning_rate", "max_grad_norm"
    )
    if not 0 <= args.beta <= 1:
        raise InputError(f"--beta must be from 0 to 1; it is {args.beta}")
    if not 2 <= args.elites <= args.members:
        raise InputError(
            f"--elites must be from 2 to --members {args.members}; it is {args.elites}"
        )
    if min(*args.hidden, *args.reward_hidden, *args.mask_hidden, 1) < 1:
        raise InputError("--hidden, --reward-hidden and --mask-hidden must be above 0")
    run_dir, checkpoint = open_run(args, "world_model")
    task, device = find_task(args.task), choose_device(args)
    if args.paper:
        args.target, args.normalize, args.trunk, args.activation = (
            "absolute",
            False,
            "separate",
            "relu",
        )
        args.hidden, args.reward_hidden, args.mask_hidden = (1024,) * 4, (1024,) * 4, (1024,) * 2
        args.learning_rate, args.beta, args.reward_weight_decay, args.decay = 3e-5, 0.0, 0.0, False
    output = args.output or run_dir / "world_model.pt"
    if output.exists() and checkpoint is None:
        raise InputError(f"{output} exists; give another --output, or move it away")
    if args.output and not output.parent.is_dir():
        raise InputError(f"no folder {output.parent} to write {output.name} to")
    dataset = load_dataset(
        task, args.dataset, device
    )  # before seeding: recording it draws random numbers
    seed_everything(args.seed, args.torch_deterministic)
    training_rows, validation_rows = dataset.split()
    if not len(ten_step_starts(dataset, validation_rows)):
        raise InputError(
            "the dataset's held-out tenth has no ten steps of one episode to test the model on; take a larger one"
        )
    architecture = {
        "state_dim": task.state_dim,
        "action_dim": task.num_agents * task.action_dim,
        "members": args.members,
    }
    architecture |= {"target": args.target, "trunk": args.trunk, "activation": args.activation}
    architecture["hidden"] = {
        "state": list(args.hidden),
        "reward": list(args.reward_hidden),
        "mask": list(args.mask_hidden),
    }
    ensemble = Ensemble(**architecture).to(device)
    if args.normalize:
        standardize(ensemble, dataset, training_rows)
    changes = ensemble.target_std.nonzero()[:, 0]
    # What eps_g is measured in: the standard deviation of each state dimension and of the reward in the dataset.
    scale = torch.cat([dataset.states, dataset.rewards[:, None]], dim=1).std(0)
    scale = torch.where(scale < 1e-6, 1, scale)
    learning_rate = torch.tensor(
        args.learning_rate, device=device
    )  # a tensor, so that a CUDA graph sees it change
    decays = [
        args.reward_weight_decay if len(ensemble.networks) == 3 and i == 1 else 0.0
        for i in range(len(ensemble.networks))
    ]
    groups = [
        {"params": network.parameters(), "weight_decay": decay}
        for network, decay in zip(ensemble.networks, decays)
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True, capturable=args.cudagraphs)
    losses = torch.compile(member_losses) if args.compile else member_losses
    columns = [
        dataset.states,
        task.join_actions(dataset.actions),
        dataset.next_states,
        dataset.rewards,
        dataset.masks,
    ]

    def update(*batch: torch.Tensor) -> torch.Tensor:
        loss = losses(ensemble, batch, changes, args.beta)
        optimizer.zero_grad()
        loss.sum().backward()
        clip_member_gradients(ensemble, args.max_grad_norm)
        optimizer.step()
        return loss.detach().mean(0)

    if args.cudagraphs:
        update = CUDAGraph(update)

    first_step, seconds = 0, 0.0
    if checkpoint is not None:
        ensemble.load_state_dict(checkpoint["ensemble"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].to(device)
        set_random_states(checkpoint["random_states"])
        first_step, seconds = checkpoint["step"], checkpoint["seconds"]
    make_folder(run_dir)
    writer = SummaryWriter(str(run_dir), purge_step=first_step + 1)
    writer.add_text(
        "arguments", "\n".join(f"- {name}: {value}" for name, value in vars(args).items())
    )
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name != "resume"
    }
    print(f"{run_dir}: world model of {task.dataset}, seed {args.seed}, on {device}")

    def save_checkpoint(step: int) -> None:
        writer.flush()  # what is logged up to here is never logged again
        state = {
            "script": "world_model",
            "args": arguments,
            "step": step,
            "seconds": seconds,
            "random_states": random_states(),
        }
        save_whole(
            state | {"ensemble": ensemble.state_dict(), "optimizer": optimizer.state_dict()},
            run_dir / "checkpoint.pt",
        )

    def evaluation() -> dict:
        return evaluate_ensemble(ensemble, architecture, args, dataset, validation_rows, scale)

    stop_signals: list[int] = []
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda number, _: stop_signals.append(number))
    progress = tqdm(
        total=args.total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty()
    )
    started, logged_step, loss_sum = time.perf_counter(), first_step, torch.zeros(3, device=device)
    for step in range(first_step + 1, args.total_steps + 1):
        if args.decay:
            for group in optimizer.param_groups:
                group["lr"].fill_(
                    args.learning_rate
                    * 0.5
                    * (1 + math.cos(math.pi * (step - 1) / args.total_steps))
                )
        indices = training_rows[
            torch.randint(len(training_rows), (args.members, args.batch_size), device=device)
        ]
        loss_sum += update(*[column[indices] for column in columns])
        progress.update()
        evaluate = step % args.eval_every == 0 or step == args.total_steps
        stopping = bool(
            stop_signals
        )  # looked at once: one that comes later waits for the next step
        if step % 100 == 0 or evaluate or stopping:
            state_loss, reward_loss, mask_loss = (loss_sum / (step - logged_step)).tolist()
            if not math.isfinite(state_loss + reward_loss + mask_loss):
                last_good = (
                    f"; {run_dir}/checkpoint.pt is the last good one"
                    if (run_dir / "checkpoint.pt").exists()
                    else ""
                )
                raise InputError(
                    f"a loss of steps {logged_step + 1} to {step} is not finite{last_good}"
                )
            for name, value in {
                "state": state_loss,
                "reward": reward_loss,
                "mask": mask_loss,
            }.items():
                writer.add_scalar(f"losses/{name}", value, step)
            logged_step = step
            loss_sum.zero_()
        if evaluate:
            seconds += time.perf_counter() - started
            result = evaluation()
            writer.add_scalar("charts/steps_per_second", step / seconds, step)
            for name, value in result.items():
                if isinstance(value, float):
                    writer.add_scalar(f"validation/{name}", value, step)
                elif isinstance(value, dict):
                    for key in ("one_step_error", "ten_step_error", "return_error", "return_bias"):
                        writer.add_scalar(f"{name}/{key}", value[key], step)
                    writer.add_scalar(f"{name}/epsilon_g_0.99", value["epsilon_g"]["0.99"], step)
            print(
                f"step {step}: held-out state {result['state_error']:.4f}, reward {result['reward_error']:.5f}; ten steps on data "
                f"{result['held-out']['ten_step_error']:.3f}, perturbed {result['perturbed']['ten_step_error']:.3f}, "
                f"random {result['random']['ten_step_error']:.3f}; "
                + (
                    f"re-targeting {result['retargeting_error']:.4f}; "
                    if "retargeting_error" in result
                    else ""
                )
                + f"{step / seconds:.0f} steps/s",
                flush=True,
            )
            started = time.perf_counter()
            save_checkpoint(step)
        elif stopping:
            seconds += time.perf_counter() - started
            save_checkpoint(step)
        if stopping:
            progress.close()
            print(
                f"stopped after step {step}; go on with: python world_model.py --resume {run_dir}"
            )
            sys.exit(128 + stop_signals[0])
    progress.close()

    if first_step == args.total_steps:  # stopped after the last checkpoint
        result = evaluation()
    description = {
        "dataset": task.dataset,
        "source": dataset.description["source"],
        "seed": args.seed,
    }
    description |= {"total_steps": args.total_steps, "seconds": seconds, **architecture}
    world_model = {
        "architecture": architecture,
        "weights": ensemble.state_dict(),
        "elites": result["elites"],
        "validation": result,
        "epsilon_g": {
            behavior: result[behavior]["epsilon_g"]
            for behavior in ("held-out", "perturbed", "random")
        },
        "scale": scale,
        "bounding_box": dataset.bounding_box(),
        "dataset": dataset.description,
        "description": description,
    }
    save_whole(world_model, output)
    save_whole(
        result
        | {"args": arguments, "seconds": seconds, "steps_per_second": args.total_steps / seconds},
        run_dir / "result.json",
    )
    writer.close()
    print(f"{output}: elites {result['elites']}, {seconds:.0f} s of training")
    return result


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
