"""Law 1: streamed = windowed, over every kind of decoder and every mode, beyond the window."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.nn import matmul
from vla_jax.nn.cells import CELLS
from vla_jax.nn.matmul import Transposed
from vla_jax.policies import decoders, heads, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.trees import leaves_by_path

B, T, W, N, D, K = 3, 14, 4, 2, 3, 2
STARTS = ([0], [0, 5], [0, 3, 4, 12])  # steps at which the episodes of each robot start

AUTOREGRESSIVE = "autoregressive"  # an LSTM with the autoregressive head
LONG_GPTS = ("rotary_gpt", "memory_gpt")
KINDS = (*trunks.names(), AUTOREGRESSIVE)
MODES = ("refresh", "periodic", "persistent")

KINDS_AND_MODES = [
    (kind, mode) for kind in KINDS for mode in MODES if (kind, mode) != ("gpt", "persistent")
]

each_mode = pytest.mark.parametrize("mode", MODES)
each_kind_and_mode = pytest.mark.parametrize(("kind", "mode"), KINDS_AND_MODES)


def make_config(kind, head="continuous"):
    if kind == AUTOREGRESSIVE:
        kind, head = "lstm", "autoregressive"
    return DecoderConfig(
        kind=kind,
        token_dim=D,
        num_tokens=N,
        window_size=W,
        action_horizon=K,
        hidden_size=6,
        num_layers=2,
        head=head,
        num_bins=16,
        num_heads=2,
        segment_size=3,
        num_memory_tokens=2,
        head_sizes=(8,),
    )


def draw_tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(B, T, N, D)).astype(np.float32)


def resets():
    reset = np.zeros((B, T), bool)
    for row, starts in enumerate(STARTS):
        reset[row, starts] = True
    return reset


def stream(params, config, tokens, *, reset=None, mode="refresh", window_size=None):
    """Returns the chunks of all steps `[B, T, K, ...]`."""
    state = decoders.init_stream(params, config, B, mode=mode, window_size=window_size)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(decoders.step, 1), static_argnames="config")
    chunks = []
    for t in range(T):
        now = None if reset is None else reset[:, t]
        state, chunk = step(params, config, state, tokens[:, t], reset=now)
        chunks.append(chunk)
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *chunks)


def first_remembered(mode, start, t, window_size):
    """First step that affects the output at `t`, for an episode that began at `start`."""
    return {
        "refresh": max(start, t - window_size + 1),
        "periodic": t - (t - start) % window_size,
        "persistent": start,
    }[mode]


def windowed(params, config, tokens, starts, mode, window_size):
    """Returns `decoders.apply` at the last of the steps that affect each output.

    Uses one batch of windows that end at step t, left-padded to the same size.
    """
    size = T if mode == "persistent" else min(window_size, T)
    windows = np.zeros((B, T, size, N, D), np.float32)
    mask = np.zeros((B, T, size), bool)
    for row in range(B):
        for t in range(T):
            start = max(s for s in starts[row] if s <= t)
            first = first_remembered(mode, start, t, window_size)
            windows[row, t, size - 1 - t + first :] = tokens[row, first : t + 1]
            mask[row, t, size - 1 - t + first :] = True
    prediction = jax.jit(decoders.apply, static_argnames="config")(
        params, config, windows.reshape(B * T, size, N, D), timestep_mask=mask.reshape(B * T, size)
    )
    chunk = heads.actions(prediction)
    return jax.tree.map(lambda leaf: leaf[:, -1].reshape(B, T, *leaf.shape[2:]), chunk)


def tolerance(kind):
    """1e-6, and 1e-5 where a window is computed in another way than single steps.

    That is, in chunks, or with rotations by position instead of age.
    """
    in_chunks = kind in CELLS and CELLS[kind].chunk is not None
    return 1e-5 if in_chunks or kind in LONG_GPTS else 1e-6


def assert_close(one, other, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.mark.sampled
@each_kind_and_mode
def test_streamed_equals_windowed(kind, mode, key):
    config, tokens = make_config(kind), draw_tokens()
    params = decoders.init(key, config)
    streamed = stream(params, config, tokens, mode=mode)
    assert_close(streamed, windowed(params, config, tokens, [[0]] * B, mode, W), tolerance(kind))


def prepare(monkeypatch, params, config, mode, batch_size=B):
    """Prepares params with a threshold so low that kernels are stored transposed."""
    with monkeypatch.context() as patch:
        # Number of elements: kernels, but not biases, nor the weights of a short convolution.
        patch.setattr(
            matmul, "LARGE", 80 if "conv_weights" in str(jax.tree.structure(params)) else 30
        )
        return decoders.prepare_params(params, config, batch_size, mode=mode)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", [*CELLS, AUTOREGRESSIVE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_params_give_the_same_chunks(kind, dtype, key, monkeypatch):
    config, tokens = dataclasses.replace(make_config(kind), dtype=dtype), draw_tokens()
    params = decoders.init(key, config)
    prepared = prepare(monkeypatch, params, config, "refresh")
    assert isinstance(prepared["recurrence"]["layers_1"]["forward"]["input_kernel"], Transposed)
    one, two = (stream(own, config, tokens, reset=resets()) for own in (params, prepared))
    assert_close(one, two, tolerance(kind))


@pytest.mark.sampled
@each_kind_and_mode
def test_kernels_are_stored_as_products_read_them(kind, mode, key):
    check_stored_in_bfloat16(make_config(kind), mode, key)


@pytest.mark.sampled
@pytest.mark.parametrize("head", heads.HEADS)
def test_kernels_of_every_head_are_stored_as_products_read_them(head, key):
    check_stored_in_bfloat16(make_config("gru", head=head), "persistent", key)


def check_stored_in_bfloat16(config, mode, key):
    config, tokens = dataclasses.replace(config, dtype="bfloat16"), draw_tokens()
    params = decoders.init(key, config)
    prepared = decoders.prepare_params(params, config, B, mode=mode)
    for path, leaf in leaves_by_path(prepared).items():
        assert (leaf.dtype == jnp.bfloat16) == path.endswith("kernel"), path
    one, two = (stream(own, config, tokens, mode=mode) for own in (params, prepared))
    assert_close(one, two, 0)


@each_kind_and_mode
def test_params_are_unchanged_where_preparing_has_no_benefit(kind, mode, key, monkeypatch):
    config = make_config(kind)
    params = decoders.init(key, config)
    if mode != "refresh" or kind not in (*CELLS, AUTOREGRESSIVE):
        assert prepare(monkeypatch, params, config, mode) is params
    assert decoders.prepare_params(params, config, B, mode=mode) is params
    assert prepare(monkeypatch, params, config, mode, batch_size=matmul.MANY) is params


def test_prepared_params_are_for_single_steps_only(key, monkeypatch):
    config = make_config("lstm")
    prepared = prepare(monkeypatch, decoders.init(key, config), config, "refresh")
    with pytest.raises(ValueError, match="params must come from `init`, got those of `prep"):
        decoders.apply(prepared, config, draw_tokens())


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "mode", "head"),
    [
        *((kind, mode, "continuous") for kind, mode in KINDS_AND_MODES),
        *((kind, mode, "discrete") for kind, mode in KINDS_AND_MODES if kind != AUTOREGRESSIVE),
        *((cell, "refresh", "autoregressive") for cell in ("rnn", "gru")),
    ],
)
def test_streamed_equals_windowed_with_different_episode_starts(kind, mode, head, key):
    config, tokens = make_config(kind, head), draw_tokens()
    params = decoders.init(key, config)
    streamed = stream(params, config, tokens, reset=resets(), mode=mode)
    assert_close(streamed, windowed(params, config, tokens, STARTS, mode, W), tolerance(kind))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "mode", "window_size"),
    [("gru", mode, size) for mode in MODES for size in (1, 6, 20)]
    + [(AUTOREGRESSIVE, mode, size) for mode in MODES for size in (1, 6)]
    + [(kind, mode, size) for kind in LONG_GPTS for mode in MODES for size in (1, 7, 20)]
    + [("gpt", mode, size) for mode in ("refresh", "periodic") for size in (1, 3)],
)
def test_streamed_equals_windowed_with_another_window_size_than_in_training(
    kind, mode, window_size, key
):
    config, tokens = make_config(kind), draw_tokens()
    params = decoders.init(key, config)
    streamed = stream(params, config, tokens, reset=resets(), mode=mode, window_size=window_size)
    assert_close(
        streamed, windowed(params, config, tokens, STARTS, mode, window_size), tolerance(kind)
    )


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, mode) for kind in ("lstm", AUTOREGRESSIVE) for mode in MODES),
        *(("gpt", mode) for mode in ("refresh", "periodic")),
    ],
)
def test_only_persistent_mode_remembers_steps_before_the_window(kind, mode, key):
    """Changes the first step, and compares the chunks of all later steps."""
    config, tokens = make_config(kind), draw_tokens()
    params = decoders.init(key, config)
    other = np.concatenate([-tokens[:, :1], tokens[:, 1:]], axis=1)
    one, two = (stream(params, config, x, mode=mode) for x in (tokens, other))
    remembers = np.abs(one.arm - two.arm).max(axis=(0, 2, 3)) > 0
    assert remembers[:W].all()
    assert remembers[W:].any() == remembers[W:].all() == (mode == "persistent")


@pytest.mark.sampled
@each_kind_and_mode
def test_the_state_has_a_constant_size_and_can_be_donated(kind, mode, key):
    config, tokens = make_config(kind), draw_tokens()
    params = decoders.init(key, config)
    state = decoders.init_stream(params, config, B, mode=mode)
    step = jax.jit(decoders.step, static_argnames="config", donate_argnames="state")
    _, chunk = step(
        params, config, decoders.init_stream(params, config, B, mode=mode), tokens[:, 0]
    )
    following, again = step(params, config, state, tokens[:, 0])
    assert_close(again, chunk)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, following)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(following))


@pytest.mark.parametrize(
    ("mode", "num_memories"), [("refresh", W), ("periodic", 1), ("persistent", 1)]
)
@pytest.mark.parametrize("kind", [*CELLS, AUTOREGRESSIVE])
def test_a_state_has_as_many_carries_as_the_mode_needs(kind, mode, num_memories, key):
    config = make_config(kind)
    state = decoders.init_stream(decoders.init(key, config), config, B, mode=mode)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.trunk.carry)}
    assert {shape[:2] for shape in shapes} == {(B, num_memories)}
    if kind not in CELLS or CELLS[kind].has_vector_carry:
        assert shapes == {(B, num_memories, 6)}
    buffers = {leaf.shape for leaf in jax.tree.leaves(state.head)}
    assert buffers == ({(B, W, num_memories, 6)} if kind == AUTOREGRESSIVE else set())


def replace_in_trunk(state, **fields):
    return state._replace(trunk=state.trunk._replace(**fields))


def fill_with_nan(tree):
    return jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), tree)


def test_a_gpt_uses_its_cache_while_all_robots_are_in_their_first_window(key):
    """Sets the unused part of the state to NaN: first the stored inputs, then the cache."""
    config, tokens = make_config("gpt"), draw_tokens()
    params = decoders.init(key, config)
    expected = stream(params, config, tokens)
    step = jax.jit(decoders.step, static_argnames="config")
    state = decoders.init_stream(params, config, B)
    for t in range(T):
        harmed = (
            {"inputs": fill_with_nan(state.trunk.inputs)}
            if t < W
            else {"cache": fill_with_nan(state.trunk.cache)}
        )
        _, chunk = step(params, config, replace_in_trunk(state, **harmed), tokens[:, t])
        assert_close(chunk, jax.tree.map(lambda leaf, t=t: leaf[:, t], expected))
        state, _ = step(params, config, state, tokens[:, t])


def test_a_gpt_uses_its_cache_again_after_the_last_long_episode_ends(key):
    config, tokens = make_config("gpt"), draw_tokens()
    params, reset = decoders.init(key, config), np.zeros((B, T), bool)
    starts = ([0, 6], [0, 5], [0, 4])
    for row, frames in enumerate(starts):
        reset[row, frames] = True
    streamed = stream(params, config, tokens, reset=reset)
    assert_close(streamed, windowed(params, config, tokens, starts, "refresh", W))
    # At step 6 the last robot beyond its first window is reset; the caches of the other two are
    # valid.
    step = jax.jit(decoders.step, static_argnames="config")
    state = decoders.init_stream(params, config, B)
    for t in range(6):
        state, _ = step(params, config, state, tokens[:, t], reset=reset[:, t])
    harmed = replace_in_trunk(state, inputs=fill_with_nan(state.trunk.inputs))
    _, chunk = step(params, config, harmed, tokens[:, 6], reset=reset[:, 6])
    assert_close(chunk, jax.tree.map(lambda leaf: leaf[:, 6], streamed))


@pytest.mark.sampled
@each_kind_and_mode
def test_masked_tokens_have_no_effect(kind, mode, key):
    config, tokens = make_config(kind), draw_tokens()
    params = decoders.init(key, config)
    state = decoders.init_stream(params, config, B, mode=mode)
    mask = np.tile([True, False], (B, 1))
    changed = np.where(mask[..., None], tokens[:, 0], 9.0)
    step = jax.jit(decoders.step, static_argnames="config")
    one, two = (
        step(params, config, state, frame, token_mask=mask) for frame in (tokens[:, 0], changed)
    )
    assert_close(one, two)


@pytest.mark.sampled
@each_kind_and_mode
def test_after_a_reset_earlier_nans_have_no_effect(kind, mode, key):
    config, tokens = make_config(kind), draw_tokens()
    params, reset = decoders.init(key, config), np.zeros((B, T), bool)
    reset[:, 3] = True
    broken = tokens.copy()
    broken[:, 2] = np.nan
    one, two = (stream(params, config, x, reset=reset, mode=mode) for x in (tokens, broken))
    assert np.isnan(two.arm[:, 2]).any()
    assert_close(*(jax.tree.map(lambda leaf: leaf[:, 3:], chunks) for chunks in (one, two)))


@pytest.mark.parametrize("kind", ["lstm", "gpt", *LONG_GPTS])
def test_robots_of_a_batch_are_independent(kind, key):
    config, tokens = make_config(kind), draw_tokens()
    params = decoders.init(key, config)
    other = np.concatenate([tokens[:1], draw_tokens(1)[1:]])
    one, two = (stream(params, config, x, reset=resets()) for x in (tokens, other))
    assert_close(one.arm[0], two.arm[0])


@pytest.mark.parametrize("kind", ["lstm", "gpt", *LONG_GPTS])
def test_a_scan_of_steps_equals_a_loop_of_steps(kind, key):
    config, tokens = make_config(kind), draw_tokens()
    params = decoders.init(key, config)
    frames = (np.swapaxes(tokens, 0, 1), resets().T)

    def body(state, frame):
        return decoders.step(params, config, state, frame[0], reset=frame[1])

    _, chunks = jax.lax.scan(body, decoders.init_stream(params, config, B), frames)
    expected = stream(params, config, tokens, reset=resets())
    assert_close(jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), chunks), expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "refesh"}, "unknown mode 'refesh'; .* Did you mean 'refresh'"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"config": make_config("fc")}, "params must have 'mlp' for a decoder of kind 'fc', got"),
    ],
)
def test_wrong_arguments_of_init_stream_are_refused(changes, sentence, key):
    config = make_config("lstm")
    arguments = {"config": config, "batch_size": B, **changes}
    with pytest.raises(ValueError, match=sentence):
        decoders.init_stream(decoders.init(key, config), **arguments)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "persistent"}, "mode must be 'refresh' or 'periodic' .* ends at window_size = 4"),
        ({"window_size": 5}, "window_size must be at most 4 for a decoder of kind 'gpt', .* got 5"),
    ],
)
def test_more_steps_than_positions_of_a_gpt_are_refused(options, sentence, key):
    config = make_config("gpt")
    with pytest.raises(ValueError, match=sentence):
        decoders.init_stream(decoders.init(key, config), config, B, **options)


def test_a_step_refuses_tokens_of_a_window(key):
    config = make_config("lstm")
    params = decoders.init(key, config)
    with pytest.raises(ValueError, match=r"tokens must be \[B, N, D\] with N = 2 and D = 3, got"):
        decoders.step(params, config, decoders.init_stream(params, config, B), draw_tokens())


def test_a_state_of_another_batch_size_is_refused(key):
    config = make_config("lstm")
    params = decoders.init(key, config)
    with pytest.raises(AssertionError, match="assert_tree_shape_prefix"):
        decoders.step(
            params, config, decoders.init_stream(params, config, B + 1), draw_tokens()[:, 0]
        )
