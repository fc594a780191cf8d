"""The coordination game, its datasets, and the learning test: the real script solves it where behavioural cloning cannot."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import coordination_game
from coordination_game import CoordinationGame, behavior_policies, coordination_task, make_columns
from data.offline_dataset import load_dataset
from mamujoco_envs import TASKS, InputError, evaluate, make_simulator
from moma_ppo import Args, Categorical, Team

ROOT = Path(__file__).parents[1]


def one_hot(choices, actions=2):
    return np.eye(actions)[np.asarray(choices)]


@pytest.mark.parametrize("agents, actions", [(2, 2), (3, 2), (2, 3)])
def test_all_agents_must_choose_alike(agents, actions):
    task = coordination_task("neutral", agents, actions)
    joint = list(itertools.product(range(actions), repeat=agents))
    game = CoordinationGame(task, len(joint))
    assert (game.reset([np.random.default_rng(0)] * len(joint)) == 0).all()
    states, rewards, terminals = game.step(one_hot(joint, actions))
    assert rewards.tolist() == [float(len(set(choices)) == 1) for choices in joint]
    assert (states == one_hot(joint, actions).reshape(len(joint), -1)).all() and not terminals.any()


@pytest.mark.parametrize("behavior, paper", coordination_game.PAPER_SCORES.items())
def test_datasets_are_those_of_table_1(behavior, paper):
    task = TASKS[f"coordination-{behavior}"]
    columns = make_columns(task)
    size = len(columns["rewards"])
    assert size == 50_000 and columns["rewards"].mean() == pytest.approx(paper, abs=0.01)
    actions = columns["actions"].reshape(size, 2, 2)
    probabilities = {"favorable": (0.75, 0.75), "neutral": (0.5, 0.5), "unfavorable": (0.25, 0.75)}[
        behavior
    ]
    np.testing.assert_allclose(actions[:, :, 1].mean(0), probabilities, atol=0.01)
    assert (
        abs(np.corrcoef(actions[:, 0, 1], actions[:, 1, 1])[0, 1]) < 0.02
    )  # agents choose for themselves
    for key, column in make_columns(task).items():
        assert np.array_equal(column, columns[key])
    assert not np.array_equal(make_columns(task, seed=1)["actions"], columns["actions"])


def test_the_dataset_is_a_recording_of_the_game():
    task = coordination_task("unfavorable", 3)
    columns = make_columns(task)
    game = CoordinationGame(task, 5000)
    states = game.reset([np.random.default_rng(0)] * 5000)
    for t in range(10):
        rows = slice(t, None, 10)
        assert np.array_equal(columns["observations"][rows], states)
        states, rewards, _ = game.step(columns["actions"][rows].reshape(5000, 3, 2))
        assert np.array_equal(columns["next_observations"][rows], states) and np.array_equal(
            columns["rewards"][rows], rewards
        )
        assert (columns["timeouts"][rows] == (t == 9)).all()


def test_unfavorable_means_half_of_the_agents_lean_each_way():
    np.testing.assert_allclose(
        behavior_policies(coordination_task("unfavorable", 4))[:, 1], [0.25, 0.25, 0.75, 0.75]
    )
    np.testing.assert_allclose(
        behavior_policies(coordination_task("neutral", 2, 3)), np.full((2, 3), 1 / 3)
    )


def test_bad_games_are_refused():
    for behavior, agents in (("easy", 2), ("neutral", 1)):
        with pytest.raises(InputError, match="two or more"):
            coordination_task(behavior, agents)


def test_a_team_that_agrees_scores_one_and_one_that_does_not_zero():
    task = TASKS["coordination-neutral"]
    right = lambda observations, _: torch.tensor([0.0, 1.0]).expand(len(observations), 2, 2)
    opposite = lambda observations, _: torch.eye(2).expand(len(observations), 2, 2)
    assert task.normalized_score(evaluate(task, right, 7).returns).tolist() == [1] * 7
    assert task.normalized_score(evaluate(task, opposite, 7).returns).tolist() == [0] * 7
    assert isinstance(make_simulator(task, 1), CoordinationGame)


def test_categorical_policies():
    logits = torch.randn(4, 3, 5, dtype=torch.float64)
    distribution, literal = Categorical(logits), torch.distributions.Categorical(logits=logits)
    torch.manual_seed(0)
    samples = torch.stack([distribution.sample() for _ in range(4000)])
    assert ((samples == 0) | (samples == 1)).all() and (samples.sum(-1) == 1).all()
    torch.testing.assert_close(samples.mean(0), literal.probs, rtol=0, atol=0.04)
    torch.testing.assert_close(
        distribution.log_prob(samples[0]), literal.log_prob(samples[0].argmax(-1)).sum(1)
    )
    assert (
        torch.equal(distribution.greedy().argmax(-1), logits.argmax(-1))
        and (distribution.excess() == 0).all()
    )


def test_agents_have_no_memory_and_start_undecided():
    task = TASKS["coordination-neutral"]
    dataset = load_dataset(task)
    assert set(dataset.actions.unique().tolist()) == {0, 1}  # one-hot to the bit
    team = Team(task, dataset.states)
    indices = torch.arange(100)
    observations, histories = task.observe(dataset.states[indices]), dataset.histories(indices)
    probabilities = team.distribution(team.inputs(observations, histories)).logits.softmax(-1)
    assert (probabilities - 0.5).abs().max() < 0.1
    assert torch.equal(
        team.act_greedily(observations, histories),
        team.act_greedily(observations, torch.randn_like(histories)),
    )


def test_moma_ppo_agrees_where_the_data_leads_apart(tmp_path):
    """The learning test: on the unfavorable dataset, most joint actions of the data fail."""
    command = [
        sys.executable,
        "moma_ppo.py",
        "--task",
        "coordination-unfavorable",
        "--run-dir",
        tmp_path / "run",
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (
        result["score"] == 1
        and result["args"]["rollout_length"] == 1
        and len(result["returns"]) == 100
    )
    assert Args().total_steps is None and result["args"]["total_steps"] == 10


def test_the_script_prints_table_1():
    finished = subprocess.run(
        [sys.executable, "coordination_game.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        finished.returncode == 0 and "0.623" in finished.stdout and "unfavorable" in finished.stdout
    )
