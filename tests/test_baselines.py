"""The baselines' losses against slow literal versions, and each script run, stopped and resumed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from baselines import ibc, iql, maiql
from data.offline_dataset import load_dataset
from mamujoco_envs import TASKS

ROOT = Path(__file__).parents[1]
TASK = TASKS["reacher-leader-only"]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    states, histories = torch.randn(9, TASK.state_dim), torch.randn(9, TASK.num_agents, 10, max(TASK.obs_dims) + 1)
    return TASK.observe(states), histories, (2 * torch.rand(9, TASK.num_agents, 1) - 1) * 0.95


def test_cloning_loss_is_the_tanh_gaussians_likelihood(batch):
    team = ibc.Team(TASK, torch.randn(50, TASK.state_dim))
    team.policy[-1].weight.data.mul_(3)  # log standard deviations on both sides of the clamp
    observations, histories, actions = batch
    mean, log_std = team.policy(team.inputs(observations, histories)).transpose(0, 1).chunk(2, dim=-1)
    expected = torch.zeros(())
    for agent in range(TASK.num_agents):
        for i in range(len(actions)):
            normal = Normal(mean[i, agent], log_std[i, agent].clamp(-6, 0).exp())
            expected -= TransformedDistribution(normal, TanhTransform()).log_prob(actions[i, agent]).sum() / len(actions)
    torch.testing.assert_close(ibc.cloning_loss(team, observations, histories, actions), expected, rtol=1e-3, atol=1e-3)


def test_cloning_finds_each_agents_own_actions(batch):
    """Actions that depend on an agent's own observation are learned; greedy actions are then these."""
    torch.manual_seed(0)
    states = torch.randn(256, TASK.state_dim)
    observations, histories = TASK.observe(states), torch.zeros(256, TASK.num_agents, 10, max(TASK.obs_dims) + 1)
    actions = 0.5 * torch.stack([states[:, 4:5].tanh(), -states[:, 1:2].tanh()], dim=1)  # target; elbow
    team = ibc.Team(TASK, states)
    optimizer = torch.optim.Adam(team.parameters(), lr=1e-3)
    before = (team.act_greedily(observations, histories) - actions).square().mean()
    for _ in range(60):
        optimizer.zero_grad()
        ibc.cloning_loss(team, observations, histories, actions).backward()
        optimizer.step()
    after = (team.act_greedily(observations, histories) - actions).square().mean()
    assert after.item() < before.item() / 20


# --- The IQL family ---

GAME = TASKS["coordination-unfavorable"]


def literal_mlp(mlp, slice_, x):
    for layer in mlp:
        x = x @ layer.weight[slice_, : x.shape[0]] + layer.bias[slice_, 0] if hasattr(layer, "weight") else layer(x)
    return x


def made_up_batch(module, task, size=7):
    dataset = load_dataset(task) if task.discrete else None
    if dataset is not None:
        return module.gather_batch(dataset, torch.randint(dataset.size, (size,)))
    states, next_states = torch.randn(size, task.state_dim), torch.randn(size, task.state_dim)
    histories, next_histories = torch.randn(2, size, task.num_agents, 10, max(task.obs_dims) + task.action_dim)
    actions = (2 * torch.rand(size, task.num_agents, task.action_dim) - 1) * 0.9
    masks = torch.tensor([1.0, 0.0] * size)[:size]
    rewards = torch.randn(size)
    return module.Batch(states, task.observe(states), histories, actions, rewards, masks, next_states, task.observe(next_states), next_histories)


def scrambled(team):
    """With targets unlike the networks they follow, and outputs of a size that shows."""
    for parameter in team.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return team


@pytest.mark.parametrize("task", [TASK, GAME], ids=lambda task: task.name)
def test_maiql_losses_equal_the_equations_sample_by_sample(task):
    torch.manual_seed(0)
    team = scrambled(maiql.Team(task, torch.randn(50, task.state_dim)))
    batch, args = made_up_batch(maiql, task), maiql.Args(gamma=0.9, max_weight=2.0)
    standardized = (batch.states - team.state_mean) / team.state_std
    next_standardized = (batch.next_states - team.state_mean) / team.state_std
    losses = torch.zeros(3)
    with torch.no_grad():
        inputs, next_inputs = team.inputs(batch.observations, batch.histories), team.inputs(batch.next_observations, batch.next_histories)
        target_inputs = team.inputs(batch.observations, batch.histories, target=True)
        log_probs = team.distribution(inputs).log_prob(batch.actions)
        for b in range(len(batch.rewards)):

            def value(inputs, states):
                weights = literal_mlp(team.value_mixer, 0, states[b])
                return sum(weights[i] * literal_mlp(team.value, i, inputs[i, b])[0] for i in range(task.num_agents)) + weights[-1]

            def q(twin, critics, mixer, inputs):
                weights = literal_mlp(mixer, 0, torch.cat([standardized[b], batch.actions[b].flatten()]))
                own = [torch.cat([batch.actions[b, i], inputs[i, b]]) for i in range(task.num_agents)]
                values = [literal_mlp(critics, twin * task.num_agents + i, x)[0] for i, x in enumerate(own)]
                return sum(weight * x for weight, x in zip(weights, values)) + weights[-1]

            target = min(q(twin, team.target_critics, team.target_critic_mixer, target_inputs) for twin in range(2))
            error = target - value(inputs, standardized)
            losses[0] += (0.3 if error < 0 else 0.7) * error**2
            losses[1] -= min(math.exp(3 * error), 2.0) * log_probs[b]
            goal = batch.rewards[b] + 0.9 * batch.masks[b] * value(next_inputs, next_standardized)
            losses[2] += sum((q(twin, team.critics, team.critic_mixer, inputs) - goal) ** 2 for twin in range(2))
        got = maiql.maiql_losses(team, batch, args)
    torch.testing.assert_close(got, losses / len(batch.rewards), rtol=1e-4, atol=1e-4)


def test_twins_differ_and_targets_equal_at_the_start():
    for team in (maiql.Team(TASK, torch.randn(50, 11)), iql.Team(iql.centralize(TASK), torch.randn(50, 11), 1)):
        twins = team.critics[0].weight.unflatten(0, (2, -1))
        assert not torch.equal(twins[0], twins[1])
        for name in ("critics", "memory"):
            for one, other in zip(getattr(team, name).parameters(), getattr(team, f"target_{name}").parameters()):
                assert torch.equal(one, other) and not other.requires_grad


def test_centralised_iql_chooses_among_all_joint_actions():
    task = iql.centralize(TASKS["coordination-unfavorable-3"])
    team, dataset = iql.Team(task, torch.randn(50, task.state_dim), 2), load_dataset(task)
    assert task.num_agents == 1 and len(team.options) == 8 and len({tuple(option) for option in team.options.tolist()}) == 8
    batch = iql.gather_batch(dataset, torch.arange(40))
    distribution = team.distribution(team.inputs(batch.observations, batch.histories))
    rows = [[tuple(option) for option in team.options.tolist()].index(tuple(action)) for action in batch.actions[:, 0].tolist()]
    expected = distribution.logits[:, 0].log_softmax(-1)[torch.arange(40), rows]
    torch.testing.assert_close(distribution.log_prob(batch.actions), expected)
    assert (distribution.greedy().unflatten(-1, (3, 2)).sum(-1) == 1).all()


@pytest.mark.parametrize("script, score", [("iql", 1), ("maiql", 0), ("ibc", 0)])
def test_who_agrees_on_the_unfavorable_dataset(script, score, tmp_path):
    """Table 3, last row: where agents lean apart, learners that execute alone follow the data; one that chooses for all does not."""
    command = [sys.executable, f"baselines/{script}.py", "--task", "coordination-unfavorable", "--total-steps", "300", "--eval-every", "100"]
    process = subprocess.run([*command, "--run-dir", tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["score"] == score
