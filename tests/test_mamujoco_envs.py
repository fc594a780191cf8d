"""Tasks and simulators against gymnasium, PettingZoo's rules, and loops that are easy to check."""

from dataclasses import replace
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from made_up import ANT, REACHER
from matplotlib.axes import Axes

import mamujoco_envs
from mamujoco_envs import (
    ACTION_LIMIT,
    HISTORY_LENGTH,
    InputError,
    ParallelEnv,
    Simulator,
    all_tasks,
    evaluate,
    find_task,
    parallel_env,
    plot_ant_paths,
    plot_team_strategy,
    retargeting_error,
)

OTHER_LEGS = find_task("ant-medium-po-other-legs")
# In Reacher agent i drives actuator i, so confusing agents and actuators would not show. Here it
# does.
CROSSED = replace(REACHER, name="reacher-crossed", driven=((1,), (0,)))
# The effect of y -> -y on each state dimension. Actions change their sign, too.
REFLECTION = np.array([1, 1, -1, -1, 1, -1, -1, -1, 1, -1, 1])

VIEWS = [find_task(f"reacher-{view}") for view in ("all-observant", "independent", "leader-only")]
VIEWS += [find_task("ant-medium-fo"), ANT]


def each(*tasks):
    return pytest.mark.parametrize("task", tasks, ids=lambda task: task.name)


def joint_action(task, actions):
    """Agents' actions [agent, action] -> the environment's action, agent by agent."""
    joint = np.zeros(sum(len(driven) for driven in task.driven))
    for driven, action in zip(task.driven, actions):
        joint[list(driven)] = action
    return joint


def started(task, number):
    simulator = Simulator(task, number)
    simulator.reset([np.random.default_rng(seed) for seed in range(number)])
    return simulator


def random_states(task, number, steps=10):
    """States of `number` episodes after a few random steps: like rows of a dataset."""
    rng, simulator = np.random.default_rng(0), started(task, number)
    for _ in range(steps):
        simulator.step(rng.uniform(-1, 1, (number, task.num_agents, task.action_dim)))
    return simulator.states


# Simulators.


@each(REACHER, CROSSED, ANT, OTHER_LEGS)
def test_simulator_equals_gymnasium_to_the_bit(task):
    seeds, rng, fallen = [0, 1, 10102], np.random.default_rng(0), False
    # The checker would warn about ants that continue after a fall.
    make = {"id": task.environment, "disable_env_checker": True}
    environments = [gymnasium.make(**make) for _ in seeds]
    generators = [np.random.default_rng(seed) for seed in seeds]
    simulator = Simulator(task, len(seeds))
    # The second episode shows that generators move on as gymnasium's own do.
    for episode in range(2):
        options = [{"seed": seed} if episode == 0 else {} for seed in seeds]
        expected = [env.reset(**o)[0] for env, o in zip(environments, options)]
        np.testing.assert_array_equal(simulator.reset(generators), expected)
        for _ in range(min(task.episode_length, 150)):
            actions = rng.uniform(-1.5, 1.5, (len(seeds), task.num_agents, task.action_dim))
            states, rewards, terminals = simulator.step(actions)
            for i, env in enumerate(environments):
                joint = joint_action(task, np.clip(actions[i], -1, 1))
                state, reward, terminal, truncated, _ = env.step(joint)
                np.testing.assert_array_equal(states[i], state)
                np.testing.assert_allclose(rewards[i], reward, rtol=0, atol=1e-12)
                assert terminals[i] == terminal
                fallen |= terminal
            if truncated:
                break
    assert fallen == (task.environment == "Ant-v4")  # otherwise it would not show


@each(REACHER, ANT)
def test_episodes_are_as_long_as_gymnasiums(task):
    assert task.episode_length == gymnasium.spec(task.environment).max_episode_steps


def test_reacher_continues_from_any_state_of_an_episode():
    env, rng = gymnasium.make("Reacher-v4"), np.random.default_rng(0)
    state, _ = env.reset(seed=0)
    simulator = Simulator(REACHER, 1)
    for _ in range(REACHER.episode_length):
        np.testing.assert_array_equal(simulator.set_states(state[None]), state[None])
        action = rng.uniform(-1, 1, (2, 1))
        states, rewards, _ = simulator.step(action[None])
        state, reward, *_ = env.step(joint_action(REACHER, action))
        np.testing.assert_allclose(states[0, :8], state[:8], rtol=0, atol=1e-10)
        # The reward is that of the given state, whose fingertip is some millimetres away from the
        # restored arm's.
        np.testing.assert_allclose(rewards[0], reward, rtol=0, atol=1e-12)


def test_ant_continues_from_any_state():
    env, rng = gymnasium.make("Ant-v4").unwrapped, np.random.default_rng(0)
    state, _ = env.reset(seed=0)
    simulator = Simulator(ANT, 1)
    for _ in range(40):
        np.testing.assert_array_equal(simulator.set_states(state[None]), state[None])
        # The solver's last solution is not part of a state.
        simulator.data[0].qacc_warmstart[:] = env.data.qacc_warmstart
        action = rng.uniform(-1, 1, (4, 2))
        states, rewards, terminals = simulator.step(action[None])
        state, reward, terminal, *_ = env.step(joint_action(ANT, action))
        np.testing.assert_allclose(states[0], state, rtol=0, atol=1e-6)
        assert terminals[0] == terminal
        # Gymnasium's torso position before the step is a substep late.
        np.testing.assert_allclose(rewards[0], reward, rtol=0, atol=0.05)


def test_set_states_accepts_float32_rows_and_keeps_their_reward():
    row = random_states(REACHER, 1).astype(np.float32)
    simulator, env = Simulator(REACHER, 1), gymnasium.make("Reacher-v4").unwrapped
    simulator.set_states(row)
    states, rewards, _ = simulator.step(np.full((1, 2, 1), 0.5))
    cos1, cos2, sin1, sin2, x, y, omega1, omega2, *offset = row[0].astype(float)
    env.reset(seed=0)
    qpos = np.array([np.arctan2(sin1, cos1), np.arctan2(sin2, cos2), x, y])
    env.set_state(qpos, np.array([omega1, omega2, 0, 0]))
    expected = env.step(np.array([0.5, 0.5]))[0]
    np.testing.assert_allclose(states[0, :8], expected[:8], rtol=0, atol=1e-10)
    expected_reward = -np.linalg.norm(offset) - 2 * 0.5**2
    np.testing.assert_allclose(rewards[0], expected_reward, rtol=0, atol=1e-6)


def test_set_states_leaves_the_other_copies_alone():
    actions, rows = np.full((3, 2, 1), 0.3), random_states(REACHER, 3)
    chosen = np.array([False, True, False])
    simulators = mixed, untouched, replaced = [started(REACHER, 3) for _ in range(3)]
    for simulator in simulators:
        simulator.step(actions)
    before = mixed.states
    replaced.set_states(rows)
    states = mixed.set_states(rows, where=chosen)
    np.testing.assert_array_equal(states, np.where(chosen[:, None], rows, untouched.states))
    np.testing.assert_array_equal(before, untouched.states)  # the caller may still hold it
    for _ in range(3):
        for got, kept, new in zip(*[simulator.step(actions) for simulator in simulators]):
            np.testing.assert_array_equal(got[~chosen], kept[~chosen])
            np.testing.assert_array_equal(got[chosen], new[chosen])


def test_set_states_forgets_what_the_copy_did_before():
    def at_the_elbow_limit(shoulder):
        simulator = started(REACHER, 4)
        for _ in range(40):
            simulator.step(np.tile([[[shoulder], [1.0]]], (4, 1, 1)))
        return simulator

    # The solver starts from its last solution, which matters where a joint limit pushes back.
    used, fresh = at_the_elbow_limit(-1.0), Simulator(REACHER, 4)
    rows = at_the_elbow_limit(0.5).states
    for simulator in (used, fresh):
        simulator.set_states(rows)
    for _ in range(3):
        steps = [simulator.step(np.ones((4, 2, 1))) for simulator in (used, fresh)]
        for got, expected in zip(*steps):
            np.testing.assert_array_equal(got, expected)


def test_copies_that_are_left_out_do_not_move():
    actions, where = np.full((3, 4, 2), 0.3), np.array([True, False, True])
    some, whole = started(ANT, 3), started(ANT, 3)
    before = some.states
    for _ in range(3):
        states, rewards, _ = some.step(actions, where)
        all_states, all_rewards, _ = whole.step(actions)
        np.testing.assert_array_equal(states[where], all_states[where])
        np.testing.assert_array_equal(rewards[where], all_rewards[where])
        np.testing.assert_array_equal(states[1], before[1])


@each(REACHER, ANT)
def test_step_from_does_not_disturb_a_rollout_that_continues(task):
    """Restored at each step, an ant would lose the solver's warm start."""
    shape = (20, 5, task.num_agents, task.action_dim)
    actions = 3 * torch.rand(shape) - 1.5
    rolled, reference = Simulator(task, 5), Simulator(task, 5)
    states = torch.as_tensor(started(task, 5).states, dtype=torch.float32)
    reference.set_states(states.numpy())
    for t in range(20):
        if t == 10:  # the third one starts anew
            states[2] = torch.as_tensor(started(task, 1).states[0])
            reference.set_states(states.numpy(), where=np.arange(5) == 2)
        got = rolled.step_from(states, actions[t])
        for one, other in zip(got, reference.step(actions[t].numpy())):
            torch.testing.assert_close(one, torch.as_tensor(other).float(), rtol=0, atol=0)
        states = got[0]


@each(*VIEWS)
def test_agents_observe_the_joints_that_they_drive(task):
    simulator = Simulator(task, 1)
    model, data = simulator.environment.model, simulator.data[0]

    def state(qpos, qvel):
        return simulator.environment.state(qpos[None], qvel[None], data.xpos[None])[0]

    for agent in range(task.num_agents):
        simulator.reset([np.random.default_rng(0)])
        actions = np.zeros((1, task.num_agents, task.action_dim))
        actions[0, agent] = 1
        simulator.step(actions)
        moved = np.flatnonzero(data.qfrc_actuator)
        assert len(moved) == task.action_dim
        for joint in model.dof_jntid[moved]:
            qpos, qvel = data.qpos.copy(), data.qvel.copy()
            qpos[model.jnt_qposadr[joint]] += 0.1
            qvel[model.jnt_dofadr[joint]] += 0.1
            shown = np.flatnonzero(state(qpos, qvel) != state(data.qpos, data.qvel))
            assert len(shown) and set(shown) <= set(task.observed[agent]), model.joint(joint).name


def test_with_other_legs_agents_drive_what_their_neighbours_observe():
    """The paper's release, for comparison."""
    assert OTHER_LEGS.observed == ANT.observed
    assert OTHER_LEGS.driven == (ANT.driven[-1], *ANT.driven[:-1])


def test_reflected_arms_move_as_reflections():
    """So a team's mirror image is as good as the team, and only convention tells them apart."""
    rows, rng = random_states(REACHER, 8), np.random.default_rng(1)
    arms, mirrored = Simulator(REACHER, 8), Simulator(REACHER, 8)
    arms.set_states(rows)
    mirrored.set_states(rows * REFLECTION)
    for _ in range(REACHER.episode_length):
        actions = rng.uniform(-1, 1, (8, 2, 1))
        states, rewards, _ = arms.step(actions)
        mirrored_states, mirrored_rewards, _ = mirrored.step(-actions)
        np.testing.assert_allclose(mirrored_states, states * REFLECTION, rtol=0, atol=1e-12)
        np.testing.assert_allclose(mirrored_rewards, rewards, rtol=0, atol=1e-12)


# Tasks.


@each(*VIEWS)
def test_observe_against_a_loop(task):
    states = torch.randn(3, 4, task.state_dim)
    observations = task.observe(states)
    width = max(len(observed) for observed in task.observed)
    assert observations.shape == (3, 4, task.num_agents, width)
    for agent, observed in enumerate(task.observed):
        for k in range(width):
            expected = states[..., observed[k]] if k < len(observed) else torch.zeros(3, 4)
            assert torch.equal(observations[:, :, agent, k], expected)


@each(*VIEWS, CROSSED, OTHER_LEGS)
def test_split_and_join_actions(task):
    joint = torch.randn(3, 5, task.num_agents * task.action_dim)
    split = task.split_actions(joint)
    assert split.shape == (3, 5, task.num_agents, task.action_dim)
    for agent, driven in enumerate(task.driven):
        for k, actuator in enumerate(driven):
            assert torch.equal(split[..., agent, k], joint[..., actuator])
    assert torch.equal(task.join_actions(split), joint)


def test_normalized_scores_are_table_2s():
    for name, task in all_tasks().items():
        bounds = {"reacher": (-11.144625, -4.2370844), "ant": (-325.6, 3879.7)}
        bounds |= {"halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3)}
        bounds |= {"walker2d": (1.629008, 4592.3)}
        bounds = np.array(bounds.get(name.split("-")[0], (0.0, 10.0)))
        np.testing.assert_allclose(task.normalized_score(bounds), [0, 1], atol=1e-12)
        assert task.normalized_score(float(bounds[1])) == pytest.approx(1)


def test_paper_scores_are_of_known_tasks():
    for algorithm, scores in mamujoco_envs.PAPER_SCORES.items():
        for name in scores:
            assert find_task(name).paper_score(algorithm) == scores[name]
    assert ANT.paper_score("iql") is None and ANT.paper_score("no algorithm") is None


@pytest.mark.parametrize("find", [find_task, parallel_env])
def test_unknown_task_names_the_nearest(find):
    with pytest.raises(InputError, match="reacher-leader-onyl.*reacher-leader-only"):
        find("reacher-leader-onyl")
    with pytest.raises(InputError, match="unknown task ''"):
        find("")


def test_games_are_played_through_the_parallel_api():
    for name, actions, score in (
        ("coordination-neutral", (1, 1), 1),
        ("peaks-neutral", (0.5, 0.5), 1),
    ):
        env = parallel_env(name)
        observations, _ = env.reset(seed=1)
        assert not any(seen.any() for seen in observations.values())
        for agent in env.agents:
            assert env.action_space(agent).contains(env.action_space(agent).sample())
        chosen = [a if env.task.discrete else np.float32([a]) for a in actions]
        total = 0
        while env.agents:
            observations, rewards, *_ = env.step(dict(zip(env.agents, chosen)))
            total += rewards["agent_0"]
        assert total == pytest.approx(10 * score)
        joint = [0, 1, 0, 1] if env.task.discrete else list(actions)
        np.testing.assert_allclose(env.state(), joint)
    with pytest.raises(InputError, match="no pictures"):
        parallel_env("coordination-neutral", render_mode="rgb_array")


# Evaluation.


def made_up_team(seen):
    """Actions that depend on all that agents see, often at the limits; keeps the histories."""

    def act(observations, histories):
        seen.append(histories.clone())
        ages = torch.arange(1.0, HISTORY_LENGTH + 1)[:, None]
        past = (histories * ages).sum((-1, -2))[..., None]
        return (2 * torch.sin(past + observations.sum(-1, keepdim=True))).clamp(-1, 1)

    return act


def evaluate_by_hand(task, act, episodes, seed, dies):
    """One episode after the other, with histories as lists of pairs."""
    env, results = parallel_env(task.name), []
    width = max(task.obs_dims)
    for episode in range(episodes):
        observations, _ = env.reset(seed=seed + episode)
        first_state, total, length = env.state(), 0.0, 0
        pasts = [[] for _ in env.possible_agents]
        for _ in range(task.episode_length):
            seen = [observations[agent] for agent in env.possible_agents]
            padded = [np.pad(x, (0, width - len(x))) for x in seen]
            histories = np.zeros(task.history_shape)
            for agent, past in enumerate(pasts):
                for age, pair in enumerate(reversed(past[-HISTORY_LENGTH:])):
                    histories[agent, HISTORY_LENGTH - 1 - age] = pair
            inputs = [torch.tensor(np.array(x)[None]).float() for x in (padded, histories)]
            actions = act(*inputs)[0].numpy()
            for past, observation, action in zip(pasts, padded, actions):
                clipped = np.clip(action, -(1 - 1e-5), 1 - 1e-5)
                past.append(np.concatenate([clipped, observation]))
            observations, rewards, *_ = env.step(dict(zip(env.possible_agents, actions)))
            total, length = total + rewards["agent_0"], length + 1
            if dies(env.state()):
                break
        results.append((total, length, first_state, env.state()))
    return [np.array(column) for column in zip(*results)]


def never(states):
    return np.zeros(states.shape[:-1], dtype=bool)


def elbow_is_fast(states):
    return states[..., 7] > 12


@pytest.mark.parametrize("dies", [never, elbow_is_fast])
def test_evaluate_equals_episodes_by_hand(dies, monkeypatch):
    class MortalReacher(mamujoco_envs.Reacher):
        def terminal(self, after):
            return dies(after.states)

    monkeypatch.setitem(mamujoco_envs.ENVIRONMENTS, "Reacher-v4", MortalReacher)
    seen, seen_by_hand = [], []
    evaluation = evaluate(REACHER, made_up_team(seen), episodes=6, seed=7)
    expected = evaluate_by_hand(REACHER, made_up_team(seen_by_hand), 6, 7, dies)
    for got, wanted in zip(evaluation[1:], expected):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    lengths = expected[1]
    # Otherwise the test would show nothing.
    assert (lengths == 50).all() if dies is never else len(set(lengths)) > 1
    # An episode that has ended stays in the batch, so compare what was seen while it ran.
    by_hand = torch.cat(seen_by_hand).split(lengths.tolist())
    for episode, histories in enumerate(by_hand):
        got = torch.stack(seen)[: len(histories), episode]
        torch.testing.assert_close(got, histories, rtol=0, atol=2e-6)
    assert any((histories[..., 0].abs() == ACTION_LIMIT).any() for histories in by_hand)


def test_transitions_of_an_evaluation_are_those_of_the_simulator():
    evaluation = evaluate(REACHER, made_up_team([]), episodes=3)
    states, actions, rewards, next_states, terminals = evaluation.transitions.values()
    assert len(rewards) == evaluation.lengths.sum() and not terminals.any()
    np.testing.assert_allclose(rewards.sum(), evaluation.returns.sum(), rtol=1e-5)
    np.testing.assert_allclose(states[:3], evaluation.first_states, atol=1e-6)
    np.testing.assert_allclose(next_states[-3:], evaluation.last_states, atol=1e-5)
    np.testing.assert_array_equal(next_states[:-3], states[3:])  # copies take turns
    simulator = mamujoco_envs.Simulator(REACHER, len(states))
    simulator.set_states(states)
    np.testing.assert_allclose(simulator.step(actions)[0], next_states, atol=0.01)


def test_a_record_keeps_scores_and_raw_returns():
    returns = np.array([-4.2370844, -11.144625, -4.2370844])
    lengths = np.array([50, 50, 50])
    record = mamujoco_envs.Evaluation(REACHER, returns, lengths, None, None, {}).record()
    assert record["score"] == pytest.approx(2 / 3)
    assert record["score_stderr"] == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)
    assert record["returns"] == returns.tolist() and record["lengths"] == lengths.tolist()
    one = mamujoco_envs.Evaluation(REACHER, returns[:1], lengths[:1], None, None, {}).record()
    assert one["score_stderr"] is None


def test_plot_team_strategy_writes_a_png(tmp_path):
    evaluation = evaluate(REACHER, lambda observations, _: torch.zeros(4, 2, 1), episodes=4)
    plot_team_strategy(evaluation, tmp_path / "strategy.png")
    assert (tmp_path / "strategy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_ant_paths_writes_a_png(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def act(observations, _):
        return 2 * torch.rand(len(observations), 4, 2, generator=generator) - 1

    evaluation = evaluate(replace(ANT, episode_length=20), act, episodes=3)
    evaluation.transitions["ends"][-1] = 1  # a fall in the last step
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title: titles.append(title))
    plot_ant_paths(evaluation, tmp_path / "strategy.png")
    assert titles[0] == "33% of episodes end in a fall"
    assert (tmp_path / "strategy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_ants_world_is_indifferent_to_its_heading():
    states = torch.as_tensor(random_states(ANT, 20, steps=30))
    rng, symmetry = np.random.default_rng(1), ANT.symmetry
    angles = torch.as_tensor(rng.uniform(-6, 6, 20))
    actions = rng.uniform(-1, 1, (20, 4, 2))

    def step(states):
        simulator = Simulator(ANT, len(states))
        simulator.set_states(states.numpy())
        next_states, rewards, terminals = simulator.step(actions)
        return torch.as_tensor(next_states), torch.as_tensor(rewards), terminals

    next_states, rewards, terminals = step(states)
    turned, next_turned, turned_rewards = symmetry.turn_transition(
        angles, states, next_states, rewards
    )
    expected, expected_rewards, expected_terminals = step(turned)
    torch.testing.assert_close(next_turned, expected, rtol=0, atol=1e-4)
    assert (terminals == expected_terminals).all()
    # The mean speed is nearly the distance over the time.
    error = (turned_rewards - expected_rewards).abs().mean()
    assert error < 0.2 * (rewards - expected_rewards).abs().mean()

    upright = symmetry.turn(states, -symmetry.heading(states))
    torch.testing.assert_close(upright[:, 4], torch.zeros_like(upright[:, 4]))
    assert (upright[:, 1] > 0).all()
    torch.testing.assert_close(symmetry.turn(upright, symmetry.heading(states)), states)


@pytest.mark.parametrize("number", range(8))
def test_the_ants_world_is_indifferent_to_how_its_legs_are_numbered(number):
    """Moved by a symmetry of its body, an ant does what it did before, moved in the same way."""
    states = torch.as_tensor(random_states(ANT, 20, steps=30))
    states = ANT.symmetry.turn(states, -ANT.symmetry.heading(states))
    actions = torch.as_tensor(np.random.default_rng(1).uniform(-1, 1, (20, 4, 2)))
    state_matrix, action_matrix = (m.double() for m in ANT.symmetry.body_symmetries[number])
    moved_actions = ANT.split_actions(ANT.join_actions(actions) @ action_matrix.T)
    moved_states = states @ state_matrix.T
    assert torch.equal(moved_states, states) == (number == 0)  # the identity comes first
    torch.testing.assert_close(ANT.symmetry.heading(moved_states), torch.zeros(20).double())

    def step(states, actions):
        simulator = Simulator(ANT, len(states))
        simulator.set_states(states.numpy())
        next_states, rewards, terminals = simulator.step(actions.numpy())
        return torch.as_tensor(next_states), torch.as_tensor(rewards), terminals

    next_states, rewards, terminals = step(states, actions)
    expected, expected_rewards, expected_terminals = step(moved_states, moved_actions)
    torch.testing.assert_close(next_states @ state_matrix.T, expected, rtol=0, atol=1e-10)
    assert (terminals == expected_terminals).all()
    _, _, moved_rewards = ANT.symmetry.move_transition(
        lambda states: states @ state_matrix.T, states, next_states, rewards
    )
    # The mean speed is nearly the distance over the time.
    error, difference = (moved_rewards - expected_rewards).abs(), (rewards - expected_rewards).abs()
    assert error.mean() <= 0.2 * difference.mean() + 1e-6


def test_the_ants_body_has_eight_different_symmetries():
    matrices = [state_matrix for state_matrix, _ in ANT.symmetry.body_symmetries]
    products = [a @ b for a in matrices for b in matrices]
    assert len({tuple(matrix.flatten().tolist()) for matrix in matrices}) == 8
    assert all(any(torch.equal(product, matrix) for matrix in matrices) for product in products)


def test_a_tasks_body_symmetries_must_fit_it():
    identity, quarter_turn = ANT.symmetry.body_symmetries[:2]
    state, action = quarter_turn

    def task(*symmetries):
        return replace(ANT, symmetry=ANT.symmetry._replace(body_symmetries=symmetries))

    task(), task(identity), task(identity, quarter_turn)
    for pair in ((state[1:, 1:], action), (action, state), (2 * state, action), (state,)):
        with pytest.raises(InputError, match=r"permutations, \[27, 27\] and \[8, 8\], of state"):
            task(identity, pair)
    with pytest.raises(InputError, match="first of body_symmetries of .* must be two identity"):
        task(quarter_turn, identity)


def test_retargeting_error_is_that_of_arms_with_another_rows_target():
    states = torch.as_tensor(random_states(REACHER, 20)).float()

    def predict(retargeted, joint_actions):
        fingertips = [x[:, 4:6] + x[:, 8:10] for x in (retargeted, states)]
        torch.testing.assert_close(*fingertips)  # arms stay where they are
        assert (retargeted[:, 4:6] != states[:, 4:6]).all() and not joint_actions.any()
        rewards = -retargeted[:, 8:10].norm(dim=1)
        return SimpleNamespace(rewards=torch.stack([rewards - 0.5, rewards + 0.1]))

    assert retargeting_error(predict, states)["retargeting_error"] == pytest.approx(0.2)


# PettingZoo's Parallel API.


def sampled_actions(env):
    return {agent: env.action_space(agent).sample() for agent in env.agents}


@each(*VIEWS)
def test_parallel_env_keeps_pettingzoos_rules(task):
    env = parallel_env(task.name)
    everyone = [f"agent_{i}" for i in range(task.num_agents)]
    assert env.possible_agents == everyone and env.max_num_agents == task.num_agents
    assert env.metadata["name"] == task.name and env.unwrapped is env
    for agent, observed in zip(everyone, task.observed):
        # The same object on each call, or seeding a space would have no effect.
        assert env.observation_space(agent) is env.observation_space(agent)
        assert env.action_space(agent) is env.action_space(agent)
        assert env.observation_space(agent).shape == (len(observed),)
        assert env.action_space(agent).shape == (task.action_dim,)
    for _ in range(2):  # a second episode starts like the first
        observations, infos = env.reset()
        assert env.agents == everyone and env.num_agents == len(everyone)
        assert set(observations) == set(infos) == set(everyone)
        for step in range(1, task.episode_length + 1):
            assert env.agents == everyone
            results = env.step(sampled_actions(env))
            observations, rewards, terminations, truncations, infos = results
            assert all(set(result) == set(everyone) for result in results)
            assert len(set(rewards.values())) == 1
            if any(terminations.values()):  # of all agents at once
                assert task.environment == "Ant-v4" and all(terminations.values())
                break
            assert set(truncations.values()) == {step == task.episode_length}
            assert all(isinstance(reward, float) for reward in rewards.values())
            flags = [*terminations.values(), *truncations.values()]
            assert all(isinstance(flag, bool) for flag in flags)
            assert env.state_space.contains(env.state())
            for agent, observed in zip(everyone, task.observed):
                assert env.observation_space(agent).contains(observations[agent])
                np.testing.assert_array_equal(observations[agent], env.state()[list(observed)])
        assert env.agents == [] and env.num_agents == 0
        assert env.step({}) == ({}, {}, {}, {}, {})


def test_parallel_env_same_seed_same_episode():
    def episode(env, seed):
        trajectory = [env.reset(seed=seed)[0]["agent_0"]]
        for agent in env.agents:
            env.action_space(agent).seed(3)
        for _ in range(env.task.episode_length):
            observations, rewards, *_ = env.step(sampled_actions(env))
            trajectory.append(np.append(observations["agent_0"], rewards["agent_0"]))
        return np.concatenate(trajectory)

    env, other = parallel_env("reacher-all-observant"), parallel_env("reacher-all-observant")
    np.testing.assert_array_equal(episode(env, 5), episode(env, 5))
    np.testing.assert_array_equal(episode(env, 5), episode(other, 5))
    assert not np.array_equal(episode(env, 5), episode(env, 6))


def test_parallel_env_takes_an_option_as_its_number_or_one_hot():
    rewards = []
    for actions in (
        {"agent_0": 1, "agent_1": 1},
        {"agent_0": np.eye(2)[1], "agent_1": np.eye(2)[1]},
    ):
        env = parallel_env("coordination-neutral")
        env.reset(seed=0)
        rewards.append(env.step(actions)[1])
    assert rewards[0] == rewards[1] == {"agent_0": 1.0, "agent_1": 1.0}
    for action in (-1, 2):
        with pytest.raises(InputError, match=f"agent_1 chooses {action}; its options are 0 to 1"):
            env.step({"agent_0": 0, "agent_1": action})


def test_parallel_env_hands_out_copies():
    env = parallel_env("reacher-leader-only")
    observations, _ = env.reset(seed=0)
    kept = env.state().copy()
    observations["agent_0"][:] = 0
    env.state()[:] = 0
    np.testing.assert_array_equal(env.state(), kept)


def test_parallel_env_gives_each_actuator_its_agents_action():
    env, gym_env = ParallelEnv(CROSSED), gymnasium.make("Reacher-v4")
    env.reset(seed=0)
    gym_env.reset(seed=0)
    # -3 is clipped to -1.
    _, rewards, *_ = env.step({"agent_0": np.array([0.4]), "agent_1": np.array([-3.0])})
    state, reward, *_ = gym_env.step(np.array([-1.0, 0.4]))
    np.testing.assert_array_equal(env.state(), state)
    assert rewards == {"agent_0": reward, "agent_1": reward}


def test_rendering_without_a_mode_says_how():
    env = parallel_env("reacher-leader-only")
    with pytest.raises(InputError, match="render_mode"):
        env.render()


@each(*VIEWS, find_task("coordination-unfavorable-4"), find_task("peaks-neutral"))
def test_pettingzoos_own_api_test(task):
    """PettingZoo is no requirement of this repository; this runs where it is installed."""
    pytest.importorskip("pettingzoo")
    from pettingzoo.test import parallel_api_test, parallel_seed_test

    parallel_api_test(parallel_env(task.name), num_cycles=200)
    parallel_seed_test(lambda: parallel_env(task.name), num_cycles=50)
