"""The baselines' losses against slow literal versions: one agent, one transition at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up import (
    ANT,
    BASELINES,
    GAME,
    REACHER,
    all_literal_inputs,
    import_script,
    literal_inputs,
    literal_mlp,
    made_up_batch,
    made_up_histories,
    made_up_states,
    recorded_columns,
    scramble,
    write_dataset,
)
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from baselines import ibc, icql, inspo, iomar, iql, itd3_bc, maiql, matd3_bc
from coordination_game import make_columns
from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import append_to_histories, find_task

DECENTRALISED = [name for name in BASELINES if name != "iql"] + ["moma_ppo"]
TD3_FAMILY = [itd3_bc, matd3_bc, icql, iomar]


def name_of(module):
    return module.__name__.split(".")[-1]


def each(*tasks):
    return pytest.mark.parametrize("task", tasks, ids=lambda task: task.name)


def modules(*names):
    return pytest.mark.parametrize("module", names, ids=name_of)


def made_up_team(module, task, **options):
    """Moved off its start, with targets unlike the networks that they follow."""
    states = made_up_states(50, task)
    team = scramble(module.Team(task, states, module.Args(**options)))
    return team.to(torch.get_default_dtype())


def literal_log_prob(team, agent, x, action):
    """log pi_i(a | h), of true width [in]."""
    outputs = literal_mlp(team.policy, agent, x)
    if team.task.discrete:
        return outputs.log_softmax(dim=0)[action.argmax()]
    mean, log_std = outputs.chunk(2)
    normal = Normal(mean, log_std.clamp(-6, 0).exp())
    return TransformedDistribution(normal, TanhTransform()).log_prob(action).sum()


def mixed(network, twin, mixer_input, own_inputs):
    """sum_i w_i V_i(h_i) + b, from inputs of true width [agent][in] (Eq. 4)."""
    weights = literal_mlp(network.mixer, 0, mixer_input)
    rows = range(twin * len(own_inputs), (twin + 1) * len(own_inputs))
    values = [literal_mlp(network.values, row, x)[0] for row, x in zip(rows, own_inputs)]
    return sum(weight * value for weight, value in zip(weights, values)) + weights[-1]


# What all teams have in common.


@pytest.mark.parametrize("name", DECENTRALISED)
@each(find_task("reacher-all-observant"), find_task("reacher-independent"), REACHER, ANT)
def test_an_agent_acts_on_its_own_observation_and_history_alone(task, name):
    module = import_script(name)
    team = made_up_team(module, task, memory="attention")
    observations, histories = task.observe(made_up_states(5, task)), made_up_histories(5, task)
    actions = team.act_greedily(observations, histories)
    assert (actions.abs() < 1).any()  # otherwise the bound would hide a change
    for changed in range(task.num_agents):
        for what in (observations, histories):
            before = what.clone()
            what[:, changed] += torch.randn_like(what[:, changed])
            after = team.act_greedily(observations, histories)
            same = [torch.equal(actions[:, i], after[:, i]) for i in range(task.num_agents)]
            assert same == [i != changed for i in range(task.num_agents)]
            what.copy_(before)


@pytest.mark.parametrize("name", [*BASELINES, "moma_ppo"])
def test_agents_and_twins_start_different_and_targets_equal(name):
    module = import_script(name)
    team = module.Team(REACHER, made_up_states(50), module.Args(memory="attention"))
    parameters = dict(team.named_parameters())
    for key, parameter in parameters.items():
        slices = parameter if "norm" not in key and len(parameter) > 1 else parameter[:0]
        if name == "moma_ppo" and key == "policy.4.bias":
            continue  # zero for all
        for one, other in zip(slices, slices[1:]):
            assert not torch.equal(one, other), key
        if key.startswith("target_"):
            assert torch.equal(parameter, parameters[key.removeprefix("target_")]), key


@pytest.mark.parametrize("name", ["ibc", "iql", "maiql", "inspo", "moma_ppo"])
@each(REACHER, ANT)
def test_log_standard_deviations_start_inside_their_clamp(task, name):
    module = import_script(name)
    team, states = (
        module.Team(task, made_up_states(50, task), module.Args()),
        made_up_states(500, task),
    )
    inputs = team.inputs(team.task.observe(states), made_up_histories(500, team.task))
    _, log_stds = team.policy(inputs).chunk(2, dim=-1)
    assert -3 < log_stds.min() and log_stds.max() < -0.3


def gradients(team):
    named = team.named_parameters()
    return {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.any()}


@modules(iql, maiql)
@each(REACHER, ANT)
def test_each_loss_of_the_iql_family_trains_its_own_networks_only(task, module):
    team = made_up_team(module, task, memory="attention")
    losses = iql.iql_losses if module is iql else maiql.maiql_losses
    batch = made_up_batch(team.task)
    for index, trained in enumerate(["value", "policy", "critics"]):
        team.zero_grad()
        losses(team, batch, module.Args(gamma=0.9))[index].backward()
        assert gradients(team) == {"memory", trained}


@modules(*TD3_FAMILY)
@each(REACHER, ANT)
def test_each_loss_of_the_td3_family_trains_its_own_networks_only(task, module):
    team, batch, noise = made_up_team(module, task), made_up_batch(task), noise_of(task)
    *critic_losses, policy_loss = td3_losses(module, team, batch, noise)
    sum(critic_losses).backward(retain_graph=True)
    assert gradients(team) == {"critics", "memory"}
    team.zero_grad()
    policy_loss.backward()
    assert gradients(team) == {"policy", "memory"}
    team.zero_grad()
    sum(td3_losses(module, team, batch, noise, learn_policy=False)).backward()
    # So that Adam leaves the policies where they are.
    assert all(parameter.grad is None for parameter in team.policy.parameters())


# IBC.


@each(REACHER, ANT, GAME)
def test_cloning_loss_is_the_likelihood_of_the_data(task, float64):
    team, batch = made_up_team(ibc, task), made_up_batch(task)
    if not task.discrete:  # log standard deviations on both sides of the clamp
        team.policy[-1].weight.data.mul_(30)
    inputs = all_literal_inputs(team, batch.observations, batch.histories)
    expected = -sum(
        literal_log_prob(team, agent, inputs[agent][b], batch.actions[b, agent])
        for agent in range(task.num_agents)
        for b in range(len(batch.rewards))
    )
    got = ibc.cloning_loss(team, batch)
    torch.testing.assert_close(got, expected / len(batch.rewards), rtol=1e-6, atol=0)


def test_cloning_finds_each_agents_own_actions():
    """Greedy actions become those of the data, which depend on an agent's own observation."""
    batch, states = made_up_batch(REACHER, 64), made_up_states(64)
    x = (states - states.mean(0)) / states.std(0)
    actions = 0.5 * torch.stack([x[:, 4:5].tanh(), -x[:, 1:2].tanh()], dim=1)  # target; elbow
    batch = batch._replace(observations=REACHER.observe(states), actions=actions)
    team = ibc.Team(REACHER, states, ibc.Args())
    optimizer = torch.optim.Adam(team.parameters(), lr=1e-3)

    def error():
        return (team.act_greedily(batch.observations, batch.histories) - actions).square().mean()

    before = error().item()
    for _ in range(60):
        optimizer.zero_grad()
        ibc.cloning_loss(team, batch).backward()
        optimizer.step()
    assert error().item() < before / 20


# IQL and MAIQL.


def expectile_loss(error):
    return (0.3 if error < 0 else 0.7) * error**2


@pytest.mark.parametrize("memory", ["none", "attention"])
@each(REACHER, ANT)
@torch.no_grad()
def test_iql_losses_equal_the_equations_sample_by_sample(task, memory, float64):
    team = made_up_team(iql, task, memory=memory)
    batch, args = made_up_batch(team.task), iql.Args(gamma=0.9, max_weight=2.0)
    inputs, target_inputs = (
        all_literal_inputs(team, batch.observations, batch.histories, target)[0]
        for target in (False, True)
    )
    next_inputs = all_literal_inputs(team, batch.next_observations, batch.next_histories)[0]
    losses = torch.zeros(3)
    for b in range(len(batch.rewards)):
        action = batch.actions[b, 0]

        def qs(critics, x, action=action):
            return [literal_mlp(critics, twin, torch.cat([action, x]))[0] for twin in range(2)]

        target_q = min(qs(team.target_critics, target_inputs[b]))
        error = target_q - literal_mlp(team.value, 0, inputs[b])[0]
        losses[0] += expectile_loss(error)
        weight = min(math.exp(3 * error), 2.0)
        losses[1] -= weight * literal_log_prob(team, 0, inputs[b], action)
        next_value = literal_mlp(team.value, 0, next_inputs[b])[0]
        td_target = batch.rewards[b] + 0.9 * batch.masks[b] * next_value
        losses[2] += sum((q - td_target) ** 2 for q in qs(team.critics, inputs[b]))
    got = torch.stack(iql.iql_losses(team, batch, args))
    torch.testing.assert_close(got, losses / len(batch.rewards), rtol=1e-6, atol=0)


@each(REACHER, ANT, GAME)
@torch.no_grad()
def test_maiql_losses_equal_the_equations_sample_by_sample(task, float64):
    team, agents = made_up_team(maiql, task), range(task.num_agents)
    batch, args = made_up_batch(task), maiql.Args(gamma=0.9, max_weight=2.0)
    inputs, target_inputs = (
        all_literal_inputs(team, batch.observations, batch.histories, target)
        for target in (False, True)
    )
    next_inputs = all_literal_inputs(team, batch.next_observations, batch.next_histories)

    losses = torch.zeros(3)
    for b in range(len(batch.rewards)):
        state, next_state = (
            (states[b] - team.state_mean) / team.state_std
            for states in (batch.states, batch.next_states)
        )
        action = batch.actions[b]

        def qs(critics, inputs, b=b, state=state, action=action):
            own = [torch.cat([action[i], inputs[i][b]]) for i in agents]
            joint = torch.cat([state, action.flatten()])
            return [mixed(critics, twin, joint, own) for twin in range(2)]

        target_q = min(qs(team.target_critics, target_inputs))
        error = target_q - mixed(team.value, 0, state, [x[b] for x in inputs])
        losses[0] += expectile_loss(error)
        log_prob = sum(literal_log_prob(team, i, inputs[i][b], action[i]) for i in agents)
        losses[1] -= min(math.exp(3 * error), 2.0) * log_prob
        next_value = mixed(team.value, 0, next_state, [x[b] for x in next_inputs])
        td_target = batch.rewards[b] + 0.9 * batch.masks[b] * next_value
        losses[2] += sum((q - td_target) ** 2 for q in qs(team.critics, inputs))
    got = torch.stack(maiql.maiql_losses(team, batch, args))
    torch.testing.assert_close(got, losses / len(batch.rewards), rtol=1e-6, atol=0)


def test_centralised_iql_chooses_among_all_joint_actions():
    task = find_task("coordination-unfavorable-3")
    dataset = load_dataset(iql.centralize(task))
    team = iql.Team(task, dataset.states, iql.Args())
    options = [tuple(option) for option in team.options.tolist()]
    assert team.task.num_agents == 1 and len(set(options)) == 8
    batch = dataset.batch(torch.arange(40), with_histories=False)
    inputs = team.inputs(batch.observations, None)
    rows = [options.index(tuple(action)) for action in batch.actions[:, 0].tolist()]
    expected = literal_mlp(team.policy, 0, inputs[0]).log_softmax(-1)[torch.arange(40), rows]
    torch.testing.assert_close(team.log_prob(inputs, batch.actions), expected)
    actions = team.act_greedily(batch.observations, None)
    assert actions.shape == (40, 1, 6) and (actions.unflatten(-1, (3, 2)).sum(-1) == 1).all()


def test_centralised_iql_loads_discrete_data_from_a_file(tmp_path, monkeypatch):
    columns, loaded = make_columns(find_task("coordination-neutral")), []
    path = write_dataset(tmp_path / "game.hdf5", columns)
    monkeypatch.setattr(iql, "normalize_rewards", loaded.append)
    args = iql.Args("coordination-neutral", dataset=path, run_dir=tmp_path / "run", total_steps=1)
    iql.train(replace(args, device="cpu", eval_episodes=1))
    assert loaded[0].task.num_agents == 1
    assert np.array_equal(loaded[0].actions[:, 0], columns["actions"])
    # Joint options are ordered as the file's actions, also where the agents' are interleaved.
    interleaved = replace(find_task("coordination-neutral"), driven=((0, 2), (1, 3)), columns=None)
    options = iql.Team(interleaved, torch.zeros(2, 4), iql.Args()).options
    assert options.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]]


@modules(iql, maiql)
@each(REACHER, ANT)
def test_returns_of_the_ant_span_1000_and_those_of_reacher_stay(task, module):
    columns = recorded_columns(task, length=20)
    before = {name: column.copy() for name, column in columns.items()}
    dataset = OfflineDataset(task, columns)
    span = np.ptp(dataset.episode_returns())
    scale = module.normalize_rewards(dataset)
    assert scale == (pytest.approx(1000 / span) if task is ANT else 1)
    expected = 1000 if task is ANT else span
    assert np.ptp(dataset.episode_returns()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(dataset.rewards, scale * before["rewards"], rtol=1e-6)
    assert all(np.array_equal(columns[name], before[name]) for name in columns)
    one_return = OfflineDataset(task, recorded_columns(task, episodes=1, length=20))
    assert module.normalize_rewards(one_return) == 1  # spans nothing


@pytest.fixture(params=[(REACHER, 1.0), (ANT, 0.25)], ids=["reacher", "ant"])
def online_data(request):
    """Four episodes and, behind them, room for rollouts of an untrained team."""
    task, scale = request.param
    dataset = OfflineDataset(task, recorded_columns(task))
    args = maiql.Args(total_steps=4, rollout_every=2, rollout_length=5)
    team = maiql.Team(task, dataset.states, args)
    return team, maiql.OnlineData(dataset, args, scale)


def test_online_data_are_rollouts_in_the_true_simulator_with_their_histories(online_data):
    """Their rewards are scaled as the dataset's were."""
    team, online = online_data
    dataset, task, simulator = online.dataset, team.task, team.task.make_simulator(1)
    returns = dataset.episode_returns()
    for step in (6, 8):  # after four steps offline
        online.collect(team, step)
    np.testing.assert_array_equal(dataset.episode_returns(), returns)
    assert dataset.size == 200
    recorded = online.rows[200:].sort().values
    # Ten rows of history stand before each rollout.
    cuts = (recorded.diff() > 1).nonzero()[:, 0] + 1
    by_rollout = recorded.tensor_split(cuts)
    assert len(by_rollout) == 40  # as many transitions as the dataset has, if none ends early
    for rows in by_rollout:
        start = (dataset.states[:200] == dataset.states[rows[0]]).all(1).nonzero()[0]
        histories = dataset.histories(start)
        simulator.set_states(dataset.states[start].numpy())
        for row in rows[:, None]:
            torch.testing.assert_close(dataset.histories(row), histories)
            next_states, rewards, terminals = simulator.step(dataset.actions[row].numpy())
            np.testing.assert_allclose(dataset.next_states[row], next_states, atol=1e-4)
            scaled = online.reward_scale * rewards
            np.testing.assert_allclose(dataset.rewards[row], scaled, atol=1e-5)
            assert dataset.masks[row] == 1 - terminals
            pair = task.observe(dataset.states[row]), dataset.actions[row]
            histories = append_to_histories(histories, *pair)
        assert torch.equal(dataset.next_states[rows[:-1]], dataset.states[rows[1:]])
        assert (dataset.masks[rows[:-1]] == 1).all()
        assert len(rows) == 5 or dataset.masks[rows[-1]] == 0
    assert len(dataset.actions[recorded].unique()) > 300  # sampled, not greedy
    assert set(online.sample_rows(20_000).tolist()) == {*range(200), *recorded.tolist()}
    full = online.next_row
    online.collect(team, 8)  # there is no more room
    assert online.next_row == full


def test_online_data_grow_evenly_where_one_rollout_at_a_time_is_too_many():
    dataset = OfflineDataset(REACHER, recorded_columns(REACHER))
    args = maiql.Args(total_steps=100, rollout_every=1, rollout_length=5)
    team = maiql.Team(REACHER, dataset.states, args)
    online = maiql.OnlineData(dataset, args, 1.0)
    counts = []
    for step in range(101, 201):
        online.collect(team, step)
        counts.append(len(online.rows) - dataset.size)
    assert counts[49] == 100
    assert counts[-2] < counts[-1] == 200


@pytest.mark.parametrize("total_steps, rollout_every", [(10, 7), (4, 3), (10, 6), (15, 10)])
def test_online_data_are_complete_where_collections_do_not_divide_the_steps(
    total_steps, rollout_every
):
    dataset = OfflineDataset(REACHER, recorded_columns(REACHER))
    args = maiql.Args(total_steps=total_steps, rollout_every=rollout_every, rollout_length=5)
    team = maiql.Team(REACHER, dataset.states, args)
    online = maiql.OnlineData(dataset, args, 1.0)
    for step in range(total_steps + 1, 2 * total_steps + 1):
        if step % rollout_every == 0:
            online.collect(team, step)
    assert len(online.rows) == 2 * dataset.size


def test_online_data_end_at_a_terminal(online_data, monkeypatch):
    team, online = online_data
    step_from = online.simulator.step_from
    ends = iter([[0], [], [3, 4], [], []])  # which rollouts end at which of the five steps

    def step_with_terminals(states, actions):
        states, rewards, _ = step_from(states, actions)
        return states, rewards, torch.isin(torch.arange(20), torch.tensor(next(ends))).float()

    monkeypatch.setattr(online.simulator, "step_from", step_with_terminals)
    online.collect(team, 6)
    recorded = online.rows[200:]
    assert len(recorded) == 20 + 19 + 19 + 17 + 17
    assert (online.dataset.masks[recorded] == 0).sum() == 3


# The TD3 family.


def noise_of(task, size=7):
    """Standard normal in the scripts; twice that reaches the clip."""
    return 2 * torch.randn(size, task.num_agents, task.action_dim)


OWN_OPTIONS = {
    itd3_bc: {"alpha": 2.5},
    matd3_bc: {"alpha": 2.5},
    icql: {"cql_alpha": 0.5, "cql_batch_size": 5, "policy_noise": 0.2},
    iomar: {"cql_alpha": 0.5, "cql_batch_size": 5, "omega": 0.5, "policy_noise": 0.2},
}


def td3_losses(module, team, batch, noise, learn_policy=True, sampler_noise=None):
    args, losses = module.Args(gamma=0.9, **OWN_OPTIONS[module]), f"{name_of(module)}_losses"
    noises = [noise]
    if module is iomar:
        shape = (args.omar_iterations, args.omar_samples, *batch.actions.shape)
        noises.append(torch.randn(shape) if sampler_noise is None else sampler_noise)
    return getattr(module, losses)(team, batch, *noises, args, learn_policy)


def literal_q(team, twin, agent, action, x, target=False):
    critics = team.target_critics if target else team.critics
    row = twin * team.task.num_agents + agent
    return literal_mlp(critics, row, torch.cat([action, x]))[0]


def literal_action(team, agent, x, target=False):
    return literal_mlp(team.target_policy if target else team.policy, agent, x).tanh()


def literal_next_action(team, agent, x, noise):
    smoothing = (0.2 * noise).clamp(-0.5, 0.5)
    return (literal_action(team, agent, x, target=True) + smoothing).clamp(-1, 1)


def inputs_of(team, batch):
    """[agent][batch, in], now and, for the targets, next."""
    now = all_literal_inputs(team, batch.observations, batch.histories)
    return now, all_literal_inputs(team, batch.next_observations, batch.next_histories, True)


@torch.no_grad()
def literal_td_loss(team, batch, smoothing):
    inputs, next_inputs = inputs_of(team, batch)
    loss = torch.zeros(())
    for b in range(len(batch.rewards)):
        for i in range(team.task.num_agents):
            x, next_x, action = inputs[i][b], next_inputs[i][b], batch.actions[b, i]
            next_action = literal_next_action(team, i, next_x, smoothing[b, i])
            next_q = min(literal_q(team, j, i, next_action, next_x, True) for j in range(2))
            td_target = batch.rewards[b] + 0.9 * batch.masks[b] * next_q
            loss += sum((literal_q(team, j, i, action, x) - td_target) ** 2 for j in range(2))
    return loss / len(batch.rewards)


@each(REACHER, ANT)
@torch.no_grad()
def test_itd3_bc_losses_equal_the_equations_agent_by_agent(task, float64):
    team, batch = made_up_team(itd3_bc, task), made_up_batch(task)
    noise, policy_loss = noise_of(task), torch.zeros(())
    inputs, _ = inputs_of(team, batch)
    for i in range(task.num_agents):
        actions = [literal_action(team, i, x) for x in inputs[i]]
        qs = torch.stack([literal_q(team, 0, i, a, x) for a, x in zip(actions, inputs[i])])
        errors = [(a - data).square().mean() for a, data in zip(actions, batch.actions[:, i])]
        policy_loss += sum(errors) / len(errors) - 2.5 / qs.abs().mean() * qs.mean()
    expected = torch.stack([literal_td_loss(team, batch, noise), policy_loss])
    got = torch.stack(td3_losses(itd3_bc, team, batch, noise))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@each(REACHER, ANT)
@torch.no_grad()
def test_matd3_bc_losses_equal_the_equations_with_mixed_values(task, float64):
    team, batch = made_up_team(matd3_bc, task), made_up_batch(task)
    noise, agents = noise_of(task), range(task.num_agents)
    inputs, next_inputs = inputs_of(team, batch)

    def team_q(twin, state, actions, own_inputs, target=False):
        state = (state - team.state_mean) / team.state_std
        own = [torch.cat([action, x]) for action, x in zip(actions, own_inputs)]
        critics = team.target_critics if target else team.critics
        return mixed(critics, twin, torch.cat([state, *actions]), own)

    critic_loss, cloning, qs = torch.zeros(()), torch.zeros(()), []
    for b in range(len(batch.rewards)):
        x, next_x = [x[b] for x in inputs], [x[b] for x in next_inputs]
        next_actions = [literal_next_action(team, i, next_x[i], noise[b, i]) for i in agents]
        next_state, data = batch.next_states[b], list(batch.actions[b])
        next_q = min(team_q(j, next_state, next_actions, next_x, True) for j in range(2))
        td_target = batch.rewards[b] + 0.9 * batch.masks[b] * next_q
        for j in range(2):
            critic_loss += (team_q(j, batch.states[b], data, x) - td_target) ** 2
        actions = [literal_action(team, i, x[i]) for i in agents]
        qs.append(team_q(0, batch.states[b], actions, x))
        cloning += sum((actions[i] - data[i]).square().mean() for i in agents)
    qs = torch.stack(qs)
    policy_loss = cloning / len(qs) - 2.5 * qs.mean() / qs.abs().mean()
    expected = torch.stack([critic_loss / len(qs), policy_loss])
    got = torch.stack(td3_losses(matd3_bc, team, batch, noise))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_quadrature_has_fewer_points_where_there_are_several_actions():
    assert [len(icql.quadrature(None, dims)[0]) for dims in (1, 2)] == [24, 36]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_quadrature_integrates_polynomials_and_exponentials(dims):
    nodes, log_weights = icql.quadrature(8, dims)
    assert nodes.shape == (8**dims, dims) and nodes.abs().max() < 1
    weights = log_weights.double().exp()
    assert weights.sum().item() == pytest.approx(2**dims, rel=1e-5)
    x = nodes.double()
    assert (weights * x.pow(14).prod(-1)).sum().item() == pytest.approx((2 / 15) ** dims, rel=1e-4)
    expected = (2 * math.sinh(3) / 3) ** dims
    assert (weights * (3 * x).exp().prod(-1)).sum().item() == pytest.approx(expected, rel=1e-4)


def literal_log_integral(team, twin, agent, x):
    """log of the integral of exp Q over [-1, 1]^action, by the trapezoidal rule on a fine grid."""
    points, dims = torch.linspace(-1, 1, 41), team.task.action_dim
    weights = torch.full((41,), 0.05)
    weights[[0, -1]] = 0.025
    grid = torch.cartesian_prod(*[points] * dims).view(-1, dims)
    weights = torch.cartesian_prod(*[weights] * dims).view(-1, dims).prod(-1)
    row = twin * team.task.num_agents + agent
    inputs = torch.cat([grid, x.expand(len(grid), -1)], dim=-1)
    q = literal_mlp(team.critics, row, inputs)[:, 0]
    return (weights.log() + q).logsumexp(0)


@modules(icql, iomar)
@each(REACHER, ANT)
@torch.no_grad()
def test_critics_learn_td_targets_and_conservatism(task, module, float64):
    """The conservative loss uses the first five of the seven transitions."""
    team, batch, noise = made_up_team(module, task), made_up_batch(task), noise_of(task)
    inputs, _ = inputs_of(team, batch)
    conservative = torch.zeros(())
    for b in range(5):
        for i in range(task.num_agents):
            for twin in range(2):
                x, action = inputs[i][b], batch.actions[b, i]
                conservative += literal_log_integral(team, twin, i, x)
                conservative -= literal_q(team, twin, i, action, x)
    td_loss, conservative_loss, _ = td3_losses(module, team, batch, noise)
    torch.testing.assert_close(td_loss, literal_td_loss(team, batch, noise), rtol=1e-6, atol=0)
    expected = 0.5 * conservative / 5
    torch.testing.assert_close(conservative_loss, expected, rtol=1e-3, atol=1e-4)


@each(REACHER, ANT)
@torch.no_grad()
def test_icql_policies_climb_their_first_critics(task, float64):
    team, batch = made_up_team(icql, task), made_up_batch(task)
    inputs, _ = inputs_of(team, batch)
    expected = -sum(
        literal_q(team, 0, i, literal_action(team, i, x), x) / len(batch.rewards)
        for i in range(task.num_agents)
        for x in inputs[i]
    )
    got = td3_losses(icql, team, batch, noise_of(task))[-1]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@each(REACHER, ANT)
@torch.no_grad()
def test_omar_sampler_equals_a_search_for_each_agent_and_state(task, float64):
    team, batch = made_up_team(iomar, task), made_up_batch(task)
    args = iomar.Args(omar_iterations=3, omar_samples=6, omar_elites=3)
    sampler_noise = torch.randn(3, 6, *batch.actions.shape)
    stacked = team.inputs(batch.observations, batch.histories)
    own_actions = team.act(stacked)
    got = iomar.best_sampled_actions(team, stacked, own_actions, sampler_noise, args)
    (inputs, _), sampled = inputs_of(team, batch), 0
    for b in range(len(batch.rewards)):
        for i in range(task.num_agents):

            def q(action, i=i, b=b):
                return literal_q(team, 0, i, action, inputs[i][b]).item()

            mean, std = torch.zeros(task.action_dim), torch.full((task.action_dim,), args.omar_std)
            elites = []
            for z in sampler_noise[:, :, b, i]:
                pool = [(mean + std * x).clamp(-1, 1) for x in z] + elites
                elites = sorted(pool, key=q, reverse=True)[:3]
                mean, std = torch.stack(elites).mean(0), torch.stack(elites).std(0) + 1e-6
            own = literal_action(team, i, inputs[i][b])
            best = own if q(own) >= q(elites[0]) else elites[0]
            sampled += best is not own
            # Samples that are clamped to the same action tie, so values are compared.
            assert q(got[b, i]) == pytest.approx(q(best), rel=1e-9)
    assert sampled


@each(REACHER, ANT)
@torch.no_grad()
def test_iomar_policies_follow_the_sampler_and_the_critic(task, float64):
    team, batch = made_up_team(iomar, task), made_up_batch(task)
    args = iomar.Args()
    shape = (args.omar_iterations, args.omar_samples, *batch.actions.shape)
    sampler_noise, expected = torch.randn(shape), torch.zeros(())
    stacked, (inputs, _) = team.inputs(batch.observations, batch.histories), inputs_of(team, batch)
    best = iomar.best_sampled_actions(team, stacked, team.act(stacked), sampler_noise, args)
    for b in range(len(batch.rewards)):
        for i in range(task.num_agents):
            own = literal_action(team, i, inputs[i][b])
            expected += 0.5 * (own - best[b, i]).square().mean()
            expected += 1e-3 * own.square().mean()
            expected -= 0.5 * literal_q(team, 0, i, own, inputs[i][b])
    got = td3_losses(iomar, team, batch, noise_of(task), sampler_noise=sampler_noise)[-1]
    torch.testing.assert_close(got, expected / len(batch.rewards), rtol=1e-6, atol=0)


# InSPO.


def literal_advantage_and_td_target(team, batch, noise, learners, place, b):
    """Of agent learners[place] on transition b: log pi_i(a | h), A_i, Q_ij and r + gamma V_i'."""
    task, agent = team.task, learners[place].item()

    def inputs(observations, histories):
        return literal_inputs(team, agent, observations, histories)[b]

    def value(critics, x, state, z):
        outputs = literal_mlp(team.policy, agent, x)
        if task.discrete:
            pairs = zip(outputs.softmax(0), torch.eye(task.action_dim))
            return sum(p * min(qs(critics, state, option)) for p, option in pairs)
        mean, log_std = outputs.chunk(2)
        actions = (mean + log_std.clamp(-6, 0).exp() * z).tanh()
        return sum(min(qs(critics, state, action)) for action in actions) / len(actions)

    def qs(critics, state, action):
        state = (state - team.state_mean) / team.state_std
        rows = (agent, task.num_agents + agent)
        return [literal_mlp(critics, row, torch.cat([state, action]))[0] for row in rows]

    x = inputs(batch.observations, batch.histories)
    next_x = inputs(batch.next_observations, batch.next_histories)
    action, state = batch.actions[b, agent], batch.states[b]
    z, next_z = noise[1, :, b, place], noise[0, :, b, place]
    advantage = min(qs(team.critics, state, action)) - value(team.critics, x, state, z)
    next_value = value(team.target_critics, next_x, batch.next_states[b], next_z)
    td_target = batch.rewards[b] + 0.9 * batch.masks[b] * next_value
    log_prob = literal_log_prob(team, agent, x, action)
    return log_prob, advantage, qs(team.critics, state, action), td_target


@pytest.mark.parametrize("phase", ["clone", "critics", "improve"])
@each(REACHER, ANT, GAME)
@torch.no_grad()
def test_inspo_losses_equal_the_equations_sample_by_sample(task, phase, float64):
    team, batch = made_up_team(inspo, task), made_up_batch(task)
    args = inspo.Args(gamma=0.9, max_weight=2.0)
    learners = torch.arange(task.num_agents) if phase == "clone" else torch.tensor([1])
    size = len(batch.rewards)
    noise = torch.randn(2, 3, size, len(learners), task.action_dim)
    critic_loss, policy_loss = torch.zeros(()), torch.zeros(())
    for place in range(len(learners)):
        samples = [
            literal_advantage_and_td_target(team, batch, noise, learners, place, b)
            for b in range(size)
        ]
        temperature = args.alpha * sum(abs(advantage) for _, advantage, *_ in samples) / size
        for log_prob, advantage, qs, td_target in samples:
            critic_loss += sum((q - td_target) ** 2 for q in qs) / size
            weight = 1 if phase == "clone" else min(math.exp(advantage / temperature), 2.0)
            policy_loss -= weight * log_prob / size
    expected = [critic_loss] if phase == "critics" else [critic_loss, policy_loss]
    got = inspo.inspo_losses(team, batch, learners, noise, args, phase)
    torch.testing.assert_close(list(got), expected, rtol=1e-4, atol=1e-6)


@each(REACHER, ANT, GAME)
@torch.no_grad()
def test_importance_weights_are_the_others_ratios(task, float64):
    team, batch = made_up_team(inspo, task), made_up_batch(task)
    team.freeze_behavior()
    agents, size = range(task.num_agents), len(batch.rewards)
    ones = torch.ones(size, task.num_agents)
    torch.testing.assert_close(inspo.importance_weights(team, batch, 100.0), ones)
    inputs = all_literal_inputs(team, batch.observations, batch.histories)

    def log_probs(b):
        return [literal_log_prob(team, i, inputs[i][b], batch.actions[b, i]) for i in agents]

    old = [log_probs(b) for b in range(size)]
    scramble(team.policy)
    ratios = [[math.exp(x - y) for x, y in zip(log_probs(b), old[b])] for b in range(size)]
    others = [[math.prod(row[:i] + row[i + 1 :]) for i in agents] for row in ratios]
    expected = torch.tensor(others).clamp(1e-6, 1.5)
    torch.testing.assert_close(inspo.importance_weights(team, batch, 1.5), expected)
    assert (expected < 1.5).any()


def test_a_turn_resamples_the_data_as_the_others_act_now():
    """The first agent goes right by now, so the second one's rows are those where it went right."""
    dataset = load_dataset(GAME)
    team, turns = inspo.Team(GAME, dataset.states, inspo.Args()), inspo.Turns(2, 5000)
    team.policy[-1].bias.data[0, 0, 1] += 5
    turns.begin(0, team, dataset, 100.0)
    assert sorted(turns.order.tolist()) == [0, 1]
    turns.order.copy_(torch.tensor([0, 1]))
    for turn, right in ((0, (0.25, 0.75)), (1, (1.0, 0.75))):
        turns.begin(turn, team, dataset, 100.0)
        shares = dataset.actions[turns.sample_rows(5000)][:, :, 1].mean(0)
        np.testing.assert_allclose(shares, right, atol=0.03)


def test_an_agent_rests_while_it_is_not_its_turn(tmp_path):
    """Three steps of one turn of four: the other agent's policy and critics stay as they were."""
    args = inspo.Args(
        "coordination-neutral", run_dir=tmp_path / "run", total_steps=7, cloning_share=0.5
    )
    args.batch_size, args.pool_size, args.turn_steps, args.eval_episodes = 16, 64, 4, 2
    seen, begin, sample_rows = [], inspo.Turns.begin, inspo.Turns.sample_rows

    def begin_and_look(self, turn, team, *others):
        begin(self, turn, team, *others)
        seen[:] = [team, int(self.order[0]), {n: p.clone() for n, p in team.named_parameters()}]
        for mine, datas in zip(team.policy.parameters(), team.behavior.parameters()):
            assert torch.equal(mine, datas)  # as cloned

    def sample_rows_and_look(self, count):
        # Before each of the three steps: the first two are the critics' alone.
        team, _, before = seen
        assert all(torch.equal(p, before[f"policy.{n}"]) for n, p in team.policy.named_parameters())
        return sample_rows(self, count)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inspo.Turns, "begin", begin_and_look)
        patched.setattr(inspo.Turns, "sample_rows", sample_rows_and_look)
        inspo.train(args)
    team, agent, before = seen
    for name, parameter in team.named_parameters():
        if name.startswith(("policy.", "critics.")):
            moved = (parameter != before[name]).flatten(1).any(1)
            assert moved[agent::2].all() and not moved[1 - agent :: 2].any(), name
