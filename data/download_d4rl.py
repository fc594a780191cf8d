"""Downloads D4RL's MuJoCo datasets (Fu et al. 2020, arXiv 2004.07219); the paper uses the ant's.

    python -m data.download_d4rl --environment ant --name medium    # data/ant-medium-d4rl.hdf5

Scripts use it with `--dataset data/ant-medium-d4rl.hdf5`, and MOMA-PPO needs a world model of it:
docs/datasets.md has the commands. Without D4RL's files, scripts record datasets of their own by the
same protocol (data/collect_mujoco.py).

An interrupted download is kept, and the same command resumes it. The file gets its final name only
once it is complete and checked.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder's inspect.py would shadow Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import errno
import http.client
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from data.offline_dataset import FOLDER, DamagedFile, OfflineDataset, read_columns
from mamujoco_envs import InputError, find_task, require
from training_run import say

HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
MIRROR = "the dataset imone/D4RL on the Hugging Face hub"
# One task per environment, against which its files are checked.
TASKS = {
    "ant": "ant-{}-fo",
    "halfcheetah": "halfcheetah-2x3-{}-fo",
    "hopper": "hopper-3x1-{}-fo",
    "walker2d": "walker2d-2x3-{}-fo",
}
ATTEMPTS = 5
CHUNK = 1 << 16  # bytes


@dataclass
class Args:
    environment: Literal["ant", "halfcheetah", "hopper", "walker2d"] = "ant"
    """environment of the dataset"""
    name: Literal["random", "medium", "full-replay", "expert"] = "medium"
    """which dataset"""
    output: Path | None = None
    """file to write; by default data/ENVIRONMENT-NAME-d4rl.hdf5"""
    host: str = HOST
    """URL of the folder that holds D4RL's files"""


class Part:
    """The file that a download writes to, and what is needed to resume it.

    The server's name for this version (its ETag or its date) is stored next to it, so that two
    versions are never mixed. Without it, a part cannot be resumed.
    """

    def __init__(self, output: Path):
        self.path = output.with_name(f"{output.name}.part")
        self.version = output.with_name(f"{output.name}.part.version")
        self.received = 0  # bytes, by this command
        self.whole = False

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def can_be_resumed(self) -> bool:
        return self.size() > 0 and self.version.exists()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)


def request_rest(url: str, part: Part) -> None:
    """Asks the server once for what `part` lacks, and writes what it sends.

    Raises `OSError` or `http.client.HTTPException` unless the part is whole then.
    """
    have, headers = 0, {}
    if part.can_be_resumed():
        have = part.size()
        headers = {"Range": f"bytes={have}-", "If-Range": part.version.read_text()}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=20) as response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("the server sent another part than asked for")
        if response.headers["Content-Length"] is None:
            raise OSError("the server does not say how long the file is")
        # The server sends the whole file if it has another version or does not support ranges.
        have = have if resumed else 0
        missing = int(response.headers["Content-Length"])
        check_room(part.path, missing)

        version = response.headers["ETag"] or response.headers["Last-Modified"]
        part.version.unlink(missing_ok=True)
        with part.path.open("ab" if resumed else "wb") as file:
            if version:
                part.version.write_text(version)
            with Progress(have + missing, "byte", have) as progress:
                while chunk := response.read1(CHUNK):
                    file.write(chunk)
                    part.received += len(chunk)
                    progress.advance(len(chunk))
    part.whole = part.size() == have + missing
    if not part.whole:
        raise OSError(f"it broke off after {part.size()} of {have + missing} bytes")


def fetch(url: str, part: Part) -> None:
    """Downloads all of `url` to `part`, in up to ATTEMPTS attempts, as long as they make progress
    or the server reports an error of its own.

    Raises `OSError` or `http.client.HTTPException` if that fails.
    """
    for attempt in range(1, ATTEMPTS + 1):
        received = part.received
        try:
            request_rest(url, part)
            return
        except urllib.error.HTTPError as error:
            # 416: nothing follows the part. It is whole, or from another version: start again.
            if error.code == 416:
                part.whole = error.headers["Content-Range"] == f"bytes */{part.size()}"
                if part.whole:
                    return
                part.remove()
            elif error.code < 500 or attempt == ATTEMPTS:
                raise
        except (OSError, http.client.HTTPException) as error:
            is_full = getattr(error, "errno", None) == errno.ENOSPC
            if is_full or attempt == ATTEMPTS or part.received == received:
                raise
        time.sleep(attempt)
    raise OSError("the server sends no more of it")


def download(args: Args) -> Path:
    """Returns the path of the whole, checked file, or raises `InputError` with advice."""
    task = find_task(TASKS[args.environment].format(args.name))
    output = args.output or FOLDER / f"{args.environment}-{args.name}-d4rl.hdf5"
    check_output(output, size=0)
    file_name = f"{args.environment}_{args.name.replace('-', '_')}-v2.hdf5"
    url, part = f"{args.host}/{file_name}", Part(output)
    by_hand = f"take {file_name} from {MIRROR} and put it at {output}"

    say(f"downloading {url} to {output}")
    try:
        fetch(url, part)
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        resumable = "; what arrived is kept, and the same command resumes the download"
        kept = resumable if part.can_be_resumed() else ""
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise InputError(f"the disk is full; make room for {output}{kept}") from None
        advice = kept or "; try again later"
        raise InputError(f"cannot download {url} ({error}){advice}, or {by_hand}") from None
    except KeyboardInterrupt:
        if part.can_be_resumed():
            say("stopped; the same command resumes the download")
        raise
    finally:
        if not part.whole and not part.can_be_resumed():
            part.remove()

    say(f"checking {output}")
    try:
        columns, source = read_columns(task, part.path)
    except DamagedFile as error:
        part.remove()
        reason = str(error).replace(str(part.path), url).split(";")[0]
        raise InputError(f"{reason}; it was removed; {by_hand}") from None
    except InputError as error:
        reason = str(error).replace(str(part.path), url)
        kept = f"the download is kept at {part.path}; move it away before you repeat the command"
        raise InputError(f"{reason}; {kept}") from None
    part.path.replace(output)
    part.remove()
    dataset = OfflineDataset(task, columns, source=source)
    scores = 100 * task.normalized_score(dataset.episode_returns())
    score = f"score in %: mean {np.mean(scores):.1f}, median {np.median(scores):.1f}"
    say(f"{output}: {dataset.size} transitions, {len(scores)} episodes, {score}")
    return output


# Bookkeeping.


def check_output(path: Path, size: float) -> None:
    """Raises `InputError` unless a new file of `size` bytes can be written to `path`."""
    folder = path.parent
    require(not os.path.lexists(path), f"{path} exists; move it away or give another --output")
    require(folder.is_dir(), f"no folder {folder} to write {path.name} to; create it")
    require(os.access(folder, os.W_OK | os.X_OK), f"cannot write to {folder}; change its mode")
    check_room(path, size)


def check_room(path: Path, size: float) -> None:
    """Raises `InputError` unless `size` more bytes can be written to `path`."""
    needed, free = size + 1e6, shutil.disk_usage(path.parent).free
    shortage = f"{path} needs {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free"
    require(free >= needed, f"{shortage}; make room")


class Progress:
    """Progress of a long command: a bar in a terminal, elsewhere a line at least every 30 s."""

    def __init__(self, total: int, unit: str, done: int = 0):
        self.total, self.unit, self.done, self.said = total, unit, done, time.monotonic()
        options = {"unit_scale": True, "mininterval": 1, "miniters": 0, "disable": None}
        self.bar = tqdm(total=total, initial=done, unit=unit, **options)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def advance(self, count: int, note: str = "") -> None:
        """Advances by `count`; `note` says what is happening."""
        self.done += count
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.said > 20:
            done, total = (tqdm.format_sizeof(number) for number in (self.done, self.total))
            say(f"{done} of {total} {self.unit}s{', ' if note else ''}{note}")
            self.said = time.monotonic()


def interrupt(number, _) -> None:
    """Makes SIGTERM end a script as Ctrl-C does, so that it removes its temporary files."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        download(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
