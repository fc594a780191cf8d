"""MOMA-PPO (Algorithm 1): agents that learn from a fixed dataset by interacting in a world model learned from it.

Paper: Barde et al., "A Model-Based Solution to the Offline Multi-Agent Reinforcement Learning Coordination Problem",
AAMAS 2024. Each learning step rolls the team out for k steps from states of the dataset, in an ensemble world model
(Section 3.1, trained by world_model.py) or in the true simulator (Table 5), and trains the team on these transitions with
multi-agent PPO (Section 3.2, Appendix A). The team is scored in the true environment, acting greedily.

    python moma_ppo.py --task reacher-leader-only                       # dataset and world model come by themselves
    python moma_ppo.py --task reacher-leader-only --ground-truth        # Table 5: rollouts in the simulator
    python moma_ppo.py --task reacher-leader-only --penalty none        # Figure 8: no uncertainty penalty
    python moma_ppo.py --task reacher-leader-only --max-uncertainty inf # Figure 8: no adaptive rollouts
    python moma_ppo.py --resume runs/RUN                                # goes on where RUN stopped, to the bit

Deviations from the paper:
1. Far fewer learning steps, and what that needs: learning rates that decay to zero, from 1e-3, on the ant from 1e-4; lambda 0.95; gamma 0.97
   on Reacher, and 0.5 in the coordination game, where a step has no consequences. The paper's values, for those who have the time:
   --total-steps 100000 --learning-rate 5e-5 --memory-learning-rate 1e-4 --gamma 0.99 --gae-lambda 0.98 --cloning-steps 0 (these rates
   would decay, too).
2. Observations are standardised by the dataset's statistics.
3. Rollouts take 50 steps (--rollout-length 10: the release's). On Reacher these are whole episodes, from first states of the dataset. Those
   from later states (--start-states any: the paper's, and ours on the ant) start where experts, who saw everything, have brought
   the arm; what agents must tell each other on the way is then learned from a tenth of the data alone.
4. Policies are initialised with a standard deviation of 0.22 instead of 1, close to the actions that the world model has seen.
5. The memory, 128 dimensions of noise at first, is initialised at a tenth of its scale, policies and values without weights on it.
6. On the ant a team then starts from behavioural cloning, as in MOReL (Kidambi et al., 2020), and its value from the data's returns, at a rate of
   1e-3 that decays to zero. From nothing, PPO would need millions of transitions before a team walks as well as the data; the
   paper's 100,000 learning steps are 200 million.
7. On the ant rewards are scaled so that values are about 1: a value moves by at most 0.2 in a learning step, too slow for hundreds.
8. lambda_g and l_eps are calibrated on held-out data by one rule (`calibrate`), and eps_g is measured in units of the
   dataset's standard deviations. The release has 0.1 and 2 for every task, on raw states.
"""

import json
import math
import os
import platform
import random
import signal
import subprocess
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
from mamujoco_envs import (
    HISTORY_LENGTH,
    InputError,
    Task,
    append_to_histories,
    evaluate,
    find_task,
    make_simulator,
    plot_team_strategy,
)

PAPER_SCORES = {  # Tables 3 and 4, MOMA-PPO
    "reacher-all-observant": "1.07 ± 0.01",
    "reacher-independent": "0.95 ± 0.06",
    "reacher-leader-only": "1.00 ± 0.01",
    "coordination-favorable": "1.00 ± 0.00",
    "coordination-neutral": "1.00 ± 0.00",
    "coordination-unfavorable": "1.00 ± 0.00",
    "ant-random-fo": "0.52 ± 0.07",
    "ant-medium-fo": "1.29 ± 0.06",
    "ant-full-replay-fo": "1.42 ± 0.07",
    "ant-expert-fo": "1.49 ± 0.01",
    "ant-random-po": "0.42 ± 0.05",
    "ant-medium-po": "0.54 ± 0.19",
    "ant-full-replay-po": "0.46 ± 0.10",
    "ant-expert-po": "0.18 ± 0.00",
}


@dataclass
class Args:
    task: str = "reacher-leader-only"
    """reacher-{all-observant,independent,leader-only}, ant-{random,medium,full-replay,expert}-{fo,po,po-other-legs} or coordination-{favorable,neutral,unfavorable}"""
    seed: int = 1
    """seed of networks, rollouts and minibatches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA GPU where there is one"""
    total_steps: int | None = None
    """learning steps of `transitions` each; if not given, see DEFAULTS (1,000: leader-only at 1.00; the paper's: 100,000)"""
    eval_every: int | None = None
    """learning steps between two evaluations, each followed by a checkpoint; if not given, see DEFAULTS"""
    eval_episodes: int | None = None
    """greedy episodes of an evaluation, from the same start states each time; if not given, see DEFAULTS (the paper's: 5); the final one has 100"""
    run_dir: Path | None = None
    """folder of the run; runs/TASK__moma_ppo__SEED__TIME if not given"""
    resume: Path | None = None
    """folder of a run to go on with; all other arguments are then the run's own"""
    compile: bool = False
    """compile cloning, the update and the rollout with torch.compile"""
    cudagraphs: bool = False
    """capture the update and the rollout step as CUDA graphs"""
    torch_deterministic: bool = True
    """only deterministic algorithms"""

    dataset: Path | None = None
    """HDF5 file in D4RL's layout; the task's own if not given"""
    world_model: Path | None = None
    """checkpoint written by world_model.py; the one shipped for the task's dataset if not given"""
    ground_truth: bool = False
    """roll out in the true simulator instead of the world model (Table 5)"""
    start_states: Literal["first", "any"] | None = None
    """rollouts start from first states of the dataset's episodes, or from any state of the dataset (the paper's); if not given, see DEFAULTS"""
    rollout_length: int | None = None
    """k, steps of a rollout (Figure 9: 5 to 50 make no difference; the release's: 10); if not given, see DEFAULTS"""
    penalty: Literal["epistemic", "aleatoric", "none"] = "epistemic"
    """what is subtracted from the reward: lambda_r eps_r + lambda_g eps_g, lambda_a eps_a (MOPO, Figure 4), or nothing"""
    lambda_r: float = 0.05
    """weight of eps_r, the ensemble's variance of the reward"""
    lambda_g: float | None = None
    """weight of eps_g; if not given, calibrated on held-out data: see `calibrate`"""
    lambda_a: float = 1.0
    """weight of eps_a, the largest aleatoric uncertainty of a member; only with --penalty aleatoric"""
    max_uncertainty: float | None = None
    """l_eps: a rollout ends where eps_g reaches it (inf: never); if not given, calibrated on held-out data"""

    cloning_steps: int | None = None
    """gradient steps of behavioural cloning, and of the values onto the data's returns, that a run begins with; if not given, see DEFAULTS (the paper's: 0)"""
    transitions: int = 2000
    """transitions of a learning step, in transitions / k parallel rollouts"""
    epochs: int = 5
    """passes over these transitions in a learning step"""
    minibatch_size: int = 256
    """transitions of a gradient step; the rest of a pass, smaller than that, is dropped"""
    learning_rate: float | None = None
    """Adam, of policies, values and mixer, decayed linearly to zero; if not given, see DEFAULTS (the paper's: 5e-5)"""
    memory_learning_rate: float | None = None
    """Adam, of the history encoders, decayed alike; if not given, see DEFAULTS (the paper's: 1e-4)"""
    gamma: float | None = None
    """discount factor; if not given, see DEFAULTS (the paper's: 0.99)"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation (the paper's: 0.98)"""
    reward_scale: float | None = None
    """what rewards are multiplied by, so that a clipped value can follow; if not given, 1, or (1 - gamma) / mean |reward| of the dataset on the ant"""
    clip: float = 0.2
    """clip value of the probability ratio and of the change of the value"""
    critic_coefficient: float = 0.5
    """weight of the critic loss"""
    entropy_coefficient: float = 0.001
    """learning rate of the dual variable alpha that weighs the entropy bonus"""
    action_penalty: float = 1.0
    """weight of the penalty on greedy actions beyond +-1"""
    max_grad_norm: float = 1.0
    """largest norm of the gradient of all parameters together"""


DEFAULTS = {
    "coordination": dict(  # single steps, without consequences
        total_steps=10, eval_every=2, eval_episodes=100, start_states="any", rollout_length=1,
        cloning_steps=0, learning_rate=1e-3, memory_learning_rate=1e-3, gamma=0.5,
    ),
    "Reacher-v4": dict(
        total_steps=300, eval_every=50, eval_episodes=100, start_states="first", rollout_length=50,
        cloning_steps=0, learning_rate=1e-3, memory_learning_rate=1e-3, gamma=0.97,
    ),
    "Ant-v4": dict(
        total_steps=200, eval_every=25, eval_episodes=20, start_states="any", rollout_length=50,
        cloning_steps=3000, learning_rate=1e-4, memory_learning_rate=1e-4, gamma=0.99,
    ),
}  # fmt: skip


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


class Gaussian(NamedTuple):
    """Policies of continuous actions: means and log standard deviations [batch, agent, action]."""

    mean: torch.Tensor
    log_std: torch.Tensor

    def sample(self) -> torch.Tensor:
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Joint log-density of the agents' actions, Eq. (6): [batch, agent, action] -> [batch]."""
        normalized = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * normalized.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum((1, 2))

    def greedy(self) -> torch.Tensor:
        return self.mean.clamp(-1, 1)

    def excess(self) -> torch.Tensor:
        """How far greedy actions are beyond +-1, squared (Appendix A.1): [batch]."""
        return (self.mean.abs() - 1).clamp(min=0).square().sum((1, 2))


class Categorical(NamedTuple):
    """Policies of discrete actions, which are one-hot vectors: logits [batch, agent, action]."""

    logits: torch.Tensor

    def sample(self) -> torch.Tensor:
        gumbel = -torch.empty_like(self.logits).exponential_().log()
        return F.one_hot((self.logits + gumbel).argmax(dim=-1), self.logits.shape[-1]).to(
            self.logits
        )

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Joint log-probability of the agents' actions, Eq. (6): [batch, agent, action] -> [batch]."""
        return (actions * self.logits.log_softmax(dim=-1)).sum((1, 2))

    def greedy(self) -> torch.Tensor:
        return F.one_hot(self.logits.argmax(dim=-1), self.logits.shape[-1]).to(self.logits)

    def excess(self) -> torch.Tensor:
        return torch.zeros_like(self.logits[:, 0, 0])


class Team(nn.Module):
    """Policies, values and history encoders of all agents, separate weights in one batch, and the value mixer."""

    def __init__(self, task: Task, states: torch.Tensor):
        """`states` [N, state]: their mean and standard deviation standardise what the networks see."""
        super().__init__()
        self.task = task
        memory_dim = 0 if task.discrete else 128
        if memory_dim:
            self.memory = HistoryEncoder(
                [width + task.action_dim for width in task.obs_dims], memory_dim
            )
        input_dims = [
            memory_dim + width for width in task.obs_dims
        ]  # an agent's input is [memory, observation]: padding comes last
        self.policy = MLP(
            input_dims, [256, 256], task.action_dim if task.discrete else 2 * task.action_dim
        )
        self.value = MLP(input_dims, [256, 256], 1)
        self.mixer = MLP([task.state_dim], [256, 256], task.num_agents + 1)
        for network in (
            self.policy,
            self.value,
        ):  # networks of the observation alone at first; the memory joins in as it learns
            for weight, width in zip(network[0].weight.data, task.obs_dims):
                weight[:memory_dim] = 0
                weight[memory_dim : memory_dim + width].uniform_(-(width**-0.5), width**-0.5)
        self.policy[-1].weight.data.mul_(0.1)
        self.policy[-1].bias.data.zero_()
        if not task.discrete:  # actions of a size that the world model has seen
            self.policy[-1].bias.data[..., task.action_dim :] = -1.5
        self.register_buffer("state_mean", states.mean(0))
        std = states.std(0)
        self.register_buffer("state_std", torch.where(std < 1e-6, 1, std))
        self.register_buffer("entropy_alpha", torch.zeros(()))

    def inputs(self, observations: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """h_t^i, what policies and values see: [batch, agent, obs], [batch, agent, 10, pair] -> [agent, batch, memory + obs]."""
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
        return torch.cat([self.memory(histories), observations.transpose(0, 1)], dim=-1)

    def distribution(self, inputs: torch.Tensor) -> Gaussian | Categorical:
        """The policies' distributions over actions; those of the agents are independent, given what each sees."""
        outputs = self.policy(inputs).transpose(0, 1)
        if self.task.discrete:
            return Categorical(outputs)
        mean, log_std = outputs.chunk(2, dim=-1)
        return Gaussian(mean, log_std.clamp(-6, 0))

    def team_value(self, inputs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """V(s) = sum_i w_i(s) V_i(h_i) + b(s) (Section 3.2, Eq. 4): [batch]."""
        weights = self.mixer(((states - self.state_mean) / self.state_std)[None])[0]
        return (weights[:, :-1] * self.value(inputs)[..., 0].T).sum(-1) + weights[:, -1]

    def act_greedily(self, observations: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """[batch, agent, action] in [-1, 1]."""
        return self.distribution(self.inputs(observations, histories)).greedy()


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


class Step(NamedTuple):
    """One step of the world model or of the simulator."""

    next_states: torch.Tensor  # [batch, state]
    rewards: torch.Tensor  # [batch]
    masks: torch.Tensor  # [batch], 0 if the next state is absorbing
    epsilon_r: torch.Tensor  # [batch]
    epsilon_g: torch.Tensor  # [batch]
    epsilon_a: torch.Tensor  # [batch]


class WorldModel:
    """The elites of a checkpoint by world_model.py, as a function from states and actions to a step (Section 3.1)."""

    def __init__(self, task: Task, path: Path, device: torch.device):
        self.task, (self.ensemble, self.checkpoint) = task, read_world_model(task, path, device)
        for parameter in self.ensemble.parameters():  # keep the elites alone
            parameter.data = parameter.data[self.checkpoint["elites"]]
        self.box, self.members = self.checkpoint["bounding_box"], len(self.checkpoint["elites"])

    @torch.no_grad()
    def step(
        self, states: torch.Tensor, actions: torch.Tensor, generator: torch.Generator | None = None
    ) -> Step:
        """[batch, state] and [batch, agent, action], clamped to +-1: one member, drawn anew, gives each next state."""
        joint = self.task.join_actions(actions.clamp(-1, 1))
        prediction = self.ensemble(
            states.expand(self.members, -1, -1), joint.expand(self.members, -1, -1)
        )
        epsilon_r, epsilon_g = epistemic_uncertainty(prediction, self.checkpoint["scale"])
        log_stds = torch.cat(
            [prediction.state_log_stds, prediction.reward_log_stds[..., None]], dim=-1
        )
        epsilon_a = (
            ((log_stds - self.checkpoint["scale"].log()) * 4).exp().sum(-1).sqrt().amax(0)
        )  # max ||diag(sigma^2)||_F
        member = torch.randint(
            self.members, (len(states),), device=states.device, generator=generator
        )
        next_states = prediction.next_states[
            member, torch.arange(len(states), device=states.device)
        ]
        return Step(
            next_states=next_states.clamp(self.box["state_min"], self.box["state_max"]),
            rewards=prediction.rewards.mean(0).clamp(
                self.box["reward_min"], self.box["reward_max"]
            ),
            masks=((prediction.mask_logits > 0).float().mean(0) > 0.5).float(),
            epsilon_r=epsilon_r,
            epsilon_g=epsilon_g,
            epsilon_a=epsilon_a,
        )


class GroundTruth:
    """The true simulator behind the interface of `WorldModel`; its uncertainty is zero."""

    def __init__(self, task: Task, num_envs: int):
        self.simulator = make_simulator(task, num_envs)

    def step(self, states: torch.Tensor, actions: torch.Tensor) -> Step:
        """Copies whose state is the one that the last step led to go on; the others are set to their new state."""
        known = torch.as_tensor(self.simulator.states).to(states)
        self.simulator.set_states(
            states.cpu().numpy(), where=(known != states).any(dim=1).cpu().numpy()
        )
        next_states, rewards, terminals = [
            torch.as_tensor(x) for x in self.simulator.step(actions.cpu().numpy())
        ]
        zeros = torch.zeros_like(states[:, 0])
        return Step(
            next_states.to(states),
            rewards.to(states),
            1 - terminals.to(states),
            zeros,
            zeros,
            zeros,
        )


def generalized_advantages(
    rewards, values, next_values, masks, time_out_masks, discount, gae_lambda
):
    """Returns and advantages [time, rollout], Appendix A: a terminal (mask 0) stops the bootstrap, a time-out does not."""
    returns, advantages = torch.empty_like(rewards), torch.empty_like(rewards)
    running_return, running_advantage = next_values[-1], torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        bootstrap = torch.where(time_out_masks[t] > 0, running_return, next_values[t])
        running_return = rewards[t] + discount * masks[t] * bootstrap
        delta = rewards[t] + discount * masks[t] * next_values[t] - values[t]
        running_advantage = (
            delta + discount * gae_lambda * masks[t] * time_out_masks[t] * running_advantage
        )
        returns[t], advantages[t] = running_return, running_advantage
    return returns, advantages


class Rollouts(NamedTuple):
    """Transitions [time, rollout]: a rollout that ends is followed, in its column, by one from a new state of the dataset."""

    states: torch.Tensor
    observations: torch.Tensor
    histories: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    next_states: torch.Tensor
    next_histories: torch.Tensor
    rewards: torch.Tensor
    masks: torch.Tensor
    time_out_masks: torch.Tensor


def draw_starts(dataset: OfflineDataset, args: Args, number: int) -> torch.Tensor:
    """Rows of the dataset from whose states and histories rollouts start: [number]."""
    rows = torch.randint(dataset.size, (number,), device=dataset.device)
    return dataset.episode_starts[rows] if args.start_states == "first" else rows


def rollout_step(team: Team, model, dataset: OfflineDataset, args: Args, states, histories, age):
    """One step of all rollouts: a transition, what the model reported of it, and the next (states, histories, age)."""
    observations = dataset.task.observe(states)
    inputs = team.inputs(observations, histories)
    distribution = team.distribution(inputs)
    actions = distribution.sample()
    step = model.step(states, actions)
    penalty = torch.zeros_like(step.rewards)
    if (
        args.penalty == "epistemic"
    ):  # bounded by l_eps (Section 3.1), whereas the test below is on the raw eps_g
        penalty = args.lambda_r * step.epsilon_r.clamp(max=args.max_uncertainty)
        penalty = penalty + args.lambda_g * step.epsilon_g.clamp(max=args.max_uncertainty)
    elif args.penalty == "aleatoric":
        penalty = args.lambda_a * step.epsilon_a
    age = age + 1
    uncertain = step.epsilon_g >= args.max_uncertainty
    time_out = uncertain | (age == args.rollout_length)
    next_histories = append_to_histories(histories, observations, actions)
    transition = Rollouts(
        states, observations, histories, actions, distribution.log_prob(actions), team.team_value(inputs, states),
        step.next_states, next_histories, step.rewards - penalty, step.masks, 1 - time_out.float(),
    )  # fmt: skip
    ended = time_out | (step.masks == 0)
    report = torch.stack(
        [step.rewards, penalty, step.epsilon_g, uncertain.float(), ended.float()]
    ).mean(1)
    indices = draw_starts(dataset, args, len(states))
    states = torch.where(ended[:, None], dataset.states[indices], step.next_states)
    histories = torch.where(ended[:, None, None, None], dataset.histories(indices), next_histories)
    return transition, report, (states, histories, torch.where(ended, 0, age))


@torch.no_grad()
def generate_rollouts(
    step: Callable, dataset: OfflineDataset, args: Args
) -> tuple[Rollouts, torch.Tensor]:
    """Algorithm 1, "generate synthetic data": `transitions` of them in whole rollouts, and the means of what the model reported."""
    indices = draw_starts(dataset, args, args.transitions // args.rollout_length)
    carry = (
        dataset.states[indices],
        dataset.histories(indices),
        torch.zeros(len(indices), device=dataset.device),
    )
    transitions, reports = [], []
    for _ in range(args.rollout_length):
        transition, report, carry = step(*carry)
        transitions.append(transition)
        reports.append(report)
    rollouts = Rollouts(*[torch.stack(field) for field in zip(*transitions)])
    rollouts.time_out_masks[-1] = 0
    reports = torch.stack(reports)
    reports[-1, -1] = 1  # the last step ends every rollout
    return rollouts, reports.mean(0)


class Minibatch(NamedTuple):
    states: torch.Tensor
    observations: torch.Tensor
    histories: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    returns: torch.Tensor
    advantages: torch.Tensor


@torch.no_grad()
def make_batch(team: Team, rollouts: Rollouts, args: Args) -> Minibatch:
    """All transitions of a learning step, rollout structure resolved: [time * rollout, ...]."""
    next_inputs = team.inputs(
        team.task.observe(rollouts.next_states.flatten(0, 1)), rollouts.next_histories.flatten(0, 1)
    )
    next_values = team.team_value(next_inputs, rollouts.next_states.flatten(0, 1)).view_as(
        rollouts.rewards
    )
    rewards = args.reward_scale * rollouts.rewards
    returns, advantages = generalized_advantages(
        rewards,
        rollouts.values,
        next_values,
        rollouts.masks,
        rollouts.time_out_masks,
        args.gamma,
        args.gae_lambda,
    )
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-3)
    return Minibatch(*[x.flatten(0, 1) for x in (*rollouts[:6], returns, advantages)])


def ppo_loss(team: Team, batch: Minibatch, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """Actor, critic, entropy bonus and action penalty (Appendix A.1); the loss [] and what is logged of it [7]."""
    inputs = team.inputs(batch.observations, batch.histories)
    distribution = team.distribution(inputs)
    log_probs = distribution.log_prob(batch.actions)
    log_ratio = (log_probs - batch.log_probs).clamp(max=10)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip, 1 + args.clip)
    actor_loss = -torch.min(ratio * batch.advantages, clipped_ratio * batch.advantages).mean()

    values = team.team_value(inputs, batch.states)
    clipped_values = batch.values + (values - batch.values).clamp(-args.clip, args.clip)
    critic_loss = torch.max(
        (clipped_values - batch.returns).square().mean(), (values - batch.returns).square().mean()
    )

    entropy = torch.min((-ratio * log_probs).mean(), (-clipped_ratio * log_probs).mean())
    with torch.no_grad():  # a dual variable: it grows while the entropy is below its target
        target_gap = team.task.entropy_target - entropy
        team.entropy_alpha.add_(args.entropy_coefficient * target_gap).clamp_(min=0)
    excess = distribution.excess()
    action_penalty = torch.max((ratio * excess).mean(), (clipped_ratio * excess).mean())

    loss = (
        actor_loss
        + args.critic_coefficient * critic_loss
        - team.entropy_alpha * entropy
        + args.action_penalty * action_penalty
    )
    clip_fraction = ((ratio - 1).abs() > args.clip).float().mean()
    approx_kl = (ratio - 1 - log_ratio).mean()
    metrics = torch.stack(
        [
            actor_loss,
            critic_loss,
            entropy,
            action_penalty,
            approx_kl,
            clip_fraction,
            team.entropy_alpha,
        ]
    )
    return loss, metrics.detach()


def discounted_returns(dataset: OfflineDataset, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards from each row to its episode's end; a time-out is followed by its last reward for ever: [N]."""
    rewards, masks, returns = dataset.rewards.tolist(), dataset.masks.tolist(), [0.0] * dataset.size
    last = set(dataset.episode_ends.tolist())
    for row in reversed(range(dataset.size)):
        following = rewards[row] / (1 - gamma) if row in last else returns[row + 1]
        returns[row] = rewards[row] + gamma * masks[row] * following
    return torch.tensor(returns, device=dataset.device)


def cloning_and_value_loss(
    team: Team, dataset: OfflineDataset, returns: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Of rows `indices`: -log pi(a | h) of the data's joint actions, and the squared error of the value of their states: []."""
    inputs = team.inputs(team.task.observe(dataset.states[indices]), dataset.histories(indices))
    values = team.team_value(inputs, dataset.states[indices])
    return (values - returns[indices]).square().mean() - team.distribution(inputs).log_prob(
        dataset.actions[indices]
    ).mean()


def clone(team: Team, dataset: OfflineDataset, args: Args) -> None:
    """Starts the policies from behavioural cloning of the data and the values from its returns, with Adam, whose rate decays from 1e-3 to zero."""
    returns = args.reward_scale * discounted_returns(dataset, args.gamma)
    optimizer = torch.optim.Adam(team.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.cloning_steps)
    loss_function = (
        torch.compile(cloning_and_value_loss) if args.compile else cloning_and_value_loss
    )
    for _ in tqdm(
        range(args.cloning_steps),
        unit="step",
        desc="behavioural cloning",
        disable=not sys.stderr.isatty(),
    ):
        loss = loss_function(
            team,
            dataset,
            returns,
            torch.randint(dataset.size, (args.minibatch_size,), device=dataset.device),
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(team.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
    if not all(parameter.isfinite().all() for parameter in team.parameters()):
        raise InputError(
            "behavioural cloning ended with weights that are not finite; is the dataset in the environment's units?"
        )


def calibrate(args: Args, checkpoint: dict) -> None:
    """lambda_g and l_eps by one rule for every dataset, from q, the 0.99 quantile of eps_g that the model has on held-out data.

    l_eps is 100 q: a rollout is cut where the members disagree as they never do on data (on the ant hardly
    any random action goes that far, and the penalty does the work). lambda_g makes the penalty one standard deviation of the
    dataset's reward at 10 q. So a team cannot earn by actions whose cost the model never saw, for which it
    pays up to ten standard deviations a step. (The paper gives no numbers; its release has lambda_g = 0.1 and l_eps = 2 for every
    task, which fit the scale of its own model's eps_g only.)
    """
    quantile = checkpoint["epsilon_g"]["held-out"]["0.99"]
    if args.max_uncertainty is None:
        args.max_uncertainty = 100 * quantile
    if args.lambda_g is None:
        args.lambda_g = float(checkpoint["scale"][-1]) / (10 * quantile)


def read_world_model(task: Task, path: Path, device: torch.device) -> tuple[Ensemble, dict]:
    """A checkpoint by world_model.py, all members and the rest of it, checked against the task."""
    command = f"python world_model.py --task {task.name} --output {path}"
    if not path.is_file():
        raise InputError(f"no world model at {path}; make it with: {command}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        dataset = checkpoint["dataset"]["name"]
        ensemble = Ensemble(**checkpoint["architecture"]).to(device)
        ensemble.load_state_dict(checkpoint["weights"])
        tensors = (
            checkpoint["weights"] | checkpoint["bounding_box"] | {"scale": checkpoint["scale"]}
        )
        checkpoint["elites"], checkpoint["epsilon_g"]["held-out"]["0.99"], checkpoint["description"]
    except Exception as error:
        raise InputError(
            f"{path} is not a whole world model ({type(error).__name__}); move it away and make it again with: {command}"
        ) from None
    if dataset != task.dataset:
        raise InputError(
            f"{path} is a world model of {dataset}; {task.name} needs one of {task.dataset}: {command}"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"'{name}' in {path} is not finite; move it away and make it again with: {command}"
            )
    return ensemble, checkpoint


@torch.no_grad()
def model_returns(
    team: Team, model: WorldModel, first_states: np.ndarray, device: torch.device
) -> np.ndarray:
    """Returns of the greedy team in the world model, from the true start states of an evaluation: [episode].

    More than in the environment means that the team exploits the model.
    """
    generator = torch.Generator(device).manual_seed(0)
    states = torch.as_tensor(first_states, dtype=torch.float32, device=device)
    pair = max(team.task.obs_dims) + team.task.action_dim
    histories = torch.zeros(len(states), team.task.num_agents, HISTORY_LENGTH, pair, device=device)
    returns, alive = torch.zeros(len(states), device=device), torch.ones(len(states), device=device)
    for _ in range(team.task.episode_length):
        observations = team.task.observe(states)
        actions = team.act_greedily(observations, histories)
        histories = append_to_histories(histories, observations, actions)
        step = model.step(states, actions, generator)
        states, returns, alive = (
            step.next_states,
            returns + alive * step.rewards,
            alive * step.masks,
        )
    return returns.cpu().numpy()


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
    run_dir, checkpoint = open_run(args, "moma_ppo")
    task, device = find_task(args.task), choose_device(args)
    for name, value in DEFAULTS[task.environment].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_positive(
        args,
        "total_steps",
        "eval_every",
        "eval_episodes",
        "transitions",
        "rollout_length",
        "epochs",
        "minibatch_size",
    )
    if args.cloning_steps < 0:
        raise InputError(f"--cloning-steps must be 0 or above; it is {args.cloning_steps}")
    if not 0 <= args.gamma < 1:
        raise InputError(f"--gamma must be from 0 to below 1; it is {args.gamma}")
    check_positive(
        args,
        "learning_rate",
        "memory_learning_rate",
        "max_grad_norm",
        *["reward_scale"] * (args.reward_scale is not None),
    )
    if args.transitions // args.rollout_length * args.rollout_length < args.minibatch_size:
        raise InputError(
            "--transitions must fill a --minibatch-size with rollouts of --rollout-length"
        )
    if task.discrete:  # single steps from any state, and no uncertainty (Section 5.2)
        args.rollout_length, args.start_states, args.penalty, args.max_uncertainty = (
            1,
            "any",
            "none",
            math.inf,
        )
    dataset = load_dataset(
        task, args.dataset, device
    )  # before seeding: recording it draws random numbers
    seed_everything(args.seed, args.torch_deterministic)
    if args.ground_truth:
        model, args.lambda_g, args.max_uncertainty = (
            GroundTruth(task, args.transitions // args.rollout_length),
            0.0,
            math.inf,
        )
    else:
        if (
            task.environment == "coordination" and args.world_model is None
        ):  # trained in seconds, so none ships
            args.world_model = run_dir / "world_model" / "world_model.pt"
            if not args.world_model.is_file():
                command = [
                    sys.executable,
                    Path(__file__).parent / "world_model.py",
                    "--task",
                    task.name,
                    "--seed",
                    str(args.seed),
                ]
                # Agents that agree are rare, and no single choice foretells it: the more agents, the longer it takes to learn.
                command += [
                    "--total-steps",
                    str(500 * (task.num_agents - 1)),
                    "--learning-rate",
                    "3e-3",
                    "--reward-weight-decay",
                    "0",
                ]
                command += [
                    "--hidden",
                    "64",
                    "64",
                    "--reward-hidden",
                    "128",
                    "128",
                    "--mask-hidden",
                    "64",
                ]
                subprocess.run(
                    [*command, "--run-dir", args.world_model.parent, "--device", device.type],
                    check=True,
                )
        args.world_model = args.world_model or Path(__file__).parent / "data" / f"{task.dataset}.pt"
        model = WorldModel(task, args.world_model, device)
        calibrate(args, model.checkpoint)
        learned_from = model.checkpoint["dataset"].get("source", dataset.description["source"])
        if learned_from != dataset.description["source"]:
            print(
                f"note: the world model learned from '{learned_from}', the dataset is '{dataset.description['source']}'"
            )

    if args.reward_scale is None:
        args.reward_scale = (
            (1 - args.gamma) / max(float(dataset.rewards.abs().mean()), 1e-3)
            if task.environment == "Ant-v4"
            else 1.0
        )

    # Initialize MAPPO policies and value function.
    team = Team(task, dataset.states).to(device)
    memory = [
        parameter for name, parameter in team.named_parameters() if name.startswith("memory.")
    ]
    others = [
        parameter for name, parameter in team.named_parameters() if not name.startswith("memory.")
    ]
    # Learning rates are tensors, so that a CUDA graph sees them change.
    groups = [
        {"params": others, "lr": torch.zeros((), device=device)},
        {"params": memory, "lr": torch.zeros((), device=device)},
    ]
    optimizer = torch.optim.Adam(groups, fused=True, capturable=args.cudagraphs)
    loss_function, step_function = ppo_loss, rollout_step
    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of eager mode
        loss_function = torch.compile(ppo_loss)
        step_function = rollout_step if args.ground_truth else torch.compile(rollout_step)

    def rollouts_and_batch() -> tuple[torch.Tensor, ...]:
        rollouts, report = generate_rollouts(
            lambda *carry: step_function(team, model, dataset, args, *carry), dataset, args
        )
        return report, *make_batch(team, rollouts, args)

    def update(*batch: torch.Tensor) -> torch.Tensor:
        loss, metrics = loss_function(team, Minibatch(*batch), args)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(team.parameters(), args.max_grad_norm)
        optimizer.step()
        return torch.cat([torch.stack([loss.detach(), norm]), metrics])

    if args.cudagraphs:
        update = CUDAGraph(update)
        rollouts_and_batch = (
            rollouts_and_batch if args.ground_truth else CUDAGraph(rollouts_and_batch)
        )

    first_step, seconds, evaluations, timings = 0, 0.0, [], []
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
    print(
        f"{run_dir}: {task.name}, seed {args.seed}, on {device}; lambda_g {args.lambda_g:.3g}, l_eps {args.max_uncertainty:.3g}"
    )

    def evaluate_team(step: int, episodes: int):
        evaluation = evaluate(task, team.act_greedily, episodes, device=device)
        record = {"step": step, "returns": evaluation.returns.tolist(), "seconds": seconds}
        record["score"] = float(task.normalized_score(evaluation.returns.mean()))
        if not args.ground_truth:
            record["model_returns"] = model_returns(
                team, model, evaluation.first_states, device
            ).tolist()
            writer.add_scalar("eval/model_return", np.mean(record["model_returns"]), step)
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
        state = {"script": "moma_ppo", "args": arguments, "step": step, "seconds": seconds}
        state |= {"evaluations": evaluations, "random_states": random_states()}
        save_whole(
            state | {"team": team.state_dict(), "optimizer": optimizer.state_dict()},
            run_dir / "checkpoint.pt",
        )

    if args.cloning_steps and checkpoint is None:
        started = time.perf_counter()
        clone(team, dataset, args)
        seconds = time.perf_counter() - started
        evaluations.append(evaluate_team(0, args.eval_episodes)[1])
        save_checkpoint(0)
        print(
            f"after behavioural cloning: score {evaluations[0]['score']:.2f}, {seconds:.0f} s",
            flush=True,
        )
    stop_signals: list[int] = []
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda number, _: stop_signals.append(number))
    progress = tqdm(
        total=args.total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty()
    )
    for step in range(first_step + 1, args.total_steps + 1):
        started = time.perf_counter()
        for group, learning_rate in zip(
            optimizer.param_groups, (args.learning_rate, args.memory_learning_rate)
        ):
            group["lr"].fill_(learning_rate * (1 - (step - 1) / args.total_steps))
        # Generate synthetic data.
        report, *batch = rollouts_and_batch()
        if device.type == "cuda":
            torch.cuda.synchronize()  # for an honest time, once in a learning step
        rolled_out = time.perf_counter()
        # Train agents.
        sums = torch.zeros(9, device=device)
        for _ in range(args.epochs):
            order = torch.randperm(len(batch[0]), device=device)
            for indices in order.split(args.minibatch_size)[: len(order) // args.minibatch_size]:
                sums += update(*[field[indices] for field in batch])
        metrics = (sums / (args.epochs * (len(order) // args.minibatch_size))).tolist()
        if not math.isfinite(metrics[0] + metrics[1]):  # loss and norm of the gradient
            last_good = (
                f"; {run_dir}/checkpoint.pt is the last good one"
                if (run_dir / "checkpoint.pt").exists()
                else ""
            )
            raise InputError(f"the loss of step {step} is not finite{last_good}")
        updated = time.perf_counter()
        seconds += updated - started
        timings.append([rolled_out - started, updated - rolled_out])

        if step % 10 == 0 or step == args.total_steps:
            names = [
                "loss",
                "grad_norm",
                "actor",
                "critic",
                "entropy",
                "action_penalty",
                "approx_kl",
                "clip_fraction",
                "entropy_alpha",
            ]
            for name, value in zip(names, metrics):
                writer.add_scalar(f"losses/{name}", value, step)
            names = [
                "world_model/reward",
                "world_model/penalty",
                "world_model/epsilon_g",
                "world_model/uncertain",
            ]
            for name, value in zip(names, report.tolist()):
                writer.add_scalar(name, value, step)
            writer.add_scalar("world_model/rollout_length", 1 / max(report[-1].item(), 1e-9), step)
            writer.add_scalar("charts/SPS", args.transitions / (updated - started), step)
            writer.add_scalar("charts/seconds_rollout", rolled_out - started, step)
            writer.add_scalar("charts/seconds_update", updated - rolled_out, step)
        stopping = bool(
            stop_signals
        )  # looked at once: one that comes later waits for the next step
        if step % args.eval_every == 0:
            evaluations.append(evaluate_team(step, args.eval_episodes)[1])
            score = evaluations[-1]["score"]
            progress.set_postfix_str(f"score {score:.2f}")
            if progress.disable:
                print(
                    f"step {step} of {args.total_steps}: score {score:.2f}, {seconds:.0f} s",
                    flush=True,
                )
        progress.update()
        if step % args.eval_every == 0 or stopping:
            save_checkpoint(step)
        if stopping:
            progress.close()
            print(f"stopped after step {step}; go on with: python moma_ppo.py --resume {run_dir}")
            sys.exit(128 + stop_signals[0])
    progress.close()

    evaluation, record = evaluate_team(args.total_steps, 100)
    scores = task.normalized_score(evaluation.returns)
    result = {
        "score": record["score"],
        "score_stderr": float(scores.std(ddof=1) / len(scores) ** 0.5),
        "best_score": max(entry["score"] for entry in [*evaluations, record] if entry["step"]),
        "paper_score": PAPER_SCORES.get(task.name.removesuffix("-other-legs")),
        "returns": record["returns"],
        "model_returns": record.get("model_returns"),
        "evaluations": evaluations,
        "args": {
            name: str(value) if isinstance(value, Path) or value == math.inf else value
            for name, value in vars(args).items()
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "dataset": dataset.description,
        "world_model": None if args.ground_truth else model.checkpoint["description"],
        "seconds": seconds,
        "steps_per_second": args.total_steps / seconds,
        "median_seconds": dict(zip(["rollout", "update"], np.median(timings, axis=0).tolist()))
        if timings
        else None,
    }
    save_checkpoint(args.total_steps)
    save_whole(result, run_dir / "result.json")
    if task.environment == "Reacher-v4":
        plot_team_strategy(task, evaluation, run_dir / "strategy.png")
    writer.close()
    print(
        f"{task.name}: score {result['score']:.3f} ± {result['score_stderr']:.3f} over 100 greedy episodes (paper: {result['paper_score'] or '-'})"
    )
    if record.get("model_returns"):
        print(
            f"return {evaluation.returns.mean():.2f} in the environment, {np.mean(record['model_returns']):.2f} in the world model"
        )
    print(f"{seconds:.0f} s of training; everything is in {run_dir}")
    return result


if __name__ == "__main__":
    try:
        train(
            tyro.cli(
                Args,
                description="Defaults: "
                + "; ".join(f"{name} {values}" for name, values in DEFAULTS.items()),
            )
        )
    except InputError as error:
        sys.exit(f"error: {error}")
