"""MOMA-PPO's networks, rollouts and losses against slow literal versions: one agent, one transition, one equation at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import moma_ppo
from data.offline_dataset import OfflineDataset
from mamujoco_envs import ACTION_LIMIT, HISTORY_LENGTH, TASKS, Simulator, evaluate
from moma_ppo import (
    BatchedLinear,
    Categorical,
    Ensemble,
    Gaussian,
    GroundTruth,
    HistoryEncoder,
    Minibatch,
    Prediction,
    Step,
    Team,
    WorldModel,
    calibrate,
    clone,
    cloning_and_value_loss,
    discounted_returns,
    epistemic_uncertainty,
    generalized_advantages,
    generate_rollouts,
    make_batch,
    model_returns,
    ppo_loss,
    rollout_step,
)


def Args(**arguments):
    """The script's, with what it sets on Reacher where nothing is given."""
    return moma_ppo.Args(
        **dict(rollout_length=50, start_states="first", reward_scale=1.0) | arguments
    )


TASK = TASKS[
    "reacher-leader-only"
]  # agents see 8 and 6 dimensions, so the second one's observation is padded
WIDTHS = [9, 7]  # of their (action, observation) pairs
ANT = TASKS[
    "ant-medium-po"
]  # four agents of two actions, the first of which sees more than the others

each_task = pytest.mark.parametrize("task", [TASK, ANT], ids=lambda task: task.name)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scramble(module, scale=0.3):
    """Moves all parameters off their initial values, among which are ones and zeros, but not the weights of padding."""
    for name, parameter in module.named_parameters():
        keep = (
            (parameter == 0)
            if name.endswith("0.weight") or name.endswith("embedding.weight")
            else torch.tensor(False)
        )
        if name in ("policy.0.weight", "value.0.weight"):
            keep[:, :128] = False  # the memory's, which are zero at first
        parameter.data.add_(torch.where(keep, 0, scale * torch.randn_like(parameter)))


# --- Networks ---


def test_each_slice_starts_as_a_linear_layer_of_its_true_width():
    layer = BatchedLinear([400, 100], 300)
    assert layer.weight.shape == (2, 400, 300)
    for weight, bias, width in zip(layer.weight, layer.bias, [400, 100]):
        reference = nn.Linear(width, 300)
        for got, expected in [(weight[:width], reference.weight), (bias, reference.bias)]:
            assert got.abs().max() <= width**-0.5
            assert got.abs().max() > 0.97 * width**-0.5
            torch.testing.assert_close(got.std(), expected.std(), rtol=0.15, atol=0)
            assert got.mean().abs() < 0.1 * width**-0.5
    assert not torch.equal(layer.weight[0, :100], layer.weight[1, :100])


def test_padding_has_no_effect_and_learns_nothing():
    layer, x = BatchedLinear([5, 3], 4), torch.randn(2, 6, 5)
    outputs = layer(x)
    torch.testing.assert_close(outputs[0], x[0] @ layer.weight[0] + layer.bias[0])
    torch.testing.assert_close(
        outputs[1], x[1, :, :3] @ layer.weight[1, :3] + layer.bias[1]
    )  # whatever stands in the padding
    x[1, :, 3:] = 0
    layer(x).square().sum().backward()
    assert (layer.weight.grad[1, 3:] == 0).all() and (layer.weight.grad[1, :3] != 0).all()


def literal_memory(encoder, agent, x):
    """Appendix A.1 for one agent, [batch, 10, pair] of true width -> [batch, dim]."""

    def linear(layer, inputs):
        return inputs @ layer.weight[agent, : inputs.shape[-1]] + layer.bias[agent]

    dim = encoder.soft_key.shape[-1]
    embedded = linear(encoder.embedding, x)
    for position in range(HISTORY_LENGTH):  # 0 is the oldest pair
        for i in range(0, dim, 2):
            angle = position / 10000 ** (i / dim)
            embedded[:, position, i] += math.sin(angle)
            embedded[:, position, i + 1] += math.cos(angle)
    query, key, value = [
        linear(layer, embedded) for layer in (encoder.query, encoder.key, encoder.value)
    ]
    attended = F.scaled_dot_product_attention(query, key, value)
    hidden = F.layer_norm(
        embedded + attended, (dim,), encoder.norm_weight[agent, 0], encoder.norm_bias[agent, 0]
    )
    scores = (hidden @ encoder.soft_key[agent]).tanh() @ encoder.soft_query[
        agent, :, 0
    ]  # [batch, 10]
    return (scores.softmax(dim=1)[..., None] * hidden).sum(1)


@pytest.mark.parametrize("widths, dim", [(WIDTHS, 128), ([3, 5, 5, 1], 16)])
def test_history_encoder_equals_the_appendix_step_by_step(widths, dim, float64):
    encoder = HistoryEncoder(widths, dim)
    scramble(encoder)
    histories = torch.randn(6, len(widths), HISTORY_LENGTH, max(widths))
    histories[1, :, :4] = 0  # a short history: zero rows at the old end
    memory = encoder(histories)
    expected = [
        literal_memory(encoder, agent, histories[:, agent, :, :width])
        for agent, width in enumerate(widths)
    ]
    torch.testing.assert_close(memory, torch.stack(expected), rtol=0, atol=1e-10)
    # The same gradients, too, except of the padding's weights.
    weights = torch.randn_like(memory)
    gradients = torch.autograd.grad((memory * weights).sum(), list(encoder.parameters()))
    expected_gradients = torch.autograd.grad(
        (torch.stack(expected) * weights).sum(), list(encoder.parameters())
    )
    for (name, _), gradient, expected_gradient in zip(
        encoder.named_parameters(), gradients, expected_gradients
    ):
        if name == "embedding.weight":
            for agent, width in enumerate(widths):
                gradient[agent, width:] = 0
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}: {text}"
        )


def test_zero_padding_of_histories_learns_nothing():
    encoder, histories = HistoryEncoder(WIDTHS, 16), torch.randn(6, 2, HISTORY_LENGTH, 9)
    histories[:, 1, :, 7:] = 0
    encoder(histories).square().sum().backward()
    assert (encoder.embedding.weight.grad[1, 7:] == 0).all()


def literal_mlp(mlp, agent, x):
    for layer in mlp:
        x = (
            x @ layer.weight[agent, : x.shape[1]] + layer.bias[agent]
            if isinstance(layer, BatchedLinear)
            else layer(x)
        )
    return x


def literal_team(team, states, observations, histories):
    """Means and log standard deviations [batch, agent, action] and team values [batch], each agent at its true widths."""
    means, log_stds, values, action_dim = [], [], [], team.task.action_dim
    for agent, observed in enumerate(team.task.observed):
        mean, std, width = (
            team.state_mean[list(observed)],
            team.state_std[list(observed)],
            len(observed),
        )
        observation = (observations[:, agent, :width] - mean) / std
        actions, past = (
            histories[:, agent, :, :action_dim],
            (histories[:, agent, :, action_dim : action_dim + width] - mean) / std,
        )
        memory = literal_memory(team.memory, agent, torch.cat([actions, past], dim=-1))
        inputs = torch.cat([memory, observation], dim=1)
        outputs = literal_mlp(team.policy, agent, inputs)
        means.append(outputs[:, :action_dim])
        log_stds.append(outputs[:, action_dim:].clamp(-6, 0))
        values.append(literal_mlp(team.value, agent, inputs)[:, 0])
    mixed = literal_mlp(team.mixer, 0, (states - team.state_mean) / team.state_std)
    team_values = sum(mixed[:, agent] * value for agent, value in enumerate(values)) + mixed[:, -1]
    return torch.stack(means, dim=1), torch.stack(log_stds, dim=1), team_values


def made_up_states(number, task=TASK):
    """With a mean and a scale that standardisation has to take away."""
    return torch.randn(number, task.state_dim) * torch.linspace(
        0.1, 10, task.state_dim
    ) + torch.linspace(-5, 5, task.state_dim)


def made_up_histories(number, task=TASK):
    """Padded as the dataset's are."""
    histories = torch.randn(
        number, task.num_agents, HISTORY_LENGTH, task.action_dim + max(task.obs_dims)
    )
    for agent, width in enumerate(task.obs_dims):
        histories[:, agent, :, task.action_dim + width :] = 0
    return histories


@torch.no_grad()
def made_up_team(task=TASK):
    """Its greedy actions are in and out of the bounds, its log standard deviations on both sides of 0."""
    states = made_up_states(300, task)
    team = Team(task, states)
    scramble(team, 0.03)
    outputs, last = (
        team.policy(team.inputs(task.observe(states), made_up_histories(300, task))),
        team.policy[-1],
    )
    scale = 1 / outputs.std(dim=1, keepdim=True)
    last.weight.mul_(scale)
    last.bias.add_(-outputs.mean(dim=1, keepdim=True)).mul_(scale).add_(
        torch.tensor([0.0, -0.5]).repeat_interleave(task.action_dim)
    )
    return team


@each_task
def test_the_team_equals_agents_computed_one_by_one(task, float64):
    team, states, histories = (
        made_up_team(task),
        made_up_states(7, task),
        made_up_histories(7, task),
    )
    observations = task.observe(states)
    inputs = team.inputs(observations, histories)
    got = *team.distribution(inputs), team.team_value(inputs, states)
    for one, expected in zip(got, literal_team(team, states, observations, histories)):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-9)


def test_dimensions_that_never_change_are_left_as_they_are():
    states = made_up_states(100)
    states[:, 6] = 3.0  # agent 0's velocity
    team = Team(TASK, states)
    assert team.state_std[6] == pytest.approx(1) and team.state_mean[6] == 3
    assert team.inputs(TASK.observe(states), made_up_histories(100)).isfinite().all()


def test_the_team_starts_near_zero_off_the_clamp_and_with_different_agents():
    team = Team(TASK, made_up_states(100))
    mean, log_std = team.distribution(
        team.inputs(TASK.observe(made_up_states(500)), made_up_histories(500))
    )
    assert mean.abs().max() < 0.3
    assert log_std.max() < -1 and log_std.min() > -2
    assert team.entropy_alpha == 0
    for name, parameter in team.named_parameters():
        if name in (
            "policy.0.weight",
            "value.0.weight",
        ):  # as of a layer of the observation's width: nothing from the memory yet
            assert (parameter[:, :128] == 0).all() and (parameter[1, 134:] == 0).all()
            assert (
                0.3 < parameter[0, 128:].abs().max() <= 8**-0.5
                and 0.3 < parameter[1, 128:134].abs().max() <= 6**-0.5
            )
        if (
            len(parameter) == TASK.num_agents
            and "norm" not in name
            and not name.startswith("policy.4.bias")
        ):
            assert not torch.equal(parameter[0], parameter[1]), name


@pytest.mark.parametrize(
    "name",
    [
        "reacher-all-observant",
        "reacher-independent",
        "reacher-leader-only",
        "ant-medium-fo",
        "ant-medium-po",
    ],
)
def test_an_agent_acts_on_its_own_observation_and_history_alone(name):
    task = TASKS[name]
    states = made_up_states(5, task)
    team = Team(task, states)
    scramble(team, 0.03)
    observations, histories = (
        task.observe(states),
        torch.zeros(5, task.num_agents, HISTORY_LENGTH, max(task.obs_dims) + task.action_dim),
    )
    actions = team.act_greedily(observations, histories)
    assert (actions.abs() < 1).all()  # else the bound would hide a change
    for agent in range(task.num_agents):
        for changed in range(task.num_agents):
            for what in (observations, histories):
                before = what.clone()
                what[:, changed] += torch.randn_like(what[:, changed])
                assert torch.equal(
                    actions[:, agent], team.act_greedily(observations, histories)[:, agent]
                ) == (agent != changed)
                what.copy_(before)


def test_greedy_actions_are_the_means_bounded():
    team, states, histories = made_up_team(), made_up_states(200), made_up_histories(200)
    mean, _ = team.distribution(team.inputs(TASK.observe(states), histories))
    actions = team.act_greedily(TASK.observe(states), histories)
    assert (mean > 1).any() and (mean < -1).any() and (mean.abs() < 1).any()
    assert torch.equal(actions, mean.clamp(-1, 1))


@pytest.mark.parametrize("agents, action_dim", [(2, 1), (4, 2), (2, 3)])
def test_log_prob_is_the_joint_density(agents, action_dim):
    actions, mean = torch.randn(2, 9, agents, action_dim, dtype=torch.float64)
    log_std = torch.linspace(-6, 0, actions.numel(), dtype=torch.float64).view_as(actions)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(dim=(1, 2))
    torch.testing.assert_close(
        Gaussian(mean, log_std).log_prob(actions), expected, rtol=1e-12, atol=0
    )


# --- The world model ---


@pytest.mark.parametrize("members", [2, 5])
def test_epistemic_uncertainty_is_the_norm_of_the_covariance(members):
    next_states, rewards = (
        torch.randn(members, 6, 11, dtype=torch.float64),
        torch.randn(members, 6, dtype=torch.float64),
    )
    scale = torch.rand(12, dtype=torch.float64) + 0.1
    epsilon_r, epsilon_g = epistemic_uncertainty(
        Prediction(next_states, None, rewards, None, None), scale
    )
    for i in range(6):
        variables = (
            torch.cat([next_states[:, i], rewards[:, i, None]], dim=1).T / scale[:, None]
        )  # [state + 1, member]
        torch.testing.assert_close(epsilon_g[i], torch.linalg.matrix_norm(torch.cov(variables)))
        torch.testing.assert_close(epsilon_r[i], torch.var(rewards[:, i]))


ARCHITECTURE = {
    "state_dim": TASK.state_dim,
    "action_dim": 2,
    "members": 7,
    "target": "delta",
    "trunk": "separate",
    "hidden": {"state": [8, 8], "reward": [8], "mask": [8]},
    "activation": "silu",
}
ELITES = [4, 0, 6, 1, 3]


@pytest.fixture
def model(tmp_path):
    """A world model that was never trained, read from its file."""
    ensemble = Ensemble(**ARCHITECTURE)
    scramble(ensemble, 0.5)
    for buffer in ensemble.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    box = {
        "state_min": -torch.rand(11),
        "state_max": torch.rand(11),
        "reward_min": torch.tensor(-0.3),
        "reward_max": torch.tensor(0.3),
    }
    checkpoint = {
        "architecture": ARCHITECTURE,
        "weights": ensemble.state_dict(),
        "elites": ELITES,
        "scale": torch.rand(12) + 0.1,
    }
    checkpoint |= {
        "bounding_box": box,
        "dataset": {"name": TASK.dataset},
        "epsilon_g": {"held-out": {"0.99": 0.02}},
        "description": {},
    }
    torch.save(checkpoint, tmp_path / "world_model.pt")
    return WorldModel(TASK, tmp_path / "world_model.pt", torch.device("cpu"))


def test_the_world_model_is_the_ensembles_elites(model):
    whole = Ensemble(**ARCHITECTURE)
    whole.load_state_dict(model.checkpoint["weights"])
    states, joint = torch.randn(3, 11), torch.rand(3, 2)
    expected = whole(states.expand(7, -1, -1), joint.expand(7, -1, -1))
    for got, field in zip(
        model.ensemble(states.expand(5, -1, -1), joint.expand(5, -1, -1)), expected
    ):
        torch.testing.assert_close(got, field[ELITES])


def test_a_step_takes_bounded_actions_in_the_environments_order(model):
    seen = []
    ensemble = model.ensemble
    model.ensemble = lambda states, joint: seen.append((states, joint)) or ensemble(states, joint)
    states, actions = (
        torch.randn(3, 11),
        torch.tensor([[[1.5], [-0.5]], [[-7.0], [0.25]], [[1.0], [1e-3]]]),
    )
    model.step(states, actions)
    assert torch.equal(seen[0][0], states.expand(5, -1, -1))
    assert torch.equal(
        seen[0][1], torch.tensor([[1.0, -0.5], [-1.0, 0.25], [1.0, 1e-3]]).expand(5, -1, -1)
    )


def test_a_next_state_is_one_members_in_the_box_and_the_reward_all_members_mean(model):
    states, actions, box = torch.randn(400, 11), 2 * torch.rand(400, 2, 1) - 1, model.box
    prediction = model.ensemble(states.expand(5, -1, -1), actions[..., 0].expand(5, -1, -1))
    step = model.step(states, actions)
    clipped = prediction.next_states.clamp(box["state_min"], box["state_max"])
    assert (clipped != prediction.next_states).any() and (clipped == prediction.next_states).any()
    chosen = (step.next_states == clipped).all(dim=-1)  # [member, batch]
    assert (chosen.sum(0) == 1).all()
    assert (chosen.sum(1) > 40).all()  # of 400 transitions a fifth each: uniform
    assert not torch.equal(
        model.step(states, actions).next_states, step.next_states
    )  # drawn anew in each step
    rewards = prediction.rewards.mean(0)
    assert (rewards < -0.3).any() and (rewards.abs() < 0.3).any()
    torch.testing.assert_close(step.rewards, rewards.clamp(-0.3, 0.3))
    for got, expected in zip(
        [step.epsilon_r, step.epsilon_g],
        epistemic_uncertainty(prediction, model.checkpoint["scale"]),
    ):
        assert torch.equal(got, expected)  # of the predictions before they are clipped


@pytest.mark.parametrize(
    "votes, mask",
    [([1, 1, 1, 0, 0], 1), ([1, 1, 0, 0, 0], 0), ([1, 1, 0, 0], 0), ([1, 1, 1, 0], 1)],
)
def test_the_mask_is_a_majority_vote(votes, mask, model):
    """However sure the minority is; a tie is absorbing."""
    logits = torch.tensor([0.1 if vote == mask else 50.0 for vote in votes]) * (
        2 * torch.tensor(votes) - 1
    )
    size, model.members = len(votes), len(votes)
    zeros = torch.zeros(size, 1, 11)
    model.ensemble = lambda states, joint: Prediction(
        zeros, zeros, zeros[..., 0], zeros[..., 0], logits[:, None]
    )
    assert model.step(torch.zeros(1, 11), torch.zeros(1, 2, 1)).masks.tolist() == [mask]


def test_the_aleatoric_uncertainty_is_the_largest_norm_of_a_members_variances(model):
    states, actions, scale = torch.randn(4, 11), torch.rand(4, 2, 1), model.checkpoint["scale"]
    prediction = model.ensemble(states.expand(5, -1, -1), actions[..., 0].expand(5, -1, -1))
    got = model.step(states, actions).epsilon_a
    for i in range(4):
        norms = []
        for member in range(5):
            stds = (
                torch.cat(
                    [
                        prediction.state_log_stds[member, i].exp(),
                        prediction.reward_log_stds[member, i, None].exp(),
                    ]
                )
                / scale
            )
            norms.append(torch.diag(stds.square()).norm())
        torch.testing.assert_close(got[i], max(norms))


def recorded_dataset(episodes=4):
    """Whole episodes of the simulator with random torques."""
    length, rng = TASK.episode_length, np.random.default_rng(0)
    simulator = Simulator(TASK, episodes)
    states = simulator.reset([np.random.default_rng(i) for i in range(episodes)])
    rows = []
    for _ in range(length):
        actions = rng.uniform(-1, 1, (episodes, 2, 1))
        next_states, rewards, _ = simulator.step(actions)
        rows.append((states, actions[..., 0], rewards, next_states))
        states = next_states
    names = ["observations", "actions", "rewards", "next_observations"]
    columns = {
        name: np.concatenate(np.stack(column, axis=1)) for name, column in zip(names, zip(*rows))
    }
    columns |= {
        "terminals": np.zeros(episodes * length),
        "timeouts": np.arange(1, episodes * length + 1) % length == 0,
    }
    return OfflineDataset(TASK, columns)


def test_ground_truth_goes_from_a_row_of_the_dataset_to_the_next():
    dataset = recorded_dataset()
    step = GroundTruth(TASK, dataset.size).step(dataset.states, dataset.actions)
    torch.testing.assert_close(step.rewards, dataset.rewards, rtol=0, atol=5e-5)
    torch.testing.assert_close(
        step.next_states[:, :8], dataset.next_states[:, :8], rtol=0, atol=1e-3
    )
    torch.testing.assert_close(
        step.next_states[:, 8:], dataset.next_states[:, 8:], rtol=0, atol=5e-3
    )  # the tip lags one substep
    assert (step.masks == 1).all()
    for epsilon in step[3:]:
        assert torch.equal(epsilon, torch.zeros(dataset.size))


def test_ground_truth_equals_the_simulator():
    states, actions = (
        recorded_dataset(1).states[:20],
        3 * torch.randn(20, 2, 1),
    )  # it bounds the torques itself
    model, simulator = GroundTruth(TASK, 20), Simulator(TASK, 20)
    simulator.set_states(states.numpy())
    for _ in range(2):
        next_states, rewards, _ = simulator.step(actions.numpy())
        step = model.step(states, actions)
        torch.testing.assert_close(
            step.next_states, torch.as_tensor(next_states, dtype=torch.float32), rtol=0, atol=0
        )
        torch.testing.assert_close(
            step.rewards, torch.as_tensor(rewards, dtype=torch.float32), rtol=0, atol=0
        )
        states = step.next_states


def test_ground_truth_does_not_disturb_a_rollout_that_goes_on():
    """Restored at each step, an ant would lose the solver's warm start, and its rewards the position of its torso."""
    task, actions = TASKS["ant-medium-po"], 2 * torch.rand(30, 5, 4, 2) - 1
    model, simulator = GroundTruth(task, 5), Simulator(task, 5)
    states = torch.as_tensor(
        Simulator(task, 5).reset([np.random.default_rng(i) for i in range(5)]), dtype=torch.float32
    )
    simulator.set_states(states.numpy())
    for t in range(30):
        if t == 15:  # the third one starts anew
            states[2] = torch.as_tensor(Simulator(task, 1).reset([np.random.default_rng(9)])[0])
            simulator.set_states(states.numpy(), where=np.arange(5) == 2)
        step, (next_states, rewards, terminals) = (
            model.step(states, actions[t]),
            simulator.step(actions[t].numpy()),
        )
        torch.testing.assert_close(
            step.next_states, torch.as_tensor(next_states).float(), rtol=0, atol=0
        )
        torch.testing.assert_close(step.rewards, torch.as_tensor(rewards).float(), rtol=0, atol=0)
        torch.testing.assert_close(
            step.masks, 1 - torch.as_tensor(terminals).float(), rtol=0, atol=0
        )
        states = step.next_states


def test_calibration_by_the_quantile_of_held_out_data():
    checkpoint = {"epsilon_g": {"held-out": {"0.99": 0.02}}, "scale": torch.tensor([3.0, 7.0, 0.5])}
    args = Args()
    calibrate(args, checkpoint)
    assert args.max_uncertainty == pytest.approx(100 * 0.02)
    assert args.lambda_g * 10 * 0.02 == pytest.approx(0.5)  # one standard deviation of the reward


def test_calibration_keeps_what_is_given():
    checkpoint = {"epsilon_g": {"held-out": {"0.99": 0.02}}, "scale": torch.tensor([0.5])}
    args = Args(lambda_g=0.1, max_uncertainty=math.inf)
    calibrate(args, checkpoint)
    assert (args.lambda_g, args.max_uncertainty) == (0.1, math.inf)
    args = Args(max_uncertainty=math.inf)  # lambda_g does not depend on it
    calibrate(args, checkpoint)
    assert args.lambda_g == pytest.approx(0.5 / 0.2)


# --- Rollouts ---


def made_up_dataset(task=TASK):
    """Uneven episodes of numbers that stand nowhere twice, so that a row is known by its state."""
    rng, size = np.random.default_rng(1), 24
    columns = {
        "observations": rng.normal(size=(size, task.state_dim)),
        "next_observations": rng.normal(size=(size, task.state_dim)),
    }
    columns |= {
        "actions": rng.uniform(-1, 1, (size, task.num_agents * task.action_dim)),
        "rewards": rng.normal(size=size),
    }
    columns |= {
        "terminals": np.isin(np.arange(size), [3, 9]),
        "timeouts": np.isin(np.arange(size), [10, 23]),
    }
    return OfflineDataset(task, columns)


class MadeUpModel:
    """Steps at random, which it remembers."""

    def __init__(self, terminals=0.1):
        self.terminals, self.calls = terminals, []

    def step(self, states, actions):
        number = len(states)
        masks = (torch.rand(number) >= self.terminals).float()
        epsilons = torch.rand(3, number) * 2
        epsilons[1, torch.rand(number) < 0.1] = 1.0  # l_eps to the bit: a rollout ends there, too
        step = Step(torch.randn_like(states), torch.randn(number), masks, *epsilons)
        self.calls.append((states, actions, step))
        return step


def made_up_rollouts(args, model, task=TASK):
    team, dataset = Team(task, made_up_states(100, task)), made_up_dataset(task)
    rollouts, report = generate_rollouts(
        lambda *carry: rollout_step(team, model, dataset, args, *carry), dataset, args
    )
    return team, dataset, rollouts, report


PENALTIES = {
    "epistemic": lambda step, args: (
        args.lambda_r * step.epsilon_r.clamp(max=args.max_uncertainty)
        + args.lambda_g * step.epsilon_g.clamp(max=args.max_uncertainty)
    ),
    "aleatoric": lambda step, args: args.lambda_a * step.epsilon_a,
    "none": lambda step, args: torch.zeros_like(step.rewards),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_penalty_is_subtracted_from_the_reward(penalty):
    args, model = (
        Args(
            penalty=penalty,
            lambda_r=0.3,
            lambda_g=0.7,
            lambda_a=0.9,
            max_uncertainty=1.0,
            transitions=500,
        ),
        MadeUpModel(),
    )
    _, _, rollouts, report = made_up_rollouts(args, model)
    penalties = torch.stack([PENALTIES[penalty](step, args) for _, _, step in model.calls])
    rewards = torch.stack([step.rewards for _, _, step in model.calls])
    torch.testing.assert_close(rollouts.rewards, rewards - penalties)
    torch.testing.assert_close(report[:2], torch.stack([rewards.mean(), penalties.mean()]))
    assert (
        max(step.epsilon_g.max() for _, _, step in model.calls) > 1.9
    )  # far beyond the penalty's bound


@pytest.mark.parametrize("start_states", ["first", "any"])
@pytest.mark.parametrize("max_uncertainty", [1.0, math.inf])
@pytest.mark.parametrize("rollout_length", [1, 10])
def test_rollouts_transition_by_transition(rollout_length, max_uncertainty, start_states):
    args = Args(
        penalty="none",
        lambda_g=0.0,
        max_uncertainty=max_uncertainty,
        transitions=1000,
        rollout_length=rollout_length,
    )
    args.start_states = start_states
    model = MadeUpModel()
    team, dataset, rollouts, report = made_up_rollouts(args, model)
    assert all(field.shape[:2] == (rollout_length, 1000 // rollout_length) for field in rollouts)
    rows_started, ends = [], 0
    for i in range(1000 // rollout_length):
        starts, age = True, 0
        for t in range(rollout_length):
            states, actions, step = model.calls[t]
            now, before = Rollout(rollouts, t, i), Rollout(rollouts, t - 1, i)
            assert torch.equal(now.states, states[i]) and torch.equal(now.actions, actions[i])
            assert torch.equal(now.next_states, step.next_states[i]) and now.masks == step.masks[i]
            assert torch.equal(now.observations, TASK.observe(now.states))
            if starts:  # in a row of the dataset, with that row's histories
                row = (dataset.states == now.states).all(dim=1).nonzero().item()
                assert torch.equal(now.histories, dataset.histories(torch.tensor([row]))[0])
                rows_started.append(row)
            else:
                assert torch.equal(now.states, before.next_states) and torch.equal(
                    now.histories, before.next_histories
                )
            assert torch.equal(now.next_histories[:, :-1], now.histories[:, 1:])
            pair = torch.cat(
                [now.actions.clamp(-ACTION_LIMIT, ACTION_LIMIT), now.observations], dim=-1
            )
            assert torch.equal(now.next_histories[:, -1], pair)
            uncertain = step.epsilon_g[i] >= max_uncertainty
            assert now.time_out_masks == (0 if uncertain or t == rollout_length - 1 else 1)
            age += 1
            starts = bool(uncertain or step.masks[i] == 0 or age == rollout_length)
            age, ends = 0 if starts else age, ends + (starts or t == rollout_length - 1)
    any_row = set(range(dataset.size))  # the last of an episode too
    assert set(rows_started) == (
        set(dataset.episode_starts.tolist()) if start_states == "first" else any_row
    )
    epsilon_g = torch.stack([step.epsilon_g for _, _, step in model.calls])
    expected = [epsilon_g.mean(), (epsilon_g >= max_uncertainty).float().mean(), ends / 1000]
    torch.testing.assert_close(report[2:], torch.tensor(expected))


class Rollout:
    """One transition of `Rollouts`."""

    def __init__(self, rollouts, t, i):
        for name, field in rollouts._asdict().items():
            setattr(self, name, field[t, i])


@each_task
def test_actions_are_samples_whose_density_and_value_the_rollouts_keep(task):
    args, model = (
        Args(penalty="none", lambda_g=0.0, max_uncertainty=1.0, transitions=2000),
        MadeUpModel(),
    )
    team, _, rollouts, _ = made_up_rollouts(args, model, task)
    flat = [field.flatten(0, 1) for field in rollouts]
    states, observations, histories, actions, log_probs, values = flat[:6]
    mean, log_std, expected_values = literal_team(team, states, observations, histories)
    distribution = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(
        log_probs, distribution.log_prob(actions).sum((1, 2)), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-4)
    normalized = (actions - mean) / log_std.exp()
    drawn = normalized.flatten(1)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(drawn.shape[1]), rtol=0, atol=0.1)
    torch.testing.assert_close(
        drawn.T.cov(), torch.eye(drawn.shape[1]), rtol=0, atol=0.1
    )  # each agent draws for itself
    assert (actions.abs() > 1).any()  # unclipped


def test_a_rollout_ends_at_age_k_wherever_it_started():
    args, dataset, model = (
        Args(penalty="none", lambda_g=0.0, max_uncertainty=math.inf, rollout_length=10),
        made_up_dataset(),
        MadeUpModel(terminals=0),
    )
    team, age = Team(TASK, dataset.states), torch.tensor([0.0, 8.0, 9.0])
    carry = torch.randn(3, 11), made_up_histories(3), age
    transition, _, (states, histories, age) = rollout_step(team, model, dataset, args, *carry)
    assert transition.time_out_masks.tolist() == [1, 1, 0]
    assert age.tolist() == [1, 9, 0]
    assert torch.equal(states[:2], transition.next_states[:2]) and torch.equal(
        histories[:2], transition.next_histories[:2]
    )
    assert (states[2] == dataset.states).all(dim=1).any()


def test_a_terminal_is_no_time_out_but_ends_the_rollout():
    args, dataset, model = (
        Args(penalty="none", lambda_g=0.0, max_uncertainty=math.inf),
        made_up_dataset(),
        MadeUpModel(terminals=1),
    )
    carry = torch.randn(4, 11), made_up_histories(4), torch.zeros(4)
    transition, _, (states, _, age) = rollout_step(
        Team(TASK, dataset.states), model, dataset, args, *carry
    )
    assert transition.time_out_masks.tolist() == [1] * 4 and transition.masks.tolist() == [0] * 4
    assert age.tolist() == [0] * 4
    assert (states[:, None] == dataset.states).all(dim=-1).any(dim=1).all()


def test_model_returns_in_a_perfect_model_are_those_of_the_environment():
    class Perfect(GroundTruth):
        def step(self, states, actions, generator):
            return super().step(states, actions)

    team = Team(TASK, recorded_dataset().states)
    evaluation = evaluate(TASK, team.act_greedily, episodes=6)
    returns = model_returns(team, Perfect(TASK, 6), evaluation.first_states, torch.device("cpu"))
    np.testing.assert_allclose(returns, evaluation.returns, rtol=0, atol=1e-2)


def test_model_returns_stop_at_an_absorbing_state():
    class Counting:
        steps = 0

        def step(self, states, actions, generator):
            self.steps += 1
            masks = torch.tensor(
                [1.0, float(self.steps != 3), float(self.steps != 1)]
            )  # two episodes end and start again
            return Step(states, torch.ones(3), masks, None, None, None)

    team, first_states = Team(TASK, made_up_states(100)), np.zeros((3, 11))
    assert model_returns(team, Counting(), first_states, torch.device("cpu")).tolist() == [50, 3, 1]


# --- PPO ---


def test_discounted_returns_row_by_row():
    """Rows 3 and 9 of the data end absorbed, 10 and 23 are time-outs, which are followed by their last reward for ever."""
    dataset, gamma, ends = made_up_dataset(), 0.9, [3, 9, 10, 23]
    for row, discounted in enumerate(discounted_returns(dataset, gamma)):
        last = min(end for end in ends if end >= row)
        rewards = dataset.rewards[row : last + 1].tolist()
        if last in (10, 23):
            rewards += [rewards[-1]] * 400
        assert discounted.item() == pytest.approx(
            sum(gamma**t * reward for t, reward in enumerate(rewards)), rel=1e-4, abs=1e-5
        )


@each_task
def test_cloning_and_value_loss_equals_agents_computed_one_by_one(task):
    dataset, team, indices = (
        made_up_dataset(task),
        made_up_team(task),
        torch.tensor([0, 5, 9, 23, 5]),
    )
    returns = torch.randn(dataset.size)
    means, log_stds, values = literal_team(
        team,
        dataset.states[indices],
        task.observe(dataset.states[indices]),
        dataset.histories(indices),
    )
    densities = torch.distributions.Normal(means, log_stds.exp()).log_prob(dataset.actions[indices])
    expected = (
        sum((values[row] - returns[indices[row]]) ** 2 - densities[row].sum() for row in range(5))
        / 5
    )
    torch.testing.assert_close(
        cloning_and_value_loss(team, dataset, returns, indices), expected, rtol=1e-3, atol=1e-4
    )


def test_cloning_finds_the_data_of_a_deterministic_team():
    """Actions that are a function of what agents see, and a value that is constant: both are found."""
    dataset = made_up_dataset()
    dataset.actions = 0.5 * TASK.observe(dataset.states)[..., :1].tanh()
    dataset.rewards, dataset.masks = (
        torch.full_like(dataset.rewards, 2.0),
        torch.ones_like(dataset.masks),
    )
    team = Team(TASK, dataset.states)
    clone(team, dataset, Args(cloning_steps=300, minibatch_size=24, gamma=0.9, reward_scale=0.1))
    observations, histories = (
        TASK.observe(dataset.states),
        dataset.histories(torch.arange(dataset.size)),
    )
    inputs = team.inputs(observations, histories)
    assert (team.distribution(inputs).greedy() - dataset.actions).abs().mean() < 0.05
    assert (team.team_value(inputs, dataset.states) - 0.1 * 2 / (1 - 0.9)).abs().mean() < 0.1


def appendix_a(rewards, values, next_values, masks, time_out_masks, discount, lamda):
    """The listing "General Advantage Estimation" of Appendix A, for one trajectory of plain numbers."""
    returns, advants = [0.0] * len(rewards), [0.0] * len(rewards)
    running_returns = next_values[-1] * masks[-1]
    running_advants = 0
    for t in reversed(range(0, len(rewards))):
        running_returns = rewards[t] + discount * masks[t] * (
            running_returns * time_out_masks[t]
            + (1.0 - time_out_masks[t]) * next_values[t] * masks[t]
        )
        returns[t] = running_returns
        running_delta = rewards[t] + (discount * next_values[t] * masks[t]) - values[t]
        running_advants = (
            running_delta + (discount * lamda * running_advants * masks[t]) * time_out_masks[t]
        )
        advants[t] = running_advants
    return returns, advants


@pytest.mark.parametrize("last_is_cut", [True, False])
def test_generalized_advantages_equal_the_papers_listing(last_is_cut):
    time, rollouts = 40, 16
    rewards, values, next_values = torch.randn(3, time, rollouts, dtype=torch.float64)
    masks, time_out_masks = (torch.rand(2, time, rollouts) > 0.15).double()
    if last_is_cut:
        time_out_masks[-1] = 0
    returns, advantages = generalized_advantages(
        rewards, values, next_values, masks, time_out_masks, 0.99, 0.98
    )
    for i in range(rollouts):
        trajectory = [
            column[:, i].tolist()
            for column in (rewards, values, next_values, masks, time_out_masks)
        ]
        expected_returns, expected_advantages = appendix_a(*trajectory, 0.99, 0.98)
        np.testing.assert_allclose(returns[:, i], expected_returns, rtol=0, atol=1e-12)
        np.testing.assert_allclose(advantages[:, i], expected_advantages, rtol=0, atol=1e-12)


@each_task
def test_the_batch_bootstraps_from_each_transitions_own_next_state(task):
    """Not from the state after it in its column, where another rollout may have started."""
    args = Args(
        penalty="none",
        lambda_g=0.0,
        max_uncertainty=1.0,
        transitions=400,
        rollout_length=10,
        gamma=0.9,
        gae_lambda=0.8,
    )
    team, _, rollouts, _ = made_up_rollouts(args, MadeUpModel(), task)
    scramble(team, 0.02)  # values that differ from state to state
    batch = make_batch(team, rollouts, args)
    for name in ("states", "observations", "histories", "actions", "log_probs", "values"):
        assert torch.equal(getattr(batch, name), getattr(rollouts, name).flatten(0, 1))
    next_states, next_histories = (
        rollouts.next_states.flatten(0, 1),
        rollouts.next_histories.flatten(0, 1),
    )
    next_values = literal_team(team, next_states, task.observe(next_states), next_histories)[
        2
    ].view(10, 40)
    returns, advantages = torch.zeros(10, 40), torch.zeros(10, 40)
    for i in range(40):
        columns = (
            rollouts.rewards,
            rollouts.values,
            next_values,
            rollouts.masks,
            rollouts.time_out_masks,
        )
        one = appendix_a(*[column[:, i].tolist() for column in columns], 0.9, 0.8)
        returns[:, i], advantages[:, i] = torch.tensor(one[0]), torch.tensor(one[1])
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-3)
    torch.testing.assert_close(batch.returns, returns.flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.advantages, advantages.flatten(), rtol=1e-3, atol=1e-3)


@each_task
def test_the_batch_scales_rewards_and_nothing_else(task):
    """Values are learned in the scaled unit, so they are not scaled once more."""
    args = Args(
        penalty="none",
        lambda_g=0.0,
        max_uncertainty=1.0,
        transitions=400,
        rollout_length=10,
        gamma=0.9,
        gae_lambda=0.8,
    )
    team, _, rollouts, _ = made_up_rollouts(args, MadeUpModel(), task)
    scramble(team, 0.02)
    rewards, unscaled = rollouts.rewards.clone(), make_batch(team, rollouts, args)
    args.reward_scale = 0.1
    scaled = make_batch(team, rollouts, args)
    args.reward_scale = 1.0
    for got, expected in zip(
        scaled, make_batch(team, rollouts._replace(rewards=0.1 * rewards), args)
    ):
        torch.testing.assert_close(got, expected)
    assert torch.equal(rollouts.rewards, rewards)  # what is logged
    assert not torch.allclose(scaled.returns, unscaled.returns) and not torch.allclose(
        scaled.advantages, unscaled.advantages
    )


def made_up_minibatch(team, size=24):
    """Old log-densities and values are off the team's by more and by less than the clip value."""
    states, histories = made_up_states(size, team.task), made_up_histories(size, team.task)
    observations = team.task.observe(states)
    with torch.no_grad():
        mean, log_std, values = literal_team(team, states, observations, histories)
        actions = mean + 0.7 * log_std.exp() * torch.randn_like(mean)
        log_probs = Gaussian(mean, log_std).log_prob(actions) + 0.3 * torch.randn(size)
    old_values = values + 0.3 * torch.randn(size)
    returns, advantages = values + torch.randn(size), torch.randn(size)
    return Minibatch(
        states, observations, histories, actions, log_probs, old_values, returns, advantages
    )


def literal_loss(team, batch, args, alpha):
    """Spec of PPO's loss in Appendix A.1, sample by sample; also the dual variable after its update."""
    mean, log_std, values = literal_team(team, batch.states, batch.observations, batch.histories)
    clip, terms = args.clip, []
    for i in range(len(batch.states)):
        new_log_prob = (
            torch.distributions.Normal(mean[i], log_std[i].exp()).log_prob(batch.actions[i]).sum()
        )
        ratio = torch.exp(torch.clamp(new_log_prob - batch.log_probs[i], max=10))
        clipped_ratio = torch.clamp(ratio, 1 - clip, 1 + clip)
        actor = torch.min(ratio * batch.advantages[i], clipped_ratio * batch.advantages[i])
        clipped_value = batch.values[i] + torch.clamp(values[i] - batch.values[i], -clip, clip)
        critics = [(clipped_value - batch.returns[i]) ** 2, (values[i] - batch.returns[i]) ** 2]
        entropies = [-clipped_ratio * new_log_prob, -ratio * new_log_prob]
        bound_error = sum(torch.relu(x.abs() - 1) ** 2 for x in mean[i].flatten())
        terms.append(
            torch.stack(
                [actor, *critics, *entropies, clipped_ratio * bound_error, ratio * bound_error]
            )
        )
    actor, clipped_critic, critic, clipped_entropy, entropy, clipped_penalty, penalty = torch.stack(
        terms
    ).mean(0)
    entropy = torch.min(clipped_entropy, entropy)
    alpha = max(0.0, alpha + args.entropy_coefficient * (team.task.entropy_target - entropy.item()))
    loss = -actor + args.critic_coefficient * torch.max(clipped_critic, critic)
    loss = loss - alpha * entropy + args.action_penalty * torch.max(clipped_penalty, penalty)
    return loss, alpha


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "close values",
        "far values",
        "a huge ratio",
        "entropy below target",
        "other coefficients",
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@each_task
def test_ppo_loss_equals_the_appendix_sample_by_sample(task, case, alpha, float64):
    team = made_up_team(task)
    team.entropy_alpha.fill_(alpha)
    batch, args = made_up_minibatch(team), Args()
    if case == "close values":  # to the returns: the clipped value is the worse one
        batch = batch._replace(returns=batch.values + 10 * (batch.returns - batch.values))
    if case == "far values":  # the unclipped value is the worse one
        batch = batch._replace(returns=batch.values.clone())
    if case == "a huge ratio":
        batch.log_probs[3] -= 15
    if case == "entropy below target":
        team.policy[-1].bias.data[..., task.action_dim :] = -5
        batch = made_up_minibatch(team)
    if case == "other coefficients":
        args = Args(clip=0.1, critic_coefficient=3.0, action_penalty=0.3, entropy_coefficient=0.05)
    expected, expected_alpha = literal_loss(team, batch, args, alpha)
    expected_gradients = torch.autograd.grad(expected, list(team.parameters()))
    loss, metrics = ppo_loss(team, batch, args)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(team.entropy_alpha.item(), expected_alpha, rtol=1e-10, atol=0)
    for (name, parameter), gradient in zip(team.named_parameters(), expected_gradients):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-7, atol=1e-9, msg=lambda text: f"{name}: {text}"
        )
    assert metrics.isfinite().all() and not metrics.requires_grad


@each_task
def test_the_minibatches_exercise_every_branch_of_the_loss(task, float64):
    team = made_up_team(task)
    batch = made_up_minibatch(team)
    mean, log_std, values = literal_team(team, batch.states, batch.observations, batch.histories)
    ratio = (Gaussian(mean, log_std).log_prob(batch.actions) - batch.log_probs).exp()
    for off, clip in [(ratio - 1, 0.2), (values - batch.values, 0.2), (mean, 1)]:
        assert (off > clip).any() and (off < -clip).any() and (off.abs() < clip).any()
    assert (log_std == 0).any() and ((-6 < log_std) & (log_std < 0)).any()


@pytest.mark.parametrize("alpha, expected", [(0.0, 0.0), (1e-4, 0.0), (1.0, 1.0)])
def test_the_dual_variable_falls_to_zero_and_no_further(alpha, expected):
    """A team that starts with a standard deviation of 0.6 has far more entropy than its target."""
    team = Team(TASK, made_up_states(100))
    team.entropy_alpha.fill_(alpha)
    ppo_loss(team, made_up_minibatch(team), Args())
    assert team.entropy_alpha.item() == pytest.approx(expected, abs=0.02)
    assert team.entropy_alpha < alpha or alpha == 0
    assert "entropy_alpha" in team.state_dict() and "entropy_alpha" not in dict(
        team.named_parameters()
    )


def test_the_compiled_loss_equals_the_eager_one():
    """Traced and differentiated as --compile does it, dual variable included, but run without generated code, which would
    take half a minute to build."""
    eager, compiled = made_up_team(), made_up_team()
    compiled.load_state_dict(eager.state_dict())
    compiled_loss = torch.compile(ppo_loss, backend="aot_eager", fullgraph=True)
    args = Args(entropy_coefficient=0.01)
    for team in (eager, compiled):
        team.entropy_alpha.fill_(0.5)
    for _ in range(2):  # the second call finds the first one's dual variable
        batch = made_up_minibatch(eager)
        for team, function in [(eager, ppo_loss), (compiled, compiled_loss)]:
            team.zero_grad()
            team.loss, team.metrics = function(team, batch, args)
            team.loss.backward()
        torch.testing.assert_close(compiled.loss, eager.loss)
        torch.testing.assert_close(compiled.metrics, eager.metrics)
        assert 0 < compiled.entropy_alpha < 0.5
        for (name, got), expected in zip(compiled.named_parameters(), eager.parameters()):
            torch.testing.assert_close(
                got.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}"
            )


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    moma_ppo.save_whole({"step": 1}, path)

    def interrupted(data, temporary):
        temporary.write_bytes(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moma_ppo.save_whole({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
