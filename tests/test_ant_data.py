"""Datasets of the ant: D4RL's own files, their download from a server that misbehaves, and our recording."""

import http.server
import re
import threading
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from data import collect_ant, download_d4rl
from data.collect_ant import (
    ACTION_DIM,
    STATE_DIM,
    Dataset,
    critic_loss,
    make_policy,
    policy_loss,
    record_dataset,
    sample_actions,
)
from data.download_d4rl import Args, download
from data.offline_dataset import load_dataset
from mamujoco_envs import TASKS, InputError, Simulator

TASK = TASKS["ant-medium-po"]
ROWS = 57


def d4rl_columns():
    """As in D4RL's ant_medium-v2.hdf5: 111 dimensions, 84 of them zero, double precision, a last row with neither flag."""
    rng = np.random.default_rng(0)
    columns = {
        "observations": rng.normal(size=(ROWS, 111)),
        "actions": rng.uniform(-1, 1, (ROWS, 8)),
        "rewards": rng.normal(size=ROWS),
        "next_observations": rng.normal(size=(ROWS, 111)),
        "terminals": np.arange(ROWS) == 20,
        "timeouts": np.arange(ROWS) == 40,
    }
    columns["observations"][:, 27:] = columns["next_observations"][:, 27:] = 0
    return columns


def write(path, columns):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, compression="gzip")
        file["infos/qpos"] = np.zeros((ROWS, 15))
        file["metadata/algorithm"] = np.bytes_("SAC")
    return path


# --- D4RL's files ---


def test_d4rl_files_load_as_they_are(tmp_path):
    columns = d4rl_columns()
    dataset = load_dataset(TASK, write(tmp_path / "ant_medium-v2.hdf5", columns))
    assert (
        dataset.states.shape == dataset.next_states.shape == (ROWS, 27)
        and dataset.states.dtype == torch.float32
    )
    assert torch.equal(
        dataset.states, torch.tensor(columns["observations"][:, :27], dtype=torch.float32)
    )
    assert torch.equal(
        dataset.next_states, torch.tensor(columns["next_observations"][:, :27], dtype=torch.float32)
    )
    for agent, driven in enumerate([(2, 3), (4, 5), (6, 7), (0, 1)]):
        assert torch.equal(
            dataset.actions[:, agent],
            torch.tensor(columns["actions"][:, list(driven)], dtype=torch.float32),
        )
    assert dataset.episode_starts.unique().tolist() == [
        0,
        21,
        41,
    ]  # the last row closes its episode
    assert dataset.masks.sum() == ROWS - 1 and dataset.masks[20] == 0
    assert dataset.description["source"] == "ant_medium-v2.hdf5"


def test_files_of_other_versions_are_refused(tmp_path):
    columns = d4rl_columns()
    columns["observations"][3, 50] = 0.1
    with pytest.raises(InputError, match="'observations' in .* has contact forces"):
        load_dataset(TASK, write(tmp_path / "contact.hdf5", columns))
    columns = d4rl_columns()
    del columns["next_observations"]
    with pytest.raises(InputError, match="has no 'next_observations'.*take D4RL's version 2"):
        load_dataset(TASK, write(tmp_path / "v0.hdf5", columns))
    columns = d4rl_columns()
    columns["observations"] = columns["observations"][:, :29]
    with pytest.raises(
        InputError,
        match=r"'observations' in .* has shape \(57, 29\); ant-medium-po needs \(57, 27\)",
    ):
        load_dataset(TASK, write(tmp_path / "positions.hdf5", columns))


def test_a_missing_file_names_both_ways_to_get_it(tmp_path):
    with pytest.raises(
        InputError,
        match="data.collect_ant dataset --name medium .* data.download_d4rl --name medium",
    ):
        load_dataset(TASK, tmp_path / "nowhere.hdf5")


# --- Download ---


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under any path; breaks off after `breaks` bytes of each of the first `broken` answers."""

    version = '"1"'

    def __init__(self, content, broken=0, breaks=1000, ranges=True, status=200):
        self.content, self.broken, self.breaks, self.ranges, self.status, self.requests = (
            content,
            broken,
            breaks,
            ranges,
            status,
            [],
        )
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
        asked = asked if server.ranges and self.headers.get("If-Range") == server.version else None
        first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if first >= len(server.content):
            self.send_response(416)
            self.end_headers()
            return
        body = server.content[first:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header(
                "Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}"
            )
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.version)
        self.end_headers()
        self.wfile.write(body[: server.breaks] if len(server.requests) <= server.broken else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def content(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return write(tmp_path / "served.hdf5", d4rl_columns()).read_bytes()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("broken", [0, 2])
def test_download_goes_on_where_it_broke_off(tmp_path, content, broken, ranges):
    server, output = Server(content, broken, ranges=ranges), tmp_path / "ant.hdf5"
    assert download(Args("full-replay", output, server.host)) == output
    assert output.read_bytes() == content
    assert not list(tmp_path.glob("*.part*"))
    starts = [None, "bytes=1000-", "bytes=2000-" if ranges else "bytes=1000-"][: broken + 1]
    assert server.requests == [("/ant_full_replay-v2.hdf5", start) for start in starts]
    load_dataset(TASKS["ant-full-replay-fo"], output)


def test_a_later_command_goes_on_with_what_came(tmp_path, content):
    server, output = Server(content, broken=5, breaks=300), tmp_path / "ant.hdf5"
    with pytest.raises(
        InputError,
        match=r"it broke off after 1500 of .* the same command goes on with it; or take ant_medium-v2.hdf5 from .*imone/D4RL",
    ):
        download(Args("medium", output, server.host))
    assert not output.exists() and (tmp_path / "ant.hdf5.part").read_bytes() == content[:1500]
    download(Args("medium", output, server.host))
    assert output.read_bytes() == content and server.requests[-1][1] == "bytes=1500-"


def test_two_versions_of_a_file_are_not_mixed(tmp_path, content):
    server, output = Server(content[::-1], broken=5, breaks=300), tmp_path / "ant.hdf5"
    with pytest.raises(InputError, match="broke off"):
        download(Args("medium", output, server.host))
    server.content, server.version = content, '"2"'
    download(Args("medium", output, server.host))
    assert output.read_bytes() == content


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_part_that_is_too_long_is_dropped(tmp_path, content, extra):
    server, output = Server(content), tmp_path / "ant.hdf5"
    (tmp_path / "ant.hdf5.part").write_bytes(content + extra)
    (tmp_path / "ant.hdf5.part.version").write_text(server.version)
    download(Args("medium", output, server.host))
    assert output.read_bytes() == content and not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("wrong", [b"<html>the lab has moved</html>" * 50, None])
def test_a_wrong_file_is_removed(tmp_path, content, wrong):
    if wrong is None:  # whole, but of another environment
        columns = d4rl_columns()
        columns["actions"] = columns["actions"][:, :3]
        wrong = write(tmp_path / "hopper.hdf5", columns).read_bytes()
    output = tmp_path / "ant.hdf5"
    with pytest.raises(
        InputError,
        match="ant_medium-v2.hdf5.*it was removed; take ant_medium-v2.hdf5 from .* and put it at .*ant.hdf5",
    ):
        download(Args("medium", output, Server(wrong).host))
    assert not output.exists() and not list(tmp_path.glob("*.part*"))


def test_a_host_that_is_down_names_the_mirror(tmp_path, content):
    server = Server(content)
    server.shutdown()
    server.server_close()
    for host in (
        server.host,
        Server(content, status=404).host,
        Server(content, status=503).host,
        "nonsense",
    ):
        with pytest.raises(
            InputError,
            match="cannot download .*; or take ant_expert-v2.hdf5 from .*imone/D4RL.* and put it at .*ant.hdf5",
        ):
            download(Args("expert", tmp_path / "ant.hdf5", host))
    assert not list(tmp_path.glob("ant.hdf5*"))


def test_a_file_that_is_there_stays(tmp_path):
    output = tmp_path / "ant.hdf5"
    output.write_text("precious")
    with pytest.raises(InputError, match="exists; move it away"):
        download(Args("medium", output))
    assert output.read_text() == "precious"
    with pytest.raises(InputError, match="no folder"):
        download(Args("medium", tmp_path / "nowhere" / "ant.hdf5"))


def test_the_default_place_is_beside_the_loader():
    assert download_d4rl.FOLDER == collect_ant.FOLDER


# --- Our recording ---


@pytest.fixture
def snapshots(tmp_path):
    """Policies as `data.collect_ant snapshots` saves them."""
    torch.manual_seed(0)
    policies = [make_policy().state_dict() for _ in range(3)]
    path = tmp_path / "snapshots.pt"
    torch.save(
        {
            "policies": {name: torch.stack([p[name] for p in policies]) for name in policies[0]},
            "returns": [500.0, 3100.0, 4500.0],
        },
        path,
    )
    return path


@pytest.mark.parametrize(
    "name, chosen", [("random", None), ("medium", [1]), ("full-replay", [0, 1, 2]), ("expert", [2])]
)
def test_recorded_episodes_are_the_simulators(tmp_path, snapshots, name, chosen, monkeypatch):
    monkeypatch.setattr(collect_ant, "TASK", replace(TASK, episode_length=40))
    path, size = tmp_path / "ant.hdf5", 1000
    record_dataset(Dataset(name, size, seed=3, snapshots=snapshots, output=path))
    with h5py.File(path) as file:
        columns = {key: file[key][()] for key in file}
        assert "ours, not D4RL's" in file.attrs["source"]
        assert (
            file.attrs["snapshots"].tolist() if chosen else file.attrs.get("snapshots")
        ) == chosen
    dataset = load_dataset(TASKS[f"ant-{name}-fo"], path)
    assert dataset.size == size and "collect_ant" in dataset.description["source"]
    ends = columns["terminals"] | columns["timeouts"]
    assert columns["terminals"].any() and not (columns["terminals"] & columns["timeouts"]).any()
    assert ends[
        [333 - 1, 666 - 1, 1000 - 1] if name == "full-replay" else [size - 1]
    ].all()  # shares are cut
    for i in np.flatnonzero(~ends):  # within an episode the next row goes on
        np.testing.assert_array_equal(
            columns["next_observations"][i], columns["observations"][i + 1]
        )
    # Every episode, simulated again from its own first state with its own actions.
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    lengths = np.diff(np.append(starts, size))
    assert lengths.max() == 40 and (lengths < 40).any()
    for episode, (start, length) in enumerate(zip(starts, lengths)):
        simulator = Simulator(TASK, 1)
        simulator.reset([np.random.default_rng([3, episode])])
        for i in range(start, start + length):
            np.testing.assert_allclose(
                columns["observations"][i], simulator.states[0], rtol=1e-6, atol=1e-6
            )
            actions = dataset.task.split_actions(torch.tensor(columns["actions"][i : i + 1]))
            states, rewards, terminals = simulator.step(actions.numpy())
            np.testing.assert_allclose(
                columns["next_observations"][i], states[0], rtol=1e-6, atol=1e-6
            )
            np.testing.assert_allclose(columns["rewards"][i], rewards[0], atol=1e-5)
            assert columns["terminals"][i] == terminals[0]
            assert columns["timeouts"][i] == (
                i - start == 39
                and not terminals[0]
                or i in (332, 665, 999)
                and ends[i]
                and not terminals[0]
            )


def test_bad_input_of_the_recording(tmp_path, snapshots):
    for arguments, message in [
        (
            dict(snapshots=tmp_path / "nowhere.pt"),
            "no policies at .*nowhere.pt; make them with: python -m data.collect_ant snapshots",
        ),
        (dict(output=tmp_path / "nowhere" / "ant.hdf5"), "no folder"),
        (dict(name="full-replay", transitions=2), "--transitions must be 3 or more"),
        (dict(transitions=0), "--transitions must be 1 or more"),
    ]:
        with pytest.raises(InputError, match=message):
            record_dataset(
                Dataset(**{"snapshots": snapshots, "output": tmp_path / "ant.hdf5"} | arguments)
            )
    snapshots.write_bytes(snapshots.read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated or holds no policies"):
        record_dataset(Dataset(snapshots=snapshots, output=tmp_path / "ant.hdf5"))
    assert not (tmp_path / "ant.hdf5").exists()


# --- SAC ---


def test_log_densities_of_squashed_actions():
    torch.manual_seed(0)
    policy, states, noise = make_policy(), torch.randn(50, STATE_DIM), torch.randn(50, ACTION_DIM)
    actions, log_probs = sample_actions(policy, states, noise)
    mean, log_std = policy(states[None])[0].chunk(2, dim=-1)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()),
        torch.distributions.transforms.TanhTransform(cache_size=1),
    )
    torch.testing.assert_close(
        log_probs,
        squashed.log_prob(actions.clamp(-1 + 1e-6, 1 - 1e-6)).sum(-1),
        rtol=1e-3,
        atol=1e-3,
    )


def test_sac_losses_transition_by_transition():
    torch.manual_seed(0)
    policy = make_policy()
    critics, targets = [collect_ant.MLP([STATE_DIM + ACTION_DIM] * 2, [16], 1) for _ in range(2)]
    log_alpha, n = torch.tensor(-1.0, requires_grad=True), 7
    batch = (
        torch.randn(n, STATE_DIM),
        torch.rand(n, ACTION_DIM),
        torch.randn(n),
        torch.randn(n, STATE_DIM),
        (torch.rand(n) > 0.5).float(),
    )
    noise = torch.randn(2, n, ACTION_DIM)

    def value(networks, twin, state, action):
        return networks(torch.cat([state, action]).expand(2, 1, -1))[twin, 0, 0]

    critic, actor = 0, 0
    for i, (state, action, reward, next_state, mask) in enumerate(zip(*batch)):
        next_action, next_log_prob = sample_actions(policy, next_state[None], noise[0, i : i + 1])
        lowest = min(value(targets, twin, next_state, next_action[0]) for twin in (0, 1))
        target = (reward + 0.99 * mask * (lowest - log_alpha.exp() * next_log_prob[0])).detach()
        critic += sum((value(critics, twin, state, action) - target) ** 2 for twin in (0, 1)) / n
        new_action, log_prob = sample_actions(policy, state[None], noise[1, i : i + 1])
        actor += (
            log_alpha.exp().detach() * log_prob[0]
            - min(value(critics, twin, state, new_action[0]) for twin in (0, 1))
        ) / n
        actor -= log_alpha * (log_prob[0].detach() - 8) / n
    torch.testing.assert_close(
        critic_loss(critics, targets, policy, log_alpha, batch, noise[0]), critic
    )
    torch.testing.assert_close(policy_loss(critics, policy, log_alpha, batch[0], noise[1]), actor)


def test_snapshots_are_saved_and_record_a_dataset(tmp_path, monkeypatch):
    path = tmp_path / "snapshots.pt"
    arguments = dict(
        total_updates=8,
        updates_per_step=2,
        num_envs=4,
        warm_up=40,
        snapshot_every=4,
        buffer_size=60,
        batch_size=16,
    )
    monkeypatch.setattr(collect_ant, "TASK", replace(TASK, episode_length=15))
    result = collect_ant.train_snapshots(collect_ant.Snapshots(**arguments, output=path))
    assert result["steps"] == 40 + 3 * 4 and len(result["returns"]) == 2
    with pytest.raises(InputError, match="exists; give another --output"):
        collect_ant.train_snapshots(collect_ant.Snapshots(output=path))
    saved = torch.load(path, weights_only=True)
    assert all(
        len(value) == 2 and not torch.equal(value[0], value[1])
        for value in saved["policies"].values()
    )
    record_dataset(Dataset("full-replay", 20, snapshots=path, output=tmp_path / "ant.hdf5"))
