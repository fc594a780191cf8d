"""Downloads D4RL's offline datasets of the ant (Fu et al. 2020), the ones that the paper uses.

    python -m data.download_d4rl --name medium    # data/ant-medium-d4rl.hdf5
    python world_model.py --task ant-medium-fo --dataset data/ant-medium-d4rl.hdf5 --output data/ant-medium-d4rl.pt
    python moma_ppo.py --task ant-medium-fo --dataset data/ant-medium-d4rl.hdf5 --world-model data/ant-medium-d4rl.pt

The same command goes on with a download that broke off. The file is checked before it gets its name, so it is there whole or not
at all. (Without these files, scripts record datasets of their own by the same protocol: data/collect_ant.py.)
"""

import http.client
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from data.offline_dataset import FOLDER, OfflineDataset, read_columns
from mamujoco_envs import InputError, find_task

HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
MIRROR = "the dataset imone/D4RL on the Hugging Face hub"


@dataclass
class Args:
    name: Literal["random", "medium", "full-replay", "expert"] = "medium"
    """which dataset"""
    output: Path | None = None
    """file to write; data/ant-NAME-d4rl.hdf5 if not given"""
    host: str = HOST
    """folder of D4RL's files on the web"""


def fetch(url: str, part: Path, attempts: int = 5) -> None:
    """Brings all of `url` into `part`, going on where `part` ends; raises `OSError` or `http.client.HTTPException` if it cannot.

    Beside `part` lies the server's name for this version of the file (ETag), so that two versions are never mixed.
    """
    version = part.with_name(part.name + ".version")
    for attempt in range(1, attempts + 1):
        have = part.stat().st_size if part.exists() and version.exists() else 0
        headers = {"Range": f"bytes={have}-", "If-Range": version.read_text()} if have else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=30
            ) as response:
                if response.status == 206 and not response.headers.get(
                    "Content-Range", ""
                ).startswith(f"bytes {have}-"):
                    raise OSError("the server sent another part than asked for")
                have = (
                    have if response.status == 206 else 0
                )  # another version, or a server without ranges: from the beginning
                if response.headers["Content-Length"] is None:
                    raise OSError("the server does not say how long the file is")
                total = have + int(response.headers["Content-Length"])
                name = response.headers["ETag"] or response.headers["Last-Modified"]
                version.write_text(name) if name else version.unlink(missing_ok=True)
                with part.open("ab" if have else "wb") as file:
                    with tqdm(
                        total=total,
                        initial=have,
                        unit="B",
                        unit_scale=True,
                        mininterval=1,
                        disable=None,
                    ) as progress:
                        while chunk := response.read(1 << 20):
                            file.write(chunk)
                            progress.update(len(chunk))
            if part.stat().st_size == total:
                version.unlink(missing_ok=True)
                return
            raise OSError(f"it broke off after {part.stat().st_size} of {total} bytes")
        except urllib.error.HTTPError as error:
            if (
                error.code == 416
            ):  # nothing is left to send, although the file was not whole: begin again
                version.unlink()
            elif error.code < 500 or attempt == attempts:
                raise
        except (OSError, http.client.HTTPException):
            if attempt == attempts or have == (
                part.stat().st_size if part.exists() else 0
            ):  # nothing came
                raise
        time.sleep(attempt)
    raise OSError("the server sent nothing to the end")


def download(args: Args) -> Path:
    """The path of the whole, checked file; raises `InputError` with what to do otherwise."""
    task, output = (
        find_task(f"ant-{args.name}-fo"),
        args.output or FOLDER / f"ant-{args.name}-d4rl.hdf5",
    )
    file_name = f"ant_{args.name.replace('-', '_')}-v2.hdf5"
    if output.exists():
        raise InputError(f"{output} exists; move it away to download it again")
    if not output.parent.is_dir():
        raise InputError(f"no folder {output.parent} to write {output.name} to")
    url, part = f"{args.host}/{file_name}", output.with_name(output.name + ".part")
    print(f"{url} to {output}", flush=True)
    try:
        fetch(url, part)
    except (OSError, ValueError, http.client.HTTPException) as error:
        kept = (
            "; what came is kept, so the same command goes on with it"
            if part.with_name(part.name + ".version").exists()
            else ""
        )
        raise InputError(
            f"cannot download {url} ({error}){kept}; or take {file_name} from {MIRROR} and put it at {output}"
        ) from None
    try:
        columns, source = read_columns(task, part)
    except InputError as error:
        part.unlink()
        reason = str(error).replace(str(part), url).split(";")[0]
        raise InputError(
            f"{reason}; it was removed; take {file_name} from {MIRROR} and put it at {output}"
        ) from None
    part.replace(output)
    dataset = OfflineDataset(task, columns, source=source)
    scores = 100 * task.normalized_score(dataset.episode_returns())
    print(
        f"{output}: {dataset.size} transitions, {len(scores)} episodes, score in %: mean {np.mean(scores):.1f}, median {np.median(scores):.1f}"
    )
    return output


if __name__ == "__main__":
    try:
        download(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
