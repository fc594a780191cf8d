"""Tasks of one's own: a file with a class, a gymnasium id or nothing but data, start to end."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.spaces import Box, MultiDiscrete
from made_up import documented_blocks, import_script, recorded_columns, write_dataset

import data.inspect
from data import collect_mujoco
from data.offline_dataset import load_dataset
from mamujoco_envs import (
    EVALUATION_SEED,
    GymnasiumSimulator,
    HalfCheetah,
    InputError,
    MujocoEnvironment,
    Simulator,
    Task,
    WorldModelSimulator,
    blocks,
    evaluate,
    find_task,
    largest_difference,
    parallel_env,
)
from training_run import default_args, load_team

TASK_FILE = """
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv

from mamujoco_envs import MujocoEnvironment, Task, blocks

ALL = (tuple(range(17)),) * 2


class Cheetah(MujocoEnvironment):
    gymnasium = HalfCheetahEnv

    def reset(self, rng):
        qpos = self.init_qpos + rng.uniform(-0.1, 0.1, self.model.nq)
        return qpos, self.init_qvel + 0.1 * rng.standard_normal(self.model.nv)

    def reward(self, before, actions, after):
        speed = (after.qpos[:, 0] - before.qpos[:, 0]) / self.dt
        return speed - 0.1 * np.square(actions).sum(1)


PAIR = Task(Cheetah, ALL, blocks(3, 3), episode_length=12, dataset="cheetah.hdf5")
SWIMMERS = Task("Swimmer-v5", (tuple(range(8)), (0, 1, 3)), blocks(1, 1), 12, dataset="swim.hdf5")
LOGGED = Task("", ALL, blocks(3, 3), episode_length=12, dataset="cheetah.hdf5")
UNSEEN = Task("", ALL, blocks(3, 3), episode_length=12, dataset="unseen.hdf5")
FEW = Task("HalfCheetah-v4", ALL, blocks(2, 2), episode_length=12, dataset="cheetah.hdf5")
"""
TINY_MODEL = ["--hidden", 16, "--reward-hidden", 16, "--mask-hidden", 16, "--batch-size", 32]
TINY_MODEL += ["--total-steps", 4, "--eval-every", 4]
TINY = {
    "moma_ppo.py": ["--transitions", 400, "--rollout-length", 10, "--epochs", 1],
    "baselines/ibc.py": ["--batch-size", 16],
    "baselines/maiql.py": ["--batch-size", 16],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of tasks, their data, and for the logged one a world model."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(TASK_FILE)
    for name, file in {"PAIR": "cheetah", "SWIMMERS": "swim", "UNSEEN": "unseen"}.items():
        source = "PAIR" if name == "UNSEEN" else name
        task = find_task(f"{folder}/own.py:{source}")
        write_dataset(folder / f"{file}.hdf5", recorded_columns(task, 12, 12, scale=1.0))
    return folder


@pytest.fixture
def run_own(folder, run_script, tmp_path):
    """A few updates of a script on one of the tasks; its status, output and result."""

    def run_own(script, name, *options):
        run_dir = tmp_path / f"{script.split('/')[-1]}-{name}"
        arguments = ["--task", f"{folder}/own.py:{name}", "--run-dir", run_dir]
        if script == "world_model.py":
            arguments += [*TINY_MODEL]
        else:
            arguments += [*TINY[script], "--total-steps", 2, "--eval-every", 1]
            arguments += ["--eval-episodes", 2]
        status, output = run_script(script, *arguments, *options)
        path = run_dir / "result.json"
        return status, output, json.loads(path.read_text()) if path.is_file() else None

    return run_own


def assert_one_line(status, *parts):
    assert isinstance(status, str) and status.startswith("error: "), status
    assert "\n" not in status
    for part in parts:
        assert str(part) in status, status


def assert_refused(call, *parts):
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


# The file.


def test_what_a_task_derives(folder):
    task = find_task(f"{folder}/own.py:PAIR")
    assert task.name == "PAIR" and task.option == f"{folder}/own.py:PAIR"
    assert task.state_dim == 17 and task.entropy_target == -6 and task.simulator_class is Simulator
    assert task.normalized_score(3.5) == 3.5  # without reference returns
    assert task.world_model_path == folder / "cheetah.pt"
    swimmers = find_task(f"{folder}/own.py:SWIMMERS")
    assert swimmers.state_dim == 8 and swimmers.simulator_class is GymnasiumSimulator
    assert not swimmers.continues_from_states
    logged = find_task(f"{folder}/own.py:LOGGED")
    assert logged.state_dim == 17 and not logged.has_environment
    named = Task("", blocks(2, 1), blocks(1, 1), 5, name="mine")
    minari = dataclasses.replace(swimmers, dataset="minari:me/swim-v0")
    assert str(minari.own_dataset) == "minari:me/swim-v0"
    assert minari.world_model_path == folder / "swim-v0.pt"
    # What checkpoints hold is no number of NumPy's, which PyTorch would not load.
    scored = dataclasses.replace(task, expert_return=np.float64(9), episode_length=np.int64(3))
    assert list(map(type, scored.scale)) == [float, float, int]
    assert named.dataset == "mine" and named.state_dim == 3 and named.observed == ((0, 1), (2,))


def test_defaults_are_those_of_the_environment_or_of_one_like_it(folder):
    defaults = {None: SimpleNamespace, "Ant-v4": SimpleNamespace}
    defaults = {
        key: dataclasses.make_dataclass("Args", [("task", str), ("key", object)])("", key)
        for key in defaults
    }
    for name, key in {"halfcheetah-6x1-medium-po": "Ant-v4", f"{folder}/own.py:PAIR": None}.items():
        assert default_args(defaults, name).key == key


BAD_TASKS = {
    "missing file": (None, "give --task with the path of the file"),
    "missing name": ("NOTHING = 1", "holds no Task called MINE; it has none"),
    "a mistake": ("import nothing_at_all", "fails in line 3: ModuleNotFoundError"),
    "a negative index": ("MINE = Task('', ((0, -1), (1,)), ((0,), (1,)), 5)", "from 0 on; not -1"),
    "one return for two scores": (
        "MINE = Task('', A, ((0,), (1,)), 5, expert_return=0.0)",
        "must be below 'expert_return'; they are 0.0 and 0.0",
    ),
    "only one of two returns": (
        "MINE = Task('', A, ((0,), (1,)), 5, random_return=7.5)",
        "must be below 'expert_return'; they are 7.5 and 1.0",
    ),
    "an action twice": ("MINE = Task('', A, ((0,), (0,)), 5)", "must drive each action once"),
    "uneven": ("MINE = Task('', A, ((0, 1), (2,)), 5)", "different numbers of actions"),
    "one agent less": ("MINE = Task('', A, ((0,),), 5)", "2 agents in 'observed', but 1"),
    "nobody": ("MINE = Task('', (), (), 5)", "needs agents"),
    "beyond the state": (
        "MINE = Task('', A, ((0,), (1,)), 5, state_dim=2)",
        "observes dimension 2; the state has dimensions 0 to 1",
    ),
    "blind": ("MINE = Task('', ((0,), ()), ((0,), (1,)), 5)", "must observe and drive at least"),
    "no whole number": (
        "MINE = Task('', A, ((0,), (1,)), 1e3)",
        "above 0; not 1000.0",
    ),
    "images": ("MINE = Task('FrozenLake-v1', A, ((0,), (1,)), 5)", "must be a flat Box"),
    "an end of its own": ("raise SystemExit", "fails in line 3: SystemExit"),
    "unknown defaults": (
        "MINE = Task('', A, ((0,), (1,)), 5, defaults='Hopper-v4')",
        "defaults of the task are 'Hopper-v4'; take Ant-v4 or Reacher-v4",
    ),
    "no environment": (
        "MINE = Task(None, A, ((0,), (1,)), 5)",
        "environment must be a gymnasium id",
    ),
    "an unknown column": (
        "MINE = Task('', A, ((0,), (1,)), 5, layout={'timeout': 'cut'})",
        "layout of the task has timeout; D4RL's columns are observations, actions",
    ),
    "no column": (
        "MINE = Task('', A, ((0,), (1,)), 5, layout={'timeouts': ()})",
        "layout of the task has no name for timeouts",
    ),
    "a column's number": (
        "MINE = Task('', A, ((0,), (1,)), 5, layout={'rewards': ('r', 5)})",
        "layout of the task must name rewards by a string, or several in a tuple",
    ),
    "flat": ("MINE = Task('', (0, 1), ((0,), (1,)), 5)", "'observed' needs dimensions for each"),
    "one option": (
        "MINE = Task('', A, ((0,), (1,)), 5, discrete=True)",
        "each drives as many actions as it has options, such as blocks(3, 3)",
    ),
    "a class of gymnasium": (
        "import gymnasium\nMINE = Task(gymnasium.Env, A, ((0,), (1,)), 5)",
        "environment must be a gymnasium id",
    ),
    "no dictionary": (
        "MINE = Task('', A, ((0,), (1,)), 5, layout=(('timeouts', 'cut'),))",
        "layout of the task must be a dict",
    ),
    "unknown id": ("MINE = Task('Nowhere-v0', A, ((0,), (1,)), 5)", "cannot make 'Nowhere-v0'"),
}


@pytest.mark.parametrize("text, part", BAD_TASKS.values(), ids=BAD_TASKS)
def test_a_bad_task_is_one_line(text, part, tmp_path):
    path = tmp_path / "bad.py"
    if text:
        path.write_text(f"from mamujoco_envs import Task\nA = ((0, 1), (0, 2))\n{text}\n")
    assert_refused(lambda: find_task(f"{path}:MINE"), part, path)


@pytest.mark.parametrize("name", ["pair.py", "pair:PAIR"])
def test_a_task_without_its_name_is_one_line(name):
    message = f"'{name}' is no task; one of your own is FILE.py:NAME"
    assert_refused(lambda: find_task(name), message)


def test_a_missing_dataset_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("data.offline_dataset.FOLDER", tmp_path)
    names = {"ANT": ("ant-medium", 'recorder="data.collect_mujoco" in the task records it')}
    names["LOG"] = ("log.hdf5", "give one with --dataset")
    lines = [f"{key} = Task('', A, A, 5, dataset='{name}')" for key, (name, _) in names.items()]
    lines = ["from mamujoco_envs import Task", "A = (0,), (1,)", *lines]
    (tmp_path / "own.py").write_text("\n".join(lines))
    for key, (_, advice) in names.items():
        task = find_task(f"{tmp_path}/own.py:{key}")
        assert_refused(lambda task=task: load_dataset(task), "no dataset at", advice)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "mine.py"
    for length in (5, 16):
        text = f"MINE = Task('', ((0, 1), (0,)), ((0,), (1,)), {length}, dataset=Path('a.hdf5'))"
        path.write_text(f"from pathlib import Path\nfrom mamujoco_envs import Task\n{text}\n")
        task = find_task(f"{path}:MINE")
        assert task.episode_length == length and find_task(f"{path}:MINE") is task
    assert type(task.dataset) is str  # checkpoints hold it, and cannot hold a Path
    assert_refused(lambda: find_task(task), "given by its name")


def test_a_replaced_environment_has_its_own_simulator():
    shipped = find_task("halfcheetah-2x3-medium-fo")
    logged = dataclasses.replace(shipped, environment="")
    assert not logged.has_environment and shipped.has_environment
    newer = dataclasses.replace(shipped, environment="HalfCheetah-v5")
    assert newer.has_environment and not newer.continues_from_states
    given = dataclasses.replace(shipped, simulator=GymnasiumSimulator)
    assert given.simulator_class is GymnasiumSimulator


def test_a_recorder_that_cannot_record_is_one_line(tmp_path):
    path = tmp_path / "pair.py"
    path.write_text(
        "from mamujoco_envs import Task\n"
        "ONE = Task('', ((0,), (1,)), ((0,), (1,)), 5, dataset='mine.hdf5', recorder='no_module')\n"
        "TWO = Task('', ((0,), (1,)), ((0,), (1,)), 5, dataset='mine.hdf5', "
        "recorder='data.collect_mujoco')\n"
        "THREE = Task('', ((0,), (1,)), ((0,), (1,)), 5, dataset='mine.hdf5', "
        "recorder='data.collect_reacher')\n"
        "FOUR = Task('', ((0,), (1,)), ((0,), (1,)), 5, dataset='mine.hdf5', recorder='math')\n"
    )
    assert_refused(lambda: load_dataset(find_task(f"{path}:ONE")), "recorder of ONE", "no_module")
    unknown = "data.collect_mujoco records ant-random", "not 'mine.hdf5'"
    assert_refused(lambda: load_dataset(find_task(f"{path}:TWO")), *unknown)
    unknown = "data.collect_reacher records reacher-expert-mix; not 'mine.hdf5'"
    assert_refused(lambda: load_dataset(find_task(f"{path}:THREE")), unknown)
    assert_refused(
        lambda: load_dataset(find_task(f"{path}:FOUR")), "math, has no function 'record'"
    )


def test_agents_that_do_not_fit_are_told_before_data_are_read(run_own):
    status, _, _ = run_own("baselines/ibc.py", "FEW")
    assert_one_line(status, "agents of FEW drive 4 actions; HalfCheetah-v4 has 6")


def test_environments_that_do_not_fit_are_one_line():
    seen = (tuple(range(4)),) * 2
    cart = Task("InvertedPendulum-v5", (tuple(range(4)),), ((0,),), 5, name="cart")
    assert_refused(lambda: parallel_env(cart), "within [-1, 1]", "RescaleAction")
    few = Task("Swimmer-v5", seen, blocks(2, 2), 5, name="few", state_dim=8)
    assert_refused(lambda: parallel_env(few), "few needs actions of shape (4,)")
    body = Task(HalfCheetah, (range(17),) * 2, blocks(2, 2), 5, name="body")
    assert_refused(lambda: Simulator(body, 1), "drive 4 actions; HalfCheetah-v4 has 6")
    assert_refused(lambda: parallel_env(body), "drive 4 actions; HalfCheetah-v4 has 6")
    wide = Task(HalfCheetah, (range(17),) * 2, blocks(3, 3), 5, name="wide", state_dim=20)
    assert_refused(lambda: Simulator(wide, 1), "have 20 dimensions", "HalfCheetah-v4 have 17")
    assert_refused(lambda: parallel_env(wide), "have 20 dimensions", "HalfCheetah-v4 have 17")


# Simulators.


class Short(gymnasium.Env):
    """Ends by a time-out of its own after five steps, and has no `render_mode`."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(-1.0, 1.0, (2,), np.float64)

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(2), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2), 1.0, False, self.steps == 5, {}

    def close(self):
        closed.append(self)


closed = []


def test_a_time_out_of_the_environments_own_ends_an_episode():
    gymnasium.register("Short-v0", Short)
    task = Task("Short-v0", ((0, 1), (0, 1)), blocks(1, 1), 20, name="short")
    closed.clear()
    evaluation = evaluate(task, lambda observations, _: torch.zeros(len(observations), 2, 1), 3)
    assert evaluation.returns.tolist() == evaluation.lengths.tolist() == [5] * 3
    assert len(closed) == 3  # environments may hold files or processes
    env = parallel_env(task)
    env.reset(seed=0)
    for _ in range(5):
        assert env.agents
        *_, truncations, _ = env.step({agent: np.zeros(1) for agent in env.agents})
    assert not env.agents and all(truncations.values())


def test_gymnasiums_copies_start_from_whole_seeds():
    swimmers = Task("Swimmer-v5", (range(8),) * 2, blocks(1, 1), 5, name="swimmers")
    simulator = swimmers.make_simulator(2)

    def started(*seeds):
        return simulator.reset([np.random.default_rng(seed) for seed in seeds])

    first, again, other = started(1, 2), started(1, 2), started(3, 2)
    assert (first == again).all() and (first[0] != other[0]).any() and (first[1] == other[1]).all()
    assert_refused(lambda: started([1, 2], 3), "from a whole number")
    assert_refused(lambda: largest_difference(swimmers), "no class to compare with gymnasium")


def test_actuators_of_a_class_take_what_agents_give():
    class Pendulum(MujocoEnvironment):
        gymnasium = InvertedPendulumEnv  # its force is within [-3, 3]

    assert_refused(lambda: Pendulum(), "actuators of Pendulum must take [-1, 1]", "gymnasium id")


def test_what_a_class_returns_is_checked():
    class Mixed(HalfCheetah):
        def reward(self, before, actions, after):
            return super().reward(before, actions, after) - np.square(actions).sum()

    class Column(HalfCheetah):
        def reward(self, before, actions, after):
            return after.qpos[:, :1] - before.qpos[:, :1]

    class Falling(HalfCheetah):
        """With numbers where arrays are usual."""

        def reward(self, before, actions, after):
            return super().reward(before, actions, after).tolist()

        @staticmethod
        def terminal(after):
            return (np.arange(len(after.states)) == 1).astype(int)

    task = find_task("halfcheetah-2x3-medium-fo")
    falling = dataclasses.replace(task, environment=Falling, episode_length=3)
    lengths = evaluate(falling, lambda seen, _: torch.zeros(len(seen), 2, 3), 3).lengths
    assert lengths.tolist() == [3, 1, 3]
    mixed, column = (dataclasses.replace(task, environment=wrong) for wrong in (Mixed, Column))
    assert largest_difference(mixed, 5)["rewards"] > 0
    assert_refused(lambda: largest_difference(column, 5), "one number per copy", "(2, 1)")


@pytest.mark.parametrize(
    "name", ["halfcheetah-2x3-medium-fo", "hopper-3x1-medium-po", "walker2d-2x3-medium-fo", "PAIR"]
)
def test_simulators_equal_gymnasium_to_the_bit(name, folder):
    task = find_task(f"{folder}/own.py:{name}" if name == "PAIR" else name)
    assert set(largest_difference(task, 200).values()) == {0.0}


@pytest.mark.parametrize("name", ["halfcheetah-2x3-medium-po", "walker2d-2x3-medium-po"])
def test_planar_bodies_continue_from_any_state(name):
    task, rng = find_task(name), np.random.default_rng(0)
    env = gymnasium.make(task.environment, disable_env_checker=True).unwrapped
    state, _ = env.reset(seed=0)
    simulator = Simulator(task, 1)
    for _ in range(20):
        np.testing.assert_array_equal(simulator.set_states(state[None]), state[None])
        simulator.data[0].qacc_warmstart[:] = env.data.qacc_warmstart
        fast = abs(env.data.qvel).max() > 10  # which a walker's state does not show
        action = rng.uniform(-1, 1, (1, task.num_agents, task.action_dim))
        states, rewards, terminals = simulator.step(action)
        state, reward, terminal, *_ = env.step(action.ravel())
        if not fast:
            np.testing.assert_allclose(states[0], state, rtol=0, atol=1e-6)
            np.testing.assert_allclose(rewards[0], reward, rtol=0, atol=1e-6)
            assert terminals[0] == terminal


# Runs.


def test_a_class_of_ones_own_from_data_to_a_score(run_own, run_script, folder, tmp_path):
    """Named by a relative path, resumed and scored from another folder."""
    model = tmp_path / "model.pt"
    status, output, result = run_own("world_model.py", "PAIR", "--output", model)
    assert status == 0, output
    assert result["random/ten_step_error"] > 0
    options = ["--world-model", model]
    status, output, result = run_own("moma_ppo.py", "PAIR", *options)
    assert status == 0, output
    assert "evaluated_in" not in result and len(result["returns"]) == 10
    assert "PAIR: score" in output
    run_dir = tmp_path / "moma_ppo.py-PAIR"
    status, output = run_script("moma_ppo.py", "--resume", run_dir, "--total-steps", 3)
    assert status == 0, output
    team = load_team(run_dir)
    assert team.task is find_task(f"{folder}/own.py:PAIR")
    status, output = run_script("scripts/evaluate.py", "--run", run_dir, "--episodes", 2)
    assert status == 0 and "PAIR, moma_ppo.py after 3 steps" in output
    moved = folder / "moved.py"
    moved.write_text((folder / "own.py").read_text())
    assert load_team(run_dir, f"{moved}:PAIR").task.file == f"{moved}:PAIR"
    again = "--resume", run_dir, "--total-steps", 4, "--task"
    status, output = run_script("moma_ppo.py", *again, f"{moved}:SWIMMERS")
    assert_one_line(status, "was started with another task")
    status, output = run_script("moma_ppo.py", *again, f"{moved}:PAIR")
    assert status == 0 and load_team(run_dir).task.file == f"{moved}:PAIR"
    moved.write_text(TASK_FILE.replace("length=12", "length=12, expert_return=9.0", 1))
    status, output = run_script("moma_ppo.py", *again[:3], 5, "--task", f"{moved}:PAIR")
    assert_one_line(status, "returns or episode_length of", "are not what they were when")
    moved.write_text(
        TASK_FILE.replace("Cheetah, ALL, blocks(3, 3)", "Cheetah, ALL, blocks(3, 3)[::-1]")
    )
    assert_refused(lambda: load_team(run_dir, f"{moved}:PAIR"), "drive other dimensions")


POINTS = """
class my_parallel_env:
    possible_agents = ["left", "right"]

    def each(self, value):
        return dict.fromkeys(self.possible_agents, value)

    def reset(self, seed=None):
        self.steps = 0
        return self.each(np.zeros(2)), {}

    def step(self, actions):
        self.steps += 1
        ends = self.each(self.steps == 5), self.each(False)
        return self.each(np.zeros(2)), self.each(1.0), *ends, {}

    def close(self):
        pass


"""


class Choices(gymnasium.Env):
    """Pays ten times the first agent's option and once the second's."""

    observation_space, action_space = Box(-1, 1, (1,)), MultiDiscrete([2, 2])

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(10 * action[0] + action[1]), False, False, {}


def test_the_document_runs_as_written(run_script, monkeypatch, capsys):
    """All its commands and its Python, on data and with budgets so small that it takes seconds.

    Nothing is compiled, which would take a minute.
    """
    short = dataclasses.replace(collect_mujoco.TASKS["halfcheetah"], episode_length=20)
    monkeypatch.setitem(collect_mujoco.TASKS, "halfcheetah", short)
    blocks_of_page = documented_blocks("python")
    task, random, swimmer, rule, wrapped, joint, logged, layout, *programs = blocks_of_page
    act, train, sweep = programs
    Path("pair.py").write_text(task.replace("episode_length=1000", "episode_length=20"))
    extra = TINY | {"baselines/matd3_bc.py": ["--batch-size", 16], "world_model.py": TINY_MODEL}
    record, commands, tables, loop = documented_blocks("")
    for line in f"{record}{commands}".strip().splitlines():
        _, script, *arguments = shlex.split(line)
        if script == "-m":
            script = f"{arguments.pop(0).replace('.', '/')}.py"
        if "collect" in script:  # in this process, where episodes are short
            args = collect_mujoco.Dataset("halfcheetah", "medium", 400, output=Path("cheetah.hdf5"))
            assert "--output cheetah.hdf5" in line
            collect_mujoco.record_dataset(args)
            continue
        arguments = [argument for argument in arguments if argument != "--compile"]
        arguments += extra.get(script, [])
        if script.startswith(("moma", "base")):
            arguments += ["--total-steps", 2, "--eval-every", 2, "--eval-episodes", 2]
        arguments += ["--cloning-steps", 2] if script == "moma_ppo.py" else []
        status, output = run_script(script, *arguments)
        assert status == 0, output
    assert Path("returns.png").is_file() and "PAIR, moma_ppo.py after 2 steps" in output

    exec(random.replace("episodes=100", "episodes=2"), {})
    exec(wrapped, {"Choices": Choices})
    pendulum = Task("UnitPendulum-v0", (range(3),), ((0,),), 210, name="pendulum")
    swing = evaluate(pendulum, lambda x, _: torch.ones(len(x), 1, 1), 2)
    assert swing.lengths.tolist() == [210] * 2  # by itself it ends after 200 steps
    choices = Task("Choices-v0", ((0,), (0,)), blocks(2, 2), 3, name="choices", discrete=True)
    chosen = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    paid = evaluate(choices, lambda x, _: chosen.expand(len(x), 2, 2), 2).returns
    assert paid.tolist() == [30] * 2
    Path("swimmers.py").write_text(swimmer)
    task = find_task("swimmers.py:SWIMMERS")
    assert set(largest_difference(task, 50).values()) == {0.0}
    Path("joint.py").write_text(f"{POINTS}{joint}")
    still = evaluate(find_task("joint.py:JOINT"), lambda x, _: torch.zeros(len(x), 2, 1), 2)
    assert still.returns.tolist() == [5] * 2 and still.lengths.tolist() == [5] * 2
    names = {"Task": Task, "blocks": blocks}
    for text in (logged, layout):
        exec(text, names)
    assert names["PLANT"].state_dim == 21 and "def terminal" in rule
    for text in (act, train.replace("00", ""), sweep):
        exec(text, {})
    status, output = run_script("scripts/reproduce.py", *shlex.split(tables)[2:], "--dry-run")
    assert status == 0 and "--lambda-g" in loop
    Path("runs/pair").rename("runs/PAIR__moma_ppo__1")
    exec(sweep, {})
    assert len(capsys.readouterr().out.splitlines()[-1].split()) == 4


def test_rollouts_that_do_not_suit_the_episodes_are_noted(folder, capsys):
    """Episodes of PAIR have 12 steps."""
    module, task = import_script("moma_ppo"), find_task(f"{folder}/own.py:PAIR")
    for length, start_states, note in [
        (50, "first", "rollouts have 50 steps; give --rollout-length 12, as in episodes"),
        (5, "first", "rollouts from first states never see what follows step 5 of 12"),
        (5, "any", ""),
        (12, "first", ""),
    ]:
        args = module.Args(rollout_length=length, start_states=start_states)
        module.compare_lengths(args, task)
        output = capsys.readouterr().out
        assert note in output and bool(note) == bool(output)


def test_a_gymnasium_id_is_played_but_not_continued(run_own, folder):
    status, output, result = run_own("baselines/ibc.py", "SWIMMERS")
    assert status == 0, output
    task = find_task(f"{folder}/own.py:SWIMMERS")

    def act(observations, histories):
        return torch.full((len(observations), 2, 1), 0.3)

    evaluation, env = evaluate(task, act, 2), parallel_env(task)
    for episode in range(2):
        env.reset(seed=EVALUATION_SEED + episode)
        total = 0.0
        while env.agents:
            _, rewards, *_ = env.step({agent: np.float32([0.3]) for agent in env.agents})
            total += rewards["agent_0"]
        assert evaluation.returns[episode] == pytest.approx(total)
        np.testing.assert_allclose(evaluation.last_states[episode], env.state(), atol=1e-9)
    status, *_ = run_own("moma_ppo.py", "SWIMMERS", "--ground-truth")
    assert_one_line(status, "--ground-truth needs a simulator of SWIMMERS")
    status, *_ = run_own("baselines/maiql.py", "SWIMMERS", "--finetune")
    assert_one_line(status, "SWIMMERS has no simulator", "leave out --finetune")
    status, output, result = run_own("world_model.py", "SWIMMERS")
    assert status == 0 and "note: SWIMMERS has no simulator that starts anywhere" in output
    assert result["on_data/ten_step_error"] > 0 and "random/ten_step_error" not in result


def test_logged_data_are_scored_in_the_world_model_alone(run_own, folder, run_script, tmp_path):
    status, *_ = run_own("baselines/ibc.py", "UNSEEN")
    assert_one_line(status, "no environment, and no world model", "python world_model.py --task")
    status, output, result = run_own("world_model.py", "UNSEEN", "--output", folder / "unseen.pt")
    assert status == 0, output
    status, *_ = run_own("baselines/ibc.py", "UNSEEN", "--dataset", folder / "cheetah.hdf5")
    assert_one_line(status, "UNSEEN has no environment", "not with --dataset")
    # The data say what the simulator would have said.
    status, output, simulated = run_own("world_model.py", "PAIR")
    for name in ("one_step_error", "ten_step_error", "return_error", "epsilon_g_0.9"):
        expected = simulated[f"on_data/{name}"]
        assert result[f"on_data/{name}"] == pytest.approx(expected, rel=0.02)
    for script in TINY:
        status, output, result = run_own(script, "UNSEEN")
        assert status == 0, output
        assert result["evaluated_in"] == "the world model unseen.pt alone"
        assert "note: UNSEEN has no environment" in output
        assert "greedy episodes in the world model unseen.pt alone" in output
        # Every evaluation starts from the same first states and draws the same noise.
        run_dir = tmp_path / f"{script.split('/')[-1]}-UNSEEN"
        status, output = run_script("scripts/evaluate.py", "--run", run_dir, "--episodes", 10)
        assert status == 0 and f"{result['score']:.3f}" in output
    assert_refused(lambda: parallel_env(load_team(run_dir).task), "no gymnasium environment")


def test_episodes_in_a_world_model_end_where_its_mask_is_zero(folder, run_own):
    status, output, _ = run_own("world_model.py", "LOGGED", "--output", folder / "cheetah.pt")
    assert status == 0, output
    simulator = WorldModelSimulator(find_task(f"{folder}/own.py:LOGGED"), 3)
    states = simulator.reset([np.random.default_rng(seed) for seed in range(3)])
    simulator.model.masks = lambda next_states: torch.tensor([1.0, 0.0, 1.0])
    next_states, rewards, terminals = simulator.step(np.zeros((3, 2, 3)))
    assert terminals.tolist() == [False, True, False]
    assert np.array_equal(simulator.states, next_states) and not np.array_equal(states, next_states)


def test_tables_take_tasks_of_ones_own(run_script, folder):
    options = ["--table", "other", "--algorithms", "ibc", "moma_ppo", "--seeds", 2, "--dry-run"]
    status, output = run_script(
        "scripts/reproduce.py", *options, "--tasks", f"{folder}/own.py:PAIR", "hopper-3x1-random-po"
    )
    lines = [line for line in output.splitlines() if "--task" in line]
    assert status == 0 and len(lines) == 8
    assert f"--task {folder}/own.py:PAIR" in lines[0] and "runs/PAIR__ibc__1" in lines[0]
    for options, part in ((["--table", "other"], "needs --tasks"),):
        status, _ = run_script("scripts/reproduce.py", *options)
        assert_one_line(status, part)


# Data.


@pytest.fixture
def columns(folder):
    return recorded_columns(find_task(f"{folder}/own.py:PAIR"), 3, 12, scale=1.0)


def fields_of(dataset):
    names = ("states", "actions", "rewards", "masks", "next_states", "episode_starts")
    return {name: getattr(dataset, name) for name in names}


def assert_same_rows(dataset, expected):
    for name, column in fields_of(expected).items():
        assert torch.equal(getattr(dataset, name), column), name


def as_episodes(columns, length):
    """Minari's: a state more than actions."""
    for first in range(0, len(columns["rewards"]), length):
        rows = slice(first, first + length)
        states = [columns["observations"][rows], columns["next_observations"][rows][-1:]]
        yield SimpleNamespace(
            observations=np.concatenate(states),
            actions=columns["actions"][rows],
            rewards=columns["rewards"][rows],
            terminations=columns["terminals"][rows],
            truncations=columns["timeouts"][rows],
        )


@pytest.fixture
def minari(monkeypatch, columns):
    """Stands for the library, with one dataset; `test_minaris_own_files` has the real one."""

    def load(name, download=True):
        if name != "cheetah/made-up-v0":
            raise ValueError("no such dataset\nat all")
        spec = SimpleNamespace(env_spec=SimpleNamespace(id=module.environment))
        episodes = list(as_episodes(columns, 12))
        return SimpleNamespace(spec=spec, id=name, iterate_episodes=lambda: iter(episodes))

    module = ModuleType("minari")
    module.load_dataset, module.environment = load, "HalfCheetah-v5"
    monkeypatch.setitem(sys.modules, "minari", module)
    return module


def test_minari_datasets_load_row_for_row(minari, columns, tmp_path, monkeypatch):
    task = find_task("halfcheetah-2x3-medium-po")
    path = write_dataset(tmp_path / "x.hdf5", columns)
    dataset = load_dataset(task, "minari:cheetah/made-up-v0")
    assert_same_rows(dataset, load_dataset(task, path))
    assert dataset.description["source"] == "Minari's cheetah/made-up-v0"
    assert_refused(lambda: load_dataset(task, "minari:other"), "cannot load other (ValueError: no")
    for recorded in ("Walker2d-v5", "Pusher-v5"):
        minari.environment = recorded
        assert_refused(lambda: load_dataset(task, "minari:cheetah/made-up-v0"), recorded, "not in")
    minari.environment = "HalfCheetah-v5"
    hopper = find_task("hopper-3x1-medium-po")
    assert_refused(lambda: load_dataset(hopper, "minari:cheetah/made-up-v0"), "not in Hopper-v4")
    # v5's tasks take v4's data where both are alike.
    minari.environment = "HalfCheetah-v4"
    newer = dataclasses.replace(task, environment="HalfCheetah-v5")
    assert len(load_dataset(newer, "minari:cheetah/made-up-v0").rewards) == dataset.size
    minari.environment, newer = "Hopper-v4", dataclasses.replace(hopper, environment="Hopper-v5")
    assert_refused(lambda: load_dataset(newer, "minari:cheetah/made-up-v0"), "not in Hopper-v5")
    monkeypatch.setitem(sys.modules, "minari", None)
    assert_refused(lambda: load_dataset(task, "minari:x"), "pip install")


def test_options_of_minari_must_be_one_hot(minari, columns):
    minari.environment = ""
    columns["actions"] = np.ones((36, 2), int)
    task = find_task("coordination-neutral")
    advice = "such as np.eye(2)[actions].reshape(36, 4)"
    assert_refused(lambda: load_dataset(task, "minari:cheetah/made-up-v0"), advice)


def test_minaris_own_files(columns, tmp_path, monkeypatch):
    """Minari is no requirement of this repository; this runs where it is installed."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    buffers = [
        EpisodeBuffer(
            observations=list(episode.observations.astype(np.float64)),
            actions=list(episode.actions),
            rewards=list(episode.rewards.astype(np.float64)),
            terminations=list(episode.terminations),
            truncations=list(episode.truncations),
        )
        for episode in as_episodes(columns, 12)
    ]
    space = gymnasium.make("HalfCheetah-v5")
    minari.create_dataset_from_buffers(
        "cheetah/made-up-v0",
        buffers,
        env="HalfCheetah-v5",
        observation_space=space.observation_space,
        action_space=space.action_space,
    )
    task = find_task("halfcheetah-2x3-medium-po")
    expected = load_dataset(task, write_dataset(tmp_path / "x.hdf5", columns))
    for path in ("minari:cheetah/made-up-v0", tmp_path / "minari" / "cheetah" / "made-up-v0"):
        assert_same_rows(load_dataset(task, path), expected)


def test_a_falling_hopper_of_v5_is_paid_as_v4s(minari, monkeypatch, tmp_path):
    task = dataclasses.replace(find_task("hopper-3x1-random-fo"), episode_length=60)
    envs = [gymnasium.make(f"Hopper-{v}", disable_env_checker=True) for v in ("v4", "v5")]
    found = []
    for env in envs:
        rng, states, rewards, fallen = np.random.default_rng(0), [env.reset(seed=0)[0]], [], False
        actions = []
        while not fallen:
            actions.append(rng.uniform(-1, 1, 3))
            state, reward, fallen, *_ = env.step(actions[-1])
            states.append(state)
            rewards.append(reward)
        ends = np.arange(len(rewards)) == len(rewards) - 1
        found.append(
            SimpleNamespace(
                observations=np.array(states),
                actions=np.array(actions),
                rewards=np.array(rewards),
                terminations=ends,
                truncations=np.zeros(len(rewards), dtype=bool),
            )
        )
    spec = SimpleNamespace(env_spec=SimpleNamespace(id="Hopper-v5"))
    dataset = SimpleNamespace(spec=spec, id="x", iterate_episodes=lambda: iter(found[1:]))
    minari.load_dataset = lambda name, download: dataset
    rewards = load_dataset(task, "minari:x").rewards.numpy()
    np.testing.assert_allclose(rewards, found[0].rewards, rtol=1e-6)
    assert not np.allclose(found[0].rewards, found[1].rewards)
    # So it is in a file that says where it was recorded.
    v5 = found[1]
    with h5py.File(tmp_path / "v5.hdf5", "w") as file:
        file.attrs["environment"] = "Hopper-v5"
        file["observations"], file["next_observations"] = v5.observations[:-1], v5.observations[1:]
        file["actions"], file["rewards"] = v5.actions, v5.rewards
        file["terminals"], file["timeouts"] = v5.terminations, v5.truncations
    assert load_dataset(task, tmp_path / "v5.hdf5").rewards.tolist() == rewards.tolist()


def test_columns_of_other_names_are_joined_agent_by_agent(columns, tmp_path):
    seen = {"observations": "obs", "next_observations": "next_obs"}
    names = {name: (f"{own}_0", f"agents/1/{own}") for name, own in seen.items()}
    path = tmp_path / "multi.hdf5"
    with h5py.File(path, "w") as file:
        for name, (first, second) in names.items():
            file[first], file[second] = np.split(columns[name], [9], axis=1)
        file["actions"] = columns["actions"].reshape(-1, 2, 3)  # [row, agent, action]
        file["reward"], file["done"] = columns["rewards"], columns["terminals"]
    # Episodes end at discontinuities, without flags.
    layout = names | {"actions": "actions", "rewards": "reward", "terminals": "done"}
    task = Task("", blocks(9, 8), blocks(3, 3), 12, name="multi", layout=layout)
    plain = dataclasses.replace(task, layout=None)
    expected = load_dataset(plain, write_dataset(tmp_path / "plain.hdf5", columns))
    assert_same_rows(load_dataset(task, path), expected)
    narrow = dataclasses.replace(task, observed=blocks(9, 9), state_dim=18)
    assert_refused(lambda: load_dataset(narrow, path), "side by side", "(36, 18)")
    other = dataclasses.replace(task, layout=layout | {"rewards": "rew"})
    assert_refused(lambda: load_dataset(other, path), "has no 'rew'", "its own layout")


def test_a_task_of_ones_own_needs_no_time_outs(folder, columns, tmp_path, capsys):
    task = find_task(f"{folder}/own.py:PAIR")
    expected = load_dataset(task, write_dataset(tmp_path / "flags.hdf5", columns))
    del columns["timeouts"]
    path = write_dataset(tmp_path / "none.hdf5", columns)
    assert_same_rows(load_dataset(task, path), expected)
    data.inspect.main(data.inspect.Args(path, task=task.option))
    assert "36 transitions, 3 episodes" in capsys.readouterr().out


def test_inspecting_data(columns, tmp_path, capsys):
    columns["timeouts"][:] = False
    columns["observations"][:, 3] = columns["next_observations"][:, 3] = 1
    path, picture = write_dataset(tmp_path / "x.hdf5", columns), tmp_path / "x.png"
    data.inspect.main(data.inspect.Args(path, histogram=picture))
    output = capsys.readouterr().out
    assert "36 transitions, 3 episodes, 0 terminal states" in output
    assert "HalfCheetah-v4, Walker2d-v4" in output and "score" not in output
    assert "never change: [3]" in output and "2 episodes end without a flag" in output
    assert "both flags" not in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    data.inspect.main(data.inspect.Args(path, task="walker2d-2x3-random-fo"))
    assert "score:" in capsys.readouterr().out
    columns["terminals"][11] = columns["timeouts"][11] = True
    data.inspect.main(data.inspect.Args(write_dataset(tmp_path / "both.hdf5", columns)))
    assert "1 rows have both flags" in capsys.readouterr().out
    by_turns = np.arange(36).reshape(3, 12).T.flatten()  # rows of three copies, step by step
    for name, column in columns.items():  # the mistakes of files that are made at home
        columns[name] = column.copy()
    columns["terminals"][:] = columns["timeouts"][:] = False
    columns["terminals"][[5, 23, 35]] = columns["timeouts"][11] = True
    columns["next_observations"][:] = np.roll(columns["observations"], -1, axis=0)
    columns["actions"][:] = columns["actions"] > 0
    task = "halfcheetah-2x3-random-fo"
    data.inspect.main(data.inspect.Args(write_dataset(tmp_path / "home.hdf5", columns), task=task))
    output = capsys.readouterr().out
    assert "3 episodes end in the first state of the next one" in output
    assert "2 terminals come at the longest length, 12, and no time-out" in output
    assert "if they are options, set discrete=True" in output
    turns = {name: column[by_turns] for name, column in columns.items()}
    data.inspect.main(data.inspect.Args(write_dataset(tmp_path / "turns.hdf5", turns)))
    assert "most episodes have one row" in capsys.readouterr().out
    for args, part in [
        (data.inspect.Args(tmp_path / "no.hdf5"), "no file at"),
        (data.inspect.Args(path, histogram=picture), "exists"),
        (data.inspect.Args(path, histogram=tmp_path / "x.pdf"), ".png"),
        (data.inspect.Args(path, task="hopper-3x1-random-fo"), "(36, 17)"),
        (data.inspect.Args(tmp_path), "a folder, but holds no Minari dataset"),
        (data.inspect.Args(Path("minari:x")), "needs a --task"),
    ]:
        assert_refused(lambda args=args: data.inspect.main(args), part)
    del columns["timeouts"]
    other = write_dataset(tmp_path / "z.hdf5", columns)
    assert_refused(lambda: data.inspect.main(data.inspect.Args(other)), "of your own need none")
    del columns["rewards"]
    other = write_dataset(tmp_path / "y.hdf5", columns)
    assert_refused(lambda: data.inspect.main(data.inspect.Args(other)), "has no rewards", "layout")
