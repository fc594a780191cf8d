"""The ensemble world model of MOMA-PPO (Section 3.1): trains it and exports it for moma_ppo.py.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning
Coordination Problem", AAMAS 2024 (arXiv 2305.17198). Seven members predict the next state and the
reward from the global state and the joint action, and from the next state whether it is absorbing.
They train together as one batched network, each on its own minibatches; the five best on held-out
data are the elites. Tasks that share a dataset share its world model.

    python world_model.py --task reacher-leader-only
    python world_model.py --task reacher-leader-only --paper    # the paper's networks and budget
    python world_model.py --resume runs/RUN

Where it differs from the paper, why, and by how much: docs/world_model.md.
"""

import copy
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin briefly, then sleep

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import Task, require
from training_run import (
    Run,
    check_output,
    check_positive,
    check_range,
    compiled,
    main,
    save,
    say,
)

BEHAVIORS = ("on_data", "perturbed", "random")
OPEN_LOOPS, OPEN_LOOP_STEPS = 1000, 10
FIRST_STATES = 1000  # exported, to start episodes from where there is no environment


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """task whose dataset the model learns: a name from docs/tasks.md, or FILE:NAME of your own"""
    seed: int = 1
    """random seed for networks and minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA GPU if there is one"""
    total_steps: int = 9000
    """gradient steps of every member (the paper: 3,000,000)"""
    eval_every: int = 1000
    """gradient steps between evaluations; each is followed by a checkpoint"""
    run_dir: Path | None = None
    """run folder; by default runs/TASK__world_model__SEED__TIME"""
    resume: Path | None = None
    """run folder to resume; allows only --device, --total-steps and, for files that have moved,
    --dataset and --task"""
    compile: bool = False
    """speed up the loss: torch.compile, with CUDA graphs on a GPU"""
    dataset: Path | None = None
    """HDF5 file, Minari folder or minari:NAME; by default the task's own"""
    output: Path | None = None
    """file to export the world model to; by default world_model.pt in the run folder"""
    paper: bool = False
    """the paper's networks, losses and budget, with rarer evaluations; overrides their options"""
    members: int = 7
    """ensemble members to train"""
    elites: int = 5
    """best members to keep"""
    target: Literal["delta", "absolute"] = "delta"
    """predict the change of the state, or the next state"""
    normalize: bool = True
    """standardise inputs, targets and rewards by the training data"""
    hidden: tuple[int, ...] = (256, 256, 256)
    """units of the state network's hidden layers"""
    reward_hidden: tuple[int, ...] = (128, 128)
    """units of the reward network's hidden layers, always ReLU"""
    mask_hidden: tuple[int, ...] = (128, 128)
    """units of the mask network's hidden layers, always ReLU"""
    activation: Literal["silu", "relu"] = "silu"
    """non-linearity of the state network"""
    batch_size: int = 256
    """transitions in each member's own minibatch"""
    learning_rate: float = 4e-3
    """AdamW"""
    decay: Literal["cosine", "none"] = "cosine"
    """decay the learning rate to zero along a cosine, or keep it constant"""
    beta: float = 0.5
    """beta-NLL: the state's likelihood is weighted by variance ** beta; 0 means unweighted"""
    reward_beta: float = 0.0
    """the same for the reward's likelihood"""
    reward_weight_decay: float = 0.3
    """AdamW, reward network; restricts it to the dimensions that explain the reward"""
    max_grad_norm: float = 1.0
    """each member's gradient norm is clipped at this value"""
    start_states: Literal["first", "any"] = "any"
    """calibrate lambda_g and l_eps on rollouts from first (or any) states of held-out episodes"""


DEFAULTS = {
    None: Args(),
    # Learning rate and beta: Deviation 3. Reacher's experts act, and members disagree, mostly in
    # an episode's first steps.
    "Reacher-v4": Args(learning_rate=1e-3, beta=0.0, start_states="first"),
    "Ant-v4": Args(total_steps=27_000, eval_every=3000),
    "coordination": Args(
        total_steps=500, eval_every=250, hidden=(64, 64), mask_hidden=(64,), learning_rate=3e-3,
        reward_weight_decay=0.0,
    ),
    # In games of numbers, the reward is a curved surface, not a table. Its peaks are rare in the
    # data, and an unweighted likelihood dismisses them as noise.
    "continuous": Args(
        total_steps=3000, eval_every=1000, hidden=(64, 64), mask_hidden=(64,), learning_rate=3e-3,
        reward_beta=0.5, reward_weight_decay=0.0,
    ),
}  # fmt: skip
PAPER = {
    "total_steps": 3_000_000, "eval_every": 100_000,
    "target": "absolute", "normalize": False, "activation": "relu",
    "hidden": (1024,) * 4, "reward_hidden": (1024,) * 4, "mask_hidden": (1024,) * 2,
    "learning_rate": 3e-5, "decay": "none",
    "beta": 0.0, "reward_beta": 0.0, "reward_weight_decay": 0.0,
}  # fmt: skip


# Networks. Members run as one batched operation.


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


class Prediction(NamedTuple):
    next_states: torch.Tensor  # [member, batch, state], each member's mean
    rewards: torch.Tensor  # [member, batch]
    epsilon_g: torch.Tensor  # [batch], epistemic uncertainty


def epistemic_uncertainty(next_states, rewards, scale):
    """eps_g, the Frobenius norm of the members' covariance of (next state, reward): [batch].

    With X the centred predictions in units of `scale`, ||X^T X||_F = ||X X^T||_F: a Gram matrix of
    members instead of one of dimensions.
    """
    outputs = torch.cat([next_states, rewards[..., None]], dim=-1) / scale
    centred = (outputs - outputs.mean(0)).transpose(0, 1)  # [batch, member, state + 1]
    gram = centred @ centred.transpose(1, 2)
    return gram.square().sum((1, 2)).sqrt() / (centred.shape[1] - 1)


class Ensemble(nn.Module):
    """The members of the world model, each with a state, a reward and a mask network.

    Networks map standardised inputs to standardised outputs. Those for an Ant see it at heading 0.
    """

    def __init__(self, task: Task, args: Args):
        super().__init__()
        self.symmetry = task.symmetry
        self.members, self.delta = args.members, args.target == "delta"
        joint_dim = task.num_agents * task.action_dim
        in_dims = [task.state_dim + joint_dim] * args.members
        activation = {"silu": nn.SiLU, "relu": nn.ReLU}[args.activation]
        self.state = MLP(in_dims, args.hidden, 2 * task.state_dim, activation)
        self.reward = MLP(in_dims, args.reward_hidden, 2)
        self.mask = MLP([task.state_dim] * args.members, args.mask_hidden, 1)
        sizes = {"input": in_dims[0], "target": task.state_dim, "reward": 1}
        for name, size in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        # Standard deviations of states and reward, the units of eps_g.
        self.register_buffer("scale", torch.ones(task.state_dim + 1))

    @torch.no_grad()
    def standardize(self, dataset: OfflineDataset, rows):
        """Takes input, target and reward statistics from the training rows.

        A target that never varies gets a standard deviation of 0, so the model predicts its mean.
        """
        joint_actions = dataset.task.join_actions(dataset.actions[rows])
        values = {
            "input": torch.cat([dataset.states[rows], joint_actions], dim=1),
            "target": dataset.next_states[rows] - self.delta * dataset.states[rows],
            "reward": dataset.rewards[rows, None],
        }
        for name, value in values.items():
            mean, std = value.double().mean(0), value.double().std(0)
            unchanging = 0 if name == "target" else 1
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std < 1e-6, unchanging, std))

    def forward(self, states, joint_actions):
        """[member, batch, state], [member, batch, joint]: means and log standard deviations of the
        standardised target [member, batch, state] and reward [member, batch, 1]."""
        x = torch.cat([states, joint_actions], dim=-1)
        x = (x - self.input_mean) / self.input_std
        mean, log_std = self.state(x).chunk(2, dim=-1)
        reward, reward_log_std = self.reward(x).chunk(2, dim=-1)
        # With these bounds, no member can be arbitrarily sure or unsure (Deviation 9).
        return mean, log_std.clamp(-10, 2), reward, reward_log_std.clamp(-10, 2)

    def mask_logits(self, next_states):
        """Logits [member, batch] that next states [member, batch, state] are not absorbing."""
        state_dim = next_states.shape[-1]
        mean, std = self.input_mean[:state_dim], self.input_std[:state_dim]
        return self.mask((next_states - mean) / std)[..., 0]

    def predict(self, states, joint_actions):
        """`Prediction`, in the units of the data, from [batch, state] and [batch, joint]."""
        if self.symmetry:
            return self.symmetry.at_heading_zero(self.transition, states, joint_actions)
        return self.transition(states, joint_actions)

    def transition(self, states, joint_actions):
        """`predict`, without turning."""
        all_states = states.expand(self.members, -1, -1)
        all_actions = joint_actions.expand(self.members, -1, -1)
        mean, _, reward, _ = self(all_states, all_actions)
        next_states = self.delta * states + mean * self.target_std + self.target_mean
        rewards = (reward * self.reward_std + self.reward_mean)[..., 0]
        epsilon_g = epistemic_uncertainty(next_states, rewards, self.scale)
        return Prediction(next_states, rewards, epsilon_g)

    def select(self, members: list[int]) -> "Ensemble":
        """A copy with these members alone."""
        selected = copy.deepcopy(self)
        selected.members = len(members)
        for parameter in selected.parameters():
            parameter.data = parameter.data[members]
        return selected


# Training (Section 3.1).


def gaussian_nll(target, mean, log_std, beta=0.0):
    """Negative log-likelihood without its constant, weighted by variance ** beta.

    The weight is that of beta-NLL (Seitzer et al., ICLR 2022). Without it, the network dismisses
    what is hard to predict as noise.
    """
    likelihood = log_std + 0.5 * ((target - mean) * (-log_std).exp()).square()
    # Detached, because the weight itself must not be minimised (Deviation 3).
    return (2 * beta * log_std).exp().detach() * likelihood


def member_losses(ensemble, batch, mask_batch, varying, beta, reward_beta):
    """Next-state, reward and mask loss of every member [3, member] (Section 3.1).

    `batch` is states, joint actions, next states and rewards, `mask_batch` next states and masks,
    each [member, batch, ...]; `varying` are the indices of state dimensions whose targets
    vary; the others are predicted by their mean.
    """
    states, joint_actions, next_states, rewards = batch
    mean, log_std, reward, reward_log_std = ensemble(states, joint_actions)
    # The standardised change of the state (Deviation 1).
    target = next_states - ensemble.delta * states - ensemble.target_mean
    target = target[..., varying] / ensemble.target_std[varying]
    state_loss = gaussian_nll(target, mean[..., varying], log_std[..., varying], beta)
    reward_target = (rewards[..., None] - ensemble.reward_mean) / ensemble.reward_std
    reward_loss = gaussian_nll(reward_target, reward, reward_log_std, reward_beta)
    judged_states, masks = mask_batch
    mask_logits = ensemble.mask_logits(judged_states)
    mask_loss = F.binary_cross_entropy_with_logits(mask_logits, masks, reduction="none")
    return torch.stack([state_loss.mean((1, 2)), reward_loss.mean((1, 2)), mask_loss.mean(1)])


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


def clip_each_agent(parameters, agents, max_norm):
    """Clips each agent's (or member's) gradient norm, over all its parameters and both twins.

    Parameters are [agent, ...] or [twin * agent, ...].
    """
    gradients = [parameter.grad.unflatten(0, (-1, agents)) for parameter in parameters]
    squares = [gradient.square().transpose(0, 1).flatten(1).sum(1) for gradient in gradients]
    factors = max_norm / torch.stack(squares).sum(0).sqrt().clamp(min=max_norm)  # [agent]
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 2)))


# Evaluation on held-out data, and beyond it.


@torch.no_grad()
def held_out_errors(ensemble, dataset: OfflineDataset, rows) -> dict:
    """Errors of each member's mean predictions [member].

    `dataset` has an Ant at heading 0. Errors are those of the state (L2) and the reward (absolute)
    in their own units, then in standard deviations of the data (the state's as a root mean square
    over dimensions), the share of wrong masks, given the true next state, and the share of
    absorbing next states that the masks miss.
    """
    scale, totals = ensemble.scale, 0
    for part in rows.split(4096):
        joint_actions = dataset.task.join_actions(dataset.actions[part])
        next_states, rewards, _ = ensemble.predict(dataset.states[part], joint_actions)
        true_next_states = dataset.next_states[part]
        mask_logits = ensemble.mask_logits(true_next_states.expand(ensemble.members, -1, -1))
        absorbing = dataset.masks[part] == 0
        wrong_masks = (mask_logits > 0) == absorbing
        state_error = next_states - true_next_states
        reward_error = (rewards - dataset.rewards[part]).abs()
        errors = {
            "state_error": state_error.norm(dim=-1),
            "reward_error": reward_error,
            "scaled_state_error": (state_error / scale[:-1]).square().mean(-1).sqrt(),
            "scaled_reward_error": reward_error / scale[-1],
            "mask_error": wrong_masks.float(),
            "missed_ends": (wrong_masks & absorbing).float(),
        }
        totals = totals + torch.stack(list(errors.values())).sum(-1)
    means = dict(zip(errors, totals / len(rows)))
    ends = (dataset.masks[rows] == 0).float().mean()
    return means | {"missed_ends": means["missed_ends"] / ends.clamp(min=1e-9)}


def disturb(task: Task, actions, behavior, generator):
    """The data's actions [batch, agent, action] as they are, perturbed, or uniformly random."""
    if behavior == "on_data":
        return actions
    if task.discrete:  # perturbed: three in ten are random
        choices = torch.randint(task.action_dim, actions.shape[:-1], generator=generator)
        share = 0.3 if behavior == "perturbed" else 1
        replaced = torch.rand(choices.shape, generator=generator) < share
        random_actions = F.one_hot(choices, task.action_dim).to(actions)
        return torch.where(replaced[..., None], random_actions, actions)
    if behavior == "perturbed":
        noise = torch.randn(actions.shape, generator=generator)
        return (actions + 0.3 * noise).clamp(-1, 1)
    return 2 * torch.rand(actions.shape, generator=generator) - 1


def shuffled(rows):
    """`rows` in one fixed random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order.to(rows.device)]


def open_loop_length(dataset: OfflineDataset, rows) -> int:
    """Ten steps, or fewer if no episode lasts that long from any of `rows`."""
    last = dataset.last_rows[torch.searchsorted(dataset.last_rows, rows)]
    return min(OPEN_LOOP_STEPS, 1 + int((last - rows).max()))


def open_loop_starts(dataset: OfflineDataset, rows, start_states="any"):
    """Those of `rows` from which the episode lasts `open_loop_length` steps, shuffled; "first"
    keeps only first rows of episodes."""
    last = rows + open_loop_length(dataset, rows) - 1
    rows, last = rows[last < dataset.size], last[last < dataset.size]
    rows = rows[dataset.episode_starts[rows] == dataset.episode_starts[last]]
    if start_states == "first":
        rows = rows[dataset.episode_starts[rows] == rows]
    return shuffled(rows)


@torch.no_grad()
def open_loop(ensemble, dataset: OfflineDataset, rows, behavior) -> dict:
    """Rolls the ensemble and the true simulator out from `rows`, with the same actions.

    Returns the state error (L2) after one and ten steps, the error and bias of the ten-step return
    (positive: the model promises too much), and quantiles of eps_g. Steps after termination are
    ignored.
    """
    task, device, count = dataset.task, dataset.device, len(rows)
    generator = torch.Generator().manual_seed(0)
    states = dataset.states[rows]
    if task.continues_from_states:
        simulator = task.make_simulator(count)
        simulator.set_states(states.cpu().numpy())
    model_return, true_return = torch.zeros(count), torch.zeros(count)
    alive = torch.ones(count, dtype=torch.bool)
    epsilons, errors = [], []
    for t in range(open_loop_length(dataset, rows)):
        actions = disturb(task, dataset.actions[rows + t].cpu(), behavior, generator)
        joint_actions = task.join_actions(actions).to(device)
        next_states, rewards, epsilon_g = ensemble.predict(states, joint_actions)
        epsilons.append(epsilon_g.cpu()[alive])
        member = torch.randint(ensemble.members, (count,), generator=generator).to(device)
        states = next_states[member, torch.arange(count, device=device)]

        if task.continues_from_states:
            truth = simulator.step(actions.numpy())
        else:  # the actions are the data's own, so the data hold the outcome
            row = rows + t
            truth = dataset.next_states[row], dataset.rewards[row], dataset.masks[row] == 0
        true_states, true_rewards, terminals = (torch.as_tensor(x, device="cpu") for x in truth)
        errors.append((states.cpu() - true_states).norm(dim=1)[alive].mean().item())
        model_return += alive * rewards.mean(0).cpu()
        true_return += alive * true_rewards
        alive &= ~terminals
        if not alive.any():
            break
    difference = model_return - true_return
    epsilons = torch.cat(epsilons)
    return {
        "one_step_error": errors[0],
        "ten_step_error": errors[-1],
        "return_error": difference.abs().mean().item(),
        "return_bias": difference.mean().item(),
        **{f"epsilon_g_{q}": epsilons.quantile(q).item() for q in (0.5, 0.9, 0.99)},
    }


def evaluate_ensemble(ensemble, args: Args, dataset: OfflineDataset, rows, starts) -> dict:
    """Chooses the elites; measures their errors on held-out `rows` and, with the data's, perturbed
    and random actions, in open loops from `starts`."""
    errors = held_out_errors(ensemble, dataset.at_heading_zero, rows)
    # Deviation 5. State and reward count equally, in standard deviations of the data.
    criterion = errors["scaled_state_error"] + errors["scaled_reward_error"]
    elites = criterion.argsort()[: args.elites].tolist()
    best = ensemble.select(elites)
    record = {name: error[elites].mean().item() for name, error in errors.items()}
    behaviors = BEHAVIORS if dataset.task.continues_from_states else ("on_data",)
    for behavior in behaviors:
        measured = open_loop(best, dataset, starts, behavior)
        record |= {f"{behavior}/{name}": value for name, value in measured.items()}
    if dataset.task.model_errors:
        record |= dataset.task.model_errors(best.predict, dataset.states[shuffled(rows)[:5000]])
    member_errors = {name: error.tolist() for name, error in errors.items()}
    return record | {"elites": elites, "member_errors": member_errors}


# Export.


def calibrate(record: dict, rewards) -> dict:
    """lambda_g and l_eps by one rule for every dataset, from q, eps_g's 0.99 quantile on data.

    Deviation 8 of docs/moma_ppo.md. lambda_g makes the penalty at q one standard deviation of the
    reward; l_eps, which cuts a rollout, is 10 q: members hardly ever disagree that much on data.
    """
    quantile = max(record["on_data/epsilon_g_0.99"], 1e-6)
    reward_std = rewards.std().item()
    reward_std = reward_std if reward_std >= 1e-6 else 1.0  # as for `Ensemble.scale`
    return {"lambda_g": reward_std / quantile, "l_epsilon": 10 * quantile}


def export(ensemble, args: Args, dataset: OfflineDataset, record: dict, seconds) -> dict:
    """What inference needs: the elites' layers, normaliser, bounding box and calibration."""
    best = ensemble.select(record["elites"])
    networks = {}
    for name in ("state", "reward", "mask"):
        layers = [layer for layer in getattr(best, name) if isinstance(layer, BatchedLinear)]
        networks[name] = [(layer.weight.data, layer.bias.data) for layer in layers]
    names = "target", "activation", "seed", "total_steps"
    description = {name: getattr(args, name) for name in names} | {"seconds": seconds}
    stride = math.ceil(len(dataset.first_rows) / FIRST_STATES)
    return {
        **networks,
        **dict(ensemble.named_buffers()),  # the normaliser, and the scale of eps_g
        **dataset.from_random_sides.bounding_box(),
        **calibrate(record, dataset.at_heading_zero.rewards),
        "first_states": dataset.states[dataset.first_rows[::stride]],
        "dataset": dataset.description,
        "description": description,
        "errors": {name: value for name, value in record.items() if isinstance(value, float)},
    }


def check(args: Args) -> None:
    """Raises `InputError` if an argument makes no sense."""
    check_positive(args, "total_steps", "eval_every", "batch_size", "learning_rate")
    check_positive(args, "max_grad_norm")
    check_range(args, 2, 1000, "members")
    check_range(args, 2, args.members, "elites")
    check_range(args, 0, 1, "beta", "reward_beta")
    check_range(args, 0, 1e9, "reward_weight_decay")
    message = "--hidden, --reward-hidden and --mask-hidden need one or more widths above 0"
    for widths in (args.hidden, args.reward_hidden, args.mask_hidden):
        require(widths and min(widths) > 0, message)
    if args.output and not args.resume:
        output = Path(args.output)
        require(output.suffix != ".json", "--output is a PyTorch file; name it *.pt")
        check_output(output)


def train(args: Args) -> dict:
    if args.paper and not args.resume:
        args = replace(args, **PAPER)
    check(args)
    with Run(args, "world_model") as run:
        task, device = run.task, run.device
        dataset = load_dataset(task, args.dataset, device)
        torch.manual_seed(args.seed)
        training_rows, held_out_rows = dataset.split()  # Deviation 6
        starts = open_loop_starts(dataset, held_out_rows, args.start_states)[:OPEN_LOOPS]
        if not task.continues_from_states:
            say(f"note: {task.name} has no simulator that starts anywhere, so the model is judged")
            say("on the data's own actions, and not on perturbed and random ones")
        ensemble = Ensemble(task, args).to(device)
        # Members learn from Ants at heading 0 (Deviation 10), in minibatches that are seen from
        # random sides (Deviation 11). Statistics come from a copy that is moved only once.
        upright, moved = dataset.at_heading_zero, dataset.from_random_sides
        has_sides = moved is not upright
        if args.normalize:
            ensemble.standardize(moved, training_rows)
        varying = ensemble.target_std.nonzero()[:, 0]
        message = f"the states of {task.dataset} never change; use --no-normalize"
        require(len(varying), message)
        scale = torch.cat([moved.states, moved.rewards[:, None]], dim=1).std(0)
        ensemble.scale.copy_(torch.where(scale < 1e-6, 1, scale))

        groups = [
            {"params": ensemble.state.parameters()},
            {"params": ensemble.reward.parameters(), "weight_decay": args.reward_weight_decay},
            {"params": ensemble.mask.parameters()},
        ]
        optimizer = torch.optim.AdamW(groups, args.learning_rate, weight_decay=0.0, fused=True)

        def rate(step):
            angle = math.pi * step / args.total_steps if args.decay == "cosine" else 0.0
            return 0.5 * (1 + math.cos(angle))

        schedule = LambdaLR(optimizer, rate)
        inputs = {"dataset": dataset.description}
        run.restore(inputs, ensemble=ensemble, optimizer=optimizer, schedule=schedule)
        loss_function = compiled(member_losses, args, device)
        joint_actions = task.join_actions(upright.actions)
        absorbing_rows = training_rows[dataset.masks[training_rows] == 0]
        rewards = upright.rewards[training_rows]
        outlying_rows = training_rows[(rewards - rewards.mean()).abs() > 10 * rewards.std()]
        columns = upright.states, joint_actions, upright.next_states, upright.rewards

        def draw(rows):
            """States, joint actions, next states and rewards, from sides that are drawn anew."""
            batch = [column[rows] for column in columns]
            if not has_sides:
                return batch
            sides = task.symmetry.random_sides(rows.shape, device)
            return task.symmetry.seen_from(sides, *batch)

        def evaluate(_=None):
            return evaluate_ensemble(ensemble, args, dataset, held_out_rows, starts)

        for _ in run.steps(evaluate):
            # Each member draws its own minibatch from the same training rows.
            shape = args.members, args.batch_size
            rows = training_rows[torch.randint(len(training_rows), shape, device=device)]
            # Deviations 7 and 8. One row in sixteen is replaced by a rare one: with an absorbing
            # next state for the mask, with an outlying reward for the other networks.
            mask_rows = with_rare(rows, absorbing_rows)
            rows = with_rare(rows, outlying_rows)
            _, _, judged_states, _ = draw(mask_rows)
            mask_batch = judged_states, dataset.masks[mask_rows]
            betas = args.beta, args.reward_beta
            losses = loss_function(ensemble, draw(rows), mask_batch, varying, *betas)
            optimizer.zero_grad()
            losses.sum().backward()
            clip_each_agent(list(ensemble.parameters()), args.members, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            names = ("losses/state", "losses/reward", "losses/mask")
            run.log(dict(zip(names, losses.detach().mean(1))))

        record = evaluate()
        run.log_evaluation(record)
        output = args.output or run.dir / "world_model.pt"
        save(export(ensemble, args, dataset, record, run.seconds), output)
        run.write_result(record | {"evaluations": run.evaluations})
        state_error, reward_error = record["state_error"], record["reward_error"]
        say(f"held-out errors: state {state_error:.4f}, reward {reward_error:.5f}")
        say(f"{run.seconds:.0f} s of training; the world model is {output}")
        return record


if __name__ == "__main__":
    main(train, DEFAULTS)
