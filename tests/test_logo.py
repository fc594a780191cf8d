"""The local-to-global model, its rollouts and its learner against slow literal versions."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from made_up import (
    ANT,
    GAME,
    REACHER,
    all_literal_inputs,
    literal_mlp,
    made_up_batch,
    made_up_states,
    recorded_columns,
    scramble,
)

import moma_ppo
from baselines import logo
from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import InputError, append_to_histories, find_task
from training_run import save

ANT_FO = find_task("ant-medium-fo")


def each(*tasks):
    return pytest.mark.parametrize("task", tasks, ids=lambda task: task.name)


def made_up_model(task, dtype=torch.float64, **options):
    """Off its start, with statistics that standardisation has to use, and two dead dimensions."""
    dataset = load_dataset(task) if task is GAME else OfflineDataset(task, recorded_columns(task))
    args = logo.Args(model_width=16, embedding=5, **options)
    model = scramble(logo.LocalToGlobal(task, dataset, torch.arange(dataset.size), args))
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
    model.change_std[:2] = 0
    for name in ("state", "reward"):
        getattr(model, f"{name}_min").sub_(20)
        getattr(model, f"{name}_max").add_(20)
    return model.to(dtype)


def made_up_team(task, **options):
    team = scramble(logo.Team(task, made_up_states(50, task), logo.Args(**options)))
    return team.to(torch.get_default_dtype())


# The model, one transition at a time.


class Literal:
    """What the model makes of one state [state] and joint action [agent, action]."""

    def __init__(self, model, state, action):
        self.model, self.task = model, model.task
        self.action = (action - model.action_mean) / model.action_std
        self.x = (state - model.state_mean) / model.state_std
        self.context = literal_mlp(model.context, 0, self.x)

    def part(self, i, values):
        return values[list(self.task.observed[i])]

    def local(self, i):
        """The change that agent i predicts of what it sees, and what it was given, twice."""
        given = torch.cat([self.action[i], self.part(i, self.x)])
        inputs = torch.cat([self.context, given])
        hidden = literal_mlp(self.model.local_encoder, i, inputs)
        outputs = literal_mlp(self.model.local_decoder, i, hidden)
        widest, seen = max(self.task.obs_dims), self.task.obs_dims[i]
        padded = F.pad(given, (0, widest - seen))
        return outputs[:widest], outputs[widest:], padded

    def deduce(self, changes):
        """Change of state, and reward, from the agents' changes, padded; and these again."""
        joint = torch.cat([*changes, self.context])
        hidden = literal_mlp(self.model.deductive_encoder, 0, joint)
        outputs = literal_mlp(self.model.deductive_decoder, 0, hidden)
        return outputs.split([self.task.state_dim + 1, len(joint) - len(self.context)])

    def direct(self):
        hidden = literal_mlp(self.model.auxiliary_encoder, 0, torch.cat([self.x, *self.action]))
        return literal_mlp(self.model.deductive_decoder, 0, hidden)[: self.task.state_dim + 1]


def error_cost(error):
    return error.abs() + error**2 / 2


def global_error(error):
    """Of state and reward, which count alike."""
    return error_cost(error[:-1]).mean() + error_cost(error[-1])


@each(REACHER, ANT, GAME)
@torch.no_grad()
def test_model_losses_equal_the_equations_transition_by_transition(task, float64):
    model, batch = made_up_model(task), made_up_batch(task)
    mask_batch = batch._replace(next_states=batch.next_states + 0.1)
    got = logo.model_losses(model, batch, mask_batch, 0.3)
    sums, size = torch.zeros(4), len(batch.rewards)
    for b in range(size):
        literal = Literal(model, batch.states[b], batch.actions[b])
        change = batch.next_states[b] - batch.states[b] - model.change_mean
        change[2:] /= model.change_std[2:]
        reward = (batch.rewards[b] - model.reward_mean) / model.reward_std
        target, widest = torch.cat([change, reward]), max(task.obs_dims)
        truths = [
            F.pad(literal.part(i, change), (0, widest - task.obs_dims[i]))
            for i in range(task.num_agents)
        ]
        predictions = []
        for i in range(task.num_agents):
            predicted, reconstructed, given = literal.local(i)
            predictions.append(predicted)
            sums[0] += error_cost(predicted - truths[i]).sum() / sum(task.obs_dims)
            sums[0] += 0.3 * error_cost(reconstructed - given).sum() / sum(task.pair_dims)
        for changes in (truths, predictions):
            deduced, reconstructed = literal.deduce(changes)
            sums[1] += global_error(deduced - target)
            error = error_cost(reconstructed - torch.cat(changes)).sum()
            sums[1] += 0.3 * error / sum(task.obs_dims)
        sums[2] += global_error(literal.direct() - target)
        next_state = (mask_batch.next_states[b] - model.state_mean) / model.state_std
        logit = literal_mlp(model.mask_network, 0, next_state)
        sums[3] += F.binary_cross_entropy_with_logits(logit[0], batch.masks[b])
    torch.testing.assert_close(torch.stack(got), sums / size, rtol=1e-6, atol=1e-9)


@each(REACHER, GAME)
@torch.no_grad()
def test_a_step_is_deduced_and_its_uncertainty_is_how_far_the_direct_way_leads(task, float64):
    model, batch = made_up_model(task), made_up_batch(task)
    next_states, rewards, masks, uncertainty = model.step(batch.states, batch.actions)
    mean = torch.cat([model.change_mean, model.reward_mean])
    std = torch.cat([model.change_std, model.reward_std])
    for b in range(len(batch.rewards)):
        literal = Literal(model, batch.states[b], batch.actions[b])
        changes = [literal.local(i)[0] for i in range(task.num_agents)]
        one, other = (mean + std * x for x in (literal.deduce(changes)[0], literal.direct()))
        torch.testing.assert_close(next_states[b], batch.states[b] + one[:-1])
        torch.testing.assert_close(rewards[b], one[-1])
        distance = ((one - other)[:-1] / model.state_std).square().sum().sqrt()
        torch.testing.assert_close(uncertainty[b], distance)
        x = (batch.states[b] + one[:-1] - model.state_mean) / model.state_std
        assert masks[b] == (literal_mlp(model.mask_network, 0, x)[0] > 0)


@torch.no_grad()
def test_an_agent_predicts_from_the_state_and_its_own_action_alone(float64):
    model, batch = made_up_model(REACHER), made_up_batch(REACHER)
    _, context, pairs = model.network_inputs(batch.states, batch.actions)
    before, _ = model.predict_locally(context, pairs)
    batch.actions[:, 1] += 0.1
    after, _ = model.predict_locally(*model.network_inputs(batch.states, batch.actions)[1:])
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@torch.no_grad()
def test_the_model_does_not_see_an_ants_heading(float64):
    """Turned states lead to turned next states, with the same mask and uncertainty."""
    model, batch = made_up_model(ANT_FO), made_up_batch(ANT_FO)
    symmetry = ANT_FO.symmetry
    upright = batch.states.clone()
    upright[:, 1:5] = F.normalize(upright[:, 1:5], dim=1)
    angles = torch.linspace(-2, 2, len(upright))
    next_states, _, masks, uncertainty = model.step(upright, batch.actions)
    turned = model.step(symmetry.turn(upright, angles), batch.actions)
    heading = symmetry.heading(symmetry.turn(upright, angles)) - symmetry.heading(upright)
    torch.testing.assert_close(turned[0], symmetry.turn(next_states, heading))
    torch.testing.assert_close(turned[2:], (masks, uncertainty))


def test_statistics_come_from_the_training_rows_and_the_box_from_all():
    task = REACHER
    dataset = OfflineDataset(task, recorded_columns(task))
    rows = torch.arange(100)
    model = logo.LocalToGlobal(task, dataset, rows, logo.Args())
    change = (dataset.next_states - dataset.states)[rows]
    torch.testing.assert_close(model.change_mean, change.mean(0))
    torch.testing.assert_close(model.action_std, dataset.actions[rows].std(0))
    assert model.change_std[4:6].tolist() == [0, 0]  # targets stay where they are
    assert torch.equal(model.state_max, torch.cat([dataset.states, dataset.next_states]).amax(0))


@each(REACHER, ANT, GAME)
@torch.no_grad()
def test_moma_ppo_steps_the_exported_model_as_this_script_does(task, tmp_path):
    model, batch = made_up_model(task, torch.float32), made_up_batch(task)
    dataset = load_dataset(task) if task is GAME else OfflineDataset(task, recorded_columns(task))
    exported = logo.exported_model(model, logo.Args(), dataset, {})
    save(exported, tmp_path / "model.pt")
    loaded = moma_ppo.open_world_model(task, tmp_path / "model.pt", "cpu")
    scale = model.uncertainty_scale.item()
    assert loaded.lambda_g == model.reward_std.item() / scale
    assert loaded.max_uncertainty == pytest.approx(10**0.5 * scale)
    # Its errors are those of what is deduced, of which rollouts are made.
    deduced, *_ = model.predict(batch.states, batch.actions)
    torch.testing.assert_close(loaded.predict(batch.states, batch.actions)[0], deduced[None])
    next_states, rewards, masks, uncertainty = model.step(batch.states, batch.actions)
    step = loaded.step(batch.states, batch.actions)
    torch.testing.assert_close(step.next_states, next_states)
    torch.testing.assert_close(step.rewards, rewards)
    torch.testing.assert_close(step.epsilon_g, uncertainty)
    assert torch.equal(step.masks, masks)
    assert not step.epsilon_a.any() and not step.epsilon_r.any()
    with pytest.raises(InputError, match="predicts no variances, which --penalty aleatoric needs"):
        moma_ppo.make_model(
            tmp_path / "model.pt",
            dataset,
            moma_ppo.Args(penalty="aleatoric"),
            SimpleNamespace(device="cpu"),
        )


def test_a_model_is_for_the_agents_that_it_was_trained_with(tmp_path):
    """Tasks that share a dataset do not share this model, whose networks are the agents'."""
    task, other = find_task("ant-medium-po"), find_task("ant-medium-po-other-legs")
    dataset = OfflineDataset(task, recorded_columns(ANT))
    exported = logo.exported_model(made_up_model(task, torch.float32), logo.Args(), dataset, {})
    save(exported, tmp_path / "model.pt")
    moma_ppo.open_world_model(task, tmp_path / "model.pt", "cpu")
    with pytest.raises(InputError, match="made for other agents .*logo.py --task ant-medium-po"):
        moma_ppo.open_world_model(other, tmp_path / "model.pt", "cpu")


@each(REACHER, ANT_FO, GAME)
def test_a_run_can_take_the_model_of_an_earlier_one(task, tmp_path):
    model, batch = made_up_model(task, torch.float32), made_up_batch(task)
    dataset = load_dataset(task) if task is GAME else OfflineDataset(task, recorded_columns(task))
    save(logo.exported_model(model, logo.Args(), dataset, {}), tmp_path / "model.pt")
    args = logo.Args(model_width=16, embedding=5, world_model=tmp_path / "model.pt")
    fresh = logo.LocalToGlobal(task, dataset, torch.arange(dataset.size), args)
    logo.load_exported(fresh, args, "cpu")
    assert fresh.description["dataset"] == dataset.description
    inputs = batch.states, batch.actions
    for one, other in zip(fresh.step(*inputs), model.step(*inputs)):
        assert torch.equal(one, other)
    args = logo.Args(world_model=tmp_path / "model.pt")
    wider = logo.LocalToGlobal(task, dataset, torch.arange(dataset.size), args)
    with pytest.raises(InputError, match="of other sizes; give --model-width 16 --embedding 5"):
        logo.load_exported(wider, args, "cpu")


@torch.no_grad()
def test_model_errors_are_those_of_both_ways_and_of_the_mask():
    dataset, rows = OfflineDataset(REACHER, recorded_columns(REACHER)), torch.arange(5, 165)
    dataset.masks[::3] = 0
    model = made_up_model(REACHER, torch.float32)
    got = logo.model_errors(model, dataset, rows)
    deduced, direct, uncertainty = model.predict(dataset.states[rows], dataset.actions[rows])
    for way, predicted in {"": deduced, "direct_": direct}.items():
        state_error = (predicted[:, :-1] - dataset.next_states[rows]).norm(dim=1).mean().item()
        reward_error = (predicted[:, -1] - dataset.rewards[rows]).abs().mean().item()
        assert got[f"{way}state_error"] == pytest.approx(state_error)
        assert got[f"{way}reward_error"] == pytest.approx(reward_error)
    goes_on = model.mask_logits(dataset.next_states[rows]) > 0
    ends = dataset.masks[rows] == 0
    assert 0 < goes_on.float().mean() < 1
    assert got["mask_error"] == pytest.approx((goes_on == ends).float().mean().item())
    assert got["missed_ends"] == pytest.approx(goes_on[ends].float().mean().item())
    assert got["uncertainty_0.99"] == pytest.approx(uncertainty.quantile(0.99).item())


def test_an_ants_model_learns_at_heading_zero(monkeypatch, tmp_path):
    """Where rollouts query it; only the first states keep their headings."""
    dataset, seen, judged = OfflineDataset(ANT, recorded_columns(ANT, length=30)), [], []
    spin = torch.linspace(-3, 3, dataset.size)  # every row at a heading of its own
    transitions = dataset.states, dataset.next_states, dataset.rewards
    spun = ANT.symmetry.turn_transition(spin, *transitions)
    dataset.states, dataset.next_states, dataset.rewards = spun
    losses, errors = logo.model_losses, logo.model_errors

    def look(model, batch, mask_batch, *others):
        seen.extend((batch, mask_batch))
        return losses(model, batch, mask_batch, *others)

    def judge(model, dataset, rows):
        judged.append(dataset)
        return errors(model, dataset, rows)

    def stop(*_, **__):
        raise InterruptedError

    functions = {"load_dataset": lambda *_: dataset, "model_losses": look, "model_errors": judge}
    for name, function in (functions | {"evaluate": stop}).items():
        monkeypatch.setattr(logo, name, function)
    options = {"model_steps": 2, "eval_every": 1, "total_steps": 2, "model_width": 16}
    with pytest.raises(InterruptedError):  # once the model is trained
        logo.train(logo.Args(ANT.name, run_dir=tmp_path / "run", device="cpu", **options))
    upright, rows = dataset.at_heading_zero, dataset.split()[0]
    known = torch.cat([upright.states, upright.next_states, upright.rewards[:, None]], dim=1)
    assert len(seen) == 4
    for batch in seen:
        learned = torch.cat([batch.states, batch.next_states, batch.rewards[:, None]], dim=1)
        assert (learned[:, None] == known[rows]).all(-1).any(-1).all()
    assert len(judged) == 3 and all(judged_dataset is upright for judged_dataset in judged)
    exported = torch.load(tmp_path / "run" / "world_model.pt", weights_only=True)
    torch.testing.assert_close(exported["state_mean"], upright.states[rows].mean(0))
    for name, bound in upright.bounding_box().items():
        assert torch.equal(exported[name], bound)
    assert torch.equal(exported["first_states"], dataset.states[dataset.first_rows])


def test_the_learner_sees_rewards_in_units_of_their_deviation(monkeypatch, tmp_path):
    """So that returns are of the order of one; the game's rewards are 0 and 1."""
    seen, losses = [], logo.macql_losses

    def look(team, batch, *others):
        seen.append(batch.rewards)
        return losses(team, batch, *others)

    monkeypatch.setattr(logo, "macql_losses", look)
    options = {"total_steps": 2, "eval_every": 2, "synthetic_share": 0.0, "gamma": 0.5}
    logo.train(logo.Args("coordination-neutral", run_dir=tmp_path / "run", **options))
    unit = 0.5 / load_dataset(find_task("coordination-neutral")).rewards.std().item()
    assert seen[0].unique().tolist() == pytest.approx([0, unit])


# Synthetic data.


@pytest.fixture
def synthetic():
    """Room for two generations of rollouts in a model that ends some of them."""
    task = REACHER
    dataset = OfflineDataset(task, recorded_columns(task))
    args = logo.Args(horizon=6, rollouts=8, generations=2, memory="attention")
    team = logo.Team(task, dataset.states, args)
    model = logo.LocalToGlobal(task, dataset, torch.arange(200), logo.Args(model_width=16))
    scramble(model)
    # At every step the rollout whose arm points furthest to the left ends.
    model.mask_logits = lambda next_states: next_states[:, 0] - next_states[:, 0].min()
    return logo.SyntheticData(dataset, args), team, model


def test_synthetic_data_are_rollouts_in_the_model_with_their_histories(synthetic):
    synthetic, team, model = synthetic
    dataset, task = synthetic.buffer, team.task
    synthetic.add_rollouts(team, model, 0)
    rows = synthetic.rows[0]
    weights = synthetic.weights.view(2, 8, 16)
    assert (weights[0, :, :10] == 0).all() and (weights[1] == 0).all()
    assert (weights[0, :, 10] > 0).all()
    alive = torch.ones(8, dtype=torch.bool)
    for t in range(10, 16):
        now = rows[:, t]
        assert torch.equal(weights[0, :, t] > 0, alive)
        step = model.step(dataset.states[now], dataset.actions[now])
        torch.testing.assert_close(dataset.next_states[now], step[0])
        torch.testing.assert_close(dataset.rewards[now], step[1])
        assert torch.equal(dataset.masks[now], step[2])
        expected = (1 - step[3] / model.uncertainty_scale).clamp(-10, 0).exp()
        torch.testing.assert_close(weights[0, :, t], alive * expected)
        pair = task.observe(dataset.states[now]), dataset.actions[now]
        if t < 15:
            after = append_to_histories(dataset.histories(now), *pair)
            torch.testing.assert_close(dataset.histories(now + 1), after)
        alive &= step[2] == 1
    assert 0 < alive.sum() < 8
    # A rollout continues a history of the data.
    data = synthetic.dataset
    start = (data.states == dataset.states[rows[0, 10]]).all(1).nonzero()[0]
    torch.testing.assert_close(dataset.histories(rows[0, 10:11]), data.histories(start))


def test_what_has_weight_is_drawn_and_the_oldest_rollouts_go(synthetic):
    synthetic, team, model = synthetic
    synthetic.add_rollouts(team, model, 0)
    first = synthetic.buffer.states.clone()
    synthetic.args.batch_size = 1000  # of which half are of rollouts
    batch = synthetic.mixed_batch(with_histories=True)
    drawn = (batch.states[500:, None] == first[synthetic.weights > 0]).all(-1)
    assert drawn.any(1).all() and drawn.any(0).sum() > 30  # of at most 48
    recorded = (batch.states[:500, None] == synthetic.dataset.states).all(-1)
    assert recorded.any(1).all() and batch.histories.shape[0] == 1000
    synthetic.add_rollouts(team, model, 1)
    second = synthetic.buffer.states.clone()
    assert torch.equal(first[:128], second[:128]) and not torch.equal(first[128:], second[128:])
    synthetic.add_rollouts(team, model, 2)
    third = synthetic.buffer.states
    assert not torch.equal(second[:128], third[:128]) and torch.equal(second[128:], third[128:])


def test_uncertain_transitions_are_drawn_less_often_or_earn_less(synthetic):
    synthetic, *_ = synthetic
    uncertainty, rewards = torch.tensor([0.5, 1.0, 2.0, 50.0]), torch.ones(4)
    weights, same = synthetic.weigh(uncertainty, rewards, torch.tensor([3.0]))
    torch.testing.assert_close(weights, torch.tensor([1, 1, math.exp(-1), math.exp(-10)]))
    assert torch.equal(same, rewards)
    synthetic.args.uncertainty = "penalty"
    weights, less = synthetic.weigh(uncertainty, rewards, torch.tensor([3.0]))
    assert weights.tolist() == [1] * 4 and less.tolist() == [-0.5, -2, -5, -29]
    synthetic.args.uncertainty = "none"
    weights, same = synthetic.weigh(uncertainty, rewards, torch.tensor([3.0]))
    assert weights.tolist() == same.tolist() == [1] * 4


# The learner, one agent and one transition at a time.


def literal_q(team, twin, agent, action, x, target=False):
    critics = team.target_critics if target else team.critics
    return literal_mlp(critics, twin * team.task.num_agents + agent, torch.cat([action, x]))[0]


def literal_mixed(team, twin, state, actions, own_inputs, target=False):
    mixer = team.target_mixer if target else team.mixer
    outputs = literal_mlp(mixer, 0, (state - team.state_mean) / team.state_std)
    qs = [
        literal_q(team, twin, i, a, x, target) for i, (a, x) in enumerate(zip(actions, own_inputs))
    ]
    return sum(math.log1p(math.exp(w)) * q for w, q in zip(outputs, qs)) + outputs[-1]


def literal_action(team, agent, x, target=False):
    if not team.task.discrete:
        return literal_mlp(team.target_policy if target else team.policy, agent, x).tanh()
    options = torch.eye(team.task.action_dim)
    return max(options, key=lambda option: literal_q(team, 0, agent, option, x, target))


@each(REACHER, ANT, GAME)
@torch.no_grad()
def test_macql_losses_equal_the_equations_transition_by_transition(task, float64):
    team, batch = made_up_team(task), made_up_batch(task)
    team.value_range.copy_(torch.tensor([-0.3, 0.5]))
    # As if these seven were of fourteen, five of them data; the last two are of rollouts.
    options = {"batch_size": 14, "synthetic_share": 9 / 14, "cql_batch_size": 7}
    args = logo.Args(gamma=0.9, cql_alpha=0.5, cql_temperature=0.2, alpha=1.5, **options)
    inputs = all_literal_inputs(team, batch.observations, batch.histories)
    next_inputs = all_literal_inputs(team, batch.next_observations, batch.next_histories, True)
    agents, td_loss, conservative = range(task.num_agents), 0, 0
    value, size_of_value, imitation, clipped = 0, 0, 0, 0
    for b in range(7):
        x, next_x = [x[b] for x in inputs], [x[b] for x in next_inputs]
        next_actions = [literal_action(team, i, next_x[i], target=True) for i in agents]
        next_q = min(
            literal_mixed(team, j, batch.next_states[b], next_actions, next_x, True) for j in (0, 1)
        )
        td_target = batch.rewards[b] + 0.9 * batch.masks[b] * next_q
        clipped += not -0.3 < td_target < 0.5
        td_target = min(max(td_target, -0.3), 0.5)
        data = list(batch.actions[b])
        standardized = (batch.states[b] - team.state_mean) / team.state_std
        outputs = literal_mlp(team.mixer, 0, standardized)
        weights = [math.log1p(math.exp(output)) for output in outputs[:-1]]
        for j in (0, 1):
            td_loss += (literal_mixed(team, j, batch.states[b], data, x) - td_target) ** 2 / 7
            for i in agents if b % 2 == 0 else ():  # every second row
                varied = [[*data[:i], node, *data[i + 1 :]] for node in team.nodes[:, 0, i]]
                qs = [literal_mixed(team, j, batch.states[b], actions, x) for actions in varied]
                integral = ((torch.stack(qs) / 0.2).exp() * team.log_weights.exp()).sum()
                conservative += 0.5 * 0.2 * integral.log() / 4
                if b < 5:
                    conservative -= 0.5 * literal_mixed(team, j, batch.states[b], data, x) / 3
        size_of_value += literal_mixed(team, 0, batch.states[b], data, x).abs() / 7
        for i in agents if not task.discrete else ():
            q = literal_q(team, 0, i, literal_action(team, i, x[i]), x[i])
            value += weights[i] * q / 7
            if b < 5:
                error = literal_action(team, i, x[i]) - data[i]
                imitation += (error**2).sum() / 5
    assert 0 < clipped < 7
    got = logo.macql_losses(team, batch, args, learn_policy=not task.discrete)
    expected = [td_loss, conservative]
    expected += [] if task.discrete else [imitation - 1.5 / size_of_value * value]
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-6, atol=1e-9)
    if not task.discrete:
        got = logo.macql_losses(team, batch, args, learn_policy=True, clone=True)
        expected = [td_loss, conservative, imitation]
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-6, atol=1e-9)


def test_each_loss_of_the_learner_trains_its_own_networks_only(float64):
    team, batch = made_up_team(REACHER, memory="attention"), made_up_batch(REACHER)
    valued = {"critics", "mixer", "memory"}
    trained = [valued, valued, {"policy", "memory"}]
    for index, expected in enumerate(trained):
        team.zero_grad()
        losses = logo.macql_losses(team, batch, logo.Args(), learn_policy=True)
        losses[index].backward()
        named = team.named_parameters()
        got = {name.split(".")[0] for name, p in named if p.grad is not None and p.grad.any()}
        assert got == expected


def test_rollouts_explore_around_the_greedy_team(float64):
    for task, scale in ((REACHER, 0.1), (GAME, 0.5)):
        team, batch = made_up_team(task), made_up_batch(task, 2000)
        seen = batch.observations, batch.histories
        greedy, explored = team.act_greedily(*seen), team.explore(*seen, scale)
        if task.discrete:
            assert torch.equal(explored.sum(-1), torch.ones(2000, 2))
            changed = (explored != greedy).any(-1).double().mean()
            assert abs(changed - 0.25) < 0.03  # half of the random options are the greedy one's
        else:
            inside = greedy.abs() < 0.5
            assert abs((explored - greedy)[inside].std() - 0.1) < 0.01


def test_options_are_chosen_by_the_first_critics(float64):
    team, dataset = made_up_team(GAME), load_dataset(GAME)
    x = all_literal_inputs(team, dataset.batch(torch.arange(20), False).observations.double(), None)
    got = team.act(torch.stack(x))
    for b in range(20):
        for i in (0, 1):
            assert torch.equal(got[b, i], literal_action(team, i, x[i][b]))
