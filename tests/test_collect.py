"""Recorded datasets, and the online learners behind them."""

import os
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from made_up import ANT, REACHER, with_a_bit_changed
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from data import collect_mujoco, collect_reacher
from data.collect_mujoco import TASKS, critic_loss, policy_loss, sample_actions
from data.collect_reacher import (
    Dataset,
    Experience,
    collect_experience,
    load_experts,
    mappo_terms,
    record_dataset,
)
from data.offline_dataset import load_dataset
from mamujoco_envs import InputError, Simulator, evaluate, find_task


def read(path):
    with h5py.File(path) as file:
        return {name: column[()] for name, column in file.items()}, dict(file.attrs)


def assert_refused(record, args, *parts):
    with pytest.raises(InputError) as error:
        record(args)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# Reacher's experts.


def test_the_shipped_experts_are_equally_good_and_bend_opposite_ways():
    task, shares = collect_reacher.TASK, []
    for team in load_experts(Dataset.experts):
        evaluation = evaluate(task, lambda x, _, t=team: t.distribution(x[:, 0]).mean, 100)
        assert task.normalized_score(evaluation.returns.mean()) > 0.95
        last = evaluation.last_states
        shares.append((np.arctan2(last[:, 3], last[:, 1]) > 0).mean())
    assert min(shares) < 0.05 and max(shares) > 0.95


def test_mappo_terms_equal_the_appendix_sample_by_sample(float64):
    team, size, clip = collect_reacher.Team(), 20, 0.2
    for parameter in team.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    states = torch.randn(size, 11)
    mean, std = (
        x.detach() for x in (team.distribution(states).mean, team.distribution(states).stddev)
    )
    actions = mean + 0.7 * std * torch.randn_like(mean)
    log_probs = Normal(mean, std).log_prob(actions).sum((1, 2)) + 0.3 * torch.randn(size)
    values = team.team_value(states).detach() + 0.3 * torch.randn(size)
    batch = Experience(states, actions, log_probs, values, torch.randn(size), torch.randn(size))
    terms = []
    for i in range(size):
        distribution = team.distribution(states[i : i + 1])
        log_prob = distribution.log_prob(actions[i]).sum()
        ratio = (log_prob - log_probs[i]).exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        value = team.team_value(states[i : i + 1])[0]
        moved = values[i] + (value - values[i]).clamp(-clip, clip)
        excess = sum((abs(x) - 1) ** 2 for x in distribution.mean.flatten() if abs(x) > 1)
        actor = min(ratio * batch.advantages[i], clipped * batch.advantages[i])
        errors = (moved - batch.returns[i]) ** 2, (value - batch.returns[i]) ** 2
        entropies = -ratio * log_prob, -clipped * log_prob
        terms.append([actor, *errors, *entropies, ratio * excess, clipped * excess])
    means = [sum(column) / size for column in zip(*terms)]
    expected = [-means[0], max(means[1:3]), min(means[3:5]), max(means[5:7])]
    for got, one in zip(mappo_terms(team, batch), expected):
        torch.testing.assert_close(got, torch.as_tensor(one), rtol=1e-8, atol=1e-12)


def test_an_expert_is_trained_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_reacher, "EPISODES", 6)
    monkeypatch.setattr(collect_reacher, "evaluate", lambda task, act, _: evaluate(task, act, 5))
    args = collect_reacher.Experts(total_steps=2, output=tmp_path / "expert.pt")
    result = collect_reacher.train_expert(args)
    assert 0 <= result["share_of_positive_bends"] <= 1
    saved = torch.load(tmp_path / "expert.pt", weights_only=True)
    collect_reacher.Team().policy.load_state_dict(saved["policy"])
    assert_refused(collect_reacher.train_expert, args, "exists")
    for options in ({"total_steps": 0}, {"learning_rate": float("nan")}, {"seed": -1}):
        name = f"--{next(iter(options)).replace('_', '-')}"
        assert_refused(collect_reacher.train_expert, replace(args, **options), name)


# Reacher's dataset.


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(collect_reacher, "RECORDED_AT_ONCE", 20)


@pytest.fixture
def recording(few_at_once, tmp_path):
    record_dataset(Dataset(episodes=40, output=tmp_path / "reacher.hdf5"))
    return tmp_path / "reacher.hdf5"


def test_recordings_are_the_same_to_the_bit(recording, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # another machine
    try:
        record_dataset(Dataset(episodes=40, output=tmp_path / "again.hdf5"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "again.hdf5").read_bytes() == recording.read_bytes()
    record_dataset(Dataset(episodes=40, seed=1, output=tmp_path / "other.hdf5"))
    one, other = (read(tmp_path / f"{name}.hdf5")[0] for name in ("again", "other"))
    assert not np.array_equal(one["observations"][0], other["observations"][0])
    assert not list(tmp_path.glob("*.tmp"))


def test_recorded_rows_are_transitions_of_reacher(recording):
    columns, attributes = read(recording)
    assert {"environment", "source", "experts_sha256", "mean_return"} <= set(attributes)
    observations, next_observations = columns["observations"], columns["next_observations"]
    assert len(observations) == 40 * 50
    inside = np.arange(1, 2000) % 50 != 0
    np.testing.assert_array_equal(next_observations[:-1][inside], observations[1:][inside])
    # The last next state is its own episode's: the next one starts with another target.
    np.testing.assert_array_equal(next_observations[:, 4:6], observations[:, 4:6])
    assert not columns["terminals"].any()
    np.testing.assert_array_equal(np.flatnonzero(columns["timeouts"]), np.arange(49, 2000, 50))
    assert np.abs(columns["actions"]).max() <= 1
    rewards = -np.linalg.norm(observations[:, 8:], axis=1) - np.square(columns["actions"]).sum(1)
    np.testing.assert_allclose(columns["rewards"], rewards, rtol=0, atol=1e-5)


def test_halves_of_the_dataset_bend_opposite_ways(recording):
    dataset = load_dataset(REACHER, recording)
    last = dataset.next_states[dataset.last_rows].view(2, -1, 11)
    shares = (torch.atan2(last[..., 3], last[..., 1]) > 0).float().mean(1)
    assert shares.max() > 0.9 and shares.min() < 0.1
    # Table 2: the score's 1 is this dataset's mean.
    score = REACHER.normalized_score(dataset.episode_returns().mean())
    assert score == pytest.approx(1, abs=0.15)


def test_recording_for_a_script_leaves_its_random_numbers_alone(few_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(collect_reacher, "Dataset", lambda **o: Dataset(episodes=40, **o))
    before = torch.get_rng_state()
    collect_reacher.record(REACHER, tmp_path / "reacher.hdf5")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_killed_recording_left_behind_goes(tmp_path):
    old, new = tmp_path / "data.hdf5.1.tmp", tmp_path / "data.hdf5.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half of")
    os.utime(old, (0, 0))
    with collect_reacher.new_file(tmp_path / "data.hdf5") as temporary:
        temporary.write_bytes(b"whole")
    assert not old.exists() and new.exists()  # another process may be writing that one
    assert (tmp_path / "data.hdf5").read_bytes() == b"whole"


def test_bad_input_of_the_recording_of_reacher(few_at_once, tmp_path):
    args = Dataset(episodes=40, output=tmp_path / "x.hdf5")
    for episodes in (0, 39, -40):
        assert_refused(record_dataset, replace(args, episodes=episodes), "--episodes", episodes)
    assert_refused(record_dataset, replace(args, seed=2**32), "--seed")
    nowhere = tmp_path / "nowhere" / "x.hdf5"
    assert_refused(record_dataset, replace(args, output=nowhere), tmp_path / "nowhere")
    assert not list(tmp_path.glob("*.hdf5*"))


FAULTS = ["missing", "same side", "empty", "text", "truncated", "a bit"]
FAULTS += ["no policy", "other shapes"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_expert_is_one_line(fault, tmp_path):
    path, saved = tmp_path / "expert.pt", {"share_of_positive_bends": 1.0}
    saved["policy"] = collect_reacher.Team().policy.state_dict()
    if fault == "no policy":
        del saved["policy"]
    if fault == "other shapes":
        saved["policy"]["0.weight"] = torch.zeros(2, 5, 64)
    torch.save(saved, path)
    contents = {"empty": b"", "text": b"not weights", "truncated": path.read_bytes()[:5000]}
    contents["a bit"] = with_a_bit_changed(path.read_bytes())
    if fault in contents:
        path.write_bytes(contents[fault])
    if fault == "missing":
        path.unlink()
    part = "100% and 100% of" if fault == "same side" else "python -m data.collect_reacher experts"
    assert_refused(load_experts, (path, path), part, "" if fault == "same side" else path)


# The ant's dataset.


@pytest.fixture
def snapshots(tmp_path):
    """Policies as `data.collect_mujoco snapshots` saves them."""
    policies = [collect_mujoco.make_policy(TASKS["ant"]).state_dict() for _ in range(3)]
    stacked = {name: torch.stack([policy[name] for policy in policies]) for name in policies[0]}
    path = tmp_path / "snapshots.pt"
    torch.save({"policies": stacked, "returns": [500.0, 3100.0, 4600.0]}, path)
    return path


CHOSEN = {"random": None, "medium": [1], "full-replay": [0, 1, 2], "expert": [2]}


@pytest.mark.parametrize("name, chosen", CHOSEN.items())
def test_recorded_episodes_are_the_simulators(name, chosen, tmp_path, snapshots, monkeypatch):
    monkeypatch.setitem(TASKS, "ant", replace(TASKS["ant"], episode_length=40))
    path, size = tmp_path / "ant.hdf5", 600
    collect_mujoco.record_dataset(collect_mujoco.Dataset("ant", name, size, 3, snapshots, path))
    columns, attributes = read(path)
    assert "ours, not D4RL's" in attributes["source"]
    got = attributes.get("snapshots")
    assert (got.tolist() if chosen else got) == chosen
    dataset = load_dataset(find_task(f"ant-{name}-fo"), path)
    assert dataset.size == size and "collect_mujoco" in dataset.description["source"]
    terminals, timeouts = columns["terminals"], columns["timeouts"]
    ends = terminals | timeouts
    assert terminals.any() and not (terminals & timeouts).any()
    cuts = [199, 399, 599] if name == "full-replay" else [599]  # where shares end
    assert ends[cuts].all()
    inside = ~ends
    np.testing.assert_array_equal(
        columns["next_observations"][inside], columns["observations"][1:][inside[:-1]]
    )
    # Every episode, simulated again from its own first state with its own actions.
    first_rows, last_rows = dataset.first_rows.tolist(), dataset.last_rows.tolist()
    assert last_rows == np.flatnonzero(ends).tolist()
    lengths = np.subtract(last_rows, first_rows) + 1
    assert lengths.max() == 40 and (lengths < 40).any()
    for episode, (first, last) in enumerate(zip(first_rows, last_rows)):
        simulator = Simulator(TASKS["ant"], 1)
        simulator.reset([np.random.default_rng([3, episode])])
        for row in range(first, last + 1):
            got = columns["observations"][row]
            np.testing.assert_allclose(got, simulator.states[0], rtol=1e-6, atol=1e-6)
            actions = ANT.split_actions(torch.tensor(columns["actions"][row : row + 1]))
            states, rewards, terminal = simulator.step(actions.numpy())
            np.testing.assert_allclose(columns["rewards"][row], rewards[0], atol=1e-5)
            got = columns["next_observations"][row]
            np.testing.assert_allclose(got, states[0], rtol=1e-6, atol=1e-6)
            assert terminals[row] == terminal[0]
            full = row - first == 39 or row in cuts
            assert timeouts[row] == (full and not terminal[0])


def test_bad_input_of_the_recording_of_the_ant(tmp_path, snapshots):
    args = collect_mujoco.Dataset(snapshots=snapshots, output=tmp_path / "ant.hdf5")
    record, command = collect_mujoco.record_dataset, "python -m data.collect_mujoco snapshots"
    nowhere = tmp_path / "nowhere"
    assert_refused(record, replace(args, snapshots=nowhere), nowhere, command)
    assert_refused(record, replace(args, output=nowhere / "ant.hdf5"), nowhere)
    assert_refused(record, replace(args, name="full-replay", transitions=2), "--transitions", 3)
    assert_refused(record, replace(args, transitions=0), "--transitions")
    assert_refused(record, replace(args, transitions=10**12), "make room")
    snapshots.write_bytes(snapshots.read_bytes()[:5000])
    assert_refused(record, args, snapshots, "truncated", command)
    assert not (tmp_path / "ant.hdf5").exists()


# SAC.


def test_log_densities_of_squashed_actions():
    policy = collect_mujoco.make_policy(TASKS["ant"])
    states, noise = torch.randn(50, 27), torch.randn(50, 8)
    actions, log_probs = sample_actions(policy, states, noise)
    mean, log_std = policy(states[None])[0].chunk(2, dim=-1)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    bounded = actions.clamp(-1 + 1e-6, 1 - 1e-6)
    expected = squashed.log_prob(bounded).sum(-1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-3, atol=1e-3)


def test_sac_losses_transition_by_transition():
    policy, log_alpha, n = (
        collect_mujoco.make_policy(TASKS["ant"]),
        torch.tensor(-1.0, requires_grad=True),
        7,
    )
    critics, targets = (
        collect_mujoco.make_critics(TASKS["ant"]),
        collect_mujoco.make_critics(TASKS["ant"]),
    )
    batch = [torch.randn(n, 27), torch.rand(n, 8), torch.randn(n)]
    batch += [torch.randn(n, 27), (torch.rand(n) > 0.5).float()]
    noise = torch.randn(2, n, 8)

    def values(networks, state, action):
        return networks(torch.cat([state, action]).expand(2, 1, -1))[:, 0, 0]

    critic, actor = 0, 0
    for i, (state, action, reward, next_state, mask) in enumerate(zip(*batch)):
        drawn = sample_actions(policy, next_state[None], noise[0, i : i + 1])
        next_action, next_log_prob = (x[0] for x in drawn)
        soft = min(values(targets, next_state, next_action)) - log_alpha.exp() * next_log_prob
        target = (reward + 0.99 * mask * soft).detach()
        critic += (values(critics, state, action) - target).square().sum() / n
        new_action, log_prob = (
            x[0] for x in sample_actions(policy, state[None], noise[1, i : i + 1])
        )
        actor += log_alpha.exp().detach() * log_prob / n
        actor -= min(values(critics, state, new_action)) / n
        actor -= log_alpha * (log_prob.detach() - 8) / n
    got = critic_loss(critics, targets, policy, log_alpha, batch, noise[0])
    torch.testing.assert_close(got, critic)
    got = policy_loss(critics, policy, log_alpha, batch[0], noise[1])
    torch.testing.assert_close(got, actor)


def test_snapshots_are_saved_and_record_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "ant", replace(TASKS["ant"], episode_length=15))
    path, counts = tmp_path / "snapshots.pt", {"total_updates": 8, "updates_per_step": 2}
    counts |= {"num_envs": 4, "warm_up": 40, "snapshot_every": 4}
    counts |= {"buffer_size": 60, "batch_size": 16}
    args = collect_mujoco.Snapshots(**counts, output=path)
    result = collect_mujoco.train_snapshots(args)
    assert result["steps"] == 40 + 3 * 4 and len(result["returns"]) == 2
    assert_refused(collect_mujoco.train_snapshots, args, "exists")
    fresh = replace(args, output=tmp_path / "fresh.pt")
    for name in ("total_updates", "num_envs", "buffer_size", "batch_size", "seed"):
        flag = f"--{name.replace('_', '-')}"
        assert_refused(collect_mujoco.train_snapshots, replace(fresh, **{name: -1}), flag)
    saved = torch.load(path, weights_only=True)["policies"]
    assert all(len(x) == 2 and not torch.equal(x[0], x[1]) for x in saved.values())
    args = collect_mujoco.Dataset(
        "ant", "full-replay", 20, snapshots=path, output=tmp_path / "ant.hdf5"
    )
    collect_mujoco.record_dataset(args)


def test_experience_is_whole_episodes_whose_last_values_bootstrap():
    team, simulator = collect_reacher.Team(), Simulator(collect_reacher.TASK, 3)
    generators = [np.random.default_rng(seed) for seed in range(3)]
    experience, mean_return = collect_experience(team, simulator, generators)
    simulator.reset([np.random.default_rng(seed) for seed in range(3)])
    columns = [x.unflatten(0, (50, 3)) for x in experience]
    states, actions, log_probs, values, returns, advantages = columns
    rewards, next_values = torch.zeros(2, 50, 3)
    for t in range(50):
        torch.testing.assert_close(states[t], torch.as_tensor(simulator.states).float())
        next_states, reward, _ = simulator.step(actions[t].numpy())
        rewards[t] = torch.as_tensor(reward)
        next_values[t] = team.team_value(torch.as_tensor(next_states).float()).detach()
    assert mean_return == pytest.approx(rewards.sum(0).mean().item())
    expected, following, last = torch.zeros(50, 3), next_values[-1], 0
    for t in reversed(range(50)):
        following = rewards[t] + 0.97 * following
        torch.testing.assert_close(returns[t], following, rtol=1e-4, atol=1e-4)
        last = rewards[t] + 0.97 * next_values[t] - values[t] + 0.97 * 0.95 * last
        expected[t] = last
    expected = (expected - expected.mean()) / (expected.std() + 1e-3)
    torch.testing.assert_close(advantages, expected, rtol=1e-3, atol=1e-3)
    density = team.distribution(states.flatten(0, 1)).log_prob(actions.flatten(0, 1)).sum((1, 2))
    torch.testing.assert_close(log_probs.flatten(), density.detach())


def test_copies_start_anew_after_a_time_out_which_is_not_absorbing(monkeypatch):
    monkeypatch.setitem(TASKS, "ant", replace(TASKS["ant"], episode_length=3))
    copies = collect_mujoco.Copies(collect_mujoco.Snapshots(num_envs=4))
    for age in (1, 2, 3, 1):
        before = copies.states
        states, _, _, next_states, masks = copies.step(torch.zeros(4, 8))
        assert np.array_equal(states, before) and (masks == 1).all()
        # The next state is still the old episode's.
        assert np.array_equal(copies.states, next_states) == (age < 3)
        assert (copies.ages == age % 3).all()


def test_target_critics_follow_slowly():
    learner = collect_mujoco.SAC(collect_mujoco.Snapshots(batch_size=5))
    old = [x.clone() for x in learner.target_critics.parameters()]
    batch = [torch.randn(5, 27), torch.rand(5, 8), torch.randn(5), torch.randn(5, 27)]
    learner.update([*batch, torch.ones(5)], with_policy=True)
    new, online = learner.target_critics.parameters(), learner.critics.parameters()
    for before, after, weight in zip(old, new, online):
        assert not torch.equal(before, weight)
        torch.testing.assert_close(after, 0.995 * before + 0.005 * weight)


def test_the_replay_buffer_gives_what_was_added_and_keeps_the_newest():
    # Eleven places have room for two steps of four copies.
    buffer = collect_mujoco.ReplayBuffer(collect_mujoco.Snapshots(num_envs=4, buffer_size=11))
    for step, kept in enumerate([{1}, {1, 2}, {2, 3}, {3, 4}], 1):
        numbers = step + np.arange(4) / 10
        shapes = [field[:4].shape for field in buffer.fields]
        buffer.add(
            [numbers.reshape(4, *[1] * (len(shape) - 1)) + np.zeros(shape) for shape in shapes]
        )
        states, actions, rewards, next_states, masks = buffer.sample(500)
        assert len(rewards.unique()) == 4 * len(kept)
        assert set(rewards.int().tolist()) == kept
        for column in (states[:, 5], actions[:, 3], next_states[:, -1], masks):
            assert torch.equal(column, rewards)  # all fields are of the same transitions
