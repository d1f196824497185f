"""NaN and inf in masked places of every function that takes a mask (laws 2 and 8).

Outputs and gradients are those of the same call with zeros in the masked places. The cases of
cells, poolings, trunks, blocks and heads are made from their registries, so that they cover a new
member. Masks of the acting state and of rewards after the end: `test_episodes`, `test_finetune`.
"""

from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.backbones import kosmos_decoder, rotary_decoder, vit
from vla_jax.backbones.kosmos_decoder import KosmosDecoderConfig
from vla_jax.backbones.rotary_decoder import RotaryDecoderConfig
from vla_jax.backbones.sequence import causal_mask
from vla_jax.backbones.state import StateConfig
from vla_jax.nn import (
    associative,
    attention,
    bptt,
    cells,
    chunkwise,
    memory_transformer,
    pooling,
    recurrence,
    residual_blocks,
    rotary,
    rotary_transformer,
    seq2seq,
    transformer,
    truncated,
)
from vla_jax.nn.attention import AttentionConfig
from vla_jax.nn.cells import CELLS
from vla_jax.nn.memory_transformer import MemoryTransformerConfig
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.nn.residual_blocks import BLOCKS, StackConfig
from vla_jax.nn.rotary_transformer import RotaryTransformerConfig
from vla_jax.nn.seq2seq import Seq2SeqConfig
from vla_jax.nn.transformer import TransformerConfig
from vla_jax.policies import decoders, policy, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.head import TeacherForcing
from vla_jax.policies.heads import HEADS
from vla_jax.policies.policy import PolicyConfig
from vla_jax.rl import policy_gradient, proximal, returns, td_errors
from vla_jax.training import auxiliary, captions, losses
from vla_jax.training.auxiliary import AuxiliaryConfig, AuxiliaryPrediction
from vla_jax.types import ActionChunk, Batch, BinChunk, Observation

B, T, D, H, N = 2, 4, 3, 4, 2
MASK = np.array([[True, True, False, True], [False, True, False, False]])
RESET = np.array([[True, False, False, True], [False, False, True, False]])
ALL_MASKED = np.zeros_like(MASK)
CASES = {}  # name -> function that returns (function of params and filled values, params, values)
KEY = jax.random.key(0)


def draw(*shape):
    return np.random.default_rng(len(shape) + sum(shape)).normal(size=shape).astype(np.float32)


def fill(values, mask, value):
    """Returns the values `[..., any trailing axes]` with `value` where the mask is False."""
    mask = np.reshape(mask, mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.where(mask, values, value)


def recurrence_case(cell, implementation, mask, *, bidirectional=False):
    config = RecurrenceConfig(
        cell=cell, hidden_size=H, num_layers=2, implementation=implementation,
        bidirectional=bidirectional, residual=True, remat_chunk=2 if bidirectional else 0,
    )  # fmt: skip

    def run(params, value):
        x = fill(draw(B, T, D), mask, value)
        return recurrence.apply(params, config, x, mask=mask, reset=RESET)[1]

    return run, recurrence.init(KEY, config, D)


def scan_case(scan, cell):
    params = CELLS[cell].init(KEY, D, H)
    carry = CELLS[cell].zero_carry(jnp.zeros((B, 1)), H)

    def run(params, value):
        projected = cells.project(params, draw(T, B, D))
        projected = jnp.where(MASK.T[..., None], projected, value)
        return scan(CELLS[cell], params, carry, projected, mask=MASK.T, reset=RESET.T)

    return run, params


def truncated_case():
    config = RecurrenceConfig(cell="gru", hidden_size=H)
    params = recurrence.init(KEY, config, D)

    def run(params, value):
        steps = {"inputs": fill(draw(B, T, D), MASK, value), "mask": MASK, "reset": RESET}

        def model(params, carry, steps):
            return recurrence.apply(params, config, **steps, carry=carry)

        chunk = jax.tree.map(lambda part: part[0], truncated.chunks(steps, 4, burn_in=1))
        carry = recurrence.zero_carry(config, jnp.zeros((B, 1)))
        return truncated.apply(model, params, carry, chunk, burn_in=1)

    return run, params


def attention_case(score):
    config = AttentionConfig(score=score, size=H)
    params = attention.init(KEY, config, D, D)

    def run(params, value):
        mask = MASK & np.array([[True], [False]])  # the second row has nothing to attend to
        source = attention.prepare(params, config, fill(draw(B, T, D), mask, value), mask=mask)
        query = fill(draw(B, D), mask.any(axis=1), value)
        return attention.apply(params, config, query, source)

    return run, params


def seq2seq_case(source):
    config = Seq2SeqConfig(
        source=source, source_size=D, target="vectors", target_size=2, embed_size=H,
        hidden_size=H, score_size=H, bidirectional=source == "tokens",
    )  # fmt: skip
    params = seq2seq.init(KEY, config)

    def run(params, value):
        vectors = fill(draw(B, T, D), MASK, value)
        outside = jnp.where(value == 0, 0, -100)  # PyTorch's id of what does not count
        values = {"vectors": vectors, "tokens": jnp.where(MASK, 1, outside)}[source]
        memory = seq2seq.encode(params, config, values, mask=MASK)
        return seq2seq.teacher_forcing(params, config, memory, draw(B, 3, 2))

    return run, params


def transformer_case():
    config = TransformerConfig(num_layers=1, num_heads=2, hidden_size=H, num_positions=T)

    def run(params, value):
        x = fill(draw(B, T, H), MASK, value)
        return transformer.apply(params, config, x, mask=MASK, reset=RESET)[1]

    return run, transformer.init(KEY, config)


def rotary_case(module, reset):
    config = RotaryTransformerConfig(
        num_layers=2, num_heads=2, num_kv_heads=1, hidden_size=H, span=3
    )
    if module is memory_transformer:
        config = MemoryTransformerConfig(config, num_memory_tokens=2, segment_size=2)

    def run(params, value):
        x = fill(draw(B, T, H), MASK, value)
        return module.apply(params, config, x, mask=MASK, reset=reset)

    return run, module.init(KEY, config)


def blocks_case(block, cell):
    cells = RecurrenceConfig(cell=cell, hidden_size=H, num_layers=1, remat_chunk=2)
    config = StackConfig(recurrence=cells, block=block)

    def run(params, value):
        x = fill(draw(B, T, D), MASK, value)
        return residual_blocks.apply(params, config, x, mask=MASK, reset=RESET)

    return run, residual_blocks.init(KEY, config, D)


def pooling_case(kind):
    params = pooling.init(KEY, kind, 2, D)

    def run(params, value):
        tokens, mask = fill(draw(B, T, D), MASK, value), MASK
        return pooling.apply(params, kind, tokens, 2, mask=mask)

    return run, params


def decoder_config(kind, head, block="none"):
    return DecoderConfig(
        kind=kind, head=head, block=block, num_tokens=N, token_dim=D, window_size=T,
        action_horizon=2, action_dim=3, num_latents=1, hidden_size=H, num_layers=1, num_heads=2,
        head_sizes=(H,), num_bins=4, segment_size=2, num_memory_tokens=2,
        pooling="attention" if kind == "fc" else "max",
    )  # fmt: skip


def fits(kind, head):
    try:
        return bool(decoder_config(kind, head))
    except ValueError:
        return False


def decoder_case(kind, head, *, block="none", rate=None):
    """A trunk and a head from the tokens to the loss."""
    config = decoder_config(kind, head, block)

    def run(params, value):
        token_mask = np.ones((B, T, N), bool)
        token_mask[0, 0, 1] = False
        tokens = fill(fill(draw(B, T, N, D), MASK, value), token_mask, value)
        action_mask = MASK[..., None] & np.array([True, False])
        action = fill(draw(B, T, 2, 3), action_mask, value)
        targets = TeacherForcing(action, action_mask, rate)
        prediction = decoders.apply(
            params, config, tokens, timestep_mask=MASK, token_mask=token_mask, reset=RESET,
            targets=targets if HEADS[head].takes_targets else None, key=KEY,
        )  # fmt: skip
        return prediction, losses.action_loss(prediction, action, action_mask)

    return run, decoders.init(KEY, config)


def predict_case(head):
    config = decoder_config("gru", head)

    def run(params, value):
        features = fill(draw(B, T, H), MASK, value)
        return decoders.predict(params, config, features, timestep_mask=MASK, reset=RESET)

    return run, decoders.init(KEY, config)


def caption_case():
    """The instruction of the real steps, from the features of a trunk."""
    config = decoder_config("gru", "continuous")
    params = {"trunk": decoders.init(KEY, config), "caption": captions.init(KEY, H, 3, 8)}

    def run(params, value):
        tokens = fill(draw(B, T, N, D), MASK, value)
        _, features = decoders.run_trunk(params["trunk"], config, tokens, timestep_mask=MASK)
        ids = jnp.where(MASK, 2, jnp.where(value == 0, 0, 7))[..., None]
        batch = Batch(Observation(instruction=ids), None, MASK, np.zeros((B, T, 1, D)), MASK)
        words = captions.visible_instruction(batch)
        return captions.loss(captions.apply(params["caption"], features, words), words)

    return run, params


def policy_case():
    config = PolicyConfig(
        backbone=StateConfig(proprio_dim=2, state_dim=2, token_dim=H),
        decoder=DecoderConfig(
            kind="lstm", window_size=T, action_horizon=1, hidden_size=H, head_sizes=(H,),
            num_latents=1, num_layers=1, num_tokens=3, token_dim=H,
        ),
    )  # fmt: skip
    words = config.backbone.max_words

    def run(params, value):
        observation = Observation(
            proprio=fill(draw(B, T, 2), MASK, value),
            environment_state=fill(draw(B, T, 2), MASK, value),
            instruction=np.zeros((B, T, words), np.int32),
        )
        return policy.apply(params, config, observation, timestep_mask=MASK, reset=RESET)

    return run, policy.init(KEY, config)


def loss_case(name, mask):
    K, A, V = 2, 3, 4
    real = mask[..., None] & np.ones((1, 1, K), bool)
    dims = real[..., None] & np.array([True, False, True])

    def action(loss_mask, make):
        def run(params, value):
            prediction = make(params, value)
            target = fill(draw(B, T, K, A), loss_mask, value)
            return losses.action_loss(prediction, target, loss_mask)

        return run

    def chunk(mask):
        def make(params, value):
            arm = fill(
                params["x"] * draw(B, T, K, A - 1),
                mask[..., :-1] if mask.ndim == 4 else mask,
                value,
            )
            gripper = fill(
                params["x"] * draw(B, T, K), mask[..., -1] if mask.ndim == 4 else mask, value
            )
            return ActionChunk(arm, gripper)

        return make

    def bins(params, value):
        return BinChunk(fill(params["x"] * draw(B, T, K, A, V), dims, value))

    def tokens(params, value):
        logits = fill(params["x"] * draw(B, T, V), mask, value)
        return losses.token_loss(logits, np.where(mask, 1, -100), mask)

    def action_tokens(params, value):
        logits = fill(params["x"] * draw(B, T, 30), mask, value)
        ids = np.where(mask, 15, -100)
        return losses.action_token_loss(logits, ids, mask, vocab_size=30, action_dim=2, num_bins=8)

    def kl(params, value):
        logits = fill(params["x"] * draw(B, T, V), mask, value)
        return losses.categorical_kl(logits, fill(draw(B, T, V), mask, value), mask)

    def mean(params, value):
        return losses.masked_mean(fill(params["x"] * draw(B, T, V), mask, value), mask)

    def forward(params, value):
        config = AuxiliaryConfig(forward_horizon=1, forward_target="tokens")
        target_mask = auxiliary.forward_mask(mask, 1)
        predicted = fill(params["x"] * draw(B, T, 1, N * D), target_mask, value)
        batch = Batch(Observation(), None, mask, np.zeros((B, T, K, A)), real)
        tokens = fill(draw(B, T, N, D), mask, value)
        return auxiliary.loss(AuxiliaryPrediction(tokens=predicted), config, batch, tokens)

    members = {
        "action": action(real, chunk(real)), "action_dims": action(dims, chunk(dims)),
        "bins": action(dims, bins), "tokens": tokens, "action_tokens": action_tokens, "kl": kl,
        "masked_mean": mean, "forward": forward,
    }  # fmt: skip
    return members[name], {"x": jnp.ones(())}


def reward_case(name):
    weight = np.array([1.0, 0.0, 1.0, 0.0], np.float32)

    def sequence(params, value, *shape):
        return fill(params["x"] * draw(T, *shape), weight > 0, value)

    def returned(function, num_values):
        def run(params, value):
            discount = np.array([0.9, 0.0, 0.9, 0.0], np.float32)  # ends after steps 1 and 3
            after = fill(params["x"] * draw(T), discount > 0, value)
            values = (draw(T),) * (num_values - 1) + (after,)
            return function(draw(T), discount, *values)

        return run

    def error(function, make_next):
        def run(params, value):
            discount = np.array([0.9, 0.0, 0.9, 0.0], np.float32)
            q, after = params["x"] * draw(T, D), fill(params["x"] * draw(T, D), discount > 0, value)
            reward, taken = draw(T), np.zeros(T, int)
            return function(q, taken, reward, discount, after, make_next(after))

        return run

    def action(function):
        def run(params, value):
            advantage = fill(draw(T), weight > 0, value)
            return function(sequence(params, value, D), np.zeros(T, int), advantage, weight)

        return run

    def two(function):
        return lambda params, value: function(
            sequence(params, value), fill(draw(T), weight > 0, value), weight
        )

    def masked(value, count):
        return [fill(draw(T), weight > 0, value) for _ in range(count)]

    members = {
        "reinforce": action(policy_gradient.reinforce_loss),
        "score": two(policy_gradient.score_loss),
        "scale": lambda params, value: policy_gradient.scale(sequence(params, value), weight),
        "entropy": lambda params, value: policy_gradient.entropy_loss(
            sequence(params, value, D), weight
        ),
        "baseline": two(policy_gradient.baseline_loss),
        "clipped": lambda params, value: proximal.clipped_loss(
            sequence(params, value), *masked(value, 2), weight, 0.2
        ),
        "clipped_value": lambda params, value: proximal.clipped_value_loss(
            sequence(params, value), *masked(value, 2), weight, 0.2
        ),
        "normalise": lambda params, value: proximal.normalise(sequence(params, value), weight),
        "divergence": lambda params, value: proximal.divergence(
            sequence(params, value), *masked(value, 1), weight
        ),
        "lambda_returns": returned(returns.lambda_returns, 1),
        "advantages": returned(returns.advantages, 2),
        "sarsa": error(td_errors.sarsa_error, lambda q: np.zeros(T, int)),
        "expected_sarsa": error(td_errors.expected_sarsa_error, jax.nn.softmax),
    }
    return members[name], {"x": jnp.ones(())}


def language_case(name):
    mask = causal_mask(jnp.asarray(MASK))
    rotary = RotaryDecoderConfig(
        vocab_size=8, hidden_size=H, intermediate_size=H, num_layers=2, num_heads=2,
        num_key_value_heads=1, head_dim=2,
    )  # fmt: skip
    kosmos = KosmosDecoderConfig(
        vocab_size=8, hidden_size=H, intermediate_size=H, num_layers=2, num_heads=2
    )
    shapes = {"rotary": rotary_decoder.shapes(rotary), "kosmos": kosmos_decoder.shapes(kosmos)}
    places = np.cumsum(MASK, axis=1) - 1

    def run(params, value):
        x = fill(draw(B, T, H), MASK, value)
        if name == "rotary":
            angles = rotary_decoder.rotary_angles(rotary, places)
            outputs = rotary_decoder.apply(params, rotary, x, angles, mask)
        else:
            outputs = kosmos_decoder.apply(params, kosmos, x, places, mask)
        return jnp.where(MASK[..., None], outputs, 0.0)

    return run, jax.tree.map(
        lambda shape: jnp.asarray(draw(*shape)), shapes[name], is_leaf=lambda x: type(x) is tuple
    )


def grouped_case():
    """Keys, values and queries of `rotary.grouped_attention` that the mask leaves out."""
    seen = MASK[:, None] & MASK[..., None]

    def run(params, value):
        query, key, values = (
            fill(params[name] + draw(B, T, heads, H), MASK, value)
            for name, heads in (("query", 4), ("key", 2), ("value", 2))
        )
        return rotary.grouped_attention(query, key, values, seen, scale=0.5, softcap=3.0)

    return run, {name: jnp.ones((1, 1, 1, H)) for name in ("query", "key", "value")}


def vision_case():
    config = vit.VisionConfig(
        hidden_size=H, intermediate_size=H, num_layers=1, num_heads=2, image_size=4, patch_size=2
    )
    real = np.array([[True, True, False, False]])

    def run(params, value):
        pixels = jnp.where(np.arange(4)[None, :, None, None] < 2, draw(1, 4, 4, 3), value)
        outputs = vit.siglip(params, config, pixels, mask=real)
        return jnp.where(real[..., None], outputs, 0.0)

    return run, jax.tree.map(
        lambda shape: jnp.asarray(draw(*shape)),
        vit.siglip_shapes(config),
        is_leaf=lambda x: type(x) is tuple,
    )


for name in CELLS:
    CASES[f"recurrence-{name}"] = lambda n=name: recurrence_case(n, "auto", MASK)
    CASES[f"scan-{name}"] = lambda n=name: scan_case(bptt.scan, n)
    CASES[f"plain_scan-{name}"] = lambda n=name: scan_case(bptt.plain_scan, n)
    if CELLS[name].coefficients is not None:
        CASES[f"recurrence-{name}-associative"] = lambda n=name: recurrence_case(
            n, "associative", MASK
        )
        CASES[f"associative-{name}"] = lambda n=name: scan_case(associative.scan, n)
    if CELLS[name].chunk is not None:
        CASES[f"chunkwise-{name}"] = lambda n=name: scan_case(chunkwise.scan, n)
CASES["recurrence-both-directions"] = lambda: recurrence_case(
    "lstm", "bptt", MASK, bidirectional=True
)
CASES["recurrence-all-masked"] = lambda: recurrence_case("lstm", "bptt", ALL_MASKED)
CASES["truncated"] = truncated_case
CASES["transformer"] = transformer_case
CASES["caption"] = caption_case
CASES["policy"] = policy_case
CASES["siglip"] = vision_case
CASES["rotary.grouped_attention"] = grouped_case
FAMILIES = {
    attention_case: [("additive",), ("dot",), ("general",), ("scaled_dot",)],
    seq2seq_case: [("tokens",), ("vectors",)],
    pooling_case: [(kind,) for kind in pooling.POOLINGS],
    predict_case: [(head,) for head in HEADS],
    reward_case: [
        (name,) for name in ("reinforce", "score", "scale", "entropy", "baseline", "clipped",
                             "clipped_value", "normalise", "divergence", "lambda_returns",
                             "advantages", "sarsa", "expected_sarsa")
    ],
    language_case: [("rotary",), ("kosmos",)],
    loss_case: [
        (name, mask) for mask in (MASK, ALL_MASKED) for name in (
            "action", "action_dims", "bins", "tokens", "action_tokens", "kl", "masked_mean",
            "forward",
        )
    ],
}  # fmt: skip
# Every trunk with one of the heads that fit, every head with "gru", every block with some cell.
for kind, head in zip(trunks.names(), cycle(HEADS), strict=False):
    CASES[f"decoder-{kind}"] = lambda k=kind, h=head: decoder_case(
        k, h if fits(k, h) else "continuous"
    )
for head in HEADS:
    CASES[f"decoder-{head}"] = lambda h=head: decoder_case("gru", h)
CASES["decoder-scheduled-sampling"] = lambda: decoder_case("gru", "autoregressive", rate=0.5)
for block, cell in zip(BLOCKS, ("gru", "m_lstm", "mamba2", *CELLS), strict=False):
    CASES[f"decoder-block-{block}"] = lambda b=block, c=cell: decoder_case(c, "flow", block=b)
    CASES[f"residual_blocks-{block}"] = lambda b=block, c=cell: blocks_case(b, c)
CASES["rotary_transformer"] = lambda: rotary_case(rotary_transformer, RESET)
CASES["memory_transformer"] = lambda: rotary_case(memory_transformer, RESET)
CASES["memory_transformer-without-reset"] = lambda: rotary_case(memory_transformer, None)
for family, arguments in FAMILIES.items():
    for args in arguments:
        label = "-".join(arg if isinstance(arg, str) else str(arg.any()) for arg in args)
        CASES[f"{family.__name__}-{label}"] = lambda f=family, a=args: f(*a)


@pytest.mark.sampled
@pytest.mark.parametrize("name", CASES)
def test_masked_nan_and_inf_change_no_output_and_no_gradient(name):
    run, params = CASES[name]()

    @jax.jit
    def outputs_and_gradients(params, value):
        def total(params):
            outputs = run(params, value)
            numbers = [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(outputs)]
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in numbers), outputs

        return jax.value_and_grad(total, has_aux=True)(params)

    expected = jax.tree.leaves(outputs_and_gradients(params, 0.0))
    assert all(np.isfinite(leaf).all() for leaf in expected)
    for value in (np.nan, np.inf):
        leaves = jax.tree.leaves(outputs_and_gradients(params, value))
        for ours, zeros in zip(leaves, expected, strict=True):
            np.testing.assert_array_equal(ours, zeros)
