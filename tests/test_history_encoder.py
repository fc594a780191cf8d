"""The networks that every script repeats, against plain versions: one agent, one step at a time.

They are the same text in every script, which another test checks, so IBC's stand for all.
"""

import pytest
import torch
import torch.nn as nn
from made_up import (
    ANT,
    GAME,
    REACHER,
    literal_inputs,
    literal_memory,
    literal_mlp,
    made_up_histories,
    made_up_states,
    scramble,
)

from baselines import ibc
from baselines.ibc import MLP, BatchedLinear, HistoryEncoder, clip_each_agent
from mamujoco_envs import find_task


def test_each_slice_starts_as_a_linear_layer_of_its_true_width():
    layer = BatchedLinear([400, 100], 300)
    assert layer.weight.shape == (2, 400, 300)
    for weight, bias, width in zip(layer.weight, layer.bias, [400, 100]):
        reference = nn.Linear(width, 300)
        for got, expected in [(weight[:width], reference.weight), (bias, reference.bias)]:
            assert 0.97 * width**-0.5 < got.abs().max() <= width**-0.5
            torch.testing.assert_close(got.std(), expected.std(), rtol=0.15, atol=0)
            assert got.mean().abs() < 0.1 * width**-0.5
    assert (layer.weight[1, 100:] == 0).all()
    assert not torch.equal(layer.weight[0, :100], layer.weight[1, :100])


def test_padding_has_no_effect_and_learns_nothing():
    layer, x = BatchedLinear([5, 3], 4), torch.randn(2, 6, 5)
    outputs = layer(x)
    torch.testing.assert_close(outputs[0], x[0] @ layer.weight[0] + layer.bias[0])
    expected = x[1, :, :3] @ layer.weight[1, :3] + layer.bias[1]  # whatever the padding holds
    torch.testing.assert_close(outputs[1], expected)
    x[1, :, 3:] = 0
    layer(x).square().sum().backward()
    assert (layer.weight.grad[1, 3:] == 0).all() and (layer.weight.grad[1, :3] != 0).all()


def test_an_mlp_is_one_perceptron_per_agent():
    mlp, x = MLP([5, 3], [7, 4], 2, activation=nn.SiLU), torch.randn(2, 6, 5)
    for agent, width in enumerate([5, 3]):
        expected = literal_mlp(mlp, agent, x[agent, :, :width])
        torch.testing.assert_close(mlp(x)[agent], expected)
    assert [type(layer) for layer in mlp] == 2 * [BatchedLinear, nn.SiLU] + [BatchedLinear]


def made_up_encoder(task, dim):
    """Moved off its initial values, and with statistics that matter."""
    shape = task.num_agents, max(task.pair_dims)
    encoder = HistoryEncoder(task.pair_dims, torch.randn(shape), torch.rand(shape) + 0.5, dim)
    for agent, width in enumerate(task.pair_dims):
        encoder.pair_mean[agent, ..., width:], encoder.pair_std[agent, ..., width:] = 0, 1
    return scramble(encoder, 0.3)


@pytest.mark.parametrize("task, dim", [(REACHER, 128), (ANT, 16)], ids=["reacher", "ant"])
def test_history_encoder_equals_the_appendix_step_by_step(task, dim, float64):
    encoder, histories = made_up_encoder(task, dim), made_up_histories(6, task)
    histories[2] = 0  # the first step of an episode
    memory = encoder(histories)
    expected = torch.stack(
        [
            literal_memory(encoder, agent, histories[:, agent, :, :width])
            for agent, width in enumerate(task.pair_dims)
        ]
    )
    torch.testing.assert_close(memory, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(memory)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad((memory * weights).sum(), parameters)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), parameters)
    names = [name for name, _ in encoder.named_parameters()]
    for name, one, other in zip(names, gradients, expected_gradients):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)
    embedding = gradients[names.index("embedding.weight")]
    for agent, width in enumerate(task.pair_dims):
        assert (embedding[agent, width:] == 0).all() and embedding[agent, :width].any()


def test_a_missing_pair_is_zero_after_standardising(float64):
    """A pair that is missing must not look like one far from the mean."""
    encoder, histories = made_up_encoder(REACHER, 16), made_up_histories(2)
    histories[:, :, :4] = 0
    before = encoder(histories)
    encoder.pair_mean.add_(100.0)
    histories[:, :, 4:] += 100.0  # all known pairs move along
    torch.testing.assert_close(encoder(histories), before, rtol=0, atol=1e-9)


def test_observations_far_from_zero_keep_their_precision():
    """Pressures, temperatures or time stamps of logged data, in float32."""
    mean, std = torch.full((2, 13), 1e4), torch.ones(2, 13)
    encoder = HistoryEncoder([13, 13], mean, std)
    near_zero = HistoryEncoder([13, 13], 0 * mean, std)
    near_zero.load_state_dict(encoder.state_dict() | {"pair_mean": near_zero.pair_mean})
    histories = torch.randn(50, 2, 10, 13)
    got, expected = encoder(histories + 1e4), near_zero(histories)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_clipping_treats_each_agent_as_if_it_were_alone():
    scales = torch.tensor([[0.01], [5.0], [0.01], [5.0]])  # two agents and their twins
    stacked = [torch.zeros(4, *shape, requires_grad=True) for shape in ((3, 2), (1, 2))]
    for parameter in stacked:
        parameter.grad = torch.randn_like(parameter) * scales[:, :, None]
    alone = [[p.detach()[agent::2].clone() for p in stacked] for agent in range(2)]
    for agent in range(2):
        for parameter, whole in zip(alone[agent], stacked):
            parameter.grad = whole.grad[agent::2].clone()
        norm = nn.utils.clip_grad_norm_(alone[agent], 1.0)
        assert (norm > 1) == (agent == 1)
    clip_each_agent(stacked, 2, 1.0)
    for agent in range(2):
        for parameter, whole in zip(alone[agent], stacked):
            torch.testing.assert_close(whole.grad[agent::2], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", [REACHER, ANT], ids=lambda task: task.name)
def test_inputs_are_memory_and_standardised_observation(task, float64):
    team = scramble(ibc.Team(task, made_up_states(50, task), ibc.Args()))
    observations, histories = task.observe(made_up_states(4, task)), made_up_histories(4, task)
    inputs = team.inputs(observations, histories)
    for agent, width in enumerate(task.obs_dims):
        expected = literal_inputs(team, agent, observations, histories)
        torch.testing.assert_close(inputs[agent, :, : 128 + width], expected, rtol=0, atol=1e-9)
        assert (inputs[agent, :, 128 + width :] == 0).all()


def test_statistics_are_those_of_what_each_agent_observes():
    states = made_up_states(100)
    states[:, 6] = 3.0  # agent 0's velocity, which never changes
    mean, std = ibc.observation_statistics(REACHER, states)
    for agent, observed in enumerate(REACHER.observed):
        for k, dimension in enumerate(observed):
            torch.testing.assert_close(mean[agent, k], states[:, dimension].mean())
            expected = states[:, dimension].std() if dimension != 6 else torch.tensor(1.0)
            torch.testing.assert_close(std[agent, k], expected)
    assert (mean[1, 6:] == 0).all() and (std[1, 6:] == 1).all()


@pytest.mark.parametrize(
    "name, memory, expected",
    [
        ("reacher-leader-only", "auto", True),
        ("reacher-leader-only", "none", False),
        ("reacher-all-observant", "auto", False),
        ("reacher-all-observant", "attention", True),
        ("coordination-neutral", "auto", False),
    ],
)
def test_who_has_a_memory(name, memory, expected):
    task = find_task(name)
    team = ibc.Team(task, torch.randn(9, task.state_dim), ibc.Args(memory=memory))
    assert (team.memory is not None) == expected
    observations = task.observe(torch.randn(3, task.state_dim))
    one, other = (team.act_greedily(observations, made_up_histories(3, task)) for _ in range(2))
    assert expected or torch.equal(one, other)
    assert one.shape == (3, task.num_agents, task.action_dim)


def test_a_game_of_choices_acts_one_hot():
    team = ibc.Team(GAME, torch.rand(9, 4), ibc.Args())
    actions = team.act_greedily(GAME.observe(torch.rand(5, 4)), None)
    assert ((actions == 0) | (actions == 1)).all() and (actions.sum(-1) == 1).all()
