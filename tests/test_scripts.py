"""Every training script as people run it, on a dataset so small that a run takes seconds."""

import ast
import dataclasses
import functools
import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from made_up import BASELINES, documented_blocks, import_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mamujoco_envs
import training_run
from data.offline_dataset import OfflineDataset, load_dataset
from mamujoco_envs import find_task
from training_run import load_checkpoint, load_team

ROOT = Path(__file__).parents[1]
TRAINING = [*BASELINES, "moma_ppo", "world_model"]
TD3_FAMILY = ("itd3_bc", "matd3_bc", "icql", "iomar")
TINY = {name: ["--batch-size", 16, "--total-steps", 4, "--eval-every", 2] for name in BASELINES}
TINY["moma_ppo"] = ["--transitions", 500, "--epochs", 1, "--total-steps", 4, "--eval-every", 2]
TINY["world_model"] = ["--hidden", 16, 16, "--reward-hidden", 16, "--mask-hidden", 16]
TINY["world_model"] += ["--total-steps", 40, "--eval-every", 20]
TINY["inspo"] += ["--turn-steps", 2, "--pool-size", 64]
TINY["maiql"] += ["--rollout-every", 2]
TINY["logo"] += ["--model-steps", 4, "--rollouts", 4, "--refresh-every", 2, "--generations", 2]
TINY["logo"] += ["--cloning-steps", 2]
for conservative in ("icql", "iomar", "logo"):
    TINY[conservative] += ["--cql-batch-size", 8]
# Runs that go through other code than the script's default.
VARIANTS = [*TRAINING, "maiql --finetune", "moma_ppo --ground-truth", "logo --synthetic-share 0"]
PAPER_NAMES = {"maiql --finetune": "maiql_ft", "moma_ppo --ground-truth": "moma_ppo-ground-truth"}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_script = pytest.mark.parametrize("script", TRAINING)


def path_of(name):
    return f"baselines/{name}.py" if name in BASELINES else f"{name}.py"


@pytest.fixture(scope="session")
def world_models(reacher_file, ant_file, tmp_path_factory):
    """Small world models by the start of their tasks' names."""
    module, folder = import_script("world_model"), tmp_path_factory.mktemp("world_models")
    files = {"reacher-leader-only": reacher_file, "ant-medium-po": ant_file}
    models = {}
    for task, dataset in files.items():
        sizes = {"hidden": (16,), "reward_hidden": (16,), "mask_hidden": (16,), "batch_size": 32}
        args = module.Args(task, dataset=dataset, run_dir=folder / task, total_steps=30, **sizes)
        module.train(args)
        models[task.split("-")[0]] = folder / task / "world_model.pt"
    return models


@pytest.fixture
def run_tiny(run_script, reacher_file, ant_file, world_models, tmp_path, monkeypatch):
    """A few updates of a script; its exit status, output and run folder."""
    find_task = mamujoco_envs.find_task

    # Evaluations take as long as episodes do, and a figure takes longer than some of these runs.
    def find_short_task(name):
        task = dataclasses.replace(find_task(name), plot=None)
        return dataclasses.replace(task, episode_length=20) if name.startswith("ant") else task

    for module in (mamujoco_envs, training_run):
        monkeypatch.setattr(module, "find_task", find_short_task)

    def run_tiny(variant, *options, name="run", task="reacher-leader-only"):
        script, *flags = variant.split()
        arguments = ["--task", task, "--run-dir", tmp_path / name, *TINY[script], *flags]
        arguments += [] if script == "world_model" else ["--eval-episodes", 5]
        kind = task.split("-")[0]
        if kind in ("reacher", "ant"):
            arguments += ["--dataset", ant_file if kind == "ant" else reacher_file]
            if script == "moma_ppo" and not flags:
                arguments += ["--world-model", world_models[kind]]
        if script == "moma_ppo" and kind == "ant":
            arguments += ["--cloning-steps", 3]
        status, output = run_script(path_of(script), *arguments, *options)
        return status, output, tmp_path / name

    return run_tiny


def result_of(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def states_of(run_dir):
    """Weights by name, of teams and ensembles."""
    state = load_checkpoint(run_dir)["state"]
    return state.get("team") or state["ensemble"]


def scalars(run_dir):
    accumulator = EventAccumulator(str(run_dir))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


def assert_one_line(status, *parts):
    assert isinstance(status, str) and status.startswith("error: "), status
    assert "\n" not in status
    for part in parts:
        assert str(part) in status, status


# Runs.


@each_variant
def test_a_killed_run_resumes_to_the_bit(variant, run_tiny, run_script, monkeypatch):
    """Killed after its fourth checkpoint, in the middle, before the evaluation that follows it."""
    status, output, whole = run_tiny(variant)
    assert status == 0, output
    checkpoints, save = [], training_run.save

    def save_and_die(data, path):
        save(data, path)
        if path.name == "checkpoint.pt":
            checkpoints.append(data["step"])
            if len(checkpoints) == 4:
                sys.exit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(training_run, "save", save_and_die)
        status, output, killed = run_tiny(variant, name="killed")
    assert status == "killed" and 0 < checkpoints[-1] < load_checkpoint(whole)["step"]
    status, output = run_script(path_of(variant.split()[0]), "--resume", killed)
    assert status == 0, output
    one, other = states_of(whole), states_of(killed)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    one, other = result_of(whole), result_of(killed)
    for name in ("returns", "score", "paper_score", "elites", "state_error"):
        assert one.get(name) == other.get(name)
    steps = [[record["step"] for record in result["evaluations"]] for result in (one, other)]
    assert steps[0] == steps[1]
    for tag, values in scalars(whole).items():
        if tag.startswith(("eval/", "losses/")):
            assert scalars(killed)[tag] == values, tag
            assert all(map(math.isfinite, values.values())), tag


@each_variant
def test_every_script_runs_on_the_ant(variant, run_tiny):
    """Four agents with two actions each, and observations of different widths."""
    status, output, run_dir = run_tiny(variant, task="ant-medium-po")
    assert status == 0, output
    result = result_of(run_dir)
    if variant == "world_model":
        assert result["state_error"] > 0 and len(result["elites"]) == 5
        return
    assert len(result["returns"]) == 10 and np.isfinite(result["returns"]).all()
    algorithm = PAPER_NAMES.get(variant, variant.split()[0])
    assert result["paper_score"] == mamujoco_envs.PAPER_SCORES[algorithm].get("ant-medium-po")
    team = load_team(run_dir)
    observations = team.task.observe(torch.randn(3, 27))
    actions = team.act_greedily(observations, torch.zeros(3, *team.task.history_shape))
    assert actions.shape == (3, team.task.num_agents, team.task.action_dim)
    assert actions.abs().max() <= 1


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in ("iql", "world_model")])
def test_weights_of_padding_stay_zero(name, run_tiny):
    """The second agent sees two dimensions less than the first."""
    status, output, run_dir = run_tiny(name)
    assert status == 0, output
    found = set()
    for key, weight in states_of(run_dir).items():
        network = key.removeprefix("target_").split(".")[0]
        first = key.endswith((".0.weight", "embedding.weight"))
        first = first and (name, network) != ("inspo", "critics")  # these see the state
        if first and len(weight) in (2, 4) and "mixer" not in key:
            narrow = weight[1::2]  # of the agent, and of its twin critics
            assert (narrow[:, -2:] == 0).all(), key
            assert (narrow[:, -3] != 0).any(), key
            found.add(network)
    assert found


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "ibc"])
def test_targets_follow_at_the_given_pace(name, run_tiny):
    """One move of the targets: every second step for the TD3 family, else every step."""
    steps = 1 if name in ("iql", "maiql", "inspo") else 2
    options = ["--polyak", 0.25, "--total-steps", steps, "--memory", "attention", "--seed", 3]
    status, output, run_dir = run_tiny(name, *options)
    assert status == 0, output
    module, saved = import_script(name), load_checkpoint(run_dir)
    task = mamujoco_envs.find_task("reacher-leader-only")
    torch.manual_seed(saved["args"]["seed"])
    start = module.Team(task, torch.zeros(2, 11), module.Args(memory="attention"))
    weights, moved = saved["state"]["team"], 0
    for key, parameter in start.named_parameters():
        if key.startswith("target_"):
            online = weights[key.removeprefix("target_")]
            expected = 0.75 * parameter.data + 0.25 * online
            torch.testing.assert_close(weights[key], expected, rtol=1e-4, atol=1e-6, msg=key)
            moved += not torch.equal(parameter, online)
    assert moved


@pytest.mark.parametrize("name", TD3_FAMILY)
def test_policies_learn_at_every_second_step(name, run_tiny):
    status, output, run_dir = run_tiny(name)
    assert status == 0, output
    state = load_checkpoint(run_dir)["state"]["optimizer"]
    policies, critics, *_ = state["param_groups"]
    steps = [state["state"][group["params"][0]]["step"].item() for group in (policies, critics)]
    assert steps == [2, 4]


@each_script
def test_compile_computes_what_eager_mode_computes(script, run_tiny, monkeypatch):
    """Traced as --compile does it, random numbers included, but run without generated code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setenv("CXX", sys.executable)  # no compiler is needed here
    steps = 4 if script in ("inspo", "logo") else 2  # past their cloning
    status, output, eager = run_tiny(script, "--total-steps", steps)
    assert status == 0, output
    status, output, traced = run_tiny(script, "--total-steps", steps, "--compile", name="traced")
    assert status == 0, output
    one, other = states_of(eager), states_of(traced)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@each_script
def test_compile_on_a_gpu_computes_what_eager_mode_computes(script, run_tiny):
    options = ["--device", "cuda", "--total-steps", 10, "--eval-every", 5]
    status, output, eager = run_tiny(script, *options)
    assert status == 0, output
    status, output, fast = run_tiny(script, *options, "--compile", name="fast")
    assert status == 0, output
    one, other = states_of(eager), states_of(fast)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("name", TD3_FAMILY)
def test_learners_of_torques_refuse_choices(name, run_tiny):
    status, _, _ = run_tiny(name, task="coordination-neutral")
    assert_one_line(status, "coordination-neutral", "discrete")


# MOMA-PPO and its world model.


def test_what_moma_ppo_leaves_behind(run_tiny, world_models):
    status, output, run_dir = run_tiny("moma_ppo")
    assert status == 0, output
    result, shown = result_of(run_dir), scalars(run_dir)
    tags = [f"world_model/{name}" for name in ("reward", "penalty", "epsilon_g", "uncertain")]
    tags += [f"losses/{name}" for name in ("actor", "critic", "entropy", "action_penalty")]
    assert {"eval/return", "eval/normalized_score", *tags} <= set(shown)
    assert result["paper_score"] == "1.00 ± 0.01"
    assert result["world_model"]["dataset"]["name"] == "reacher-expert-mix"
    assert len(result["world_model"]["sha256"]) == 64
    model = torch.load(world_models["reacher"], weights_only=True)
    assert result["args"]["lambda_g"] == pytest.approx(model["lambda_g"])  # as calibrated
    assert math.isfinite(result["model_return"])


@pytest.mark.parametrize("penalty", ["epistemic", "aleatoric", "none"])
def test_penalties(penalty, run_tiny):
    status, output, run_dir = run_tiny("moma_ppo", "--penalty", penalty, "--total-steps", 1)
    assert status == 0, output
    shown = scalars(run_dir)["world_model/penalty"]
    assert all((value > 0) == (penalty != "none") for value in shown.values())


@pytest.mark.parametrize("bound, share", [("inf", 0), (0, 1)])
def test_the_uncertainty_that_ends_rollouts(bound, share, run_tiny):
    options = ["--max-uncertainty", bound, "--total-steps", 1]
    status, output, run_dir = run_tiny("moma_ppo", *options)
    assert status == 0, output
    assert set(scalars(run_dir)["world_model/uncertain"].values()) == {share}
    assert float(result_of(run_dir)["args"]["max_uncertainty"]) == float(bound)


def test_rollouts_in_the_true_simulator(run_tiny):
    status, output, run_dir = run_tiny("moma_ppo --ground-truth")
    assert status == 0, output
    result = result_of(run_dir)
    assert "model_return" not in result and "Reacher-v4" in result["world_model"]["name"]


def test_seeds_differ_and_repeat(run_tiny):
    returns = []
    for name, seed in (("a", 2), ("b", 2), ("c", 3)):
        status, output, run_dir = run_tiny(
            "moma_ppo", "--seed", seed, "--total-steps", 1, name=name
        )
        assert status == 0, output
        returns.append(result_of(run_dir)["returns"])
    assert returns[0] == returns[1] != returns[2]


def test_a_cloned_team_is_not_cloned_again(run_tiny, run_script, monkeypatch):
    """Killed as soon as the checkpoint after the cloning is whole."""
    status, output, whole = run_tiny("moma_ppo", "--cloning-steps", 3)
    assert status == 0, output
    save = training_run.save

    def save_and_die(data, path):
        save(data, path)
        if data["state"]["team"]["cloned"]:
            sys.exit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(training_run, "save", save_and_die)
        assert run_tiny("moma_ppo", "--cloning-steps", 3, name="killed")[0] == "killed"
    killed = whole.with_name("killed")
    assert load_checkpoint(killed)["step"] == 0
    status, output = run_script("moma_ppo.py", "--resume", killed)
    assert status == 0, output
    resumed = states_of(killed)
    for name, weight in states_of(whole).items():
        assert torch.equal(weight, resumed[name]), name


def test_an_extended_run_learns_from_its_first_step(run_tiny, run_script):
    """Its learning rate had decayed to zero."""
    status, output, run_dir = run_tiny("ibc")
    assert status == 0, output
    before = states_of(run_dir)
    status, output = run_script(path_of("ibc"), "--resume", run_dir, "--total-steps", 5)
    assert status == 0, output
    assert load_checkpoint(run_dir)["step"] == 5
    after = states_of(run_dir)
    assert any(not torch.equal(x, after[name]) for name, x in before.items() if "policy" in name)


def test_finetuning_learns_from_its_rollouts(run_tiny, monkeypatch):
    """After four steps offline rollouts are added at the sixth and the eighth."""
    drawn, make_batch = [], OfflineDataset.batch

    def keep_rows(dataset, rows, with_histories):
        drawn.append(rows)
        return make_batch(dataset, rows, with_histories)

    monkeypatch.setattr(OfflineDataset, "batch", keep_rows)
    status, output, run_dir = run_tiny("maiql --finetune", "--batch-size", 256)
    assert status == 0, output
    recorded = load_checkpoint(run_dir)["state"]["online_data"]["rows"][2000:]
    assert len(recorded) == 2000  # as many as the dataset has
    assert [bool(torch.isin(rows, recorded).any()) for rows in drawn] == [False] * 5 + [True] * 3


def test_a_finetuned_run_is_not_extended(run_tiny, run_script):
    status, output, run_dir = run_tiny("maiql --finetune")
    assert status == 0, output
    options = "--resume", run_dir, "--total-steps", 100
    assert_one_line(*run_script(path_of("maiql"), *options), "--total-steps cannot change")


def test_an_extended_run_of_inspo_does_not_clone_again(run_tiny, run_script):
    """A quarter of the steps that it began with are cloning, whatever --total-steps is later."""
    status, output, run_dir = run_tiny("inspo")
    assert status == 0, output
    cloned = {name: x for name, x in states_of(run_dir).items() if "behavior" in name}
    status, output = run_script(path_of("inspo"), "--resume", run_dir, "--total-steps", 24)
    assert status == 0, output
    assert cloned and load_checkpoint(run_dir)["step"] == 24
    extended = states_of(run_dir)
    for name, weight in cloned.items():
        assert torch.equal(weight, extended[name]), name


def test_a_world_model_that_has_changed_is_noticed(run_tiny, run_script, world_models, tmp_path):
    mine = tmp_path / "mine.pt"
    mine.write_bytes(world_models["reacher"].read_bytes())
    status, output, run_dir = run_tiny("moma_ppo", "--world-model", mine)
    assert status == 0, output
    model = torch.load(mine, weights_only=True)
    torch.save(model | {"lambda_g": 2 * model["lambda_g"]}, mine)
    status, _ = run_script("moma_ppo.py", "--resume", run_dir)
    assert_one_line(status, "the world model has changed")


def test_a_run_of_the_world_model(run_tiny):
    status, output, run_dir = run_tiny("world_model")
    assert status == 0, output
    result, shown = result_of(run_dir), scalars(run_dir)
    scaled = result["member_errors"]
    criterion = np.add(scaled["scaled_state_error"], scaled["scaled_reward_error"])
    assert sorted(result["elites"]) == sorted(criterion.argsort()[:5].tolist())
    expected = np.mean([scaled["state_error"][i] for i in result["elites"]])
    assert result["state_error"] == pytest.approx(expected, rel=1e-5)
    assert list(shown["eval/state_error"])[:2] == [0, 20]
    exported = torch.load(run_dir / "world_model.pt", weights_only=True)
    assert exported["dataset"]["transitions"] == 2000
    assert len(exported["state"][0][0]) == 5


def test_every_option_of_the_networks(run_tiny, tmp_path):
    """And MOMA-PPO reads what they make."""
    options = ["--target", "absolute", "--activation", "relu", "--no-normalize", "--members", 3]
    options += ["--elites", 2, "--decay", "none", "--beta", 0, "--output", tmp_path / "other.pt"]
    status, output, _ = run_tiny("world_model", *options)
    assert status == 0, output
    options = ["--world-model", tmp_path / "other.pt", "--total-steps", 1]
    status, output, run_dir = run_tiny("moma_ppo", *options, name="moma")
    assert status == 0, output
    assert result_of(run_dir)["world_model"]["activation"] == "relu"
    exported = torch.load(tmp_path / "other.pt", weights_only=True)
    assert exported["description"]["target"] == "absolute" and len(exported["mask"][0][0]) == 2
    assert (exported["input_std"] == 1).all() and (exported["target_mean"] == 0).all()


def test_the_papers_setting_of_the_world_model():
    module, seen = import_script("world_model"), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "check", lambda args: seen.append(args) or sys.exit())
        with pytest.raises(SystemExit):
            module.train(module.Args(paper=True))
    assert seen[0].total_steps == 3_000_000 and seen[0].hidden == (1024,) * 4


def test_an_existing_world_model_is_not_overwritten(run_tiny, world_models, tmp_path):
    before = world_models["reacher"].read_bytes()
    status, *_ = run_tiny("world_model", "--output", world_models["reacher"])
    assert_one_line(status, world_models["reacher"], "exists")
    assert world_models["reacher"].read_bytes() == before
    status, *_ = run_tiny("world_model", "--output", tmp_path / "nowhere" / "x.pt")
    assert_one_line(status, tmp_path / "nowhere")


# Bad input.


NONSENSE = [
    *[(name, "polyak", 1.5) for name in BASELINES if name != "ibc"],
    *[(name, option, -0.1) for name in ("iql", "maiql") for option in ("expectile", "beta")],
    *[(name, option, 0) for name in BASELINES for option in ("batch_size", "eval_episodes")],
    *[(name, "gamma", "nan") for name in (*BASELINES[1:], "moma_ppo")],
    *[(name, "learning_rate", value) for name in TRAINING for value in (-1, "nan", "inf")],
    *[(name, option, 0) for name in TRAINING for option in ("total_steps", "eval_every")],
    *[(name, "eval_episodes", 10**6) for name in (*BASELINES, "moma_ppo")],
    *[(name, "batch_size", 10**12) for name in (*BASELINES, "world_model")],
    *[(name, "seed", value) for name in TRAINING for value in (-1, 2**32)],
    *[("maiql --finetune", name, 0) for name in ("rollout_every", "rollout_length")],
    *[(name, "policy_delay", x) for name in (*TD3_FAMILY, "logo") for x in (0, 10**6)],
    *[(name, "policy_noise", "nan") for name in TD3_FAMILY],
    *[(name, "alpha", "inf") for name in ("itd3_bc", "matd3_bc")],
    *[(name, x, 0) for name in ("icql", "iomar", "logo") for x in ("cql_points", "cql_batch_size")],
    *[("iomar", "omar_elites", value) for value in (1, 21)],  # no variance; of twenty samples
    ("iomar", "omega", 1.1),
    *[("inspo", name, 0) for name in ("alpha", "turn_steps", "pool_size", "policy_samples")],
    ("inspo", "cloning_share", 1.1),
    ("inspo", "turn_steps", 10**6),  # no policy would learn after cloning
    *[("logo", name, 0) for name in ("model_steps", "horizon", "rollouts", "generations")],
    *[("logo", name, 0) for name in ("refresh_every", "embedding", "model_width")],
    *[("logo", "synthetic_share", value) for value in (-0.1, 1)],  # none of the data
    ("logo", "cloning_steps", -1),
    *[("logo", "cql_batch_size", value) for value in (3, 257)],  # does not divide 256
    *[("moma_ppo", "transitions", value) for value in (-400, 0, 200)],
    *[("moma_ppo", "rollout_length", value) for value in (-1, 0, 501)],
    *[("moma_ppo", name, 0) for name in ("minibatch_size", "epochs", "eval_episodes")],
    *[("moma_ppo", name, -1) for name in ("cloning_steps", "clip", "lambda_g", "lambda_r")],
    *[("moma_ppo", "max_uncertainty", value) for value in (-1, "nan")],
    ("moma_ppo", "gamma", 1),
    *[("world_model", name, 0) for name in ("batch_size", "hidden", "reward_hidden")],
    *[("world_model", "elites", value) for value in (1, 8)],  # no variance; of seven
    *[("world_model", name, "nan") for name in ("beta", "reward_beta", "reward_weight_decay")],
    ("world_model", "max_grad_norm", "nan"),
]


@pytest.mark.parametrize("variant, name, value", NONSENSE)
def test_nonsense_numbers_name_their_flag(variant, name, value, run_tiny):
    option = f"--{name.replace('_', '-')}"
    status, _, run_dir = run_tiny(variant, option, value)
    assert_one_line(status, option)
    assert not (run_dir / "checkpoint.pt").exists()


@each_script
def test_unknown_tasks_and_missing_datasets_are_one_line(script, run_tiny, run_script, tmp_path):
    status, _ = run_script(path_of(script), "--task", "reacher-leadr-only")
    assert_one_line(status, "'reacher-leadr-only'; did you mean reacher-leader-only")
    status, *_ = run_tiny(script, "--dataset", tmp_path / "nowhere.hdf5")
    assert_one_line(status, tmp_path / "nowhere.hdf5")


@each_script
def test_a_loss_that_is_not_finite_is_one_line(script, run_tiny):
    options = ["--learning-rate", 1e30, "--total-steps", 6, "--eval-every", 3]
    status, _, run_dir = run_tiny(script, *options)
    assert_one_line(status, "not finite", "smaller learning rate")
    assert all(weight.isfinite().all() for weight in states_of(run_dir).values())


@pytest.mark.parametrize(
    "name, options, part",
    [
        ("icql", {"cql_points": 71}, "--cql-points to the power of an agent's 2 actions is 5041"),
        ("iomar", {"cql_points": 71}, "--cql-points to the power of an agent's 2 actions is 5041"),
        ("maiql", {"finetune": True, "rollout_every": 10**6}, "--rollout-every must be from 1 to"),
    ],
)
def test_bad_options_are_refused_before_a_missing_dataset_is_recorded(
    name, options, part, tmp_path, monkeypatch
):
    script = import_script(name)
    monkeypatch.setattr(script, "load_dataset", lambda *_: pytest.fail("read a dataset"))
    arguments = {"task": "ant-medium-fo", "run_dir": tmp_path / "run"} | options
    with pytest.raises(mamujoco_envs.InputError, match=part):
        script.train(script.Args(**arguments))


def test_too_many_simulators_for_finetuning_are_refused():
    maiql = import_script("maiql")
    task = mamujoco_envs.find_task("reacher-leader-only")

    class Large:
        size = 10**6

    Large.task = task
    with pytest.raises(mamujoco_envs.InputError, match="total-steps"):
        maiql.OnlineData(Large(), maiql.Args(total_steps=100), 1.0)


# The command line.


def scripts_of_the_repository():
    patterns = ("*.py", "baselines/*.py", "data/*.py", "scripts/*.py")
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path for path in paths if "\nif __name__ ==" in path.read_text()]


SCRIPTS = [str(path.relative_to(ROOT)) for path in scripts_of_the_repository()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, run_script):
    status, output = run_script(script, "--help")
    assert status == 0 and "usage" in output


@each_script
def test_each_boolean_flag_goes_both_ways(script):
    module = import_script(script)
    flags = [field.name for field in dataclasses.fields(module.Args) if field.type is bool]
    assert "compile" in flags
    for name in flags:
        option = name.replace("_", "-")
        assert getattr(tyro.cli(module.Args, args=[f"--{option}"]), name) is True
        assert getattr(tyro.cli(module.Args, args=[f"--no-{option}"]), name) is False


@each_script
def test_every_option_has_a_docstring_and_every_default_is_valid(script):
    module = import_script(script)
    source = ast.parse((ROOT / path_of(script)).read_text())
    body = next(x.body for x in source.body if isinstance(x, ast.ClassDef) and x.name == "Args")
    for field, docstring in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(docstring.value.value, str)
    for args in module.DEFAULTS.values():
        assert tyro.cli(module.Args, args=[], default=args) == args


def documented_commands():
    """Lines that start with `python ` in the code blocks of all pages and in docstrings."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [block for page in pages for block in page.read_text().split("```")[1::2]]
    blocks += [
        ast.get_docstring(ast.parse((ROOT / script).read_text())) or "" for script in SCRIPTS
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip().startswith("python ")))


class Parsed(Exception):
    """Ends a script as soon as its command line is understood."""


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_parse(line, run_script, monkeypatch):
    _, script, *arguments = shlex.split(line.partition(" | ")[0], comments=True)
    if script == "-m":
        module, *arguments = arguments
        script = module.replace(".", "/") + ".py"
        if module == "pytest":
            return
    assert script in SCRIPTS
    Path("pair.py").write_text(documented_blocks("python")[0])
    main, cli = training_run.main, tyro.cli
    subcommands = tyro.extras.subcommand_cli_from_dict

    def stop(*_, **__):
        raise Parsed

    def parse_and_stop(parse):
        def parse_and_stop(*arguments, **options):
            parse(*arguments, **options)
            raise Parsed

        return parse_and_stop

    def main_without_training(train, defaults):
        saved = {name: training_run.portable(x, ROOT) for name, x in vars(defaults[None]).items()}
        checkpoint = {"script": Path(script).stem, "args": saved}
        monkeypatch.setattr(training_run, "load_checkpoint", lambda _: checkpoint)
        monkeypatch.setattr(tyro, "cli", cli)
        main(stop, defaults)

    monkeypatch.setattr(training_run, "main", main_without_training)
    monkeypatch.setattr(tyro, "cli", parse_and_stop(cli))
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", parse_and_stop(subcommands))
    if "--help" in arguments:
        status, output = run_script(script, *arguments)
        assert status == 0 and "usage" in output
        return
    with pytest.raises(Parsed):
        status, output = run_script(script, *arguments)
        pytest.fail(f"{status}: {output}")


# Learning: the coordination game, Table 3, and its continuous sister.


@pytest.mark.parametrize(
    "name, behavior, score",
    [
        ("ibc", "favorable", 1),
        # Where agents lean apart, learners that execute alone follow the data.
        ("ibc", "unfavorable", 0),
        ("maiql", "favorable", 1),
        ("maiql", "unfavorable", 0),
        # Those who learn one after another, each on what the others do by then, agree.
        ("inspo", "unfavorable", 1),
        # A single learner that chooses for all does not.
        ("iql", "unfavorable", 1),
    ],
)
def test_who_agrees_in_the_coordination_game(name, behavior, score, run_script, tmp_path):
    options = ["--task", f"coordination-{behavior}", "--total-steps", 250, "--eval-every", 250]
    options += ["--batch-size", 64, "--seed", 1 + score]  # whose untrained teams do the opposite
    status, output = run_script(path_of(name), *options, "--run-dir", tmp_path / "run")
    assert status == 0, output
    result = result_of(tmp_path / "run")
    assert [result["evaluations"][0]["score"], result["score"]] == [1 - score, score]


def test_logo_learns_in_a_model_of_its_own(run_script, tmp_path):
    options = ["--task", "coordination-favorable", "--model-steps", 100, "--total-steps", 100]
    options += ["--eval-every", 100, "--batch-size", 64]
    status, output = run_script(path_of("logo"), *options, "--run-dir", tmp_path / "run")
    assert status == 0, output
    assert result_of(tmp_path / "run")["score"] == 1


def test_logo_resumes_among_its_rollouts(run_tiny, run_script, monkeypatch):
    """Killed when cloning has just ended, in the middle of a generation of rollouts."""
    options = ["--total-steps", 8, "--refresh-every", 4]  # after four steps of the model
    status, output, whole = run_tiny("logo", *options)
    assert status == 0, output
    save = training_run.save

    def save_and_die(data, path):
        save(data, path)
        if path.name == "checkpoint.pt" and data["step"] == 6:
            sys.exit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(training_run, "save", save_and_die)
        status, output, killed = run_tiny("logo", *options, name="killed")
    assert status == "killed"
    status, output = run_script(path_of("logo"), "--resume", killed)
    assert status == 0, output
    one, other = (load_checkpoint(run_dir)["state"] for run_dir in (whole, killed))
    for part in ("team", "synthetic"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    for name, moments in one["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, other["optimizer"]["state"][name][key]), (name, key)


def test_logo_learns_in_the_model_of_an_earlier_run(run_tiny, run_script, world_models):
    status, output, first = run_tiny("logo")
    assert status == 0, output
    model = "--world-model", first / "world_model.pt"
    status, output, second = run_tiny("logo", *model, name="second")
    assert status == 0, output
    assert load_checkpoint(second)["step"] == load_checkpoint(first)["step"] - 4  # the model's
    assert not (second / "world_model.pt").exists()
    one, other = (load_checkpoint(run_dir)["state"]["model"] for run_dir in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    status, output = run_script(path_of("logo"), "--resume", second, "--total-steps", 6)
    assert status == 0, output
    # What cannot be used is refused before the run begins.
    ensemble = "--world-model", world_models["reacher"]
    for options, message in (
        (ensemble, "is not a model of this script; make one with: python baselines/logo.py"),
        (("--world-model", "no/model.pt"), "no world model at no/model.pt; without --world-model"),
        ((*model, "--synthetic-share", 0), "uses the data alone; leave --world-model out"),
        (("--synthetic-share", 0.001), "a batch needs data and rollouts; use another"),
    ):
        status, output, refused = run_tiny("logo", *options, name="refused")
        assert_one_line(status, message)
        assert not refused.exists()
    # A run that is resumed cannot do without its model.
    (first / "world_model.pt").unlink()
    status, output = run_script(path_of("logo"), "--resume", second)
    assert_one_line(status, "world_model.pt; put it back")


@pytest.mark.parametrize("cloning_steps, policy_steps", [(0, 2), (2, 1)])
def test_logos_policies_forget_the_moments_of_cloning(cloning_steps, policy_steps, run_tiny):
    """Of four steps every second one is of the policies."""
    status, output, run_dir = run_tiny("logo", "--cloning-steps", cloning_steps)
    assert status == 0, output
    state = load_checkpoint(run_dir)["state"]["optimizer"]
    policies, critics, *_ = state["param_groups"]
    steps = [state["state"][group["params"][0]]["step"].item() for group in (policies, critics)]
    assert steps == [policy_steps, 4]


@pytest.mark.parametrize("uncertainty", ["weighting", "penalty"])
def test_the_range_of_logos_targets(uncertainty, run_tiny, reacher_file):
    status, output, run_dir = run_tiny("logo", "--uncertainty", uncertainty)
    assert status == 0, output
    dataset = load_dataset(find_task("reacher-leader-only"), reacher_file, "cpu")
    rewards = dataset.rewards
    unit = rewards[dataset.split()[0]].std()  # what the model standardises by
    lowest = rewards.min() - (10 * unit if uncertainty == "penalty" else 0)
    exported = torch.load(run_dir / "world_model.pt", weights_only=True)
    quantile = exported["errors"]["uncertainty_0.99"]
    assert exported["uncertainty_scale"].item() == pytest.approx(quantile)
    got = states_of(run_dir)["value_range"]
    torch.testing.assert_close(got, torch.stack([lowest, torch.zeros(())]) / rewards.std())


def test_moma_ppo_agrees_where_the_data_leads_apart(run_script, tmp_path):
    """On the unfavorable dataset most joint actions of the data fail."""
    options = ["--task", "coordination-unfavorable", "--total-steps", 5]
    status, output = run_script("moma_ppo.py", *options, "--run-dir", tmp_path / "run")
    assert status == 0, output
    result = result_of(tmp_path / "run")
    assert result["score"] == 1 and result["args"]["rollout_length"] == 1


@pytest.mark.parametrize("name", TD3_FAMILY)
def test_learners_of_torques_improve_on_the_continuous_game(name, run_script, tmp_path):
    """Agents of the data earn 0.06; who climbs a critic goes to the end of the interval."""
    options = ["--task", "continuous-favorable", "--total-steps", 120, "--eval-every", 120]
    options += ["--batch-size", 64]
    status, output = run_script(path_of(name), *options, "--run-dir", tmp_path / "run")
    assert status == 0, output
    assert result_of(tmp_path / "run")["score"] > 0.5


def test_models_are_compared(run_script, world_models, reacher_file):
    options = ["--models", world_models["reacher"], "--dataset", reacher_file, "--starts", 20]
    status, output = run_script("scripts/compare_models.py", *options)
    assert status == 0, output
    assert output.count("worst dimension: ") == 3
    module = import_script("scripts.compare_models")
    changes = torch.randn(1000, 3)
    changes[:, 2] = 0  # as a target's, which does not move
    blind = changes * torch.tensor([2.0, 0.0, 1.0]) + 0.1 * torch.randn(1000, 3)
    assert module.worst_correlation(changes, changes) == pytest.approx(1)
    assert abs(module.worst_correlation(blind, changes)) < 0.2
    constant = changes * torch.tensor([1.0, 0.0, 1.0])
    assert module.worst_correlation(constant, changes) == 0
