"""The world model's losses and statistics against slow literal versions, one member at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from made_up import REACHER, literal_mlp, recorded_columns
from torch.distributions import Normal

import world_model
from baselines import logo
from data.offline_dataset import OfflineDataset
from mamujoco_envs import InputError, find_task
from moma_ppo import open_world_model
from world_model import (
    Args,
    Ensemble,
    clip_each_agent,
    disturb,
    held_out_errors,
    member_losses,
    open_loop,
    open_loop_starts,
)

ANT, MEMBERS = find_task("ant-medium-fo"), 4
CONSTANT = [4, 5, 10]  # Reacher's target stays where it is, and the fingertip in its plane
SMALL = {"members": MEMBERS, "hidden": (16, 16), "reward_hidden": (16,), "mask_hidden": (16,)}

each_target = pytest.mark.parametrize("target", ["delta", "absolute"])


def made_up_ensemble(target="delta", **options):
    """With statistics as `standardize` sets them: a target that never changes has neither."""
    ensemble = Ensemble(REACHER, Args(**SMALL | {"target": target} | options))
    for buffer in ensemble.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    if target == "delta":
        ensemble.target_mean[CONSTANT] = ensemble.target_std[CONSTANT] = 0
    return ensemble


def toy_dataset(size=5000, terminals=0.2):
    """A linear world: next states, rewards and whether the next state is absorbing."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(size, 11)) * np.linspace(0.1, 10, 11)
    actions = rng.uniform(-1, 1, (size, 2))
    states[:, 10] = 0.0
    change = 0.2 * states @ rng.normal(size=(11, 11)) / 11 + actions @ rng.normal(size=(2, 11))
    change[:, CONSTANT] = 0
    next_states = states + change
    columns = {
        "observations": states,
        "actions": actions,
        "next_observations": next_states,
        "rewards": states[:, 0] - actions[:, 1] - 3,
        "terminals": next_states[:, 1] < np.quantile(next_states[:, 1], terminals),
        "timeouts": np.arange(size) % 50 == 49,
    }
    columns = {name: np.asarray(column, np.float32) for name, column in columns.items()}
    return OfflineDataset(REACHER, columns)


def literal_prediction(ensemble, member, states, joint_actions):
    """One member's next state and reward, and the log standard deviations of both."""
    x = torch.cat([states, joint_actions], dim=-1)
    x = (x - ensemble.input_mean) / ensemble.input_std
    outputs, reward = (literal_mlp(x_, member, x) for x_ in (ensemble.state, ensemble.reward))
    next_states = outputs[..., :11] * ensemble.target_std + ensemble.target_mean
    next_states = next_states + (states if ensemble.delta else 0)
    log_stds = outputs[..., 11:].clamp(-10, 2) + ensemble.target_std.log()
    rewards = reward[..., 0] * ensemble.reward_std[0] + ensemble.reward_mean[0]
    reward_log_stds = reward[..., 1].clamp(-10, 2) + ensemble.reward_std.log()
    return next_states, log_stds, rewards, reward_log_stds


def literal_mask(ensemble, member, next_states):
    """One member's probability that a next state is not absorbing."""
    x = (next_states - ensemble.input_mean[:11]) / ensemble.input_std[:11]
    return literal_mlp(ensemble.mask, member, x)[..., 0].sigmoid()


def batches_of(dataset, rows):
    """What `member_losses` takes: a batch, and another for the masks."""
    joint_actions = REACHER.join_actions(dataset.actions)
    columns = (dataset.states, joint_actions, dataset.next_states, dataset.rewards)
    return [column[rows] for column in columns], (dataset.next_states[rows], dataset.masks[rows])


@each_target
@pytest.mark.parametrize(("beta", "reward_beta"), [(0.0, 0.5), (0.5, 0.0)])
def test_losses_are_those_of_gaussians_and_a_bernoulli(target, beta, reward_beta, float64):
    ensemble = made_up_ensemble(target)
    for network in (ensemble.state, ensemble.reward):
        network[-1].weight.data.mul_(60)  # some log standard deviations leave their bounds
    states, next_states = torch.randn(2, MEMBERS, 30, 11)
    actions, rewards = torch.randn(MEMBERS, 30, 2), torch.randn(MEMBERS, 30)
    masks = (torch.rand(MEMBERS, 30) > 0.3).double()
    varying = ensemble.target_std.nonzero()[:, 0]
    batch, judged = (states, actions, next_states, rewards), torch.randn(MEMBERS, 30, 11)
    losses = member_losses(ensemble, batch, (judged, masks), varying, beta, reward_beta)
    constant = 0.5 * np.log(2 * np.pi)
    for i in range(MEMBERS):
        prediction = literal_prediction(ensemble, i, states[i], actions[i])
        mean, log_std, reward_mean, reward_log_std = prediction
        assert (log_std < -9.5).any() and (log_std[:, varying] > 1.5).any()
        normal = Normal(mean[:, varying], log_std[:, varying].exp())
        # Both are densities of the standardised change, and so is the variance that weighs them.
        shift = ensemble.target_std.log()[varying]
        nll = -normal.log_prob(next_states[i][:, varying]) - constant - shift
        variance = (2 * (log_std[:, varying] - shift)).exp()
        reward_nll = -Normal(reward_mean, reward_log_std.exp()).log_prob(rewards[i])
        reward_nll -= constant + ensemble.reward_std.log()
        reward_variance = (reward_log_std.exp() / ensemble.reward_std).square()
        expected = [
            (variance**beta * nll).mean(),
            (reward_variance**reward_beta * reward_nll).mean(),
            F.binary_cross_entropy(literal_mask(ensemble, i, judged[i]), masks[i]),
        ]
        torch.testing.assert_close(losses[:, i], torch.stack(expected), rtol=1e-7, atol=1e-9)


def test_a_members_loss_leaves_the_other_members_alone():
    ensemble = made_up_ensemble()
    batches = batches_of(toy_dataset(), torch.randint(5000, (MEMBERS, 30)))
    varying = ensemble.target_std.nonzero()[:, 0]
    losses = member_losses(ensemble, *batches, varying, 0.5, 0.5)
    losses[:, 1].sum().backward()
    for name, parameter in ensemble.named_parameters():
        assert (parameter.grad[1] != 0).any(), name
        assert (parameter.grad[[0, 2, 3]] == 0).all(), name


def test_members_start_different():
    for name, parameter in Ensemble(REACHER, Args(**SMALL)).named_parameters():
        assert not torch.equal(parameter[0], parameter[1]), name


def test_gradients_are_clipped_for_each_member_by_itself():
    ensemble = made_up_ensemble()
    scale = torch.tensor([1e-3, 1.0, 1e-4, 1e3])[:, None, None]
    for parameter in ensemble.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    members = [[p[i].detach().clone() for p in ensemble.parameters()] for i in range(MEMBERS)]
    for i, member in enumerate(members):
        for copy, parameter in zip(member, ensemble.parameters()):
            copy.requires_grad_().grad = parameter.grad[i].clone()
        assert (nn.utils.clip_grad_norm_(member, 0.5) > 0.5) == (i in (1, 3))
    clip_each_agent(list(ensemble.parameters()), MEMBERS, 0.5)
    for i, member in enumerate(members):
        for copy, parameter in zip(member, ensemble.parameters()):
            torch.testing.assert_close(parameter.grad[i], copy.grad, rtol=1e-5, atol=0)


@each_target
def test_statistics_are_those_of_the_training_rows(target):
    dataset, rows = toy_dataset(), torch.randperm(5000)[:3000]
    ensemble = Ensemble(REACHER, Args(**SMALL, target=target))
    ensemble.standardize(dataset, rows)
    batch, _ = batches_of(dataset, rows)
    states, joint_actions, next_states, rewards = (x.double().numpy() for x in batch)
    expected = {
        "input": np.hstack([states, joint_actions]),
        "target": next_states - states if target == "delta" else next_states,
        "reward": rewards[:, None],
    }
    for name, values in expected.items():
        varying = values.std(0) > 1e-6
        assert varying.all() == (name == "reward")
        mean, std = getattr(ensemble, f"{name}_mean"), getattr(ensemble, f"{name}_std")
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(std[varying], values[:, varying].std(0, ddof=1), rtol=1e-5)
        assert (std[~varying] == (0 if name == "target" else 1)).all()


@each_target
def test_dimensions_that_never_change_are_predicted_to_the_bit(target):
    dataset, rows = toy_dataset(), torch.arange(5000)
    ensemble = Ensemble(REACHER, Args(**SMALL, target=target))
    ensemble.standardize(dataset, rows)
    states = 100 * torch.randn(50, 11)
    states[..., 10] = 0
    predicted = ensemble.predict(states, torch.randn(50, 2)).next_states
    # With absolute targets that is the only one with the same value in all rows.
    kept = CONSTANT if target == "delta" else [10]
    assert torch.equal(predicted[..., kept], states[:, kept].expand(MEMBERS, -1, -1))
    varying = ensemble.target_std.nonzero()[:, 0]
    batches = batches_of(dataset, rows.expand(MEMBERS, -1))
    assert member_losses(ensemble, *batches, varying, 0.5, 0.5).isfinite().all()


def test_held_out_errors_against_a_loop_over_members():
    dataset, ensemble = toy_dataset(), made_up_ensemble()
    scale = ensemble.scale
    rows = torch.randperm(5000)[:4500]  # more than one part
    errors = held_out_errors(ensemble, dataset, rows)
    (states, joint_actions, next_states, rewards), (_, masks) = batches_of(dataset, rows)
    for i in range(MEMBERS):
        prediction = literal_prediction(ensemble, i, states, joint_actions)
        state_error, reward_error = prediction[0] - next_states, prediction[2] - rewards
        probability = literal_mask(ensemble, i, next_states)
        expected = {
            "state_error": state_error.norm(dim=1).mean(),
            "reward_error": reward_error.abs().mean(),
            "scaled_state_error": (state_error / scale[:-1]).square().mean(1).sqrt().mean(),
            "scaled_reward_error": (reward_error / scale[-1]).abs().mean(),
            "mask_error": ((probability > 0.5) != (masks == 1)).float().mean(),
            "missed_ends": (probability[masks == 0] > 0.5).float().mean(),
        }
        for name, error in expected.items():
            torch.testing.assert_close(errors[name][i], error, rtol=1e-4, atol=1e-5)


LENGTHS = {"some end": [3, 10, 1, 11, 10], "none ends": [11] * 5, "all end": [2, 7, 1, 7, 4]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_open_loop_against_a_loop_until_the_true_episodes_end(lengths):
    """Steps after a terminal belong to no episode; the last step of an episode does."""
    dataset, ensemble = toy_dataset(), made_up_ensemble()
    dataset.last_rows = torch.tensor([dataset.size - 1])  # so that only the simulator ends them
    rows, steps = torch.tensor([7, 100, 205, 3000, 4321]), torch.arange(1, 11)[:, None]
    true_states, true_rewards = 10 * torch.randn(10, 5, 11), torch.randn(10, 5)
    terminals = steps == torch.tensor(lengths)  # [step, row]
    over = steps > torch.tensor(lengths)
    true_states[over] = true_rewards[over] = 1e6

    class Scripted:
        def __init__(self, task, number):
            self.steps = zip(true_states.numpy(), true_rewards.numpy(), terminals.numpy())

        def set_states(self, states):
            assert np.array_equal(states, dataset.states[rows])

        def step(self, actions):
            return next(self.steps)

    dataset.task = replace(REACHER, simulator=Scripted)
    got = open_loop(ensemble, dataset, rows, "on_data")
    generator = torch.Generator().manual_seed(0)
    members = [torch.randint(MEMBERS, (5,), generator=generator) for _ in range(10)]
    errors, gaps, epsilons = [[] for _ in range(10)], [], []
    for i, row in enumerate(rows):
        state, gap = dataset.states[row], 0.0
        for t in range(min(10, lengths[i])):
            action = REACHER.join_actions(dataset.actions[row + t])
            predictions = [literal_prediction(ensemble, m, state, action) for m in range(MEMBERS)]
            next_states = torch.stack([x[0] for x in predictions]).detach()
            rewards = torch.stack([x[2] for x in predictions]).detach()
            variables = torch.cat([next_states, rewards[:, None]], dim=1) / ensemble.scale
            epsilons.append(torch.linalg.matrix_norm(torch.cov(variables.T)))
            state = next_states[members[t][i]]
            errors[t].append((state - true_states[t, i]).norm().item())
            gap += (rewards.mean() - true_rewards[t, i]).item()
        gaps.append(gap)
    expected = {
        "one_step_error": np.mean(errors[0]),
        "ten_step_error": np.mean([x for x in errors if x][-1]),
        "return_error": np.mean(np.abs(gaps)),
        "return_bias": np.mean(gaps),
    }
    for q in (0.5, 0.9, 0.99):
        expected[f"epsilon_g_{q}"] = torch.stack(epsilons).quantile(q).item()
    assert got == pytest.approx(expected, rel=1e-3)


def dataset_of_episodes(lengths):
    """Random episodes of these lengths."""
    size = sum(lengths)
    states = np.random.default_rng(0).normal(size=(size + 1, 11)).astype(np.float32)
    columns = {
        "observations": states[:-1],
        "actions": np.zeros((size, 2), np.float32),
        "next_observations": states[1:],
        "rewards": np.zeros(size, np.float32),
        "terminals": np.zeros(size, np.float32),
        "timeouts": np.isin(np.arange(size), np.cumsum(lengths) - 1).astype(np.float32),
    }
    return OfflineDataset(REACHER, columns)


def test_open_loops_start_where_an_episode_lasts_ten_steps():
    dataset = dataset_of_episodes([9, 10, 1, 12])
    rows = torch.arange(dataset.size)
    starts = open_loop_starts(dataset, rows)
    assert sorted(starts.tolist()) == [9, 20, 21, 22]
    assert torch.equal(starts, open_loop_starts(dataset, rows))
    assert sorted(open_loop_starts(dataset, rows[10:], "first").tolist()) == [20]
    assert sorted(open_loop_starts(dataset, rows, "first").tolist()) == [9, 20]
    assert open_loop_starts(dataset, rows[:9]).tolist() == [0]  # where none does, the longest


def test_open_loops_start_at_all_ages_of_equally_long_episodes():
    dataset = dataset_of_episodes([50] * 40)
    starts = open_loop_starts(dataset, torch.arange(2000))[:1000]
    assert set((starts - dataset.episode_starts[starts]).tolist()) == set(range(41))


def test_disturbed_actions():
    generator, actions = torch.Generator().manual_seed(0), 2 * torch.rand(4000, 2, 1) - 1
    assert torch.equal(disturb(REACHER, actions, "on_data", generator), actions)
    perturbed = disturb(REACHER, actions, "perturbed", generator)
    assert perturbed.abs().max() == 1 and 0.2 < (perturbed - actions).std() < 0.3
    random = disturb(REACHER, actions, "random", generator)
    assert random.std() == pytest.approx(3**-0.5, abs=0.02)
    game = find_task("coordination-neutral")
    choices = torch.eye(2)[torch.zeros(4000, 2, dtype=int)]
    for behavior, share in {"on_data": 0.0, "perturbed": 0.15, "random": 0.5}.items():
        disturbed = disturb(game, choices, behavior, generator)
        assert (disturbed.sum(-1) == 1).all()
        assert disturbed[..., 1].mean() == pytest.approx(share, abs=0.02)


def test_predictions_do_not_depend_on_an_ants_heading(float64):
    """A turned ant goes where it went before, turned, and as uncertain; the reward for its speed
    along x is the one for where it now goes."""
    ensemble, symmetry = Ensemble(ANT, Args(**SMALL)), ANT.symmetry
    for buffer in ensemble.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    states, joint_actions = torch.randn(30, 27), torch.randn(30, 8)
    angles = torch.linspace(-1, 1, 30)
    before = ensemble.predict(states, joint_actions)
    after = ensemble.predict(symmetry.turn(states, angles), joint_actions)
    turned = symmetry.turn_transition(angles, states, before.next_states, before.rewards)
    torch.testing.assert_close((after.next_states, after.rewards), turned[1:])
    torch.testing.assert_close(after.epsilon_g, before.epsilon_g)
    # At heading 0 it is what the networks say.
    upright = symmetry.turn(states, -symmetry.heading(states))
    prediction = ensemble.predict(upright, joint_actions)
    torch.testing.assert_close(prediction, ensemble.transition(upright, joint_actions))


def test_an_ants_model_learns_at_heading_zero_from_all_sides(monkeypatch, tmp_path):
    """Where rollouts will ask it; only the first states keep their headings."""
    columns, seen = recorded_columns(ANT, length=30), []
    losses, dataset = world_model.member_losses, OfflineDataset(ANT, columns)
    spin = torch.linspace(-3, 3, dataset.size)  # every row at a heading of its own
    transitions = dataset.states, dataset.next_states, dataset.rewards
    spun = ANT.symmetry.turn_transition(spin, *transitions)
    dataset.states, dataset.next_states, dataset.rewards = spun

    def look(ensemble, batch, mask_batch, *others):
        seen.append((batch, mask_batch))
        return losses(ensemble, batch, mask_batch, *others)

    def judge(ensemble, judged_dataset, rows):
        assert judged_dataset is dataset.at_heading_zero
        return held_out_errors(ensemble, judged_dataset, rows)

    functions = {"load_dataset": lambda *_: dataset, "member_losses": look, "OPEN_LOOPS": 5}
    for name, function in (functions | {"held_out_errors": judge}).items():
        monkeypatch.setattr(world_model, name, function)
    options = SMALL | {"task": ANT.name, "elites": 2, "total_steps": 1, "batch_size": 64}
    world_model.train(Args(**options, run_dir=tmp_path / "run", device="cpu"))
    exported = torch.load(tmp_path / "run" / "world_model.pt", weights_only=True)
    upright, training_rows = dataset.at_heading_zero, dataset.split()[0]
    (states, actions, next_states, _), (judged_states, masks) = seen.pop()
    joint_actions, known_masks = ANT.join_actions(upright.actions), upright.masks[:, None]
    copies = []
    for state_matrix, action_matrix in ANT.symmetry.body_symmetries:
        moved = [x @ state_matrix.T for x in (upright.states, upright.next_states)]
        moved += [joint_actions @ action_matrix.T, known_masks]
        copies.append(torch.cat(moved, dim=1)[training_rows])
    copies = torch.cat(copies)

    def is_known(rows, columns):
        known = {tuple(row) for row in copies[:, columns].round(decimals=4).tolist()}
        return [tuple(row) in known for row in rows.flatten(0, -2).round(decimals=4).tolist()]

    assert all(is_known(torch.cat([states, next_states, actions], dim=-1), slice(62)))
    assert all(is_known(next_states, slice(27, 54)))
    judged = torch.cat([judged_states, masks[..., None]], dim=-1)
    assert all(is_known(judged, [*range(27, 54), 62]))
    # Each side is drawn, and for masks as well.
    for drawn, columns in ((states, slice(27)), (judged_states, slice(27, 54))):
        sides = copies[:, columns].view(8, len(training_rows), 27)
        drawn = drawn.flatten(0, 1)
        assert all((drawn[:, None] == side).all(-1).any() for side in sides)
    moved = dataset.from_random_sides
    for name, bound in moved.bounding_box().items():
        assert torch.equal(exported[name], bound)
    mean = moved.states[training_rows].mean(0)
    torch.testing.assert_close(exported["input_mean"][:27], mean)
    torch.testing.assert_close(exported["scale"][-1], moved.rewards.std())
    # A penalty of one standard deviation of the data's reward at eps_g's 0.99 quantile.
    quantile = exported["errors"]["on_data/epsilon_g_0.99"]
    assert exported["lambda_g"] == pytest.approx(upright.rewards.std().item() / quantile)
    assert torch.equal(exported["first_states"], dataset.states[dataset.first_rows])


def test_selected_members_predict_as_before_in_the_order_asked_for():
    ensemble = made_up_ensemble()
    selected = ensemble.select([3, 0, 1])
    inputs = torch.randn(20, 11), torch.randn(20, 2)
    for one, other in zip(selected.predict(*inputs)[:2], ensemble.predict(*inputs)[:2]):
        torch.testing.assert_close(one, other[[3, 0, 1]])
    for parameter in ensemble.parameters():  # continues to learn
        parameter.data.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in selected.parameters())


@pytest.mark.parametrize("target, activation", [("delta", "silu"), ("absolute", "relu")])
def test_moma_ppo_reads_what_is_exported(target, activation, tmp_path):
    """Its inference code is its own, so it is compared with the ensemble's."""
    args = Args(**SMALL, elites=3, target=target, activation=activation)
    dataset = toy_dataset()
    ensemble = made_up_ensemble(target, activation=activation)
    record = {"elites": [2, 0, 3], "on_data/epsilon_g_0.99": 0.02}
    exported = world_model.export(ensemble, args, dataset, record, 1.0)
    assert exported["l_epsilon"] == pytest.approx(10 * 0.02)
    # One standard deviation of the reward at the quantile.
    assert exported["lambda_g"] * 0.02 == pytest.approx(dataset.rewards.std().item())
    world_model.save(exported, tmp_path / "world_model.pt")
    model = open_world_model(REACHER, tmp_path / "world_model.pt", "cpu")
    states, actions = dataset.states[:50], dataset.actions[:50]
    joint_actions = REACHER.join_actions(actions)
    prediction = ensemble.select([2, 0, 3]).predict(states, joint_actions)
    next_states, rewards, epsilon_g = (x.detach() for x in prediction)
    means, stds = model.predict(states, actions)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(means, torch.cat([next_states, rewards[..., None]], -1), **close)
    inputs = (x.expand(MEMBERS, -1, -1) for x in (states, joint_actions))
    _, log_std, _, reward_log_std = (x[[2, 0, 3]].detach() for x in ensemble(*inputs))
    expected = [log_std.exp() * ensemble.target_std, reward_log_std.exp() * ensemble.reward_std]
    torch.testing.assert_close(stds, torch.cat(expected, -1), **close)
    step, box = model.step(states, actions), dataset.bounding_box()
    margin = 0.5 * (box["state_max"] - box["state_min"])
    assert (step.next_states >= box["state_min"] - margin).all()
    assert (step.next_states <= box["state_max"] + margin).all()
    margin = 0.5 * (box["reward_max"] - box["reward_min"])
    expected = rewards.mean(0).clamp(box["reward_min"] - margin, box["reward_max"] + margin)
    torch.testing.assert_close(step.rewards, expected, rtol=1e-4, atol=1e-4)
    logits = ensemble.mask_logits(states.expand(MEMBERS, -1, -1))[[2, 0, 3]]
    assert torch.equal(model.masks(states), ((logits > 0).float().mean(0) > 0.5).float())
    torch.testing.assert_close(step.epsilon_g, epsilon_g, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target, beta", [("delta", 0.5), ("absolute", 0.0)])
def test_a_linear_world_is_learned(target, beta):
    dataset = toy_dataset()
    training_rows, held_out_rows = dataset.split()
    options = SMALL | {"hidden": (64, 64), "reward_hidden": (64,), "mask_hidden": (64,)}
    ensemble = Ensemble(REACHER, Args(**options, target=target))
    ensemble.standardize(dataset, training_rows)
    varying = ensemble.target_std.nonzero()[:, 0]
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-2)
    untrained = held_out_errors(ensemble, dataset, held_out_rows)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        rows = training_rows[torch.randint(len(training_rows), (MEMBERS, 128))]
        optimizer.zero_grad()
        batches = batches_of(dataset, rows)
        member_losses(ensemble, *batches, varying, beta, reward_beta=0.0).sum().backward()
        clip_each_agent(list(ensemble.parameters()), MEMBERS, 1.0)
        optimizer.step()
    errors = held_out_errors(ensemble, dataset, held_out_rows)
    for name in ("state_error", "reward_error"):
        assert (errors[name] < 0.05 * untrained[name]).all(), (name, errors, untrained)
    assert (errors["mask_error"] < 0.05).all(), errors  # one in five is absorbing


def test_one_row_in_sixteen_is_rare():
    rows, rare_rows = torch.zeros(3, 64, dtype=torch.long), torch.tensor([5, 7, 9])
    mixed = world_model.with_rare(rows, rare_rows)
    assert (rows == 0).all() and world_model.with_rare(rows, rare_rows[:0]) is rows
    assert set(mixed.unique().tolist()) == {0, 5, 7, 9}
    assert ((mixed > 0).sum(dim=1) == 4).all()


@pytest.mark.parametrize("size, rare", [(1, 0), (15, 0), (16, 1), (17, 1), (33, 2)])
def test_no_more_than_one_row_in_sixteen_is_rare(size, rare):
    mixed = world_model.with_rare(torch.zeros(3, size, dtype=torch.long), torch.tensor([5]))
    assert ((mixed > 0).sum(dim=1) == rare).all()


def test_an_output_named_as_json_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"name it \*\.pt"):
        world_model.train(Args(output=tmp_path / "model.json"))
    assert not (tmp_path / "model.json").exists()


def test_states_that_never_change_are_refused(monkeypatch, tmp_path):
    dataset = dataset_of_episodes([50, 50])
    dataset.next_states = dataset.states
    monkeypatch.setattr(world_model, "load_dataset", lambda *_: dataset)
    with pytest.raises(InputError, match="never change; use --no-normalize"):
        world_model.train(Args(**SMALL | {"elites": 2, "run_dir": tmp_path / "run"}))


@pytest.mark.parametrize("script", [world_model, logo], ids=["world_model", "logo"])
def test_a_rare_transition_is_shown_as_a_whole(script, monkeypatch, tmp_path):
    """With eight agents rewards are rare. The game's next state is the joint action."""
    seen = []
    name = "member_losses" if script is world_model else "model_losses"
    losses = getattr(script, name)

    def look(network, batch, *others):
        seen.append(batch)
        return losses(network, batch, *others)

    monkeypatch.setattr(script, name, look)
    sizes = {"model_steps": 2, "rollouts": 4} if script is logo else SMALL | {"elites": 2}
    options = {"total_steps": 2, "eval_every": 2, "batch_size": 512} | sizes
    options["run_dir"] = tmp_path / "run"
    script.train(script.Args("coordination-unfavorable-8", **options))
    for batch in seen[:2]:
        if script is logo:
            actions, next_states, rewards = batch.actions, batch.next_states, batch.rewards
            actions = actions.flatten(-2)
        else:
            _, actions, next_states, rewards = batch
        assert torch.equal(actions, next_states)
        alike = next_states.unflatten(-1, (8, 2)).sum(-2).amax(-1) == 8
        assert torch.equal(rewards == 1, alike) and (rewards == 1).float().mean() > 0.05


def test_a_run_trains_as_its_options_say(monkeypatch, tmp_path):
    """Each member on training rows of its own, with clipped gradients and falling rates."""
    dataset, seen, steps = toy_dataset(terminals=0.002), [], []
    losses, adam_step = world_model.member_losses, torch.optim.AdamW.step

    def look(ensemble, batch, mask_batch, varying, *betas):
        seen.append((batch, mask_batch, betas))
        return losses(ensemble, batch, mask_batch, varying, *betas)

    def keep_step(optimizer):
        groups = optimizer.param_groups
        squares = sum(p.grad.square().sum((1, 2)) for group in groups for p in group["params"])
        decays = [group["weight_decay"] for group in groups]
        steps.append((groups[0]["lr"], decays, squares.sqrt().max().item()))
        return adam_step(optimizer)

    functions = {"load_dataset": lambda *_: dataset, "member_losses": look, "OPEN_LOOPS": 5}
    for name, function in functions.items():
        monkeypatch.setattr(world_model, name, function)
    monkeypatch.setattr(torch.optim.AdamW, "step", keep_step)
    options = SMALL | {"elites": 2, "total_steps": 3, "eval_every": 3, "batch_size": 64}
    options |= {"beta": 0.25, "reward_beta": 0.75, "max_grad_norm": 1e-3}
    world_model.train(Args(**options, run_dir=tmp_path / "run", device="cpu"))
    known = {tuple(state) for state in dataset.states[dataset.split()[0]].tolist()}
    for (states, *_), (_, masks), betas in seen:
        assert {tuple(state) for state in states.flatten(0, 1).tolist()} <= known
        assert not torch.equal(states[0], states[1]) and betas == (0.25, 0.75)
        assert ((masks == 0).sum(1) >= 4).all()  # one in sixteen
    rates, decays, norms = zip(*steps)
    assert rates == pytest.approx([4e-3, 3e-3, 1e-3]) and decays[0] == [0, 0.3, 0]
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)
    exported = torch.load(tmp_path / "run" / "world_model.pt", weights_only=True)
    scale = torch.cat([dataset.states, dataset.rewards[:, None]], dim=1).std(0)
    scale[10] = 1  # which never changes
    torch.testing.assert_close(exported["scale"], scale)
