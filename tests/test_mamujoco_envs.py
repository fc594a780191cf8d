"""The tasks and their simulator against gymnasium, PettingZoo's rules, and loops that a reader can check by eye."""

from dataclasses import replace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

import mamujoco_envs
from mamujoco_envs import (
    ACTION_LIMIT,
    HISTORY_LENGTH,
    TASKS,
    InputError,
    ParallelEnv,
    Simulator,
    evaluate,
    find_task,
    parallel_env,
)

LEADER_ONLY = TASKS["reacher-leader-only"]
# In Reacher agent i drives actuator i, so mixing up agents' and actuators' order would not show. Here it does.
CROSSED = replace(LEADER_ONLY, name="reacher-crossed", driven=((1,), (0,)))
# What y -> -y does to each state dimension. Actions change sign too.
REFLECTION = np.array([1, 1, -1, -1, 1, -1, -1, -1, 1, -1, 1])

FULL, PARTIAL, OTHER_LEGS = (TASKS[f"ant-medium-{view}"] for view in ("fo", "po", "po-other-legs"))
MUJOCO = {name: task for name, task in TASKS.items() if task.environment == "Reacher-v4"} | {
    "ant-medium-fo": FULL,
    "ant-medium-po": PARTIAL,
}
each_task = pytest.mark.parametrize("task", MUJOCO.values(), ids=MUJOCO)


def joint_action(task, actions):
    """Agents' actions [agent, action] -> the environment's action vector, agent by agent."""
    joint = np.zeros(sum(len(driven) for driven in task.driven))
    for driven, action in zip(task.driven, actions):
        joint[list(driven)] = action
    return joint


def random_states(task, number, steps=10, seed=0):
    """States of `number` episodes after a few random steps: like rows of a dataset."""
    rng, simulator = np.random.default_rng(seed), Simulator(task, number)
    simulator.reset([np.random.default_rng([seed, i]) for i in range(number)])
    for _ in range(steps):
        simulator.step(rng.uniform(-1, 1, (number, task.num_agents, task.action_dim)))
    return simulator.states


# --- Simulator ---


@pytest.mark.parametrize(
    "task", [LEADER_ONLY, CROSSED, PARTIAL, OTHER_LEGS], ids=lambda task: task.name
)
def test_simulator_equals_gymnasium_to_the_bit(task):
    seeds, rng, fallen = [0, 1, 2, 10102, 12345], np.random.default_rng(0), False
    environments = [
        gymnasium.make(task.environment, disable_env_checker=True) for _ in seeds
    ]  # it warns of ants that go on after a fall
    generators = [np.random.default_rng(seed) for seed in seeds]
    simulator = Simulator(task, len(seeds))
    for episode in range(2):  # the second shows that the generators move on as gymnasium's own do
        expected = [
            env.reset(seed=seed if episode == 0 else None)[0]
            for env, seed in zip(environments, seeds)
        ]
        np.testing.assert_array_equal(simulator.reset(generators), expected)
        truncated = False
        for _ in range(250):
            if truncated:
                break
            actions = rng.uniform(-1.5, 1.5, (len(seeds), task.num_agents, task.action_dim))
            states, rewards, terminals = simulator.step(actions)
            for i, env in enumerate(environments):
                state, reward, terminal, truncated, _ = env.step(
                    joint_action(task, np.clip(actions[i], -1, 1))
                )
                np.testing.assert_array_equal(states[i], state)
                np.testing.assert_allclose(rewards[i], reward, rtol=0, atol=1e-12)
                assert terminals[i] == terminal
                fallen |= terminal
    assert fallen == (task.environment == "Ant-v4")  # else it would not show


@each_task
def test_the_episode_is_as_long_as_gymnasiums(task):
    assert task.episode_length == gymnasium.spec(task.environment).max_episode_steps


def test_simulator_goes_on_from_any_state_of_an_episode():
    env, rng = gymnasium.make("Reacher-v4"), np.random.default_rng(0)
    state, _ = env.reset(seed=0)
    simulator = Simulator(LEADER_ONLY, 1)
    for _ in range(LEADER_ONLY.episode_length):
        np.testing.assert_array_equal(simulator.set_states(state[None]), state[None])
        action = rng.uniform(-1, 1, (2, 1))
        states, rewards, _ = simulator.step(action[None])
        state, reward, *_ = env.step(joint_action(LEADER_ONLY, action))
        np.testing.assert_allclose(states[0, :8], state[:8], rtol=0, atol=1e-10)
        # The reward is the given state's, where the fingertip is; the restored arm's is some millimetres away from it.
        np.testing.assert_allclose(rewards[0], reward, rtol=0, atol=1e-12)


def test_set_states_takes_float32_rows_and_keeps_their_reward():
    row, action = random_states(LEADER_ONLY, 1).astype(np.float32), np.full((1, 2, 1), 0.5)
    simulator, env = Simulator(LEADER_ONLY, 1), gymnasium.make("Reacher-v4").unwrapped
    simulator.set_states(row)
    states, rewards, _ = simulator.step(action)
    cos1, cos2, sin1, sin2, x, y, omega1, omega2, *offset = row[0].astype(float)
    env.reset(seed=0)
    env.set_state(
        np.array([np.arctan2(sin1, cos1), np.arctan2(sin2, cos2), x, y]),
        np.array([omega1, omega2, 0, 0]),
    )
    expected = env.step(action[0, :, 0])[0]
    np.testing.assert_allclose(states[0, :8], expected[:8], rtol=0, atol=1e-10)
    np.testing.assert_allclose(rewards[0], -np.linalg.norm(offset) - 2 * 0.5**2, rtol=0, atol=1e-6)


def test_set_states_leaves_the_other_copies_alone():
    def simulator():
        started = Simulator(LEADER_ONLY, 3)
        started.reset([np.random.default_rng(i) for i in range(3)])
        started.step(actions)
        return started

    actions, rows, chosen = (
        np.full((3, 2, 1), 0.3),
        random_states(LEADER_ONLY, 3),
        np.array([False, True, False]),
    )
    mixed, untouched, replaced = simulator(), simulator(), simulator()
    before = mixed.states
    replaced.set_states(rows)
    states = mixed.set_states(rows, where=chosen)
    np.testing.assert_array_equal(states, np.where(chosen[:, None], rows, untouched.states))
    np.testing.assert_array_equal(before, untouched.states)  # the caller may still hold it
    for _ in range(3):
        mixed_step, untouched_step, replaced_step = (
            s.step(actions) for s in (mixed, untouched, replaced)
        )
        for got, kept, new in zip(mixed_step, untouched_step, replaced_step):
            np.testing.assert_array_equal(got[~chosen], kept[~chosen])
            np.testing.assert_array_equal(got[chosen], new[chosen])


def test_set_states_forgets_what_the_copy_did_before():
    def at_the_elbow_limit(shoulder):
        simulator = Simulator(LEADER_ONLY, 4)
        simulator.reset([np.random.default_rng(i) for i in range(4)])
        for _ in range(40):
            simulator.step(np.tile([[[shoulder], [1.0]]], (4, 1, 1)))
        return simulator

    # The solver starts from its last solution, which matters where a joint limit pushes back.
    used, fresh, rows = (
        at_the_elbow_limit(-1.0),
        Simulator(LEADER_ONLY, 4),
        at_the_elbow_limit(0.5).states,
    )
    used.set_states(rows)
    fresh.set_states(rows)
    for _ in range(3):
        for got, expected in zip(used.step(np.ones((4, 2, 1))), fresh.step(np.ones((4, 2, 1)))):
            np.testing.assert_array_equal(got, expected)


@each_task
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
    assert OTHER_LEGS.observed == PARTIAL.observed
    assert OTHER_LEGS.driven == (PARTIAL.driven[-1], *PARTIAL.driven[:-1])


def test_ant_goes_on_from_any_state():
    env, rng = gymnasium.make("Ant-v4").unwrapped, np.random.default_rng(0)
    state, _ = env.reset(seed=0)
    simulator = Simulator(PARTIAL, 1)
    for step in range(40):
        warm_start = env.data.qacc_warmstart.copy()
        np.testing.assert_array_equal(simulator.set_states(state[None]), state[None])
        simulator.data[0].qacc_warmstart[:] = (
            warm_start  # what a state does not hold: the solver's last solution
        )
        action = rng.uniform(-1, 1, (4, 2))
        states, rewards, terminals = simulator.step(action[None])
        state, reward, terminal, *_ = env.step(joint_action(PARTIAL, action))
        np.testing.assert_allclose(states[0], state, rtol=0, atol=1e-6)
        assert terminals[0] == terminal
        np.testing.assert_allclose(
            rewards[0], reward, rtol=0, atol=0.05
        )  # the torso's position before the step is a substep late in gymnasium


def test_copies_that_are_left_out_stand_still():
    actions, where = np.full((3, 4, 2), 0.3), np.array([True, False, True])
    some, all_of_them = Simulator(PARTIAL, 3), Simulator(PARTIAL, 3)
    for simulator in (some, all_of_them):
        simulator.reset([np.random.default_rng(i) for i in range(3)])
    before = some.states
    for _ in range(3):
        (states, rewards, _), (expected, expected_rewards, _) = (
            some.step(actions, where),
            all_of_them.step(actions),
        )
        np.testing.assert_array_equal(states[where], expected[where])
        np.testing.assert_array_equal(rewards[where], expected_rewards[where])
        np.testing.assert_array_equal(states[1], before[1])


def test_reflected_arms_move_as_reflections():
    """So the mirror image of a team is as good as the team, and convention is all that tells them apart."""
    rows, rng = random_states(LEADER_ONLY, 8), np.random.default_rng(1)
    arms, mirrored = Simulator(LEADER_ONLY, 8), Simulator(LEADER_ONLY, 8)
    arms.set_states(rows)
    mirrored.set_states(rows * REFLECTION)
    for _ in range(LEADER_ONLY.episode_length):
        actions = rng.uniform(-1, 1, (8, 2, 1))
        states, rewards, _ = arms.step(actions)
        mirrored_states, mirrored_rewards, _ = mirrored.step(-actions)
        np.testing.assert_allclose(mirrored_states, states * REFLECTION, rtol=0, atol=1e-12)
        np.testing.assert_allclose(mirrored_rewards, rewards, rtol=0, atol=1e-12)


# --- Task ---


@each_task
def test_observe_against_a_loop(task):
    states = torch.randn(3, 4, task.state_dim)
    observations = task.observe(states)
    width = max(len(observed) for observed in task.observed)
    assert observations.shape == (3, 4, task.num_agents, width)
    for agent, observed in enumerate(task.observed):
        for k in range(width):
            expected = states[..., observed[k]] if k < len(observed) else torch.zeros(3, 4)
            assert torch.equal(observations[:, :, agent, k], expected)


@pytest.mark.parametrize("task", [*MUJOCO.values(), CROSSED, OTHER_LEGS])
def test_split_and_join_actions(task):
    joint = torch.randn(3, 5, task.num_agents * task.action_dim)
    split = task.split_actions(joint)
    assert split.shape == (3, 5, task.num_agents, task.action_dim)
    for agent, driven in enumerate(task.driven):
        for k, actuator in enumerate(driven):
            assert torch.equal(split[..., agent, k], joint[..., actuator])
    assert torch.equal(task.join_actions(split), joint)


def test_normalized_score():
    for name in ("reacher-all-observant", "reacher-independent", "reacher-leader-only"):
        assert TASKS[name].normalized_score(-4.2370844) == pytest.approx(1)
        assert TASKS[name].normalized_score(-11.144625) == pytest.approx(0)
        np.testing.assert_allclose(
            TASKS[name].normalized_score(np.array([-4.2370844, -11.144625])), [1, 0], atol=1e-12
        )
    for behavior in ("random", "medium", "full-replay", "expert"):
        for view in ("fo", "po"):
            np.testing.assert_allclose(
                TASKS[f"ant-{behavior}-{view}"].normalized_score(np.array([3879.7, -325.6])),
                [1, 0],
                atol=1e-12,
            )


@pytest.mark.parametrize("find", [find_task, parallel_env])
def test_unknown_task_names_the_nearest(find):
    with pytest.raises(InputError, match="reacher-leader-onyl.*reacher-leader-only"):
        find("reacher-leader-onyl")


# --- evaluate ---


def made_up_team(seen):
    """Actions that depend on everything the agents see, often at the limits; remembers the histories in `seen`."""

    def act(observations, histories):
        seen.append(histories.clone())
        ages = torch.arange(1.0, HISTORY_LENGTH + 1)[:, None]
        past = (histories * ages).sum((-1, -2))[..., None]
        return (2 * torch.sin(past + observations.sum(-1, keepdim=True))).clamp(-1, 1)

    return act


def evaluate_by_hand(task, act, episodes, seed, dies):
    """One episode after the other, histories kept as lists of pairs."""
    env, results = parallel_env(task.name), []
    width = max(len(observed) for observed in task.observed)
    for episode in range(episodes):
        observations, _ = env.reset(seed=seed + episode)
        first_state, total, length = env.state(), 0.0, 0
        pasts = [[] for _ in env.possible_agents]
        for _ in range(task.episode_length):
            padded = [
                np.pad(observations[agent], (0, width - len(observations[agent])))
                for agent in env.possible_agents
            ]
            histories = np.zeros((task.num_agents, HISTORY_LENGTH, task.action_dim + width))
            for agent, past in enumerate(pasts):
                for age, pair in enumerate(reversed(past[-HISTORY_LENGTH:])):
                    histories[agent, HISTORY_LENGTH - 1 - age] = pair
            actions = act(
                torch.tensor(np.array(padded)[None]).float(), torch.tensor(histories[None]).float()
            )[0].numpy()
            for past, observation, action in zip(pasts, padded, actions):
                past.append(np.concatenate([np.clip(action, -(1 - 1e-5), 1 - 1e-5), observation]))
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
        def terminal(self, next_states):
            return dies(next_states)

    monkeypatch.setitem(mamujoco_envs.ENVIRONMENTS, "Reacher-v4", MortalReacher)
    seen, seen_by_hand = [], []
    evaluation = evaluate(LEADER_ONLY, made_up_team(seen), episodes=6, seed=7)
    expected = evaluate_by_hand(LEADER_ONLY, made_up_team(seen_by_hand), 6, 7, dies)
    for got, wanted in zip(evaluation, expected):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    lengths = expected[1]
    assert (
        (lengths == 50).all() if dies is never else len(set(lengths)) > 1
    )  # else the test would show nothing
    # An episode that has ended stays in the batch, so compare what was seen while it ran.
    by_hand = torch.cat(seen_by_hand).split(lengths.tolist())
    for episode, histories in enumerate(by_hand):
        torch.testing.assert_close(
            torch.stack(seen)[: len(histories), episode], histories, rtol=0, atol=2e-6
        )
    assert any((histories[..., 0].abs() == ACTION_LIMIT).any() for histories in by_hand)


def test_plot_team_strategy_writes_a_png(tmp_path):
    evaluation = evaluate(
        LEADER_ONLY, lambda observations, histories: torch.zeros(4, 2, 1), episodes=4
    )
    mamujoco_envs.plot_team_strategy(LEADER_ONLY, evaluation, tmp_path / "strategy.png")
    assert (tmp_path / "strategy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# --- parallel_env ---


def sampled_actions(env):
    return {agent: env.action_space(agent).sample() for agent in env.agents}


@each_task
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
            observations, rewards, terminations, truncations, infos = results = env.step(
                sampled_actions(env)
            )
            assert all(set(result) == set(everyone) for result in results)
            assert len(set(rewards.values())) == 1
            if any(terminations.values()):  # of all agents at once
                assert task.environment == "Ant-v4" and all(terminations.values())
                break
            assert set(truncations.values()) == {step == task.episode_length}
            assert all(isinstance(reward, float) for reward in rewards.values())
            assert all(
                isinstance(flag, bool) for flag in [*terminations.values(), *truncations.values()]
            )
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

    env = parallel_env("reacher-all-observant")
    np.testing.assert_array_equal(episode(env, 5), episode(env, 5))
    np.testing.assert_array_equal(
        episode(env, 5), episode(parallel_env("reacher-all-observant"), 5)
    )
    assert not np.array_equal(episode(env, 5), episode(env, 6))


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
    _, rewards, *_ = env.step(
        {"agent_0": np.array([0.4]), "agent_1": np.array([-3.0])}
    )  # clipped to -1
    state, reward, *_ = gym_env.step(np.array([-1.0, 0.4]))
    np.testing.assert_array_equal(env.state(), state)
    assert rewards == {"agent_0": reward, "agent_1": reward}


@each_task
def test_pettingzoos_own_api_test(task):
    """PettingZoo is no requirement of this repository, so this runs only where it is installed."""
    pytest.importorskip("pettingzoo")
    from pettingzoo.test import parallel_api_test, parallel_seed_test

    parallel_api_test(parallel_env(task.name), num_cycles=1000)
    parallel_seed_test(lambda: parallel_env(task.name), num_cycles=100)
