"""Packed rows: every step once, with the outputs of separate windows."""

import functools

import numpy as np
import pytest

from vla_jax.backbones import word_hashing
from vla_jax.data import normalize
from vla_jax.data.dataset import Episode, from_episodes
from vla_jax.data.packing import Packed, pack
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.policies import decoders
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.types import Tokens

W, K = 8, 3
LENGTHS = (3, 8, 5, 2, 11, 1, 4)


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            {"proprio": rng.normal(size=(length, 2)).astype(np.float32)},
            rng.uniform(-1, 1, (length, 7)).astype(np.float32),
            f"take {index}",
        )
        for index, length in enumerate(LENGTHS)
    ]
    dataset = from_episodes(episodes, fps=10)
    tokens = rng.normal(size=(sum(LENGTHS), 2, 4)).astype(np.float32)
    tokens = Tokens(tokens, rng.random(tokens.shape[:2]) < 0.8)
    config = WindowConfig(window_size=W, action_horizon=K, stride=W)
    stats = normalize.compute_norm_stats(dataset)
    tokenize = functools.partial(word_hashing.tokenize, max_words=12, vocab_size=2048)
    return Windows(dataset, config, tokenize=tokenize, norm_stats=stats, tokens=tokens)


def test_every_step_occurs_exactly_once():
    ends = np.cumsum(LENGTHS)
    rows = pack(ends, W)
    frame, step, mask = rows.steps(np.arange(rows.num_rows))
    assert sorted(frame[mask]) == list(range(ends[-1]))
    starts = np.concatenate([[0], ends[:-1]])
    assert np.array_equal(frame[mask] - step[mask], np.repeat(starts, LENGTHS)[frame[mask]])


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(1).integers(1, 33, 500)
    rows = pack(np.cumsum(lengths), 32)
    mask = rows.steps(np.arange(rows.num_rows))[2]
    assert mask.mean() > 0.97


def test_the_chunk_mask_counts_the_real_targets(windows):
    packed = Packed(windows)
    batch = packed[np.arange(len(packed))]
    expected = sum(min(K, length - t) for length in LENGTHS for t in range(length))
    assert batch.action_mask.sum() == expected
    assert not batch.action[~batch.action_mask].any()


def test_the_instruction_is_visible_at_the_first_step_of_each_episode_only(windows):
    packed = Packed(windows)
    batch = packed[np.arange(len(packed))]
    shown = (batch.observation.instruction > 0).any(-1)
    _, step, mask = packed.rows.steps(np.arange(len(packed)))
    assert np.array_equal(shown & batch.timestep_mask, (step == 0) & mask)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "gpt"])
def test_an_episode_in_a_packed_row_gives_the_outputs_of_its_own_window(kind, windows, key):
    config = DecoderConfig(
        kind=kind, token_dim=4, num_tokens=2, window_size=W, action_horizon=K,
        hidden_size=8, num_layers=1, head_sizes=(8,),
    )  # fmt: skip
    params = decoders.init(key, config)
    packed = Packed(windows)
    rows, alone = packed[np.arange(len(packed))], windows[np.arange(len(windows))]

    def arm_actions(batch, reset):
        chunk = decoders.apply(
            params,
            config,
            batch.tokens.tokens,
            timestep_mask=batch.timestep_mask,
            token_mask=batch.tokens.mask,
            reset=reset,
        )
        return np.asarray(chunk.arm)[batch.timestep_mask]

    together, separate = arm_actions(rows, rows.reset), arm_actions(alone, None)
    frame, _, mask = packed.rows.steps(np.arange(len(packed)))
    order = np.argsort(frame[mask])
    starts = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    episode, last = windows.index.place(slice(None))
    steps = last[:, None] + np.arange(1 - W, 1)
    frames = (starts[episode, None] + steps)[alone.timestep_mask]
    # Episodes longer than W are cut at different steps by the two; only the others are compared.
    fits = np.repeat(np.array(LENGTHS) <= W, LENGTHS)
    by_frame = {frame: arm for frame, arm in zip(frames, separate, strict=True)}
    for frame, arm in enumerate(together[order]):
        if fits[frame]:
            np.testing.assert_allclose(arm, by_frame[frame], atol=1e-6)
