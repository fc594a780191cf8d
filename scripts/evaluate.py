"""Scores a run again: greedy episodes of its latest checkpoint in the true environment.

    python scripts/evaluate.py --run runs/RUN
    python scripts/evaluate.py --run runs/RUN --episodes 1000 --output scores.json
    python scripts/evaluate.py --run runs/RUN --episodes 10 --video    # and films the first one

The run may be finished, stopped or still running. With the default seed the episodes are those of
the run's own evaluations, on which settings may have been tuned. --seed 20000 gives others:
episode i starts from seed + i, so a seed nearby repeats most of them. A run needs neither its
dataset nor its world model here, unless its task has no environment.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import tyro

from mamujoco_envs import EVALUATION_SEED, InputError, evaluate, require
from training_run import (
    FINAL_EPISODES,
    check_output,
    check_range,
    load_checkpoint,
    load_team,
    save,
    say,
)


@dataclass
class Args:
    run: Path
    """run folder; its checkpoint.pt is scored"""
    episodes: int = FINAL_EPISODES
    """greedy episodes"""
    seed: int = EVALUATION_SEED
    """episode i starts from seed + i"""
    output: Path | None = None
    """a .json file for the scores and raw returns; by default they are printed only"""
    video: bool = False
    """also film the first episode, as RUN/film.gif (scripts/render.py)"""
    task: str | None = None
    """FILE:NAME of your own task, if its file has moved; by default, as the run knows it"""


def main(args: Args) -> dict:
    check_range(args, 1, 10_000, "episodes")  # each has its own simulator
    require(args.seed >= 0, f"--seed must not be negative; it is {args.seed}")
    if args.output:
        require(args.output.suffix == ".json", f"--output must end in .json; it is {args.output}")
        check_output(args.output)
    checkpoint = load_checkpoint(args.run)  # only once: the run may be saving newer ones
    team = load_team(args.run, args.task, checkpoint)
    if args.video:  # before the episodes, because not every machine renders
        render = importlib.import_module("scripts.render")
        film = render.Args(run=args.run, seed=args.seed, task=args.task)
        render.check(film, team)
    task, script, step = team.task, checkpoint["script"], checkpoint["step"]
    record = evaluate(task, team.act_greedily, args.episodes, args.seed).record()
    if args.output:
        origin = {"task": task.name, "script": script, "step": step, "seed": args.seed}
        save(origin | record, args.output)

    # One episode has no standard error.
    error = "" if record["score_stderr"] is None else f" ± {record['score_stderr']:.3f}"
    episodes = f"{args.episodes} greedy episode{'s' if args.episodes > 1 else ''}"
    say(f"{task.name}, {script}.py after {step} steps: {episodes} from seed {args.seed}")
    where = f" in {record['evaluated_in']}" if "evaluated_in" in record else ""
    paper = task.paper_score(checkpoint.get("algorithm", script)) or "no figure"
    say(f"score {record['score']:.3f}{error}{where} (paper: {paper})")
    say(f"mean return {record['return']:.4g}")
    if args.video:
        render.main(film, team)
    return record


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
