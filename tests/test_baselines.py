"""The baselines' losses against slow literal versions, and each script run, stopped and resumed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution, Uniform
from torch.distributions.transforms import TanhTransform

from baselines import ibc, icql, iomar, iql, itd3_bc, maiql, matd3_bc
from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import TASKS, append_to_histories, make_simulator

ROOT = Path(__file__).parents[1]
TASK = TASKS["reacher-leader-only"]
ANT = TASKS[
    "ant-medium-po"
]  # four agents of two actions, the first of which sees more than the others

each_task = pytest.mark.parametrize("task", [TASK, ANT], ids=lambda task: task.name)


def literal_mlp(mlp, slice_, x):
    for layer in mlp:
        x = (
            x @ layer.weight[slice_, : x.shape[0]] + layer.bias[slice_, 0]
            if hasattr(layer, "weight")
            else layer(x)
        )
    return x


def own_input(team, agent, agent_input):
    """Without the padding behind it."""
    widths = team.task.obs_dims
    return agent_input[: len(agent_input) - max(widths) + widths[agent]]


def literal_log_prob(team, agent, agent_input, action):
    outputs = literal_mlp(team.policy, agent, own_input(team, agent, agent_input))
    if team.task.discrete:
        return outputs.log_softmax(dim=0)[action.argmax()]
    actions = team.task.action_dim
    normal = Normal(outputs[:actions], outputs[actions:].clamp(-6, 0).exp())
    return TransformedDistribution(normal, TanhTransform()).log_prob(action).sum()


@each_task
def test_cloning_loss_is_the_tanh_gaussians_likelihood(task):
    torch.manual_seed(0)
    observations, histories = (
        task.observe(torch.randn(9, task.state_dim)),
        torch.randn(9, task.num_agents, 10, max(task.obs_dims) + task.action_dim),
    )
    actions = (2 * torch.rand(9, task.num_agents, task.action_dim) - 1) * 0.95
    team = ibc.Team(task, torch.randn(50, task.state_dim))
    team.policy[-1].weight.data.mul_(3)  # log standard deviations on both sides of the clamp
    inputs, expected = team.inputs(observations, histories), torch.zeros(())
    for agent in range(task.num_agents):
        for i in range(len(actions)):
            expected -= literal_log_prob(team, agent, inputs[agent, i], actions[i, agent]) / len(
                actions
            )
    torch.testing.assert_close(
        ibc.cloning_loss(team, observations, histories, actions), expected, rtol=1e-3, atol=1e-3
    )


def test_cloning_finds_each_agents_own_actions():
    """Actions that depend on an agent's own observation are learned; greedy actions are then these."""
    torch.manual_seed(0)
    states = torch.randn(256, TASK.state_dim)
    observations, histories = (
        TASK.observe(states),
        torch.zeros(256, TASK.num_agents, 10, max(TASK.obs_dims) + 1),
    )
    actions = 0.5 * torch.stack(
        [states[:, 4:5].tanh(), -states[:, 1:2].tanh()], dim=1
    )  # target; elbow
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


def made_up_batch(module, task, size=7):
    dataset = load_dataset(task) if task.discrete else None
    if dataset is not None:
        return module.gather_batch(dataset, torch.randint(dataset.size, (size,)))
    states, next_states = torch.randn(size, task.state_dim), torch.randn(size, task.state_dim)
    histories, next_histories = torch.randn(
        2, size, task.num_agents, 10, max(task.obs_dims) + task.action_dim
    )
    actions = (2 * torch.rand(size, task.num_agents, task.action_dim) - 1) * 0.9
    masks = torch.tensor([1.0, 0.0] * size)[:size]
    rewards = torch.randn(size)
    return module.Batch(
        states,
        task.observe(states),
        histories,
        actions,
        rewards,
        masks,
        next_states,
        task.observe(next_states),
        next_histories,
    )


def scrambled(team):
    """With targets unlike the networks they follow, and outputs of a size that shows."""
    for parameter in team.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return team


@each_task
def test_iql_losses_equal_the_equations_sample_by_sample(task):
    torch.manual_seed(0)
    task = iql.centralize(task)
    team = scrambled(iql.Team(task, torch.randn(50, task.state_dim), 1))
    batch, args = made_up_batch(iql, task), iql.Args(gamma=0.9, max_weight=2.0)
    losses = torch.zeros(3)
    with torch.no_grad():
        inputs, next_inputs = (
            team.inputs(batch.observations, batch.histories)[0],
            team.inputs(batch.next_observations, batch.next_histories)[0],
        )
        target_inputs = team.inputs(batch.observations, batch.histories, target=True)[0]
        for b in range(len(batch.rewards)):
            qs = [
                literal_mlp(team.critics, twin, torch.cat([batch.actions[b, 0], inputs[b]]))[0]
                for twin in range(2)
            ]
            target_qs = [
                literal_mlp(
                    team.target_critics, twin, torch.cat([batch.actions[b, 0], target_inputs[b]])
                )[0]
                for twin in range(2)
            ]
            error = min(target_qs) - literal_mlp(team.value, 0, inputs[b])[0]
            losses[0] += (0.3 if error < 0 else 0.7) * error**2
            losses[1] -= min(math.exp(3 * error), 2.0) * literal_log_prob(
                team, 0, inputs[b], batch.actions[b, 0]
            )
            goal = (
                batch.rewards[b]
                + 0.9 * batch.masks[b] * literal_mlp(team.value, 0, next_inputs[b])[0]
            )
            losses[2] += sum((q - goal) ** 2 for q in qs)
        got = iql.iql_losses(team, batch, args)
    torch.testing.assert_close(got, losses / len(batch.rewards), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("task", [TASK, ANT, GAME], ids=lambda task: task.name)
def test_maiql_losses_equal_the_equations_sample_by_sample(task):
    torch.manual_seed(0)
    team = scrambled(maiql.Team(task, torch.randn(50, task.state_dim)))
    batch, args = made_up_batch(maiql, task), maiql.Args(gamma=0.9, max_weight=2.0)
    standardized = (batch.states - team.state_mean) / team.state_std
    next_standardized = (batch.next_states - team.state_mean) / team.state_std
    losses = torch.zeros(3)
    with torch.no_grad():
        inputs, next_inputs = (
            team.inputs(batch.observations, batch.histories),
            team.inputs(batch.next_observations, batch.next_histories),
        )
        target_inputs = team.inputs(batch.observations, batch.histories, target=True)
        for b in range(len(batch.rewards)):

            def value(inputs, states):
                weights = literal_mlp(team.value_mixer, 0, states[b])
                return (
                    sum(
                        weights[i] * literal_mlp(team.value, i, own_input(team, i, inputs[i, b]))[0]
                        for i in range(task.num_agents)
                    )
                    + weights[-1]
                )

            def q(twin, critics, mixer, inputs):
                weights = literal_mlp(
                    mixer, 0, torch.cat([standardized[b], batch.actions[b].flatten()])
                )
                own = [
                    torch.cat([batch.actions[b, i], own_input(team, i, inputs[i, b])])
                    for i in range(task.num_agents)
                ]
                values = [
                    literal_mlp(critics, twin * task.num_agents + i, x)[0]
                    for i, x in enumerate(own)
                ]
                return sum(weight * x for weight, x in zip(weights, values)) + weights[-1]

            target = min(
                q(twin, team.target_critics, team.target_critic_mixer, target_inputs)
                for twin in range(2)
            )
            error = target - value(inputs, standardized)
            losses[0] += (0.3 if error < 0 else 0.7) * error**2
            log_prob = sum(
                literal_log_prob(team, i, inputs[i, b], batch.actions[b, i])
                for i in range(task.num_agents)
            )
            losses[1] -= min(math.exp(3 * error), 2.0) * log_prob
            goal = batch.rewards[b] + 0.9 * batch.masks[b] * value(next_inputs, next_standardized)
            losses[2] += sum(
                (q(twin, team.critics, team.critic_mixer, inputs) - goal) ** 2 for twin in range(2)
            )
        got = maiql.maiql_losses(team, batch, args)
    torch.testing.assert_close(got, losses / len(batch.rewards), rtol=1e-4, atol=2e-4)


@each_task
@pytest.mark.parametrize("module", [iql, maiql], ids=["iql", "maiql"])
def test_each_loss_of_the_iql_family_trains_its_own_networks_only(module, task):
    torch.manual_seed(0)
    task, states = iql.centralize(task) if module is iql else task, torch.randn(50, task.state_dim)
    team = scrambled(iql.Team(task, states, 1) if module is iql else maiql.Team(task, states))
    losses = iql.iql_losses if module is iql else maiql.maiql_losses
    batch, args = made_up_batch(module, task), module.Args(gamma=0.9)
    for index, trained in enumerate(
        [{"value", "value_mixer"}, {"policy"}, {"critics", "critic_mixer"}]
    ):
        team.zero_grad()
        losses(team, batch, args)[index].backward()
        moved = {
            name.split(".")[0]
            for name, parameter in team.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        }
        assert moved == {"memory"} | {name for name in trained if hasattr(team, name)}


def test_clipping_treats_each_agent_as_if_it_were_alone():
    torch.manual_seed(0)
    scales = torch.tensor([[0.01], [5.0], [0.01], [5.0]])  # two agents and their twins
    stacked = [torch.zeros(4, *shape, requires_grad=True) for shape in ((3, 2), (1, 2))]
    for parameter in stacked:
        parameter.grad = torch.randn_like(parameter) * scales[:, :, None]
    alone = [[parameter.detach()[agent::2].clone() for parameter in stacked] for agent in range(2)]
    for agent in range(2):
        for parameter, whole in zip(alone[agent], stacked):
            parameter.grad = whole.grad[agent::2].clone()
        torch.nn.utils.clip_grad_norm_(alone[agent], 1.0)
    itd3_bc.clip_each_agent(stacked, 2, 1.0)
    for agent in range(2):
        for parameter, whole in zip(alone[agent], stacked):
            torch.testing.assert_close(whole.grad[agent::2], parameter.grad, rtol=1e-4, atol=1e-6)


def test_twins_differ_and_targets_equal_at_the_start():
    modules = (maiql, itd3_bc, matd3_bc, icql, iomar)
    for team in (
        *[module.Team(TASK, torch.randn(50, 11)) for module in modules],
        iql.Team(iql.centralize(TASK), torch.randn(50, 11), 1),
    ):
        twins = team.critics[0].weight.unflatten(0, (2, -1))
        assert not torch.equal(twins[0], twins[1])
        for name in ("critics", "memory"):
            for one, other in zip(
                getattr(team, name).parameters(), getattr(team, f"target_{name}").parameters()
            ):
                assert torch.equal(one, other) and not other.requires_grad


def test_centralised_iql_chooses_among_all_joint_actions():
    task = iql.centralize(TASKS["coordination-unfavorable-3"])
    team, dataset = iql.Team(task, torch.randn(50, task.state_dim), 2), load_dataset(task)
    assert (
        task.num_agents == 1
        and len(team.options) == 8
        and len({tuple(option) for option in team.options.tolist()}) == 8
    )
    batch = iql.gather_batch(dataset, torch.arange(40))
    distribution = team.distribution(team.inputs(batch.observations, batch.histories))
    rows = [
        [tuple(option) for option in team.options.tolist()].index(tuple(action))
        for action in batch.actions[:, 0].tolist()
    ]
    expected = distribution.logits[:, 0].log_softmax(-1)[torch.arange(40), rows]
    torch.testing.assert_close(distribution.log_prob(batch.actions), expected)
    assert (distribution.greedy().unflatten(-1, (3, 2)).sum(-1) == 1).all()


def recorded_columns(task):
    """Four episodes, cut after 50 steps, of random actions that leave an ant on its feet."""
    rng, simulator, rows = np.random.default_rng(0), make_simulator(task, 4), []
    states = simulator.reset([np.random.default_rng(seed) for seed in range(4)])
    for _ in range(50):
        actions = rng.uniform(-0.3, 0.3, size=(4, task.num_agents, task.action_dim))
        next_states, rewards, terminals = simulator.step(actions)
        assert not terminals.any()
        rows.append(
            (states, task.join_actions(torch.as_tensor(actions)).numpy(), rewards, next_states)
        )
        states = next_states
    names = ("observations", "actions", "rewards", "next_observations")
    columns = {
        name: np.stack(column, axis=1).reshape(200, *column[0].shape[1:])
        for name, column in zip(names, zip(*rows))
    }
    columns |= {"terminals": np.zeros(200), "timeouts": np.arange(200) % 50 == 49}
    return {
        name: column.astype(np.float32) for name, column in columns.items()
    }  # as in files: tensors share their memory


@each_task
@pytest.mark.parametrize("module", [iql, maiql], ids=["iql", "maiql"])
def test_returns_of_the_ant_span_1000_and_those_of_reacher_stay(module, task):
    columns = recorded_columns(task)
    before, view = (
        {name: column.copy() for name, column in columns.items()},
        iql.centralize(task) if module is iql else task,
    )
    dataset = OfflineDataset(view, columns)
    span = np.ptp(dataset.episode_returns())
    scale = module.normalize_rewards(dataset)
    assert scale == (pytest.approx(1000 / span) if task is ANT else 1)
    assert np.ptp(dataset.episode_returns()) == pytest.approx(
        1000 if task is ANT else span, rel=1e-5
    )
    np.testing.assert_allclose(dataset.rewards, scale * before["rewards"], rtol=1e-6)
    assert all(np.array_equal(columns[name], before[name]) for name in columns)
    assert (
        module.normalize_rewards(OfflineDataset(view, columns | {"timeouts": np.zeros(200)})) == 1
    )  # a single return spans nothing


@pytest.fixture(params=[(TASK, 1.0), (ANT, 0.25)], ids=["reacher", "ant"])
def online_data(request):
    """Four episodes and, behind them, rollouts of an untrained team."""
    task, scale = request.param
    torch.manual_seed(0)
    dataset = OfflineDataset(task, recorded_columns(task))
    args = maiql.Args(total_steps=4, rollout_every=2, rollout_length=5)
    return maiql.Team(task, dataset.states), maiql.OnlineData(task, dataset, args, scale)


def test_online_data_are_rollouts_in_the_true_simulator_with_their_histories(online_data):
    """Their rewards are in the unit of the dataset's, which were scaled before."""
    team, online = online_data
    dataset, task, simulator = online.dataset, team.task, make_simulator(team.task, 1)
    for _ in range(2):
        online.collect(team)
    assert len(dataset.episode_returns()) == 4 and np.allclose(
        dataset.episode_returns(), dataset.rewards[:200].view(4, 50).sum(1)
    )
    recorded = online.rows[: online.filled].sort().values
    by_rollout = recorded.tensor_split(
        (recorded.diff() > 1).nonzero()[:, 0] + 1
    )  # ten rows of history stand before each
    assert (
        len(by_rollout) == 40 and dataset.size == 200
    )  # as many transitions as the dataset has, if none ends early
    for rows in by_rollout:
        start = (dataset.states[:200] == dataset.states[rows[0]]).all(1).nonzero()[0]
        histories = dataset.histories(start)
        simulator.set_states(dataset.states[start].numpy())
        for row in rows:
            row = row[None]
            torch.testing.assert_close(dataset.histories(row), histories)
            next_states, rewards, terminals = simulator.step(dataset.actions[row].numpy())
            np.testing.assert_allclose(dataset.next_states[row], next_states, atol=1e-4)
            np.testing.assert_allclose(
                dataset.rewards[row], online.reward_scale * rewards, atol=1e-5
            )
            assert dataset.masks[row] == 1 - terminals
            histories = append_to_histories(
                histories, task.observe(dataset.states[row]), dataset.actions[row]
            )
        assert torch.equal(dataset.next_states[rows[:-1]], dataset.states[rows[1:]])
        assert (dataset.masks[rows[:-1]] == 1).all() and (
            len(rows) == 5 or dataset.masks[rows[-1]] == 0
        )
    assert len(dataset.actions[recorded].unique()) > 300  # sampled, not greedy
    assert set(online.sample(20_000).tolist()) == {*range(200), *recorded.tolist()}


def test_online_data_end_at_a_terminal(online_data, monkeypatch):
    team, online = online_data
    step = online.simulator.step
    ends = iter([[0], [], [3, 4], [], []])  # which rollouts end at which of the five steps

    def step_with_terminals(actions):
        states, rewards, _ = step(actions)
        return states, rewards, np.isin(np.arange(20), next(ends))

    monkeypatch.setattr(online.simulator, "step", step_with_terminals)
    online.collect(team)
    assert online.filled == 20 + 19 + 19 + 17 + 17
    assert (online.dataset.masks[online.rows[: online.filled]] == 0).sum() == 3


# --- The TD3 family ---


def literal_q(team, twin, agent, action, agent_input, target=False):
    critics = team.target_critics if target else team.critics
    return literal_mlp(
        critics,
        twin * team.task.num_agents + agent,
        torch.cat([action, own_input(team, agent, agent_input)]),
    )[0]


def literal_action(team, agent, agent_input, target=False):
    return literal_mlp(
        team.target_policy if target else team.policy, agent, own_input(team, agent, agent_input)
    ).tanh()


def td3_case(module, task, size=5):
    """A team with targets unlike its networks, a batch, what its agents see now and next, and noise."""
    torch.manual_seed(0)
    team = scrambled(module.Team(task, torch.randn(50, task.state_dim)))
    batch = made_up_batch(module, task, size)
    with torch.no_grad():
        inputs = team.inputs(batch.observations, batch.histories)
        next_inputs = team.inputs(batch.next_observations, batch.next_histories, target=True)
    return team, batch, inputs, next_inputs, 2 * torch.randn_like(batch.actions)


def literal_next_action(team, agent, next_input, noise):
    action = literal_action(team, agent, next_input, target=True)
    return (action + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)


@torch.no_grad()
def literal_td_loss(team, batch, inputs, next_inputs, noise):
    loss = torch.zeros(())
    for b in range(len(batch.rewards)):
        for i in range(team.task.num_agents):
            action = literal_next_action(team, i, next_inputs[i, b], noise[b, i])
            next_q = min(
                literal_q(team, twin, i, action, next_inputs[i, b], target=True)
                for twin in range(2)
            )
            target = batch.rewards[b] + 0.9 * batch.masks[b] * next_q
            loss += sum(
                (literal_q(team, twin, i, batch.actions[b, i], inputs[i, b]) - target) ** 2
                for twin in range(2)
            )
    return loss / len(batch.rewards)


@each_task
def test_itd3_bc_losses_equal_the_equations_agent_by_agent(task):
    team, batch, inputs, next_inputs, noise = td3_case(itd3_bc, task)
    args = itd3_bc.Args(gamma=0.9)
    policy_loss = torch.zeros(())
    with torch.no_grad():
        for i in range(task.num_agents):
            actions = [literal_action(team, i, x) for x in inputs[i]]
            qs = torch.stack([literal_q(team, 0, i, a, x) for a, x in zip(actions, inputs[i])])
            policy_loss += sum(
                (a - data) ** 2 for a, data in zip(actions, batch.actions[:, i])
            ).mean() / len(actions)
            policy_loss -= 2.5 / qs.abs().mean() * qs.mean()
    expected = torch.stack([literal_td_loss(team, batch, inputs, next_inputs, noise), policy_loss])
    torch.testing.assert_close(
        itd3_bc.itd3_bc_losses(team, batch, noise, args, True), expected, rtol=1e-4, atol=1e-4
    )
    between = itd3_bc.itd3_bc_losses(team, batch, noise, args, False)
    torch.testing.assert_close(between, expected * torch.tensor([1.0, 0.0]), rtol=1e-4, atol=1e-4)


@each_task
def test_matd3_bc_losses_equal_the_equations_with_mixed_values(task):
    team, batch, inputs, next_inputs, noise = td3_case(matd3_bc, task)
    agents = range(task.num_agents)

    def team_q(twin, state, actions, own_inputs, target=False):
        mixer = team.target_critic_mixer if target else team.critic_mixer
        weights = literal_mlp(
            mixer, 0, torch.cat([(state - team.state_mean) / team.state_std, *actions])
        )
        values = [literal_q(team, twin, i, actions[i], own_inputs[i], target) for i in agents]
        return sum(weight * value for weight, value in zip(weights, values)) + weights[-1]

    critic_loss, cloning, qs = torch.zeros(()), torch.zeros(()), []
    with torch.no_grad():
        for b in range(len(batch.rewards)):
            next_actions = [
                literal_next_action(team, i, next_inputs[i, b], noise[b, i]) for i in agents
            ]
            next_q = min(
                team_q(twin, batch.next_states[b], next_actions, next_inputs[:, b], target=True)
                for twin in range(2)
            )
            target = batch.rewards[b] + 0.9 * batch.masks[b] * next_q
            critic_loss += sum(
                (team_q(twin, batch.states[b], list(batch.actions[b]), inputs[:, b]) - target) ** 2
                for twin in range(2)
            )
            actions = [literal_action(team, i, inputs[i, b]) for i in agents]
            qs.append(team_q(0, batch.states[b], actions, inputs[:, b]))
            cloning += sum((actions[i] - batch.actions[b, i]).square().mean() for i in agents)
        qs = torch.stack(qs)
    expected = torch.stack(
        [critic_loss / len(qs), cloning / len(qs) - 2.5 * qs.mean() / qs.abs().mean()]
    )
    got = matd3_bc.matd3_bc_losses(team, batch, noise, matd3_bc.Args(gamma=0.9), True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def literal_conservative_loss(team, batch, inputs, next_inputs, noise):
    loss, third = torch.zeros(()), len(noise) // 3
    for b in range(len(batch.rewards)):
        for i in range(team.task.num_agents):
            here, after = (literal_action(team, i, x) for x in (inputs[i, b], next_inputs[i, b]))
            for twin in range(2):
                terms = []
                for j, z in enumerate(noise[:, b, i]):
                    center = here if j < 2 * third else after
                    action = 2 * z - 1 if j < third else (center + 0.2 * z).clamp(-1, 1)
                    log_density = (
                        Uniform(-1, 1).log_prob(action)
                        if j < third
                        else Normal(0, 0.2).log_prob(0.2 * z)
                    ).sum()
                    terms.append(literal_q(team, twin, i, action, inputs[i, b]) - log_density)
                loss += torch.stack(terms).logsumexp(0) - literal_q(
                    team, twin, i, batch.actions[b, i], inputs[i, b]
                )
    return loss / len(batch.rewards)


@each_task
@pytest.mark.parametrize("module", [icql, iomar], ids=["icql", "iomar"])
def test_conservative_loss_is_the_importance_weighted_log_sum_exp(module, task):
    team, batch, inputs, next_inputs, smoothing = td3_case(module, task)
    args = module.Args(gamma=0.9, cql_samples=3, cql_alpha=0.5)
    _, noise = module.draw_noise(batch, args)
    assert (
        noise.shape == (9, 5, task.num_agents, task.action_dim)
        and 0 <= noise[:3].min()
        and noise[:3].max() <= 1
    )
    conservative = literal_conservative_loss(team, batch, inputs, next_inputs, noise)
    torch.testing.assert_close(
        module.conservative_loss(team, batch, inputs, next_inputs, noise, args),
        conservative,
        rtol=1e-4,
        atol=1e-4,
    )
    losses = icql.icql_losses if module is icql else iomar.iomar_losses
    got = losses(
        team, batch, (smoothing, noise, torch.randn(2, 20, *batch.actions.shape)), args, True
    )
    torch.testing.assert_close(
        got[0],
        literal_td_loss(team, batch, inputs, next_inputs, smoothing) + 0.5 * conservative,
        rtol=1e-4,
        atol=1e-4,
    )
    if module is icql:
        policy_loss = torch.zeros(())
        with torch.no_grad():
            for i in range(task.num_agents):
                for x in inputs[i]:
                    policy_loss -= literal_q(team, 0, i, literal_action(team, i, x), x) / len(
                        inputs[i]
                    )
        torch.testing.assert_close(got[1], policy_loss, rtol=1e-4, atol=1e-4)


@each_task
def test_omar_sampler_equals_a_search_for_each_agent_and_state(task):
    team, batch, inputs, _, smoothing = td3_case(iomar, task)
    args = iomar.Args(
        omar_iterations=3, omar_samples=6, omar_elites=3, omar_mean=0.1, omega=0.5, cql_alpha=1.0
    )
    noise, policy_actions = torch.randn(3, 6, *batch.actions.shape), team.act(inputs).detach()
    got = iomar.best_sampled_actions(team, inputs, policy_actions, noise, args)
    kept, policy_loss = 0, torch.zeros(())
    with torch.no_grad():
        for b in range(5):
            for i in range(task.num_agents):
                q = lambda action: literal_q(team, 0, i, action, inputs[i, b]).item()  # noqa: E731
                mean, std, elites = (
                    torch.full((task.action_dim,), 0.1),
                    torch.full((task.action_dim,), 2.0),
                    [],
                )
                for z in noise[:, :, b, i]:
                    pool = [(mean + std * x).clamp(-1, 1) for x in z] + elites
                    elites = sorted(pool, key=q, reverse=True)[:3]
                    mean, std = torch.stack(elites).mean(0), torch.stack(elites).std(0) + 1e-6
                own = literal_action(team, i, inputs[i, b])
                best = own if q(own) >= q(elites[0]) else elites[0]
                kept += best is own
                torch.testing.assert_close(got[b, i], best, rtol=1e-3, atol=1e-3)
                policy_loss += (
                    0.5 * (own - best).square().mean() + 1e-3 * own.square().mean() - 0.5 * q(own)
                ) / 5
    assert kept < 5 * task.num_agents
    loss = iomar.iomar_losses(
        team, batch, (smoothing, iomar.draw_noise(batch, args)[1], noise), args, True
    )[1]
    torch.testing.assert_close(loss, policy_loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "module", [itd3_bc, matd3_bc, icql, iomar], ids=lambda module: module.__name__.split(".")[-1]
)
@each_task
def test_each_loss_trains_its_own_networks_only(module, task):
    team, batch, _, _, noise = td3_case(module, task)
    args = module.Args(cql_alpha=1.0) if module in (icql, iomar) else module.Args()
    if module in (icql, iomar):
        noise = (*module.draw_noise(batch, args), torch.randn(2, 20, *batch.actions.shape))
    losses = getattr(module, f"{module.__name__.split('.')[-1]}_losses")
    for index, (trained, untouched) in enumerate([("critics", "policy"), ("policy", "critics")]):
        team.zero_grad()
        losses(team, batch, noise, args, True)[index].backward()
        assert all(
            parameter.grad.abs().sum() == 0 for parameter in getattr(team, untouched).parameters()
        )
        assert all(
            parameter.grad.abs().sum() > 0 for parameter in getattr(team, trained).parameters()
        )
        assert sum(parameter.grad.abs().sum() for parameter in team.memory.parameters()) > 0
        assert all(
            parameter.grad is None
            for name, parameter in team.named_parameters()
            if name.startswith("target_")
        )
        if module is matd3_bc:
            moved = (
                sum(parameter.grad.abs().sum() for parameter in team.critic_mixer.parameters()) > 0
            )
            assert moved == (trained == "critics")
    team.zero_grad()
    losses(team, batch, noise, args, False).sum().backward()
    assert all(
        parameter.grad is None for parameter in team.policy.parameters()
    )  # so that Adam leaves them where they are


@pytest.mark.parametrize("script, score", [("iql", 1), ("maiql", 0), ("ibc", 0)])
def test_who_agrees_on_the_unfavorable_dataset(script, score, tmp_path):
    """Table 3, last row: where agents lean apart, learners that execute alone follow the data; one that chooses for all does not."""
    command = [
        sys.executable,
        f"baselines/{script}.py",
        "--task",
        "coordination-unfavorable",
        "--total-steps",
        "300",
        "--eval-every",
        "100",
    ]
    process = subprocess.run(
        [*command, "--run-dir", tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["score"] == score
