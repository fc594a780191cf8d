"""The world model's losses and statistics against slow literal versions, one member at a time, and a toy world it must learn."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import world_model
from data.offline_dataset import OfflineDataset
from mamujoco_envs import TASKS
from world_model import (
    BatchedLinear,
    Ensemble,
    clip_member_gradients,
    member_losses,
    open_loop,
    select_members,
    standardize,
    validate,
)

TASK = TASKS["reacher-leader-only"]
MEMBERS = 4
CONSTANT = [4, 5, 10]  # Reacher's target stays where it is, and the fingertip in its plane

each_target = pytest.mark.parametrize("target", ["delta", "absolute"])
each_trunk = pytest.mark.parametrize("trunk", ["separate", "shared"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def architecture(target="delta", trunk="separate", width=16):
    hidden = {"state": [width, width], "reward": [width], "mask": [width]}
    return {
        "state_dim": 11,
        "action_dim": 2,
        "members": MEMBERS,
        "target": target,
        "trunk": trunk,
        "hidden": hidden,
        "activation": "silu",
    }


def made_up_ensemble(target="delta", trunk="separate"):
    """With statistics as `standardize` sets them: a target that never changes has neither mean nor scale."""
    ensemble = Ensemble(**architecture(target, trunk))
    for buffer in ensemble.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    if target == "delta":
        ensemble.target_mean[CONSTANT] = ensemble.target_std[CONSTANT] = 0
    return ensemble


def toy_dataset(size=5000, terminals=0.2):
    """A linear world: next states, rewards and whether the next state is absorbing."""
    rng = np.random.default_rng(0)
    states, actions = (
        rng.normal(size=(size, 11)) * np.linspace(0.1, 10, 11),
        rng.uniform(-1, 1, (size, 2)),
    )
    states[:, 10] = 0.0
    change = 0.2 * states @ rng.normal(size=(11, 11)) / 11 + actions @ rng.normal(size=(2, 11))
    change[:, CONSTANT] = 0
    columns = {"observations": states, "actions": actions, "next_observations": states + change}
    columns |= {"rewards": states[:, 0] - actions[:, 1] - 3, "timeouts": np.arange(size) % 50 == 49}
    columns["terminals"] = states[:, 1] < np.quantile(states[:, 1], terminals)
    return OfflineDataset(TASK, columns)


def literal_prediction(ensemble, member, states, actions):
    """One member's mean next states, their log standard deviations, both of the reward, and the mask's logits."""
    x, outputs = (
        (torch.cat([states, actions], dim=1) - ensemble.input_mean) / ensemble.input_std,
        [],
    )
    for network in ensemble.networks:
        y = x
        for layer in network:
            y = (
                y @ layer.weight[member] + layer.bias[member]
                if isinstance(layer, BatchedLinear)
                else layer(y)
            )
        outputs.append(y)
    outputs = torch.cat(outputs, dim=1)
    next_states = outputs[:, :11] * ensemble.target_std + ensemble.target_mean
    next_states = states + next_states if ensemble.target == "delta" else next_states
    state_log_stds = outputs[:, 11:22].clamp(-6, 2) + ensemble.target_std.log()
    reward = outputs[:, 22] * ensemble.reward_std + ensemble.reward_mean
    reward_log_stds = outputs[:, 23].clamp(-6, 2) + ensemble.reward_std.log()
    return next_states, state_log_stds, reward, reward_log_stds, outputs[:, 24]


def batch_of(dataset, rows):
    """Columns of rows [member, batch]."""
    columns = [
        dataset.states,
        TASK.join_actions(dataset.actions),
        dataset.next_states,
        dataset.rewards,
        dataset.masks,
    ]
    return [column[rows] for column in columns]


@each_target
@each_trunk
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_losses_are_those_of_gaussians_and_a_bernoulli(target, trunk, beta, float64):
    ensemble = made_up_ensemble(target, trunk)
    for network in ensemble.networks:
        network[-1].weight.data.mul_(30)  # some log standard deviations leave their bounds
    states, next_states = torch.randn(2, MEMBERS, 30, 11)
    actions, rewards, masks = (
        torch.randn(MEMBERS, 30, 2),
        torch.randn(MEMBERS, 30),
        (torch.rand(MEMBERS, 30) > 0.3).double(),
    )
    changes = ensemble.target_std.nonzero()[:, 0]
    losses = member_losses(ensemble, (states, actions, next_states, rewards, masks), changes, beta)
    for i in range(MEMBERS):
        mean, log_std, reward_mean, reward_log_std, logits = literal_prediction(
            ensemble, i, states[i], actions[i]
        )
        assert (log_std < -5.5).any() and (log_std[:, changes] > 1.5).any()
        log_probs = torch.distributions.Normal(
            mean[:, changes], log_std[:, changes].exp()
        ).log_prob(next_states[i][:, changes])
        reward_log_probs = torch.distributions.Normal(reward_mean, reward_log_std.exp()).log_prob(
            rewards[i]
        )
        constant = 0.5 * np.log(2 * np.pi)
        variance = (2 * (log_std - ensemble.target_std.log())).exp()[
            :, changes
        ]  # of the standardised change
        expected = [
            (variance**beta * (-log_probs - constant)).mean(),
            -reward_log_probs.mean() - constant,
        ]
        expected.append(F.binary_cross_entropy(logits.sigmoid(), masks[i]))
        torch.testing.assert_close(losses[i], torch.stack(expected), rtol=1e-9, atol=1e-12)


@each_trunk
def test_a_members_loss_leaves_the_other_members_alone(trunk):
    ensemble = made_up_ensemble(trunk=trunk)
    batch = batch_of(toy_dataset(), torch.randint(5000, (MEMBERS, 30)))
    losses = member_losses(ensemble, batch, ensemble.target_std.nonzero()[:, 0], 0.5)
    losses[1].sum().backward()
    for name, parameter in ensemble.named_parameters():
        assert (parameter.grad[1] != 0).any(), name
        assert (parameter.grad[[0, 2, 3]] == 0).all(), name


def test_members_start_different():
    for name, parameter in Ensemble(**architecture()).named_parameters():
        assert not torch.equal(parameter[0], parameter[1]), name


def test_gradients_are_clipped_for_each_member_by_itself():
    ensemble = made_up_ensemble()
    scale = torch.tensor([1e-3, 1.0, 1e-4, 1e3])[:, None, None]
    for parameter in ensemble.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    members = [
        [nn.Parameter(p[i].detach().clone()) for p in ensemble.parameters()] for i in range(MEMBERS)
    ]
    for i, member in enumerate(members):
        for copy, parameter in zip(member, ensemble.parameters()):
            copy.grad = parameter.grad[i].clone()
        norm = nn.utils.clip_grad_norm_(member, 0.5)
        assert (norm > 0.5) == (i in (1, 3))
    clip_member_gradients(ensemble, 0.5)
    for i, member in enumerate(members):
        for copy, parameter in zip(member, ensemble.parameters()):
            torch.testing.assert_close(parameter.grad[i], copy.grad, rtol=1e-5, atol=0)


@each_target
def test_statistics_are_those_of_the_training_rows(target):
    dataset = toy_dataset()
    rows = torch.randperm(5000)[:3000]
    ensemble = Ensemble(**architecture(target))
    standardize(ensemble, dataset, rows)
    states, next_states = (
        dataset.states[rows].double().numpy(),
        dataset.next_states[rows].double().numpy(),
    )
    inputs = np.hstack([states, dataset.actions[rows, :, 0].double().numpy()])
    targets = next_states - states if target == "delta" else next_states
    for name, values in {
        "input": inputs,
        "target": targets,
        "reward": dataset.rewards[rows].double().numpy()[:, None],
    }.items():
        changes = values.std(0) > 1e-6
        assert changes.all() == (name == "reward")
        mean, std = getattr(ensemble, f"{name}_mean"), getattr(ensemble, f"{name}_std")
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(std[changes], values[:, changes].std(0, ddof=1), rtol=1e-5)
        assert (std[~changes] == (0 if name == "target" else 1)).all()


@each_target
def test_dimensions_that_never_change_are_predicted_to_the_bit(target):
    dataset, rows = toy_dataset(), torch.arange(5000)
    ensemble = Ensemble(**architecture(target))
    standardize(ensemble, dataset, rows)
    states, joint = 100 * torch.randn(MEMBERS, 50, 11), torch.randn(MEMBERS, 50, 2)
    states[..., 10] = 0
    predicted = ensemble(states, joint).next_states
    kept = (
        CONSTANT if target == "delta" else [10]
    )  # the only one that has the same value in all rows
    assert torch.equal(predicted[..., kept], states[..., kept])
    losses = member_losses(
        ensemble,
        batch_of(dataset, rows.expand(MEMBERS, -1)),
        ensemble.target_std.nonzero()[:, 0],
        0.5,
    )
    assert losses.isfinite().all()


def test_validation_errors_against_a_loop_over_rows():
    dataset, ensemble, rows = (
        toy_dataset(),
        made_up_ensemble(),
        torch.randperm(5000)[:4500],
    )  # more than one part
    errors = validate(ensemble, dataset, rows)
    for i in range(MEMBERS):
        next_states, _, rewards, _, logits = literal_prediction(
            ensemble, i, dataset.states[rows], dataset.actions[rows, :, 0]
        )
        expected = [
            np.mean(
                [
                    np.sqrt(np.sum((got - true) ** 2))
                    for got, true in zip(
                        next_states.detach().numpy(), dataset.next_states[rows].numpy()
                    )
                ]
            ),
            np.mean(np.abs(rewards.detach().numpy() - dataset.rewards[rows].numpy())),
            np.mean((logits.detach().numpy() > 0) != (dataset.masks[rows].numpy() == 1)),
        ]
        np.testing.assert_allclose(errors[i], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "lengths",
    [[3, 10, 1, 11, 10], [11] * 5, [2, 7, 1, 7, 4]],
    ids=["some end", "none ends", "all end early"],
)
def test_open_loop_against_a_loop_over_rows_until_their_true_episodes_end(lengths, monkeypatch):
    """What a simulator and the model say after a terminal is in no episode; the last step of an episode is."""
    dataset, ensemble, scale = toy_dataset(), made_up_ensemble(), torch.rand(12) + 0.1
    rows, true_states, true_rewards = (
        torch.tensor([7, 100, 205, 3000, 4321]),
        10 * torch.randn(10, 5, 11),
        torch.randn(10, 5),
    )
    steps = torch.arange(1, 11)[:, None]
    terminals = steps == torch.tensor(lengths)  # [step, row]
    true_states[steps > torch.tensor(lengths)] = true_rewards[steps > torch.tensor(lengths)] = (
        torch.nan
    )

    class Scripted:
        def __init__(self, task, number):
            self.steps = zip(true_states.numpy(), true_rewards.numpy(), terminals.numpy())

        def set_states(self, states):
            assert np.array_equal(states, dataset.states[rows])

        def step(self, actions):
            return next(self.steps)

    monkeypatch.setattr(world_model, "make_simulator", Scripted)
    got = open_loop(ensemble, dataset, rows, scale, "held-out")
    generator = torch.Generator().manual_seed(0)
    members = [torch.randint(MEMBERS, (5,), generator=generator) for _ in range(10)]
    errors, gaps, epsilons = [[] for _ in range(10)], [], []
    for i, row in enumerate(rows):
        state, gap = dataset.states[row], 0.0
        for t in range(min(10, lengths[i])):
            joint = TASK.join_actions(dataset.actions[row + t])
            predictions = [
                literal_prediction(ensemble, member, state[None], joint[None])
                for member in range(MEMBERS)
            ]
            next_states, rewards = (
                torch.cat([x[0] for x in predictions]).detach(),
                torch.cat([x[2] for x in predictions]).detach(),
            )
            epsilons.append(
                torch.linalg.matrix_norm(
                    torch.cov((torch.cat([next_states, rewards[:, None]], dim=1) / scale).T)
                )
            )
            state = next_states[members[t][i]]
            errors[t].append((state - true_states[t, i]).norm().item())
            gap += (rewards.mean() - true_rewards[t, i]).item()
        gaps.append(gap)
    expected = {
        "one_step_error": np.mean(errors[0]),
        "ten_step_error": np.mean([x for x in errors if x][-1]),
    }
    expected |= {"return_error": np.mean(np.abs(gaps)), "return_bias": np.mean(gaps)}
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    quantiles = [torch.stack(epsilons).quantile(q).item() for q in (0.5, 0.9, 0.99)]
    assert got["epsilon_g"] == pytest.approx(dict(zip(("0.5", "0.9", "0.99"), quantiles)), rel=1e-3)


@each_trunk
def test_selected_members_predict_as_before_in_the_order_asked_for(trunk):
    ensemble = made_up_ensemble(trunk=trunk)
    selected = select_members(ensemble, architecture(trunk=trunk), [3, 0, 1])
    states, joint = torch.randn(20, 11), torch.randn(20, 2)
    before = ensemble(states.expand(MEMBERS, -1, -1), joint.expand(MEMBERS, -1, -1))
    for field, expected in zip(selected(states.expand(3, -1, -1), joint.expand(3, -1, -1)), before):
        torch.testing.assert_close(field, expected[[3, 0, 1]])
    for parameter in ensemble.parameters():  # goes on learning
        parameter.data.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in selected.parameters())


@each_target
@pytest.mark.parametrize(
    "trunk, beta", [("separate", 0.0), ("separate", 0.5), ("shared", 0.0)]
)  # beta makes a shared trunk care less for the state
def test_a_linear_world_is_learned(target, trunk, beta):
    dataset, (training_rows, validation_rows) = toy_dataset(), toy_dataset().split()
    ensemble = Ensemble(**architecture(target, trunk, width=64))
    standardize(ensemble, dataset, training_rows)
    changes = ensemble.target_std.nonzero()[:, 0]
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-2)
    untrained = validate(ensemble, dataset, validation_rows)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        rows = training_rows[torch.randint(len(training_rows), (MEMBERS, 128))]
        optimizer.zero_grad()
        member_losses(ensemble, batch_of(dataset, rows), changes, beta).sum().backward()
        clip_member_gradients(ensemble, 1.0)
        optimizer.step()
    errors = validate(ensemble, dataset, validation_rows)
    assert (errors[:, :2] < 0.05 * untrained[:, :2]).all(), (errors, untrained)
    assert (errors[:, 2] < 0.15).all(), errors  # one in five is absorbing
