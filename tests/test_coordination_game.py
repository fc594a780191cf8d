"""The coordination game and its datasets."""

import dataclasses
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import GAME

import coordination_game
from coordination_game import (
    CoordinationGame,
    behavior_policies,
    climbing_task,
    continuous_task,
    coordination_task,
    make_columns,
    train_world_model,
)
from data.offline_dataset import load_dataset
from mamujoco_envs import InputError, evaluate, find_task
from training_run import save

CHECKPOINT = ("script", "args", "step", "seconds", "evaluations", "inputs")
CHECKPOINT += ("random_states", "state")


def one_hot(choices, actions=2):
    return np.eye(actions)[np.asarray(choices)]


@pytest.mark.parametrize("agents, actions", [(2, 2), (3, 2), (2, 3)])
def test_all_agents_must_choose_alike(agents, actions):
    task = coordination_task("neutral", agents, actions)
    joint = list(itertools.product(range(actions), repeat=agents))
    game = CoordinationGame(task, len(joint))
    assert (game.reset([None] * len(joint)) == 0).all()
    states, rewards, terminals = game.step(one_hot(joint, actions))
    assert rewards.tolist() == [float(len(set(choices)) == 1) for choices in joint]
    assert (states == one_hot(joint, actions).reshape(len(joint), -1)).all()
    assert not terminals.any()


@pytest.mark.parametrize("behavior, paper", coordination_game.BEHAVIORS.items())
def test_datasets_are_those_of_table_1(behavior, paper):
    task = coordination_task(behavior)
    columns = make_columns(task)
    size = len(columns["rewards"])
    assert size == 50_000 and columns["rewards"].mean() == pytest.approx(paper, abs=0.01)
    actions = columns["actions"].reshape(size, 2, 2)
    right = {"favorable": (0.75, 0.75), "neutral": (0.5, 0.5), "unfavorable": (0.25, 0.75)}
    np.testing.assert_allclose(actions[:, :, 1].mean(0), right[behavior], atol=0.01)
    # Agents choose for themselves.
    assert abs(np.corrcoef(actions[:, 0, 1], actions[:, 1, 1])[0, 1]) < 0.02
    for name, column in make_columns(task).items():
        assert np.array_equal(column, columns[name])
    assert not np.array_equal(make_columns(task, seed=1)["actions"], columns["actions"])


@pytest.mark.parametrize(
    "task",
    [coordination_task("unfavorable", 3), continuous_task("peaks", "neutral", 3), climbing_task(1)],
    ids=lambda task: task.name,
)
def test_the_dataset_is_a_recording_of_the_game(task):
    columns = make_columns(task)
    game = CoordinationGame(task, 5000)
    states = game.reset([None] * 5000)
    for t in range(10):
        rows = slice(t, None, 10)
        assert np.array_equal(columns["observations"][rows], states)
        actions = columns["actions"][rows].reshape(5000, task.num_agents, task.action_dim)
        states, rewards, _ = game.step(actions)
        assert np.array_equal(columns["next_observations"][rows], states)
        np.testing.assert_allclose(columns["rewards"][rows], rewards, atol=1e-5)
        assert (columns["timeouts"][rows] == (t == 9)).all()


def test_its_dataset_loads_with_one_hot_actions_and_ten_steps_an_episode():
    dataset = load_dataset(GAME)
    assert set(dataset.actions.unique().tolist()) == {0, 1}  # to the bit
    assert (dataset.last_rows - dataset.first_rows == 9).all()


def test_unfavorable_means_that_half_of_the_agents_lean_each_way():
    policies = behavior_policies(coordination_task("unfavorable", 4))
    np.testing.assert_allclose(policies[:, 1], [0.25, 0.25, 0.75, 0.75])
    policies = behavior_policies(coordination_task("unfavorable", 2, 3))
    np.testing.assert_allclose(policies, [[0.75, 0.125, 0.125], [0.125, 0.125, 0.75]])
    policies = behavior_policies(coordination_task("neutral", 2, 3))
    np.testing.assert_allclose(policies, np.full((2, 3), 1 / 3))


@pytest.mark.parametrize("kind, best", [("continuous", 1.0), ("peaks", 0.5)])
def test_numbers_earn_most_where_agents_agree(kind, best):
    game = CoordinationGame(continuous_task(kind, "neutral", 4), 5)
    joint = best * np.array(
        [[1, 1, 1, 1], [-1, -1, -1, -1], [1, 1, 1, -1], [0, 0, 0, 0], [2, 1, 1, 1]]
    )
    states, rewards, _ = game.step(joint[..., None])
    np.testing.assert_array_equal(states, joint.clip(-1, 1))
    if kind == "continuous":  # the product, of numbers clipped to [-1, 1]
        assert rewards.tolist() == [1, 1, -1, 0, 1]
    else:  # squares from the nearer peak, over 2 · 0.25²
        np.testing.assert_allclose(rewards, np.exp([0, 0, -8, -8, -2]))


@pytest.mark.parametrize("behavior, mean", [("favorable", 1), ("neutral", 0), ("unfavorable", -1)])
def test_following_the_data_of_numbers_earns_what_its_name_says(behavior, mean):
    for agents in (2, 3):  # E[a_i] is a quarter, to one side or the other
        rewards = make_columns(continuous_task("continuous", behavior, agents))["rewards"]
        assert rewards.mean() == pytest.approx(mean * 0.25**agents, abs=5e-3)
    peaks = make_columns(continuous_task("peaks", behavior))
    assert (peaks["rewards"] > 0).all() and peaks["rewards"].max() > 0.99
    right = {"favorable": (0.75, 0.75), "neutral": (0.5, 0.5), "unfavorable": (0.25, 0.75)}
    np.testing.assert_allclose((peaks["actions"] > 0).mean(0), right[behavior], atol=0.01)


@pytest.mark.parametrize("coverage", coordination_game.COVERAGES)
def test_the_climbing_games_data_show_its_best_joint_action_as_often_as_said(coverage):
    task = climbing_task(coverage)
    rewards = make_columns(task)["rewards"]
    best = (rewards == 1).mean()
    assert best == pytest.approx(coverage / 100, rel=0.3)
    assert (rewards < -2).mean() == pytest.approx((1 - best) / 4, abs=0.01)  # one climbs alone
    payoffs = CoordinationGame(task, 9)
    joint = np.eye(3)[list(itertools.product(range(3), repeat=2))]
    expected = np.array([11, -30, 0, -30, 7, 6, 0, 0, 5]) / 11
    np.testing.assert_allclose(payoffs.step(joint)[1], expected)


def test_bad_games_of_numbers_are_refused():
    for game in (("hills", "neutral"), ("peaks", "easy"), ("peaks", "neutral", 1)):
        with pytest.raises(InputError, match="no game|two or more"):
            continuous_task(*game)
    with pytest.raises(InputError, match="from 0 to 100"):
        climbing_task(101)


@pytest.mark.parametrize("game", [("easy", 2, 2), ("neutral", 1, 2), ("neutral", 2, 1)])
def test_bad_games_are_refused(game):
    with pytest.raises(InputError, match="no game 'easy'|two or more"):
        coordination_task(*game)


def test_a_game_is_known_by_its_dataset():
    names = (
        "mine.hdf5",
        "coordination-easy",
        "coordination-neutral-x",
        "peaks-neutral-4x",
        "climbing-x",
    )
    for name in names:
        task = dataclasses.replace(GAME, dataset=name, columns=None)
        with pytest.raises(InputError, match=f"'{name}' names no game; keep the game's dataset"):
            coordination_game.game_of(task)


def test_a_game_too_large_to_print_is_refused():
    with pytest.raises(InputError, match="at most 1000"):
        coordination_game.describe(coordination_game.Args(agents=501))


def test_a_team_that_agrees_scores_one_and_one_that_does_not_zero():
    task = find_task("coordination-neutral")

    def right(observations, histories):
        return torch.tensor([0.0, 1.0]).expand(len(observations), 2, 2)

    def opposite(observations, histories):
        return torch.eye(2).expand(len(observations), 2, 2)

    for act, score in ((right, 1), (opposite, 0)):
        evaluation = evaluate(task, act, 7)
        assert task.normalized_score(evaluation.returns).tolist() == [score] * 7


def test_the_game_steps_tensors_from_any_state():
    states, actions = torch.randn(3, 4), torch.eye(2).repeat(3, 1, 1)
    got, rewards, terminals = CoordinationGame(GAME, 3).step_from(states, actions)
    assert (
        torch.equal(got, actions.flatten(1)) and rewards.tolist() == terminals.tolist() == [0] * 3
    )


def test_the_script_prints_table_1(run_script):
    status, output = run_script("coordination_game.py")
    assert status == 0 and "0.623" in output and "unfavorable" in output
    status, output = run_script("coordination_game.py", "--agents", 4, "--actions", 3)
    assert status == 0 and "0.623" not in output
    status, _ = run_script("coordination_game.py", "--agents", 1)
    assert status.startswith("error: ") and "\n" not in status


def test_a_stopped_world_model_is_resumed_by_the_same_command(monkeypatch, tmp_path):
    """But not by one with another seed."""
    run_dir, commands = tmp_path / "world_model", []

    def trained_or_stopped(command):
        commands.append(command[2:])
        if len(commands) > 1:
            (run_dir / "world_model.pt").touch()
            return subprocess.CompletedProcess(command, 0)
        run_dir.mkdir()
        save({name: {"seed": 1} for name in CHECKPOINT}, run_dir / "checkpoint.pt")
        raise KeyboardInterrupt

    monkeypatch.setattr(coordination_game.subprocess, "run", trained_or_stopped)
    task = coordination_task("neutral")
    with pytest.raises(KeyboardInterrupt):
        train_world_model(task, 1, "cpu", run_dir)
    with pytest.raises(InputError, match="has seed 1, not 2; give another --run-dir"):
        train_world_model(task, 2, "cpu", run_dir)
    assert train_world_model(task, 1, "cpu", run_dir) == run_dir / "world_model.pt"
    assert commands[0][:4] == ["--task", "coordination-neutral", "--seed", "1"]
    assert commands[1:] == [["--resume", run_dir, "--device", "cpu"]]


def test_a_games_world_model_learns_the_given_data(monkeypatch, tmp_path):
    commands = []

    def trained(command):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(coordination_game.subprocess, "run", trained)
    train_world_model(coordination_task("neutral"), 1, "cpu", tmp_path, Path("my.hdf5"))
    assert commands[0][commands[0].index("--dataset") + 1] == Path("my.hdf5")
