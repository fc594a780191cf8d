"""Datasets on small made-up files against loops over episodes, every bad input, and Reacher's own recording."""

import h5py
import numpy as np
import pytest
import torch

from data import collect_reacher, offline_dataset
from data.collect_reacher import Dataset, generalized_advantages, load_experts, record_dataset
from data.offline_dataset import load_dataset
from mamujoco_envs import TASKS, InputError, evaluate

LEADER_ONLY = TASKS["reacher-leader-only"]
EPISODES = [
    (1, "timeout"),
    (12, "terminal"),
    (3, "timeout"),
    (25, "timeout"),
    (1, "terminal"),
    (10, "terminal"),
    (14, None),
]
ROWS = sum(length for length, _ in EPISODES)

REACHER = {name: task for name, task in TASKS.items() if task.environment == "Reacher-v4"}
each_task = pytest.mark.parametrize("task", REACHER.values(), ids=REACHER)


def made_up_columns():
    """Uneven episodes that end both ways; as in some files of D4RL, the last row has neither flag."""
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.normal(size=(ROWS, 11)).astype(np.float32),
        "actions": rng.uniform(-1.5, 1.5, (ROWS, 2)).clip(-1, 1).astype(np.float32),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "next_observations": rng.normal(size=(ROWS, 11)).astype(np.float32),
        "terminals": np.zeros(ROWS, dtype=bool),
        "timeouts": np.zeros(ROWS, dtype=bool),
    }
    ends = np.cumsum([length for length, _ in EPISODES]) - 1
    for end, (_, kind) in zip(ends, EPISODES):
        if kind:
            columns[f"{kind}s"][end] = True
    return columns


def write(path, columns):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


@pytest.fixture
def columns():
    return made_up_columns()


@pytest.fixture
def path(tmp_path, columns):
    return write(tmp_path / "made-up.hdf5", columns)


# --- Loading and sampling ---


@each_task
def test_histories_against_a_loop_over_episodes(task, path, columns):
    dataset = load_dataset(task, path)
    width = max(len(observed) for observed in task.observed)
    expected = torch.zeros(ROWS, task.num_agents, 10, task.action_dim + width)
    past = []  # rows of the running episode
    for row in range(ROWS):
        for age, old in enumerate(reversed(past[-10:])):
            for agent, (observed, driven) in enumerate(zip(task.observed, task.driven)):
                slot = expected[
                    row, agent, 9 - age
                ]  # the newest pair is last, zero rows are at the old end
                slot[: len(driven)] = torch.tensor(columns["actions"][old, list(driven)]).clamp(
                    -(1 - 1e-5), 1 - 1e-5
                )
                slot[len(driven) : len(driven) + len(observed)] = torch.tensor(
                    columns["observations"][old, list(observed)]
                )
        past.append(row)
        if columns["terminals"][row] or columns["timeouts"][row]:
            past = []
    indices = torch.randint(ROWS, (4 * ROWS,))
    assert torch.equal(dataset.histories(torch.arange(ROWS)), expected)
    assert torch.equal(dataset.histories(indices), expected[indices])


def test_fields(path, columns):
    dataset = load_dataset(LEADER_ONLY, path)
    assert dataset.size == ROWS
    for field, name in [
        ("states", "observations"),
        ("next_states", "next_observations"),
        ("rewards", "rewards"),
    ]:
        assert torch.equal(getattr(dataset, field), torch.tensor(columns[name]))
    assert dataset.actions.shape == (ROWS, 2, 1)
    assert torch.equal(
        dataset.actions[..., 0], torch.tensor(columns["actions"]).clamp(-(1 - 1e-5), 1 - 1e-5)
    )
    assert (
        dataset.actions.abs().max() < 1 and (columns["actions"] == 1).any()
    )  # else the clamp would not show


def test_a_terminal_is_absorbing_and_a_time_out_is_not(path, columns):
    masks = load_dataset(LEADER_ONLY, path).masks
    assert (masks[columns["terminals"]] == 0).all() and columns["terminals"].any()
    assert (masks[columns["timeouts"]] == 1).all() and columns["timeouts"].any()
    assert (masks[~columns["terminals"]] == 1).all()


def test_a_last_row_with_a_flag_adds_no_episode(tmp_path, columns):
    columns["timeouts"][-1] = True
    dataset = load_dataset(LEADER_ONLY, write(tmp_path / "closed.hdf5", columns))
    assert len(dataset.episode_returns()) == len(EPISODES)


def test_integer_flags_and_double_precision_load_alike(tmp_path, path, columns):
    """D4RL's replay files hold float64."""
    wide = {
        name: column.astype(np.uint8 if column.dtype == bool else np.float64)
        for name, column in columns.items()
    }
    dataset, expected = (
        load_dataset(LEADER_ONLY, write(tmp_path / "wide.hdf5", wide)),
        load_dataset(LEADER_ONLY, path),
    )
    for field in ("states", "actions", "rewards", "next_states", "masks", "episode_starts"):
        assert torch.equal(getattr(dataset, field), getattr(expected, field))


def test_split_is_disjoint_complete_and_fixed(path):
    train, validation = load_dataset(LEADER_ONLY, path).split()
    assert len(train) == ROWS * 9 // 10
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(ROWS))
    assert train.tolist() != sorted(train.tolist())
    torch.manual_seed(1)  # whatever a script seeds
    for again, first in zip(load_dataset(LEADER_ONLY, path).split(), (train, validation)):
        assert torch.equal(again, first)


def test_bounding_box_covers_states_and_next_states(path, columns):
    box = load_dataset(LEADER_ONLY, path).bounding_box()
    both = np.concatenate([columns["observations"], columns["next_observations"]])
    np.testing.assert_array_equal(box["state_min"], both.min(0))
    np.testing.assert_array_equal(box["state_max"], both.max(0))
    # Made-up next states are independent of the states, so each extreme is now in one and now in the other.
    assert (both.max(0) > columns["observations"].max(0)).any() and (
        both.max(0) > columns["next_observations"].max(0)
    ).any()
    assert (box["reward_min"], box["reward_max"]) == (
        columns["rewards"].min(),
        columns["rewards"].max(),
    )


def test_episode_returns(path, columns):
    expected, row = [], 0
    for length, _ in EPISODES:
        expected.append(columns["rewards"][row : row + length].sum())
        row += length
    np.testing.assert_allclose(
        load_dataset(LEADER_ONLY, path).episode_returns(), expected, rtol=1e-5
    )


def test_reachers_dataset_is_recorded_when_it_is_missing(tmp_path, monkeypatch, columns):
    monkeypatch.setattr(offline_dataset, "FOLDER", tmp_path)
    monkeypatch.setattr(collect_reacher, "record_dataset", lambda args: write(args.output, columns))
    assert load_dataset(LEADER_ONLY).size == ROWS
    monkeypatch.setattr(
        collect_reacher, "record_dataset", lambda args: pytest.fail("recorded again")
    )
    assert load_dataset(TASKS["reacher-independent"]).size == ROWS  # tasks share the dataset


# --- Bad input ---


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def spoil(row, value):
    def spoiled(column):
        column = column.astype(np.float32)
        column[row] = value
        return column

    return spoiled


@pytest.mark.parametrize(
    "key, change, hint",
    [
        pytest.param("observations", spoil(7, np.nan), "row 7", id="NaN"),
        pytest.param("next_observations", spoil((19, 3), np.inf), "row 19", id="infinite"),
        pytest.param("actions", spoil(0, np.nan), "row 0", id="NaN in the first row"),
        pytest.param(
            "rewards", spoil(ROWS - 1, -np.inf), f"row {ROWS - 1}", id="infinite in the last row"
        ),
        pytest.param("terminals", spoil(5, np.nan), "row 5", id="NaN flag"),
        pytest.param("observations", lambda column: column[:, :10], "(66, 10)", id="narrow states"),
        pytest.param("next_observations", lambda column: column[:-1], "(65, 11)", id="a row less"),
        pytest.param("actions", lambda column: column[:, 0], "(66,)", id="one action"),
        pytest.param("rewards", lambda column: column[:, None], "(66, 1)", id="reward columns"),
        pytest.param("timeouts", lambda column: column[:3], "(3,)", id="few flags"),
        pytest.param("observations", lambda column: column[0, 0], "()", id="a number"),
        pytest.param("observations", lambda column: column.astype("S"), "", id="text"),
    ],
)
def test_a_bad_column_is_named(key, change, hint, tmp_path, columns):
    columns[key] = change(columns[key])
    path = write(tmp_path / "bad.hdf5", columns)
    with pytest.raises(InputError) as error:
        load_dataset(LEADER_ONLY, path)
    assert_one_line(error, path, f"'{key}'", hint)


@pytest.mark.parametrize("key", made_up_columns())
def test_a_missing_key_is_named(key, tmp_path, columns):
    del columns[key]
    path = write(tmp_path / "bad.hdf5", columns)
    with pytest.raises(InputError) as error:
        load_dataset(LEADER_ONLY, path)
    assert_one_line(error, path, f"'{key}'")


def test_a_group_in_place_of_a_column_is_named(tmp_path, columns):
    """As in a file with one group per episode."""
    columns["observations/episode_0"] = columns.pop("observations")
    path = write(tmp_path / "bad.hdf5", columns)
    with pytest.raises(InputError) as error:
        load_dataset(LEADER_ONLY, path)
    assert_one_line(error, path, "'observations'")


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    path = tmp_path / "nowhere.hdf5"
    with pytest.raises(InputError) as error:
        load_dataset(LEADER_ONLY, path)
    assert_one_line(error, path, "python -m data.collect_reacher dataset")


@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(kept, path):
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError) as error:
        load_dataset(LEADER_ONLY, path)
    assert_one_line(error, path, "truncated")


def test_a_file_without_transitions_is_named(tmp_path, columns):
    path = write(tmp_path / "empty.hdf5", {name: column[:0] for name, column in columns.items()})
    with pytest.raises(InputError) as error:
        load_dataset(LEADER_ONLY, path)
    assert_one_line(error, path, "no transitions")


# --- Making Reacher's dataset ---


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


def test_the_shipped_experts_are_equally_good_and_bend_opposite_ways():
    task, sides = collect_reacher.TASK, []
    for team in load_experts(Dataset.experts):
        evaluation = evaluate(
            task, lambda observations, _: team.distribution(observations[:, 0]).mean, episodes=100
        )
        assert task.normalized_score(evaluation.returns.mean()) > 0.95
        sides.append(
            (np.arctan2(evaluation.last_states[:, 3], evaluation.last_states[:, 1]) > 0).mean()
        )
    assert min(sides) < 0.05 and max(sides) > 0.95


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "reacher.hdf5"
    record_dataset(Dataset(episodes=1000, output=path))
    return path


def test_recordings_are_the_same_to_the_bit(recording, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # another machine
    try:
        record_dataset(Dataset(episodes=1000, output=tmp_path / "again.hdf5"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "again.hdf5").read_bytes() == recording.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.hdf5"]


def test_another_seed_records_other_episodes(recording, tmp_path):
    record_dataset(Dataset(episodes=1000, seed=1, output=tmp_path / "other.hdf5"))
    with h5py.File(recording) as one, h5py.File(tmp_path / "other.hdf5") as other:
        assert not np.array_equal(one["observations"][0], other["observations"][0])


def test_recorded_rows_are_transitions_of_reacher(recording):
    with h5py.File(recording) as file:
        columns = {name: column[()] for name, column in file.items()}
        assert {"environment", "source", "experts_sha256", "mean_return"} <= set(file.attrs)
    observations, next_observations = columns["observations"], columns["next_observations"]
    assert len(observations) == 1000 * 50
    inside = np.arange(1, 50_000) % 50 != 0
    np.testing.assert_array_equal(next_observations[:-1][inside], observations[1:][inside])
    # The last next state is its own episode's, not the next one's start, which has another target.
    np.testing.assert_array_equal(next_observations[:, 4:6], observations[:, 4:6])
    assert not columns["terminals"].any()
    np.testing.assert_array_equal(np.flatnonzero(columns["timeouts"]), np.arange(49, 50_000, 50))
    assert np.abs(columns["actions"]).max() <= 1
    rewards = -np.linalg.norm(observations[:, 8:], axis=1) - np.square(columns["actions"]).sum(1)
    np.testing.assert_allclose(columns["rewards"], rewards, rtol=0, atol=1e-5)


def test_halves_of_the_dataset_bend_opposite_ways(recording):
    dataset = load_dataset(LEADER_ONLY, recording)
    last = dataset.next_states[torch.as_tensor(dataset.episode_ends)].view(2, -1, 11)
    sides = (torch.atan2(last[..., 3], last[..., 1]) > 0).float().mean(1)
    assert sides.max() > 0.95 and sides.min() < 0.05
    score = LEADER_ONLY.normalized_score(dataset.episode_returns().reshape(2, -1).mean(1))
    np.testing.assert_allclose(score, 1, atol=0.1)  # Table 2: the score's 1 is this dataset's mean


@pytest.mark.parametrize("episodes", [0, 999, 1500, -1000])
def test_a_number_of_episodes_without_equal_halves_is_refused(episodes, tmp_path):
    with pytest.raises(InputError) as error:
        record_dataset(Dataset(episodes=episodes, output=tmp_path / "odd.hdf5"))
    assert_one_line(error, "--episodes", episodes)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def saved_expert():
    return {"policy": collect_reacher.Team().policy.state_dict(), "share_of_positive_bends": 1.0}


def assert_refused(path, *parts):
    with pytest.raises(InputError) as error:
        load_experts((path, path))
    assert_one_line(error, *parts)


def test_a_missing_expert_names_the_command_that_makes_it(tmp_path):
    assert_refused(
        tmp_path / "nobody.pt", tmp_path / "nobody.pt", "python -m data.collect_reacher experts"
    )


def test_experts_that_bend_the_same_way_are_refused(tmp_path, saved_expert):
    torch.save(saved_expert, tmp_path / "expert.pt")
    assert_refused(tmp_path / "expert.pt", "[1.0, 1.0]")


@pytest.mark.parametrize("fault", ["empty", "text", "truncated", "no policy", "other shapes"])
def test_a_bad_experts_file_is_named(fault, tmp_path, saved_expert):
    path = tmp_path / "expert.pt"
    if fault == "no policy":
        del saved_expert["policy"]
    if fault == "other shapes":
        saved_expert["policy"]["0.weight"] = torch.zeros(2, 5, 64)
    torch.save(saved_expert, path)
    if fault in ("empty", "text", "truncated"):
        path.write_bytes(
            {"empty": b"", "text": b"not weights", "truncated": path.read_bytes()[:5000]}[fault]
        )
    assert_refused(path, path)


def test_output_in_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(InputError) as error:
        record_dataset(Dataset(episodes=1000, output=tmp_path / "nowhere" / "x.hdf5"))
    assert_one_line(error, tmp_path / "nowhere")
