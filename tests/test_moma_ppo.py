"""MOMA-PPO's rollouts and losses against slow literal versions: one transition at a time."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_up import (
    ANT,
    GAME,
    REACHER,
    all_literal_inputs,
    literal_mlp,
    made_up_dataset,
    made_up_histories,
    made_up_states,
    recorded_columns,
    scramble,
    with_a_bit_changed,
)
from torch.distributions import Normal

import moma_ppo
from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import ACTION_LIMIT, InputError, errors_on, evaluate, model_returns
from moma_ppo import (
    Args,
    GroundTruth,
    Rollouts,
    Step,
    Team,
    check,
    clone,
    cloning_and_value_loss,
    generalized_advantages,
    generate_rollouts,
    make_batch,
    open_world_model,
    ppo_loss,
    rollout_step,
    surrogate_gain,
)


def each(*tasks):
    return pytest.mark.parametrize("task", tasks, ids=lambda task: task.name)


def make_args(**options):
    """The script's, with what it takes from the world model."""
    return moma_ppo.Args(**{"lambda_g": 0.7, "max_uncertainty": 1.0, "penalty": "none"} | options)


@torch.no_grad()
def made_up_team(task=REACHER):
    """Greedy actions in and out of the bounds, log standard deviations on both sides of 0."""
    states = made_up_states(300, task)
    team = scramble(Team(task, states, make_args()), 0.03)
    inputs = team.inputs(task.observe(states), made_up_histories(300, task))
    outputs, last = team.policy(inputs), team.policy[-1]
    scale, shift = 1 / outputs.std(dim=1, keepdim=True), outputs.mean(dim=1, keepdim=True)
    last.weight.mul_(scale)
    last.bias.sub_(shift).mul_(scale)
    if not task.discrete:
        last.bias[..., task.action_dim :] -= 0.5
    return team


def literal_team(team, states, observations, histories):
    """Means and log standard deviations [batch, agent, action], and team values [batch]."""
    inputs = all_literal_inputs(team, observations, histories)
    agents = range(team.task.num_agents)
    outputs = torch.stack([literal_mlp(team.policy, i, inputs[i]) for i in agents], dim=1)
    means, log_stds = outputs.chunk(2, dim=-1)
    weights = literal_mlp(team.mixer, 0, (states - team.state_mean) / team.state_std)
    values = [literal_mlp(team.value, i, inputs[i])[:, 0] for i in agents]
    team_values = sum(weights[:, i] * values[i] for i in agents) + weights[:, -1]
    return means, log_stds.clamp(-6, 0), team_values


# The team.


@each(REACHER, ANT)
def test_the_team_equals_agents_computed_one_by_one(task, float64):
    team, states, histories = (
        made_up_team(task),
        made_up_states(7, task),
        made_up_histories(7, task),
    )
    observations = task.observe(states)
    inputs = team.inputs(observations, histories)
    normal = team.distribution(inputs).base_dist
    got = normal.mean, normal.stddev.log(), team.team_value(inputs, states)
    expected = literal_team(team, states, observations, histories)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    actions = torch.randn_like(normal.mean)
    log_probs = Normal(expected[0], expected[1].exp()).log_prob(actions).sum((1, 2))
    torch.testing.assert_close(team.distribution(inputs).log_prob(actions), log_probs)


def test_the_team_starts_near_zero_and_ignores_its_memory():
    team, states = Team(REACHER, made_up_states(100), make_args()), made_up_states(500)
    normal = team.distribution(
        team.inputs(REACHER.observe(states), made_up_histories(500))
    ).base_dist
    assert normal.mean.abs().max() < 0.3
    torch.testing.assert_close(normal.stddev.log(), torch.full((500, 2, 1), -1.5), atol=0.4, rtol=0)
    assert team.entropy_alpha == 0
    for network in (team.policy, team.value):
        weight = network[0].weight
        assert (weight[:, :128] == 0).all() and (weight[1, 134:] == 0).all()
        # As in a layer of the observation's width.
        assert 0.3 < weight[0, 128:].abs().max() <= 8**-0.5
        assert 0.3 < weight[1, 128:134].abs().max() <= 6**-0.5


def test_dimensions_that_never_change_are_left_as_they_are():
    states = made_up_states(100)
    states[:, 6] = 3.0
    team = Team(REACHER, states, make_args())
    assert team.state_std[6] == 1 and team.state_mean[6] == 3
    assert team.inputs(REACHER.observe(states), made_up_histories(100)).isfinite().all()


def test_greedy_actions_are_the_bounded_means():
    team, states, histories = made_up_team(), made_up_states(200), made_up_histories(200)
    observations = REACHER.observe(states)
    mean = literal_team(team, states, observations, histories)[0]
    assert (mean > 1).any() and (mean < -1).any() and (mean.abs() < 1).any()
    actions = team.act_greedily(observations, histories)
    torch.testing.assert_close(actions, mean.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_agents_of_the_game_have_no_memory_and_start_undecided():
    dataset = load_dataset(GAME)
    team = Team(GAME, dataset.states, make_args())
    assert team.memory is None
    batch = dataset.batch(torch.arange(100), with_histories=False)
    probabilities = team.distribution(team.inputs(batch.observations, None)).base_dist.probs
    assert (probabilities - 0.5).abs().max() < 0.1


# The world model.


ELITES = 5


@pytest.fixture
def saved(tmp_path):
    """A world model that was never trained, as world_model.py exports it."""

    def layers(outputs, inputs=13):
        sizes = [inputs, 8, 8, outputs]
        shapes = zip(sizes, sizes[1:])
        return [(torch.randn(ELITES, i, o), torch.randn(ELITES, 1, o)) for i, o in shapes]

    saved = {"state": layers(22), "reward": layers(2), "mask": layers(1, 11)}
    for name, size in {"input": 13, "target": 11, "reward": 1}.items():
        saved |= {f"{name}_mean": torch.rand(size), f"{name}_std": torch.rand(size) + 0.5}
    saved |= {"state_min": -torch.rand(11), "state_max": torch.rand(11)}
    saved |= {"reward_min": torch.tensor(-0.3), "reward_max": torch.tensor(0.3)}
    saved |= {"scale": torch.rand(12) + 0.1, "lambda_g": 0.1, "l_epsilon": 2.0}
    saved["dataset"] = {"name": REACHER.dataset, "source": "made up"}
    saved["description"] = {"target": "delta", "activation": "silu"}
    return saved


def read(saved, tmp_path, task=REACHER, **options):
    torch.save(saved, tmp_path / "world_model.pt")
    return open_world_model(task, tmp_path / "world_model.pt", "cpu", **options)


def literal_network(saved, member, name, x, activation):
    *hidden, last = saved[name]
    for weight, bias in hidden:
        x = activation(x @ weight[member] + bias[member, 0])
    return x @ last[0][member] + last[1][member, 0]


def literal_vote(saved, member, next_state):
    """Whether one elite takes a next state for an ordinary one."""
    x = (next_state - saved["input_mean"][:11]) / saved["input_std"][:11]
    return literal_network(saved, member, "mask", x, F.relu)[0] > 0


def literal_prediction(saved, member, state, joint_action):
    """One elite's next state and reward, and their standard deviations."""
    network = functools.partial(literal_network, saved, member)
    x = (torch.cat([state, joint_action]) - saved["input_mean"]) / saved["input_std"]
    activation = {"silu": F.silu, "relu": F.relu}[saved["description"]["activation"]]
    outputs, reward = network("state", x, activation), network("reward", x, F.relu)
    start = state if saved["description"]["target"] == "delta" else 0
    next_state = start + outputs[:11] * saved["target_std"] + saved["target_mean"]
    stds = outputs[11:].clamp(-10, 2).exp() * saved["target_std"]
    reward_std = reward[1:].clamp(-10, 2).exp() * saved["reward_std"]
    next_reward = reward[:1] * saved["reward_std"] + saved["reward_mean"]
    return next_state, next_reward, stds, reward_std


@pytest.mark.parametrize("target, activation", [("delta", "silu"), ("absolute", "relu")])
def test_a_step_of_the_world_model_equals_section_3_1(target, activation, saved, tmp_path, float64):
    saved["description"] = {"target": target, "activation": activation}
    saved = {k: v.double() if torch.is_tensor(v) else v for k, v in saved.items()}
    for name in ("state", "reward", "mask"):
        saved[name] = [(weight.double(), bias.double()) for weight, bias in saved[name]]
    for name in ("state_min", "state_max"):
        saved[name] *= 5  # some dimensions are clipped, not all
    model = read(saved, tmp_path, next_states="mean")
    assert (model.lambda_g, model.max_uncertainty) == (0.1, 2.0)
    states, actions = torch.randn(40, 11), 3 * torch.rand(40, 2, 1) - 1.5
    step, chosen = model.step(states, actions), set()
    for i in range(40):
        joint_action = actions[i, :, 0].clamp(-1, 1)
        elites = [literal_prediction(saved, m, states[i], joint_action) for m in range(ELITES)]
        next_states = torch.stack([elite[0] for elite in elites])
        rewards = torch.stack([elite[1] for elite in elites])
        low, high = saved["state_min"], saved["state_max"]
        boxed = next_states.clamp(low - 0.5 * (high - low), high + 0.5 * (high - low))
        same = torch.isclose(boxed, step.next_states[i]).all(dim=1)
        assert same.sum() == 1  # a single member's
        chosen.add(int(same.nonzero()))
        torch.testing.assert_close(step.rewards[i], rewards.mean().clamp(-0.6, 0.6))
        # Each elite judges the next state that was chosen, before it is clipped.
        next_state = next_states[int(same.nonzero())]
        votes = sum(literal_vote(saved, m, next_state) for m in range(ELITES))
        assert step.masks[i] == (votes > ELITES / 2)
        # Uncertainties are those of the predictions before they are clipped.
        variables = torch.cat([next_states, rewards], dim=1) / saved["scale"]
        norm = torch.linalg.matrix_norm(torch.cov(variables.T))
        torch.testing.assert_close(step.epsilon_g[i], norm)
        torch.testing.assert_close(step.epsilon_r[i], rewards.var())
        scaled = [torch.cat([stds, reward_std]) / saved["scale"] for *_, stds, reward_std in elites]
        largest = max(torch.diag(stds.square()).norm() for stds in scaled)
        torch.testing.assert_close(step.epsilon_a[i], largest)
    assert chosen == set(range(ELITES))
    assert {0, 1} == set(step.masks.tolist())
    assert not torch.equal(model.step(states, actions).next_states, step.next_states)


def test_next_states_are_samples_of_a_members_gaussian(saved, tmp_path):
    saved["state_min"], saved["state_max"] = -torch.full((11,), 1e9), torch.full((11,), 1e9)
    model = read(saved, tmp_path)
    state, action = torch.randn(11), torch.rand(2, 1)
    means, stds = model.predict(state[None], action[None])
    for member in range(ELITES):
        next_state, reward, std, reward_std = literal_prediction(saved, member, state, action[:, 0])
        torch.testing.assert_close(means[member, 0], torch.cat([next_state, reward]))
        torch.testing.assert_close(stds[member, 0], torch.cat([std, reward_std]))
    samples = model.step(state.expand(50_000, -1), action.expand(50_000, -1, -1)).next_states
    means, stds = means[:, 0, :-1], stds[:, 0, :-1]
    variance = stds.square().mean(0) + means.var(0, correction=0)
    assert ((samples.mean(0) - means.mean(0)).abs() < 5 * (variance / 50_000).sqrt()).all()
    torch.testing.assert_close(samples.var(0), variance, rtol=0.05, atol=0)


def test_masks_judge_the_next_state_before_the_box_hides_it(saved, tmp_path):
    path = tmp_path / "ant.pt"
    layers = [(torch.zeros(ELITES, 35, 54), torch.zeros(ELITES, 1, 54))]
    layers[0][1][..., 27:] = -10.0  # hardly any noise
    weight = torch.zeros(ELITES, 27, 1)
    weight[:, 0] = -1.0  # absorbing above a height of 1
    saved |= {"state": layers, "mask": [(weight, torch.ones(ELITES, 1, 1))]}
    saved |= {"reward": [(torch.zeros(ELITES, 35, 2), torch.zeros(ELITES, 1, 2))]}
    saved |= {"input_mean": torch.zeros(35), "input_std": torch.ones(35)}
    saved |= {"target_mean": torch.zeros(27), "target_std": torch.full((27,), 1e-3)}
    saved |= {"state_min": torch.full((27,), -0.45), "state_max": torch.full((27,), 0.45)}
    saved["scale"], saved["dataset"] = torch.ones(28), {"name": ANT.dataset, "source": "made up"}
    torch.save(saved, path)
    states = torch.zeros(4, 27)
    states[:, 0] = torch.tensor([0.1, 0.5, 0.95, 1.1])
    step = open_world_model(ANT, path, "cpu").step(states, torch.zeros(4, 4, 2))
    assert step.masks.tolist() == [1, 1, 1, 0]
    assert step.next_states.max() <= 0.9


def test_the_world_model_is_indifferent_to_an_ants_heading(saved, tmp_path):
    layers = [(0.1 * torch.randn(ELITES, 35, 54), torch.zeros(ELITES, 1, 54))]
    saved |= {"state": layers, "mask": [(torch.randn(ELITES, 27, 1), torch.ones(ELITES, 1, 1))]}
    saved |= {"reward": [(torch.randn(ELITES, 35, 2), torch.zeros(ELITES, 1, 2))]}
    saved |= {"input_mean": torch.zeros(35), "input_std": torch.ones(35)}
    saved |= {"target_mean": torch.zeros(27), "target_std": torch.ones(27)}
    saved |= {"state_min": torch.full((27,), -9.0), "state_max": torch.full((27,), 9.0)}
    saved |= {"reward_min": torch.tensor(-9.0), "reward_max": torch.tensor(9.0)}
    saved["scale"], saved["dataset"] = torch.ones(28), {"name": ANT.dataset, "source": "made up"}
    model = read(saved, tmp_path, task=ANT)
    states, actions = torch.randn(30, 27), torch.rand(30, 4, 2)
    angles = 2 * torch.randn(30)
    steps = [
        model.step(x, actions, torch.Generator().manual_seed(0))
        for x in (states, ANT.symmetry.turn(states, angles))
    ]
    transition = states, steps[0].next_states, steps[0].rewards
    _, next_states, rewards = ANT.symmetry.turn_transition(angles, *transition)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(steps[1].next_states, next_states, **close)
    torch.testing.assert_close(steps[1].rewards, rewards, **close)
    for name in ("masks", "epsilon_r", "epsilon_g", "epsilon_a"):
        torch.testing.assert_close(getattr(steps[1], name), getattr(steps[0], name), **close)
    # So are its errors on transitions of the true ant.
    names = ("states", "next_states", "rewards")
    transition, errors = (states, states + 0.1, torch.randn(30)), []
    for columns in (transition, ANT.symmetry.turn_transition(angles, *transition)):
        named = dict(zip(names, columns)) | {"actions": actions}
        errors.append(errors_on(model, {name: x.numpy() for name, x in named.items()}))
    for name in ("model_state_error", "model_reward_error", "outside_box"):
        assert errors[1][name] == pytest.approx(errors[0][name], rel=1e-3)


@pytest.mark.parametrize("votes, mask", [([1, 1, 0, 0], 0), ([1, 1, 1, 0], 1), ([1, 0, 0, 0], 0)])
def test_the_mask_is_a_majority_vote(votes, mask, saved, tmp_path):
    """However sure the minority is; a tie is absorbing."""
    model = read(saved, tmp_path)
    logits = torch.tensor([0.1 if vote == mask else 50.0 for vote in votes])
    logits = logits * (2 * torch.tensor(votes) - 1)
    network, model.members = model.network, len(votes)

    def with_votes(name, x, activation):
        if name == "mask":
            return logits[:, None, None]
        return network(name, x[:1].expand(ELITES, -1, -1), activation)[: len(votes)]

    model.network = with_votes
    assert model.step(torch.zeros(1, 11), torch.zeros(1, 2, 1)).masks.tolist() == [mask]


FAULTS = ["empty", "text", "half", "a bit", "a list", "other shapes"]
FAULTS += ["nan weights", "nan scale", "nan box", "no state", "no scale", "no l_epsilon"]
FAULTS += ["no description", "no state_min", "no dataset"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_world_model_is_one_line(fault, saved, tmp_path):
    path = tmp_path / "world_model.pt"
    read(saved, tmp_path)
    content = path.read_bytes()
    if fault == "other shapes":
        saved["input_mean"] = torch.zeros(29)
    elif fault == "nan weights":
        saved["reward"][0][0][2, 0, 0] = math.nan
    elif fault.startswith("nan"):
        saved[{"nan scale": "scale", "nan box": "state_max"}[fault]][3] = math.nan
    elif fault.startswith("no "):
        del saved[fault.removeprefix("no ")]
    broken = {"empty": b"", "text": b"not a world model", "half": content[: len(content) // 2]}
    broken["a bit"] = with_a_bit_changed(content)
    torch.save([saved] if fault == "a list" else saved, path)
    if fault in broken:
        path.write_bytes(broken[fault])
    with pytest.raises(InputError) as error:
        open_world_model(REACHER, path, "cpu")
    message = str(error.value)
    assert str(path) in message and "python world_model.py" in message and "\n" not in message


def test_an_aleatoric_penalty_needs_variances():
    with pytest.raises(InputError, match="predicts no variances"):
        check(Args(ground_truth=True, penalty="aleatoric"))


def test_advantages_need_two_transitions_to_be_standardised():
    with pytest.raises(InputError, match="--transitions must be from 2 to 1000000000; it is 1"):
        check(Args(transitions=1, rollout_length=1, minibatch_size=1))
    check(Args(transitions=2, rollout_length=1, minibatch_size=1))
    check(Args(transitions=2, rollout_length=2, minibatch_size=1))


def test_a_world_model_of_another_dataset_or_none_is_one_line(saved, tmp_path):
    saved["dataset"]["name"] = "ant-expert"
    with pytest.raises(InputError, match="of ant-expert, not of reacher-expert-mix; make one with"):
        read(saved, tmp_path)
    with pytest.raises(
        InputError, match="no world model at .*python world_model.py --task reacher"
    ):
        open_world_model(REACHER, tmp_path / "nowhere.pt", "cpu")


@each(REACHER, ANT)
def test_ground_truth_goes_from_a_row_of_the_dataset_to_the_next(task):
    dataset = OfflineDataset(task, recorded_columns(task, length=20))
    step = GroundTruth(task, dataset.size).step(dataset.states, dataset.actions)
    # A restored ant lacks the solver's last solution, a restored arm's tip lags one substep.
    tolerance = 5e-5 if task is REACHER else 0.3
    torch.testing.assert_close(step.rewards, dataset.rewards, rtol=0, atol=tolerance)
    tolerance = 5e-3 if task is REACHER else 0.3
    torch.testing.assert_close(step.next_states, dataset.next_states, rtol=0, atol=tolerance)
    assert (step.masks == 1).all()
    assert all(torch.equal(epsilon, torch.zeros(dataset.size)) for epsilon in step[3:])


# Rollouts.


class MadeUpModel:
    """Steps at random, which it remembers."""

    def __init__(self, terminals=0.1):
        self.terminals, self.calls = terminals, []

    def step(self, states, actions):
        count = len(states)
        masks = (torch.rand(count) >= self.terminals).float()
        epsilons = torch.rand(3, count) * 2
        epsilons[1, torch.rand(count) < 0.1] = 1.0  # l_eps to the bit: a rollout ends there, too
        step = Step(torch.randn_like(states), torch.randn(count), masks, *epsilons)
        self.calls.append((states, actions, step))
        return step


def made_up_rollouts(args, model, task=REACHER):
    team, dataset = Team(task, made_up_states(100, task), args), made_up_dataset(task)
    return team, dataset, *generate_rollouts(rollout_step, team, model, dataset, args)


def literal_penalty(step, args):
    bounded = (
        step.epsilon_r.clamp(max=args.max_uncertainty),
        step.epsilon_g.clamp(max=args.max_uncertainty),
    )
    return {
        "epistemic": args.lambda_r * bounded[0] + args.lambda_g * bounded[1],
        "aleatoric": args.lambda_a * step.epsilon_a,
        "none": torch.zeros_like(step.rewards),
    }[args.penalty]


@pytest.mark.parametrize("penalty", ["epistemic", "aleatoric", "none"])
def test_the_penalty_is_subtracted_from_the_reward(penalty):
    args, model = (
        make_args(penalty=penalty, lambda_r=0.3, lambda_a=0.9, transitions=500),
        MadeUpModel(),
    )
    _, _, rollouts, report = made_up_rollouts(args, model)
    steps = [step for *_, step in model.calls]
    penalties = torch.stack([literal_penalty(step, args) for step in steps])
    rewards = torch.stack([step.rewards for step in steps])
    torch.testing.assert_close(rollouts.rewards, rewards - penalties)
    torch.testing.assert_close(report["reward"], rewards.mean())
    torch.testing.assert_close(report["penalty"], penalties.mean())
    assert max(step.epsilon_g.max() for step in steps) > 1.9  # far beyond the penalty's bound


@pytest.mark.parametrize("start_states", ["first", "any"])
@pytest.mark.parametrize("max_uncertainty", [1.0, math.inf])
@pytest.mark.parametrize("rollout_length", [1, 10])
def test_rollouts_transition_by_transition(rollout_length, max_uncertainty, start_states):
    args = make_args(max_uncertainty=max_uncertainty, start_states=start_states)
    args.transitions, args.rollout_length = 1000, rollout_length
    model, count = MadeUpModel(), 1000 // rollout_length
    team, dataset, rollouts, report = made_up_rollouts(args, model)
    assert all(field.shape[:2] == (rollout_length, count) for field in rollouts[:10])
    rows_started = []
    for i in range(count):
        starts, histories, before = True, None, None
        for t in range(rollout_length):
            states, actions, step = model.calls[t]
            now = SimpleNamespace(**dict(zip(Rollouts._fields, (x[t, i] for x in rollouts[:10]))))
            assert torch.equal(now.states, states[i]) and torch.equal(now.actions, actions[i])
            assert torch.equal(now.next_states, step.next_states[i])
            assert now.masks == step.masks[i]
            assert torch.equal(now.observations, REACHER.observe(now.states))
            if starts:  # in a row of the dataset, with that row's histories
                row = (dataset.states == now.states).all(dim=1).nonzero().item()
                assert torch.equal(now.histories, dataset.histories(torch.tensor([row]))[0])
                rows_started.append(row)
            else:
                assert torch.equal(now.states, before.next_states)
                assert torch.equal(now.histories, histories)
            limited = now.actions.clamp(-ACTION_LIMIT, ACTION_LIMIT)
            pair = torch.cat([limited, now.observations], dim=-1)
            histories = torch.cat([now.histories[:, 1:], pair[:, None]], dim=1)
            assert (histories[1, :, 7:] == 0).all()  # padding
            uncertain = step.epsilon_g[i] >= max_uncertainty
            cut = uncertain or t == rollout_length - 1
            assert now.time_out_masks == (0 if cut else 1)
            starts, before = bool(uncertain or step.masks[i] == 0), now
    expected_rows = dataset.first_rows.tolist() if start_states == "first" else range(dataset.size)
    assert set(rows_started) == set(expected_rows)
    epsilon_g = torch.stack([step.epsilon_g for *_, step in model.calls])
    torch.testing.assert_close(report["epsilon_g"], epsilon_g.mean())
    uncertain = (epsilon_g >= max_uncertainty).float().mean()
    torch.testing.assert_close(report["uncertain"], uncertain)


@each(REACHER, ANT)
def test_actions_are_samples_whose_density_and_value_the_rollouts_keep(task):
    team, _, rollouts, _ = made_up_rollouts(make_args(transitions=2000), MadeUpModel(), task)
    states, observations, histories, actions, log_probs, values = (
        field.flatten(0, 1) for field in rollouts[:6]
    )
    mean, log_std, expected_values = literal_team(team, states, observations, histories)
    expected = Normal(mean, log_std.exp()).log_prob(actions).sum((1, 2))
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-4)
    drawn = ((actions - mean) / log_std.exp()).flatten(1)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(drawn.shape[1]), rtol=0, atol=0.1)
    # Each agent draws for itself.
    torch.testing.assert_close(drawn.T.cov(), torch.eye(drawn.shape[1]), rtol=0, atol=0.12)


def test_choices_are_samples_whose_density_the_rollouts_keep():
    args = make_args(transitions=4000, rollout_length=1, start_states="any")
    team = scramble(Team(GAME, torch.rand(9, 4), args), 0.3)
    rollouts, _ = generate_rollouts(rollout_step, team, MadeUpModel(), load_dataset(GAME), args)
    assert rollouts.histories is None and rollouts.actions.unique().tolist() == [0, 1]
    outputs = team.policy(team.inputs(rollouts.observations[0], None)).transpose(0, 1)
    expected = (outputs.log_softmax(-1) * rollouts.actions[0]).sum((1, 2))
    torch.testing.assert_close(rollouts.log_probs[0], expected, rtol=1e-4, atol=1e-5)
    shares = rollouts.actions[0].mean(0)
    torch.testing.assert_close(shares, outputs.softmax(-1).mean(0), rtol=0, atol=0.05)


def test_a_compiled_rollout_step_is_one_graph_and_equals_the_eager_one(saved, tmp_path):
    """A break would split it, and on a GPU its CUDA graph."""
    args, dataset = make_args(penalty="epistemic", start_states="any"), made_up_dataset()
    team, model = Team(REACHER, dataset.states, args), read(saved, tmp_path)
    carry = dataset.states[:6], made_up_histories(6)
    traced = torch.compile(rollout_step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (rollout_step, traced):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(function(team, model, dataset, args, *carry))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch._dynamo.reset()


def test_a_terminal_is_no_time_out_but_ends_the_rollout():
    args, dataset = make_args(max_uncertainty=math.inf), made_up_dataset()
    team, carry = Team(REACHER, dataset.states, args), (torch.randn(4, 11), made_up_histories(4))
    step = rollout_step(team, MadeUpModel(terminals=1), dataset, args, *carry)
    transition, _, (states, _) = step
    assert transition.time_out_masks.tolist() == [1] * 4 and transition.masks.tolist() == [0] * 4
    assert (states[:, None] == dataset.states).all(dim=-1).any(dim=1).all()


def test_model_returns_in_a_perfect_model_are_those_of_the_environment():
    team = Team(REACHER, made_up_states(100), make_args())
    evaluation = evaluate(REACHER, team.act_greedily, episodes=6)
    first_states = torch.as_tensor(evaluation.first_states).float()
    returns = model_returns(GroundTruth(REACHER, 6), REACHER, team.act_greedily, first_states)
    np.testing.assert_allclose(returns, evaluation.returns, rtol=0, atol=1e-2)


def test_model_returns_stop_at_an_absorbing_state():
    class Counting:
        steps = 0

        def step(self, states, actions, generator):
            self.steps += 1
            masks = torch.tensor([1.0, float(self.steps != 3), float(self.steps != 1)])
            return Step(states, torch.ones(3), masks, None, None, None)

    team = Team(REACHER, made_up_states(100), make_args())
    returns = model_returns(Counting(), REACHER, team.act_greedily, torch.zeros(3, 11))
    assert returns.tolist() == [50, 3, 1]


# PPO.


@each(REACHER, ANT)
def test_cloning_and_value_loss_equals_agents_computed_one_by_one(task, float64):
    dataset, team, rows = made_up_dataset(task), made_up_team(task), torch.tensor([0, 5, 9, 23, 5])
    returns = torch.randn(5)
    batch = dataset.batch(rows, with_histories=True)
    fields = (batch.states, batch.observations, batch.histories)
    means, log_stds, values = literal_team(team, *fields)
    densities = Normal(means, log_stds.exp()).log_prob(batch.actions)
    expected = sum((values[b] - returns[b]) ** 2 - densities[b].sum() for b in range(5)) / 5
    got = cloning_and_value_loss(team, batch, returns)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_cloning_finds_the_data_of_a_deterministic_team():
    """Actions that are a function of what agents see, and a value that is constant."""
    dataset = made_up_dataset()
    dataset.actions = 0.5 * REACHER.observe(dataset.states)[..., :1].tanh()
    dataset.rewards = torch.full_like(dataset.rewards, 2.0)
    dataset.masks = torch.ones_like(dataset.masks)
    args = make_args(memory="none", cloning_steps=250, minibatch_size=24, gamma=0.9)
    team = Team(REACHER, dataset.states, args)
    clone(team, dataset, args, reward_scale=0.1)
    batch = dataset.batch(torch.arange(dataset.size), with_histories=True)
    actions = team.act_greedily(batch.observations, batch.histories)
    assert team.cloned and (actions - dataset.actions).abs().mean() < 0.06
    inputs = team.inputs(batch.observations, batch.histories)
    value = 0.1 * 2 / (1 - 0.9)
    assert (team.team_value(inputs, dataset.states) - value).abs().mean() < 0.1


def appendix_a(rewards, values, next_values, masks, time_out_masks, discount, lamda):
    """The listing "General Advantage Estimation" of Appendix A, for one trajectory of numbers."""
    returns, advants = [0.0] * len(rewards), [0.0] * len(rewards)
    running_returns = next_values[-1] * masks[-1]
    running_advants = 0
    for t in reversed(range(0, len(rewards))):
        running_returns = rewards[t] + discount * masks[t] * (
            running_returns * time_out_masks[t]
            + (1.0 - time_out_masks[t]) * next_values[t] * masks[t]
        )
        returns[t] = running_returns
        delta = rewards[t] + (discount * next_values[t] * masks[t]) - values[t]
        decay = discount * lamda * masks[t] * time_out_masks[t]
        running_advants = delta + decay * running_advants
        advants[t] = running_advants
    return returns, advants


@pytest.mark.parametrize("last_is_cut", [True, False])
def test_generalized_advantages_equal_the_papers_listing(last_is_cut, float64):
    rewards, values, next_values = torch.randn(3, 40, 16)
    masks, time_out_masks = (torch.rand(2, 40, 16) > 0.15).double()
    if last_is_cut:
        time_out_masks[-1] = 0
    columns = (rewards, values, next_values, masks, time_out_masks)
    returns, advantages = generalized_advantages(*columns, 0.99, 0.98)
    for i in range(16):
        expected = appendix_a(*[column[:, i].tolist() for column in columns], 0.99, 0.98)
        np.testing.assert_allclose(returns[:, i], expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(advantages[:, i], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("reward_scale", [1.0, 0.1])
@each(REACHER, ANT)
def test_the_batch_bootstraps_from_each_transitions_own_next_state(task, reward_scale):
    """Not from the state after it in its column, where another rollout may have started."""
    args = make_args(transitions=400, rollout_length=10, gamma=0.9, gae_lambda=0.8)
    team, _, rollouts, _ = made_up_rollouts(args, MadeUpModel(), task)
    scramble(team, 0.02)  # values that differ from state to state
    # The values are those of the team that generated the rollouts.
    fields = [rollouts.states, rollouts.observations, rollouts.histories]
    values = literal_team(team, *[field.flatten(0, 1) for field in fields])[2].detach()
    rollouts = rollouts._replace(values=values.view(10, 40))
    rewards = rollouts.rewards.clone()
    batches = make_batch(team, rollouts, args, reward_scale)
    assert torch.equal(rollouts.rewards, rewards)  # what is logged
    columns = slice(36), slice(36, 40)  # four of the forty are held out
    for name in ("states", "observations", "histories", "actions", "log_probs", "values"):
        for batch, part in zip(batches, columns):
            expected = getattr(rollouts, name)[:, part].flatten(0, 1)
            assert torch.equal(getattr(batch, name), expected)
    limited = rollouts.actions.clamp(-ACTION_LIMIT, ACTION_LIMIT)
    pairs = torch.cat([limited, rollouts.observations], dim=-1)[:, :, :, None]
    histories = torch.cat([rollouts.histories[:, :, :, 1:], pairs], dim=3).flatten(0, 1)
    next_states = rollouts.next_states.flatten(0, 1)
    next_values = literal_team(team, next_states, task.observe(next_states), histories)[2]
    terms = (reward_scale * rewards, rollouts.values, next_values.view(10, 40))
    terms = (*terms, rollouts.masks, rollouts.time_out_masks)
    returns, advantages = torch.zeros(2, 10, 40)
    for i in range(40):
        one = appendix_a(*[term[:, i].tolist() for term in terms], 0.9, 0.8)
        returns[:, i], advantages[:, i] = torch.tensor(one[0]), torch.tensor(one[1])
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-3)
    for batch, part in zip(batches, columns):
        expected = returns[:, part].flatten(), advantages[:, part].flatten()
        torch.testing.assert_close(batch.returns, expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(batch.advantages, expected[1], rtol=1e-3, atol=1e-3)


def test_gain_of_an_update_is_the_importance_weighted_advantage():
    team = made_up_team()
    batch = made_up_minibatch(team)
    mean, log_std, _ = literal_team(team, batch.states, batch.observations, batch.histories)
    log_probs = Normal(mean, log_std.exp()).log_prob(batch.actions).sum((1, 2))
    ratios = (log_probs - batch.log_probs).exp()
    expected = sum((r - 1) * a for r, a in zip(ratios, batch.advantages)) / len(ratios)
    torch.testing.assert_close(surrogate_gain(team, batch), expected.detach())


def test_errors_of_the_model_where_the_team_goes(saved, tmp_path):
    model, states, actions = read(saved, tmp_path), made_up_states(30), torch.rand(30, 2, 1)
    next_states, rewards = made_up_states(30), torch.randn(30)
    columns = (states, actions, rewards, next_states, torch.zeros(30))
    names = ("states", "actions", "rewards", "next_states", "terminals")
    transitions = {name: column.numpy() for name, column in zip(names, columns)}
    errors = errors_on(model, transitions)
    means, _ = model.predict(states, actions)
    state_errors = [(means[m, i, :-1] - next_states[i]).norm() for m in range(5) for i in range(30)]
    reward_errors = [(means[m, i, -1] - rewards[i]).abs() for m in range(5) for i in range(30)]
    low, high = saved["state_min"], saved["state_max"]
    outside = [any(x < low) or any(x > high) for x in next_states]
    assert errors["model_state_error"] == pytest.approx(np.mean(state_errors), rel=0.05)
    assert errors["model_reward_error"] == pytest.approx(np.mean(reward_errors), rel=0.05)
    assert errors["outside_box"] == pytest.approx(np.mean(outside), abs=0.05)
    epsilon_g = model.step(states, actions).epsilon_g.mean().item()
    assert errors["epsilon_g"] == pytest.approx(epsilon_g, rel=0.05)


def made_up_minibatch(team, size=24):
    """Old log densities and values are off by more and by less than the clipping range."""
    states, histories = made_up_states(size, team.task), made_up_histories(size, team.task)
    observations = team.task.observe(states)
    with torch.no_grad():
        mean, log_std, values = literal_team(team, states, observations, histories)
        actions = mean + 0.7 * log_std.exp() * torch.randn_like(mean)
        log_probs = Normal(mean, log_std.exp()).log_prob(actions).sum((1, 2))
    log_probs = log_probs + 0.3 * torch.randn(size)
    old_values = values + 0.3 * torch.randn(size)
    returns, advantages = values + torch.randn(size), torch.randn(size)
    fields = (states, observations, histories, actions, log_probs, old_values)
    return Rollouts(*fields, *[None] * 4, returns, advantages)


def literal_loss(team, batch, args, alpha):
    """PPO's loss in Appendix A.1, sample by sample, and the dual variable after its update."""
    mean, log_std, values = literal_team(team, batch.states, batch.observations, batch.histories)
    clip, terms = args.clip, []
    for i in range(len(batch.states)):
        new_log_prob = Normal(mean[i], log_std[i].exp()).log_prob(batch.actions[i]).sum()
        ratio = torch.exp(torch.clamp(new_log_prob - batch.log_probs[i], max=10))
        clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
        actor = torch.min(ratio * batch.advantages[i], clipped * batch.advantages[i])
        moved = torch.clamp(values[i] - batch.values[i], -clip, clip)
        critics = [(v - batch.returns[i]) ** 2 for v in (batch.values[i] + moved, values[i])]
        entropies = [-clipped * new_log_prob, -ratio * new_log_prob]
        excess = sum(torch.relu(x.abs() - 1) ** 2 for x in mean[i].flatten())
        terms.append([actor, *critics, *entropies, clipped * excess, ratio * excess])
    means = [torch.stack(column).mean() for column in zip(*terms)]
    actor, clipped_critic, critic, clipped_entropy, entropy, clipped_penalty, penalty = means
    entropy = torch.min(clipped_entropy, entropy)
    gap = team.task.entropy_target - entropy.item()
    alpha = max(0.0, alpha + args.entropy_coefficient * gap)
    loss = -actor + args.critic_coefficient * torch.max(clipped_critic, critic)
    loss = loss - alpha * entropy + args.action_penalty * torch.max(clipped_penalty, penalty)
    return loss, alpha


OTHER = {"clip": 0.1, "critic_coefficient": 3.0, "action_penalty": 0.3, "entropy_coefficient": 0.05}
CASES = ["plain", "far returns", "old returns", "a huge ratio", "entropy below target", "other"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@each(REACHER, ANT)
def test_ppo_loss_equals_the_appendix_sample_by_sample(task, case, alpha, float64):
    team, args = made_up_team(task), make_args(**(OTHER if case == "other" else {}))
    if case == "entropy below target":
        team.policy[-1].bias.data[..., task.action_dim :] = -5
    team.entropy_alpha.fill_(alpha)
    batch = made_up_minibatch(team)
    if case == "far returns":  # the clipped value is the worse one
        batch = batch._replace(returns=batch.values + 10 * (batch.returns - batch.values))
    if case == "old returns":  # the unclipped value is the worse one
        batch = batch._replace(returns=batch.values.clone())
    if case == "a huge ratio":
        batch.log_probs[3] -= 15
    expected, expected_alpha = literal_loss(team, batch, args, alpha)
    expected_gradients = torch.autograd.grad(expected, list(team.parameters()))
    loss, metrics = ppo_loss(team, batch, args)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(team.entropy_alpha.item(), expected_alpha, rtol=1e-6, atol=1e-9)
    for (name, parameter), gradient in zip(team.named_parameters(), expected_gradients):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(value.isfinite() and not value.requires_grad for value in metrics.values())


@each(REACHER, ANT)
def test_the_minibatches_exercise_every_branch_of_the_loss(task, float64):
    team = made_up_team(task)
    batch = made_up_minibatch(team)
    fields = (batch.states, batch.observations, batch.histories)
    mean, log_std, values = literal_team(team, *fields)
    log_probs = Normal(mean, log_std.exp()).log_prob(batch.actions).sum((1, 2))
    ratio = (log_probs - batch.log_probs).exp()
    for off, clip in [(ratio - 1, 0.2), (values - batch.values, 0.2), (mean, 1)]:
        assert (off > clip).any() and (off < -clip).any() and (off.abs() < clip).any()
    assert (log_std == 0).any() and ((-6 < log_std) & (log_std < 0)).any()


@pytest.mark.parametrize("alpha, expected", [(0.0, 0.0), (1e-4, 0.0), (1.0, 1.0)])
def test_the_dual_variable_falls_to_zero_and_no_further(alpha, expected):
    """Teams start with far more entropy than their target."""
    team = Team(REACHER, made_up_states(100), make_args())
    team.entropy_alpha.fill_(alpha)
    ppo_loss(team, made_up_minibatch(team), make_args())
    assert team.entropy_alpha.item() == pytest.approx(expected, abs=0.02)
    assert team.entropy_alpha < alpha or alpha == 0
    assert "entropy_alpha" in team.state_dict()
    assert "entropy_alpha" not in dict(team.named_parameters())


def test_the_compiled_loss_equals_the_eager_one():
    """Traced and differentiated as --compile does it, but run without generated code."""
    eager, traced = made_up_team(), made_up_team()
    traced.load_state_dict(eager.state_dict())
    traced_loss = torch.compile(ppo_loss, backend="aot_eager", fullgraph=True)
    args = make_args(entropy_coefficient=0.01)
    for team in (eager, traced):
        team.entropy_alpha.fill_(0.5)
    for _ in range(2):  # the second call finds the first one's dual variable
        batch = made_up_minibatch(eager)
        for team, function in [(eager, ppo_loss), (traced, traced_loss)]:
            team.zero_grad()
            loss, _ = function(team, batch, args)
            loss.backward()
        torch.testing.assert_close(traced.entropy_alpha, eager.entropy_alpha)
        assert 0 < traced.entropy_alpha < 0.5
        for (name, got), expected in zip(traced.named_parameters(), eager.parameters()):
            torch.testing.assert_close(
                got.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_run_trains_as_its_options_say(saved, reacher_file, tmp_path, monkeypatch):
    """Shuffled whole minibatches of each epoch, clipped gradients, rates that fall to zero."""
    saved["dataset"]["sha256"] = ""
    read(saved, tmp_path)
    sizes = {"transitions": 400, "rollout_length": 10, "minibatch_size": 100, "epochs": 2}
    sizes |= {"total_steps": 2, "eval_every": 2, "eval_episodes": 1, "max_grad_norm": 1e-3}
    args = Args(dataset=reacher_file, world_model=tmp_path / "world_model.pt", **sizes)
    args.run_dir, args.next_states, args.device = tmp_path / "run", "mean", "cpu"
    models, batches, minibatches, steps = [], [], [], []
    make_model, adam_step = moma_ppo.make_model, torch.optim.Adam.step

    def keep_model(*inputs):
        models.append(make_model(*inputs))
        return models[-1]

    def keep_batch(team, rollouts, args, reward_scale):
        assert (args.lambda_g, args.max_uncertainty) == (0.1, 2.0)  # the world model's
        mean = load_dataset(REACHER, reacher_file).rewards.abs().mean()
        assert reward_scale == pytest.approx((1 - args.gamma) / mean.item())
        batches.append(make_batch(team, rollouts, args, reward_scale))
        return batches[-1]

    def keep_minibatch(team, batch, args):
        minibatches.append(batch.log_probs.tolist())
        return ppo_loss(team, batch, args)

    def keep_step(optimizer):
        (group,) = optimizer.param_groups
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        steps.append((group["lr"], torch.cat(gradients).norm().item()))
        return adam_step(optimizer)

    kept = {"make_model": keep_model, "make_batch": keep_batch, "ppo_loss": keep_minibatch}
    for name, function in (kept | {"FINAL_EPISODES": 2}).items():
        monkeypatch.setattr(moma_ppo, name, function)
    monkeypatch.setattr(torch.optim.Adam, "step", keep_step)
    moma_ppo.train(args)
    assert models[0].next_states == "mean"
    rates, norms = zip(*steps)
    assert rates == pytest.approx([1e-3] * 6 + [5e-4] * 6)
    assert norms == pytest.approx([1e-3] * 12, rel=1e-3)
    for (batch, _), first in zip(batches, (0, 6)):
        epochs = [sum(minibatches[i : i + 3], []) for i in (first, first + 3)]
        for epoch in epochs:
            assert len(set(epoch)) == 300 and set(epoch) < set(batch.log_probs.tolist())
            assert epoch != batch.log_probs[:300].tolist()
        assert epochs[0] != epochs[1]


def test_a_fall_in_the_true_simulator_is_absorbing():
    states = torch.as_tensor(recorded_columns(ANT, episodes=3, length=1)["observations"])
    states[1, 0] = 2.0  # high in the air
    step = GroundTruth(ANT, 3).step(states, torch.zeros(3, 4, 2))
    assert step.masks.tolist() == [1, 0, 1]
