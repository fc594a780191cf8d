"""What many tests share: made-up data, and networks as slow loops over agents and samples.

Imported as `made_up`, because pytest puts this folder on the path.
"""

import importlib
import math
import textwrap
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F

from data.offline_dataset import Batch, OfflineDataset
from mamujoco_envs import ACTION_LIMIT, HISTORY_LENGTH, find_task

# Agents see 8 and 6 dimensions, so the second one's observation is padded.
REACHER = find_task("reacher-leader-only")
# Four agents with two actions each, the first of which sees more than the others.
ANT = find_task("ant-medium-po")
GAME = find_task("coordination-unfavorable")
BASELINES = ("ibc", "iql", "maiql", "itd3_bc", "matd3_bc", "icql", "iomar", "inspo", "logo")


def import_script(name):
    return importlib.import_module(f"baselines.{name}" if name in BASELINES else name)


# Data.


def recorded_columns(task, episodes=4, length=50, scale=0.3):
    """Columns of a dataset: episodes of random actions, cut after `length` steps."""
    rng, simulator, steps = np.random.default_rng(0), task.make_simulator(episodes), []
    states = simulator.reset([np.random.default_rng(seed) for seed in range(episodes)])
    for step in range(length):
        actions = rng.uniform(-scale, scale, (episodes, task.num_agents, task.action_dim))
        next_states, rewards, terminals = simulator.step(actions)
        assert not terminals.any() or step == task.episode_length - 1  # the end of the time
        joint_actions = task.join_actions(torch.as_tensor(actions)).numpy()
        steps.append((states, joint_actions, rewards, next_states))
        states = next_states
    names = ("observations", "actions", "rewards", "next_observations")
    columns = {
        name: np.concatenate(np.stack(column, axis=1)).astype(np.float32)
        for name, column in zip(names, zip(*steps))
    }
    size = episodes * length
    columns["terminals"] = np.zeros(size, dtype=bool)
    columns["timeouts"] = np.arange(size) % length == length - 1
    return columns


def write_dataset(path, columns):
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


def made_up_states(number, task=REACHER):
    """With a mean and a scale that standardisation has to remove."""
    ramp = torch.linspace(0, 1, task.state_dim)
    return torch.randn(number, task.state_dim) * (0.1 + 10 * ramp) + 10 * ramp - 5


def made_up_histories(number, task=REACHER):
    """Padded as the dataset's are; in the second row only the last six pairs are known."""
    histories = torch.randn(number, *task.history_shape)
    for agent, width in enumerate(task.pair_dims):
        histories[:, agent, :, width:] = 0
    histories[1:2, :, :4] = 0
    return histories


def made_up_batch(task, size=7):
    states, next_states = made_up_states(size, task), made_up_states(size, task)
    actions = 0.9 * (2 * torch.rand(size, task.num_agents, task.action_dim) - 1)
    if task.discrete:
        states, next_states = torch.rand(2, size, task.state_dim).round()
        actions = torch.eye(task.action_dim)[actions.argmax(-1)]
    return Batch(
        states,
        task.observe(states),
        made_up_histories(size, task),
        actions,
        torch.randn(size),
        (torch.arange(size) % 2).float(),
        next_states,
        task.observe(next_states),
        made_up_histories(size, task),
    )


def made_up_dataset(task=REACHER):
    """Uneven episodes of numbers that occur nowhere twice, so a state tells its row."""
    rng, size = np.random.default_rng(1), 24
    states = rng.normal(size=(size + 1, task.state_dim))
    columns = {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": rng.uniform(-1, 1, (size, task.num_agents * task.action_dim)),
        "rewards": rng.normal(size=size),
        "terminals": np.isin(np.arange(size), [3, 9]),
        "timeouts": np.isin(np.arange(size), [10, 23]),
    }
    columns = {name: np.asarray(column, dtype=np.float32) for name, column in columns.items()}
    return OfflineDataset(task, columns)


def documented_blocks(language):
    """The code blocks of docs/your_own_task.md in "python", or those without a language."""
    page = Path(__file__).parents[1] / "docs" / "your_own_task.md"
    blocks = [block.partition("\n") for block in page.read_text().split("```")[1::2]]
    return [textwrap.dedent(text) for kind, _, text in blocks if kind.strip() == language]


# Networks, one agent and one equation at a time.


def scramble(module, scale=0.05):
    """Moves parameters off their initial values, among which are zeros and ones, but no padding."""
    for name, parameter in module.named_parameters():
        noise = scale * torch.randn_like(parameter)
        first_layer = name.endswith(("0.weight", "embedding.weight"))
        if first_layer:
            never_used = (parameter == 0).all(dim=-1, keepdim=True)
            noise = torch.where(never_used & is_padding(parameter), 0, noise)
        parameter.data.add_(noise)
    return module


def is_padding(weight):
    """Rows of zeros at the end of a slice [agent, in, 1]; zeros at its beginning are weights."""
    zero = (weight == 0).all(dim=-1)
    return zero.flip(1).cumprod(1).flip(1).bool()[..., None]


def literal_mlp(mlp, index, x):
    """One agent's or member's perceptron, at the true width of `x` [..., in]."""
    for layer in mlp:
        if hasattr(layer, "weight"):
            x = x @ layer.weight[index, : x.shape[-1]] + layer.bias[index, 0]
        else:
            x = layer(x)
    return x


def literal_memory(encoder, agent, pairs):
    """Appendix A.1 for one agent: pairs [batch, 10, pair] of true width -> [batch, dim]."""

    def linear(layer, inputs):
        return inputs @ layer.weight[agent, : inputs.shape[-1]] + layer.bias[agent, 0]

    width, dim = pairs.shape[-1], encoder.soft_key.shape[-1]
    mean, std = encoder.pair_mean[agent, 0, :width], encoder.pair_std[agent, 0, :width]
    missing = (pairs == 0).all(dim=-1, keepdim=True)
    standardised = torch.where(missing, 0, (pairs - mean) / std)
    angles = [[t / 10000 ** (k // 2 * 2 / dim) for k in range(dim)] for t in range(HISTORY_LENGTH)]
    positions = [[(math.cos if k % 2 else math.sin)(a[k]) for k in range(dim)] for a in angles]
    embedded = linear(encoder.embedding, standardised) + pairs.new_tensor(positions)

    layers = (encoder.query, encoder.key, encoder.value)
    attended = F.scaled_dot_product_attention(*[linear(layer, embedded) for layer in layers])
    norm = encoder.norm_weight[agent, 0], encoder.norm_bias[agent, 0]
    hidden = F.layer_norm(embedded + attended, (dim,), *norm)
    scores = (hidden @ encoder.soft_key[agent]).tanh() @ encoder.soft_query[agent, 0]
    return (scores.softmax(dim=1)[..., None] * hidden).sum(1)


def literal_inputs(team, agent, observations, histories, target=False):
    """What one agent acts on, without padding: [batch, memory + obs]."""
    width, pair_width = team.task.obs_dims[agent], team.task.pair_dims[agent]
    mean, std = team.obs_mean[agent, :width], team.obs_std[agent, :width]
    observation = (observations[:, agent, :width] - mean) / std
    if team.memory is None:
        return observation
    memory = team.target_memory if target else team.memory
    pairs = histories[:, agent, :, :pair_width]
    return torch.cat([literal_memory(memory, agent, pairs), observation], dim=-1)


def all_literal_inputs(team, observations, histories, target=False):
    """[agent][batch, memory + obs]."""
    agents = range(team.task.num_agents)
    return [literal_inputs(team, i, observations, histories, target) for i in agents]


def assert_pairs_are_padded(histories, task):
    for agent, width in enumerate(task.pair_dims):
        assert (histories[:, agent, :, width:] == 0).all()


def clamped(actions):
    return actions.clamp(-ACTION_LIMIT, ACTION_LIMIT)


def with_a_bit_changed(content):
    """The bytes of a file of PyTorch's with one bit of one weight changed."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
