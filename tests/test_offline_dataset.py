"""Datasets on small made-up files against loops over episodes, and every kind of bad file."""

import sys
import time
from dataclasses import replace
from threading import Thread
from types import ModuleType

import numpy as np
import pytest
import torch
from made_up import GAME, REACHER, recorded_columns, write_dataset

from data import offline_dataset
from data.offline_dataset import DamagedFile, OfflineDataset, load_dataset
from mamujoco_envs import InputError, find_task

EPISODES = [(1, "timeout"), (12, "terminal"), (3, "timeout"), (25, "timeout"), (1, "terminal")]
EPISODES += [(10, "terminal"), (14, None)]
ROWS = sum(length for length, _ in EPISODES)
LAST_ROWS = np.cumsum([length for length, _ in EPISODES]) - 1
FIRST_ROWS = [0, *(LAST_ROWS[:-1] + 1)]

VIEWS = ("all-observant", "independent", "leader-only")
each_view = pytest.mark.parametrize("task", [find_task(f"reacher-{view}") for view in VIEWS])


@pytest.fixture
def columns():
    """Uneven episodes that end both ways; as in some of D4RL's files, the last row has no flag."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(ROWS + 1, 11)).astype(np.float32)
    columns = {
        "observations": states[:-1],
        "actions": rng.uniform(-1.5, 1.5, (ROWS, 2)).clip(-1, 1).astype(np.float32),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "next_observations": states[1:].copy(),
        "terminals": np.zeros(ROWS, dtype=bool),
        "timeouts": np.zeros(ROWS, dtype=bool),
    }
    columns["next_observations"][LAST_ROWS] += 1  # the next episode starts elsewhere
    for last, (_, kind) in zip(LAST_ROWS, EPISODES):
        if kind:
            columns[f"{kind}s"][last] = True
    return columns


@pytest.fixture
def path(tmp_path, columns):
    return write_dataset(tmp_path / "made-up.hdf5", columns)


# Loading and sampling.


@each_view
def test_histories_against_a_loop_over_episodes(task, path, columns):
    dataset = load_dataset(task, path)
    expected = torch.zeros(ROWS, *task.history_shape)
    past = []  # rows of the running episode
    for row in range(ROWS):
        for age, old in enumerate(reversed(past[-10:])):
            for agent, (observed, driven) in enumerate(zip(task.observed, task.driven)):
                # The newest pair is last; pairs from before the episode are zero.
                pair = expected[row, agent, 9 - age]
                action = torch.tensor(columns["actions"][old, list(driven)])
                pair[: len(driven)] = action.clamp(-(1 - 1e-5), 1 - 1e-5)
                observation = torch.tensor(columns["observations"][old, list(observed)])
                pair[len(driven) : len(driven) + len(observed)] = observation
        past = [] if row in LAST_ROWS else [*past, row]
    rows = torch.randint(ROWS, (4 * ROWS,))
    assert torch.equal(dataset.histories(torch.arange(ROWS)), expected)
    assert torch.equal(dataset.histories(rows), expected[rows])


def test_fields(path, columns):
    dataset = load_dataset(REACHER, path)
    assert dataset.size == ROWS
    names = {"states": "observations", "next_states": "next_observations", "rewards": "rewards"}
    for field, name in names.items():
        assert torch.equal(getattr(dataset, field), torch.tensor(columns[name]))
    limit = 1 - 1e-5
    assert torch.equal(
        dataset.actions[..., 0], torch.tensor(columns["actions"]).clamp(-limit, limit)
    )
    assert (columns["actions"] == 1).any()  # otherwise the clamp would not show
    assert dataset.first_rows.tolist() == FIRST_ROWS
    assert dataset.last_rows.tolist() == LAST_ROWS.tolist()
    description = dataset.description
    assert description["transitions"] == ROWS and description["episodes"] == len(EPISODES)
    assert description["source"] == path.name and len(description["sha256"]) == 64


@pytest.mark.parametrize("with_histories", [True, False])
def test_a_batch_is_rows_with_what_agents_see_before_and_after(with_histories, path):
    dataset = load_dataset(REACHER, path)
    rows = torch.tensor([0, 1, 5, 40, ROWS - 1])
    batch = dataset.batch(rows, with_histories)
    assert torch.equal(batch.observations, REACHER.observe(dataset.states[rows]))
    assert torch.equal(batch.next_observations, REACHER.observe(dataset.next_states[rows]))
    for name in ("states", "actions", "rewards", "masks", "next_states"):
        assert torch.equal(getattr(batch, name), getattr(dataset, name)[rows])
    if not with_histories:
        assert batch.histories is None and batch.next_histories is None
        return
    assert torch.equal(batch.histories, dataset.histories(rows))
    # Inside an episode the next history is that of the following row.
    assert torch.equal(batch.next_histories[[1, 2]], dataset.histories(rows[[1, 2]] + 1))
    assert (batch.next_histories[:, 1, :, 7:] == 0).all()  # padding of the narrow agent


def test_random_rows_are_of_all_transitions_or_of_first_ones(path):
    dataset = load_dataset(REACHER, path)
    assert set(dataset.sample_rows(5000).tolist()) == set(range(ROWS))
    assert set(dataset.sample_rows(5000, first=True).tolist()) == set(FIRST_ROWS)


def test_a_terminal_is_absorbing_and_a_time_out_is_not(path, columns):
    masks = load_dataset(REACHER, path).masks
    assert (masks[columns["terminals"]] == 0).all() and columns["terminals"].any()
    assert (masks[columns["timeouts"]] == 1).all() and columns["timeouts"].any()
    assert (masks[~columns["terminals"]] == 1).all()


def test_a_discontinuity_ends_an_episode_flagged_or_not(tmp_path, path, columns):
    expected = load_dataset(REACHER, path)
    columns["timeouts"][:] = False
    dataset = load_dataset(REACHER, write_dataset(tmp_path / "no-flags.hdf5", columns))
    assert torch.equal(dataset.last_rows, expected.last_rows)


def test_a_last_row_with_a_flag_adds_no_episode(tmp_path, columns):
    columns["timeouts"][-1] = True
    dataset = load_dataset(REACHER, write_dataset(tmp_path / "closed.hdf5", columns))
    assert len(dataset.episode_returns()) == len(EPISODES)


def test_integer_flags_and_double_precision_load_alike(tmp_path, path, columns):
    """D4RL's replay files hold float64."""
    for name, column in columns.items():
        columns[name] = column.astype(np.uint8 if column.dtype == bool else np.float64)
    dataset = load_dataset(REACHER, write_dataset(tmp_path / "wide.hdf5", columns))
    expected = load_dataset(REACHER, path)
    for field in ("states", "actions", "rewards", "next_states", "masks", "episode_starts"):
        assert torch.equal(getattr(dataset, field), getattr(expected, field))
    assert dataset.description["sha256"] == expected.description["sha256"]


@pytest.mark.parametrize("name", offline_dataset.COLUMNS)
def test_the_fingerprint_changes_with_any_column(name, tmp_path, path, columns):
    column = columns[name].copy()
    row = 2  # inside an episode
    column[row] = ~column[row] if column.dtype == bool else column[row] + 1e-6
    changed = write_dataset(tmp_path / "changed.hdf5", columns | {name: column})
    one, other = (load_dataset(REACHER, file).description["sha256"] for file in (path, changed))
    assert one != other


def test_held_out_data_are_whole_episodes_and_always_the_same(path):
    train, held_out = load_dataset(REACHER, path).split()
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(ROWS))
    episode_of = np.searchsorted(LAST_ROWS, np.arange(ROWS))
    assert not {*episode_of[train.numpy()]} & {*episode_of[held_out.numpy()]}
    assert len({*episode_of[held_out.numpy()]}) == 1  # a tenth of seven, and at least one
    torch.manual_seed(1)  # whatever a script seeds
    for again, first in zip(load_dataset(REACHER, path).split(), (train, held_out)):
        assert torch.equal(again, first)


def test_one_transition_is_too_few_to_learn_from(tmp_path, columns):
    two = {name: column[:2].copy() for name, column in columns.items()}
    two["terminals"][:] = True  # two episodes, one of which is held out
    dataset = load_dataset(REACHER, write_dataset(tmp_path / "two.hdf5", two))
    with pytest.raises(InputError, match="a single transition to learn from; record more"):
        dataset.split()


def test_a_tenth_of_the_episodes_is_held_out():
    dataset = load_dataset(GAME)
    train, held_out = dataset.split()
    assert len(held_out) == dataset.size // 10 and len(train) == dataset.size - len(held_out)


def test_transitions_are_turned_to_heading_zero():
    ant = find_task("ant-medium-fo")
    symmetry, dataset = ant.symmetry, OfflineDataset(ant, recorded_columns(ant, length=20))
    turned = dataset.at_heading_zero
    heading = symmetry.heading(dataset.states)
    torch.testing.assert_close(symmetry.heading(turned.states), 0 * heading)
    again = symmetry.turn_transition(heading, turned.states, turned.next_states, turned.rewards)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(again[0], dataset.states, **close)
    torch.testing.assert_close(again[1], dataset.next_states, **close)
    torch.testing.assert_close(again[2], dataset.rewards, **close)
    for name in ("actions", "masks", "episode_starts"):
        assert getattr(turned, name) is getattr(dataset, name)


def test_half_the_transitions_are_moved_by_a_random_symmetry_of_the_body():
    ant = find_task("ant-medium-fo")
    dataset = OfflineDataset(ant, recorded_columns(ant, length=30))
    upright, moved = dataset.at_heading_zero, dataset.from_random_sides
    joint_actions, moved_joint = map(ant.join_actions, (upright.actions, moved.actions))
    found = torch.zeros(dataset.size, dtype=torch.int)
    for state_matrix, action_matrix in ant.symmetry.body_symmetries:
        expected = upright.states @ state_matrix.T, upright.next_states @ state_matrix.T
        actual = moved.states, moved.next_states
        pairs = [*zip(expected, actual), (joint_actions @ action_matrix.T, moved_joint)]
        matches = [torch.isclose(one, other).all(dim=1) for one, other in pairs]
        found += torch.stack(matches).all(dim=0)
    assert (found == 1).all()
    same = (moved.states == upright.states).all(dim=1)
    assert 0.4 < same.float().mean() < 0.75  # one of the eight symmetries changes nothing
    # The rest of the reward does not depend on the side.
    others = [x.rewards - (x.states + x.next_states)[:, 13] / 2 for x in (upright, moved)]
    torch.testing.assert_close(*others)
    assert moved.masks is dataset.masks


def test_a_body_without_symmetries_is_left_at_heading_zero():
    ant = find_task("ant-medium-fo")
    ant = replace(ant, symmetry=ant.symmetry._replace(body_symmetries=()))
    dataset = OfflineDataset(ant, recorded_columns(ant, length=20))
    assert dataset.from_random_sides is dataset.at_heading_zero is not dataset


def test_a_dataset_without_a_symmetry_is_never_turned(path):
    dataset = load_dataset(REACHER, path)
    assert dataset.at_heading_zero is dataset and dataset.from_random_sides is dataset


def test_bounding_box_covers_states_and_next_states(path, columns):
    box = load_dataset(REACHER, path).bounding_box()
    both = np.concatenate([columns["observations"], columns["next_observations"]])
    np.testing.assert_array_equal(box["state_min"], both.min(0))
    np.testing.assert_array_equal(box["state_max"], both.max(0))
    # Both extremes are not always among the states.
    assert (both.max(0) > columns["observations"].max(0)).any()
    rewards = columns["rewards"]
    assert (box["reward_min"], box["reward_max"]) == (rewards.min(), rewards.max())


def test_episode_returns(path, columns):
    bounds = zip(FIRST_ROWS, LAST_ROWS)
    expected = [columns["rewards"][first : last + 1].sum() for first, last in bounds]
    dataset = load_dataset(REACHER, path)
    np.testing.assert_allclose(dataset.episode_returns(), expected, rtol=1e-5)
    assert dataset.description["mean_return"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_discounted_returns_row_by_row(path, columns):
    """After a time-out the mean reward goes on forever; after a terminal there is nothing."""
    gamma, mean = 0.9, columns["rewards"].astype(float).mean()
    for row, discounted in enumerate(load_dataset(REACHER, path).discounted_returns(gamma)):
        last = min(last for last in LAST_ROWS if last >= row)
        rewards = columns["rewards"][row : last + 1].tolist()
        rewards += [] if columns["terminals"][last] else [mean] * 400
        expected = sum(gamma**t * reward for t, reward in enumerate(rewards))
        assert discounted.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_missing_dataset_is_recorded_once(tmp_path, monkeypatch, columns):
    recorded = []
    recorder = ModuleType("data.collect_reacher")
    recorder.record = lambda task, path: (
        recorded.append(task.dataset) or write_dataset(path, columns)
    )
    monkeypatch.setitem(sys.modules, "data.collect_reacher", recorder)
    monkeypatch.setattr(offline_dataset, "FOLDER", tmp_path)
    for name in ("reacher-leader-only", "reacher-independent"):  # they share the dataset
        assert load_dataset(find_task(name)).size == ROWS
    assert recorded == ["reacher-expert-mix"]


# Bad files.


def assert_refused(task, path, *parts, error=InputError):
    with pytest.raises(error) as raised:
        load_dataset(task, path)
    message = str(raised.value)
    assert "\n" not in message
    for part in (path, *parts):
        assert str(part) in message


def spoil(row, value):
    def spoiled(column):
        column = column.astype(np.float32)
        column[row] = value
        return column

    return spoiled


BAD_COLUMNS = {
    "NaN": ("observations", spoil(7, np.nan), "row 7"),
    "infinite": ("next_observations", spoil((19, 3), np.inf), "row 19"),
    "too large": ("rewards", lambda column: column.astype(np.float64) * 1e300, "row 0"),
    "NaN in the first row": ("actions", spoil(0, np.nan), "row 0"),
    "infinite in the last row": ("rewards", spoil(ROWS - 1, -np.inf), f"row {ROWS - 1}"),
    "action out of range": ("actions", spoil((4, 1), 1.5), "row 4"),
    "NaN flag": ("terminals", spoil(5, np.nan), "row 5"),
    "flag of 2": ("timeouts", spoil(6, 2), "row 6"),
    "narrow states": ("observations", lambda column: column[:, :10], "(66, 10)"),
    "a row less": ("next_observations", lambda column: column[:-1], "(65, 11)"),
    "one action": ("actions", lambda column: column[:, 0], "(66,)"),
    "reward columns": ("rewards", lambda column: column[:, None], "(66, 1)"),
    "few flags": ("timeouts", lambda column: column[:3], "(3,)"),
    "a number": ("observations", lambda column: column[0, 0], "()"),
    "text": ("observations", lambda column: column.astype("S"), "no numbers"),
}


@pytest.mark.parametrize("name, change, hint", BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_a_bad_column_is_named(name, change, hint, tmp_path, columns):
    columns[name] = change(columns[name])
    assert_refused(REACHER, write_dataset(tmp_path / "bad.hdf5", columns), f"'{name}'", hint)


@pytest.mark.parametrize("name", offline_dataset.COLUMNS)
def test_a_missing_column_is_named(name, tmp_path, columns):
    del columns[name]
    assert_refused(REACHER, write_dataset(tmp_path / "bad.hdf5", columns), f"'{name}'")


def test_a_group_in_place_of_a_column_is_named(tmp_path, columns):
    """As in a file with one group per episode."""
    columns["observations/episode_0"] = columns.pop("observations")
    assert_refused(REACHER, write_dataset(tmp_path / "bad.hdf5", columns), "'observations'")


def test_an_episode_that_is_too_long_is_named(tmp_path, columns):
    columns["observations"][:] = columns["next_observations"][:] = 0
    columns["terminals"][:] = columns["timeouts"][:] = False
    path = write_dataset(tmp_path / "long.hdf5", columns)
    assert_refused(REACHER, path, f"row {ROWS - 1}", f"{ROWS} steps", "at most 50", "'timeouts'")


def test_an_option_that_is_not_one_hot_is_named(tmp_path):
    task, rows = find_task("coordination-unfavorable"), 100
    columns = {
        "observations": np.eye(4)[np.zeros(rows, int)],
        "actions": np.tile([1.0, 0, 0, 1], (rows, 1)),
        "next_observations": np.eye(4)[np.zeros(rows, int)],
        "rewards": np.zeros(rows),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 10 == 9,
    }
    load_dataset(task, write_dataset(tmp_path / "good.hdf5", columns))
    columns["actions"][7] = 0.5, 0.5, 1, 0
    assert_refused(task, write_dataset(tmp_path / "bad.hdf5", columns), "row 7", "not one-hot")
    columns["actions"] = np.tile([0, 1], (rows, 1))
    path = write_dataset(tmp_path / "numbers.hdf5", columns)
    assert_refused(task, path, "one number per agent", "np.eye(2)[actions].reshape(100, 4)")


def test_a_dataset_of_another_task_is_refused(path):
    assert_refused(find_task("ant-medium-fo"), path, "'observations'", "(66, 11)", "(66, 27)")


def test_a_missing_file_says_how_to_use_the_tasks_own(tmp_path):
    assert_refused(REACHER, tmp_path / "nowhere.hdf5", "leave out --dataset")
    assert_refused(REACHER, tmp_path, "leave out --dataset")  # a folder


@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(kept, path):
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert_refused(REACHER, path, "truncated", error=DamagedFile)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_file_without_transitions_is_named(rows, tmp_path, columns):
    few = {name: column[:rows] for name, column in columns.items()}
    path = write_dataset(tmp_path / "few.hdf5", few)
    assert_refused(REACHER, path, "fewer than two transitions")
    renamed = replace(REACHER, layout={"rewards": "rewards"})
    assert_refused(renamed, path, "fewer than two transitions")


# D4RL's own files.


ANT_ROWS = 57


@pytest.fixture
def d4rl_columns():
    """As in ant_medium-v2.hdf5: 111 dimensions, 84 of them zero, double precision."""
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.normal(size=(ANT_ROWS, 111)),
        "actions": rng.uniform(-1, 1, (ANT_ROWS, 8)),
        "rewards": rng.normal(size=ANT_ROWS),
        "terminals": np.arange(ANT_ROWS) == 20,
        "timeouts": np.arange(ANT_ROWS) == 40,
    }
    columns["observations"][:, 27:] = 0
    columns["next_observations"] = np.roll(columns["observations"], -1, axis=0)
    columns["next_observations"][[20, 40], :27] += 1
    columns["infos/qpos"] = np.zeros((ANT_ROWS, 15))
    columns["metadata/algorithm"] = np.bytes_("SAC")
    return columns


def test_d4rl_files_load_as_they_are(tmp_path, d4rl_columns):
    task = find_task("ant-medium-po")
    path = write_dataset(tmp_path / "ant_medium-v2.hdf5", d4rl_columns)
    dataset = load_dataset(task, path)
    for field, name in {"states": "observations", "next_states": "next_observations"}.items():
        expected = torch.tensor(d4rl_columns[name][:, :27]).float()
        assert torch.equal(getattr(dataset, field), expected)
    actions = torch.tensor(d4rl_columns["actions"]).float()
    for agent, driven in enumerate([(2, 3), (4, 5), (6, 7), (0, 1)]):
        assert torch.equal(dataset.actions[:, agent], actions[:, list(driven)])
    assert dataset.first_rows.tolist() == [0, 21, 41]  # the last row closes its episode
    assert dataset.masks.sum() == ANT_ROWS - 1 and dataset.masks[20] == 0
    assert dataset.description["source"] == "ant_medium-v2.hdf5"


def test_files_of_other_versions_are_refused(tmp_path, d4rl_columns):
    task, path = find_task("ant-medium-po"), tmp_path / "other.hdf5"
    states = d4rl_columns["observations"]
    contact = states.copy()
    contact[3, 50] = 0.1
    write_dataset(path, d4rl_columns | {"observations": contact})
    assert_refused(task, path, "'observations'", "contact forces")
    write_dataset(path, d4rl_columns | {"observations": states[:, :29]})
    assert_refused(task, path, "'observations'", "(57, 29)", "(57, 27)")
    del d4rl_columns["next_observations"]
    assert_refused(task, write_dataset(path, d4rl_columns), "no 'next_observations'")


def test_of_several_runs_one_records(monkeypatch, tmp_path):
    recorded = []

    class Recorder:
        @staticmethod
        def record(task, path):
            recorded.append(path)
            time.sleep(0.3)
            path.write_text("data")

    path = tmp_path / "data.hdf5"
    monkeypatch.setattr(offline_dataset.importlib, "import_module", lambda name: Recorder)
    threads = [Thread(target=offline_dataset.record_once, args=(REACHER, path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorded == [path]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to"):
        offline_dataset.record_once(REACHER, tmp_path / "file" / "data.hdf5")
