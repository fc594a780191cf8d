"""The download of D4RL's files from a server that misbehaves."""

import http.server
import re
import threading
import time

import h5py
import numpy as np
import pytest

from data import download_d4rl
from data.download_d4rl import Args, download
from data.offline_dataset import load_dataset
from mamujoco_envs import InputError, find_task

ROWS = 57


def write(path, width=8):
    """As D4RL's ant files: 111 dimensions, 84 of them zero, double precision, no last flag."""
    rng = np.random.default_rng(0)
    states = np.pad(rng.normal(size=(ROWS + 1, 27)), ((0, 0), (0, 84)))
    columns = {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": rng.uniform(-1, 1, (ROWS, width)),
        "rewards": rng.normal(size=ROWS),
        "terminals": np.arange(ROWS) == 20,
        "timeouts": np.arange(ROWS) == 40,
    }
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, compression="gzip")
    return path.read_bytes()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under any path; breaks off after `breaks` bytes of the first answers."""

    version = '"1"'

    def __init__(self, content, broken=0, breaks=1000, ranges=True, status=200):
        self.content, self.broken, self.breaks = content, broken, breaks
        self.ranges, self.status, self.requests = ranges, status, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.host = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.status != 200:
            self.send_error(server.status)
            return
        known = server.ranges and self.headers.get("If-Range") == server.version
        first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and known else 0
        size = len(server.content)
        if first >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if asked and known else 200)
        if asked and known:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - first))
        self.send_header("ETag", server.version)
        self.end_headers()
        breaks = server.breaks if len(server.requests) <= server.broken else size
        self.wfile.write(server.content[first:][:breaks])

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def content(tmp_path):
    return write(tmp_path / "served.hdf5")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "ant.hdf5"


def parts(output):
    return list(output.parent.glob("*.part*"))


def assert_refused(args, *words):
    with pytest.raises(InputError) as error:
        download(args)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("broken", [0, 2])
def test_a_download_continues_where_it_broke_off(output, content, broken, ranges):
    server = Server(content, broken, ranges=ranges)
    assert download(Args("ant", "full-replay", output, server.host)) == output
    assert output.read_bytes() == content and not parts(output)
    starts = [None, "bytes=1000-", "bytes=2000-" if ranges else "bytes=1000-"][: broken + 1]
    assert server.requests == [("/ant_full_replay-v2.hdf5", start) for start in starts]
    load_dataset(find_task("ant-full-replay-fo"), output)


def test_a_later_command_continues_with_what_came(output, content):
    server = Server(content, broken=5, breaks=300)
    words = ("broke off after 1500 of", "the same command resumes", "imone/D4RL")
    assert_refused(Args("ant", "medium", output, server.host), *words)
    assert not output.exists()
    assert output.with_name("ant.hdf5.part").read_bytes() == content[:1500]
    download(Args("ant", "medium", output, server.host))
    assert output.read_bytes() == content and server.requests[-1][1] == "bytes=1500-"


def test_two_versions_of_a_file_are_not_mixed(output, content):
    server = Server(content[::-1], broken=5, breaks=300)
    assert_refused(Args("ant", "medium", output, server.host), "broke off")
    server.content, server.version = content, '"2"'
    download(Args("ant", "medium", output, server.host))
    assert output.read_bytes() == content


@pytest.mark.parametrize("extra, requests", [(b"", 1), (b"more", 2)])
def test_a_whole_part_is_kept_and_one_that_is_too_long_dropped(output, content, extra, requests):
    server = Server(content)
    output.with_name("ant.hdf5.part").write_bytes(content + extra)
    output.with_name("ant.hdf5.part.version").write_text(server.version)
    download(Args("ant", "medium", output, server.host))
    assert output.read_bytes() == content and not parts(output)
    assert len(server.requests) == requests


def test_what_is_no_dataset_is_removed(output):
    server = Server(b"<html>the lab has moved</html>" * 50)
    words = ("ant_medium-v2.hdf5", "it was removed", f"put it at {output}")
    assert_refused(Args("ant", "medium", output, server.host), *words)
    assert not output.exists() and not parts(output)


def test_a_dataset_of_another_environment_gets_no_name(output, tmp_path):
    server = Server(write(tmp_path / "hopper.hdf5", width=3))
    assert_refused(Args("ant", "medium", output, server.host), "'actions'", "(57, 3)")
    assert not output.exists()


def test_a_host_that_is_down_names_the_mirror(output, content):
    down = Server(content)
    down.shutdown()
    down.server_close()
    hosts = [down.host, *(Server(content, status=status).host for status in (404, 503)), "nonsense"]
    for host in hosts:
        words = ("cannot download", "ant_expert-v2.hdf5", "imone/D4RL", f"put it at {output}")
        assert_refused(Args("ant", "expert", output, host), *words)
    assert not output.exists() and not parts(output)


def test_a_file_that_is_there_stays(output, tmp_path):
    output.write_text("precious")
    assert_refused(Args("ant", "medium", output), "exists; move it away")
    assert output.read_text() == "precious"
    assert_refused(Args("ant", "medium", tmp_path / "nowhere" / "ant.hdf5"), "no folder")


def test_the_default_place_is_next_to_the_loader():
    assert download_d4rl.FOLDER.name == "data"
