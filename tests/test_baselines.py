"""The baselines' losses against slow literal versions, and each script run, stopped and resumed."""

import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from baselines import ibc
from mamujoco_envs import TASKS

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
