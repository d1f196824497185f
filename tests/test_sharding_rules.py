"""Law 6 over families: params split by their member's rules train as those of one device."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_demos
import tiny_vlm
from jax.sharding import PartitionSpec

from train import setup
from vla_jax import trees
from vla_jax.backbones.registry import BACKBONES
from vla_jax.nn import residual_blocks, seq2seq, sharded_params
from vla_jax.nn.cells import CELLS
from vla_jax.policies import decoders, heads, trunks
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.policies.head import TeacherForcing
from vla_jax.rl import network
from vla_jax.training import auxiliary, losses, parallel, update
from vla_jax.training.auxiliary import AuxiliaryConfig

B, W, N, D, K, A = 4, 3, 2, 4, 2, 3
SMALL = {
    "token_dim": D, "num_tokens": N, "window_size": W, "action_horizon": K, "action_dim": A,
    "num_layers": 1, "hidden_size": 8, "num_heads": 2, "head_sizes": (8,), "num_bins": 8,
    "segment_size": 2, "num_memory_tokens": 2,
}  # fmt: skip


def is_pair(kind, head):
    """The autoregressive head's own recurrence is of the trunk's cell."""
    return head != "autoregressive" or (kind in CELLS and CELLS[kind].has_vector_carry)


PAIRS = [(kind, head) for kind in trunks.names() for head in heads.HEADS if is_pair(kind, head)]
FAST = [("gru", "flow"), ("rotary_gpt", "discrete")]
SLOW = [
    pytest.param(*pair, marks=[pytest.mark.slow, pytest.mark.sampled])
    for pair in PAIRS
    if pair not in FAST
]


def config_of(kind, head, **changes):
    return DecoderConfig(kind=kind, head=head, **{**SMALL, **changes})


def make_loss(config):
    """The loss of a decoder with teacher forcing where its head takes targets."""
    mask = jnp.ones((B, W, K), bool)

    def loss_fn(params, batch, key):
        tokens, action = batch
        head = heads.HEADS[config.head]
        targets = TeacherForcing(action, mask) if head.takes_targets else None
        prediction = decoders.apply(params, config, tokens, targets=targets, key=key)
        terms, _ = losses.action_terms(prediction, action, mask)
        return sum(terms.values()), {}

    return loss_fn


def run_updates(config, mesh_text, rules):
    """Runs two updates by gradient descent; returns the state and the losses."""
    draw = np.random.default_rng(0)
    batch = (
        draw.normal(size=(B, W, N, D)).astype(np.float32),
        draw.uniform(-1, 1, (B, W, K, A)).astype(np.float32),
    )
    mesh, optimizer = parallel.make_mesh(mesh_text), optax.sgd(0.1)
    step = update.make_update(make_loss(config), optimizer, ema_decay=0.5)

    def init(key):
        return update.init_train_state(decoders.init(key, config), optimizer, ema=True)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = parallel.make_shardings(shapes, mesh, rules)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    step, found = parallel.jit_update(step, mesh, shardings), []
    for _ in range(2):
        state, metrics = step(state, parallel.shard_batch(batch, mesh), jax.random.key(1))
        found.append(metrics["loss"])
    return state, found


@pytest.mark.parametrize(("kind", "head"), FAST + SLOW)
def test_every_trunk_and_head_split_over_devices_trains_as_on_one(kind, head):
    config = config_of(kind, head)
    rules = decoders.sharding_rules(config)
    expected = run_updates(config, "data=1", ())
    found = run_updates(config, "fsdp=2,tensor=2", rules)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    kernels = {
        path: leaf
        for path, leaf in trees.leaves_by_path(found[0]).items()
        if "kernel" in path and min(leaf.shape) % 2 == 0
    }
    assert len(kernels) >= 4  # of params and their EMA
    for path, leaf in kernels.items():
        assert not leaf.sharding.is_fully_replicated, path
        assert leaf.addressable_shards[0].data.size <= leaf.size // 2, path


def split_fraction(shapes, rules, mesh="fsdp=4"):
    """The fraction of the numbers of a tree that is split over devices."""
    shardings = parallel.make_shardings(shapes, parallel.make_mesh(mesh), rules)
    sizes = [
        (leaf.size, leaf.size * (not sharding.is_fully_replicated))
        for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    ]
    total, split = (sum(column) for column in zip(*sizes, strict=True))
    return split / total


def shapes_of(init, *args):
    return jax.eval_shape(lambda key: init(key, *args), jax.random.key(0))


@pytest.mark.parametrize(("kind", "head"), PAIRS)
def test_nearly_all_params_of_a_decoder_are_split(kind, head):
    config = DecoderConfig(kind=kind, head=head, token_dim=64, num_tokens=4)
    assert split_fraction(shapes_of(decoders.init, config), decoders.sharding_rules(config)) > 0.98


@pytest.mark.parametrize("block", [name for name in residual_blocks.BLOCKS if name != "none"])
def test_nearly_all_params_of_residual_blocks_are_split(block):
    config = config_of("m_lstm", "continuous", hidden_size=256, block=block)
    shapes = shapes_of(decoders.init, config)
    assert split_fraction(shapes, decoders.sharding_rules(config)) > 0.98


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in BACKBONES), ("state", {"joint_sizes": (64, 64)})]
)
def test_most_params_of_a_backbone_are_split(kind, options):
    member = BACKBONES[kind]
    # the smallest members have position embeddings and biases that matter
    share = split_fraction(shapes_of(member.init, member.config(**options)), member.sharding_rules)
    assert share > (0.9 if kind == "perceiver" else 0.98)


@pytest.mark.parametrize("score", ["general", "additive", "none"])
def test_nearly_all_params_of_an_encoder_decoder_are_split(score):
    config = seq2seq.Seq2SeqConfig(hidden_size=256, score=score)
    assert split_fraction(shapes_of(seq2seq.init, config), seq2seq.SHARDING) > 0.97


def test_most_params_of_networks_and_auxiliary_heads_are_split():
    config = network.NetworkConfig("gru", hidden_sizes=(256, 256), memory_size=256)
    shapes = shapes_of(network.init, config, (8,), {"value": 4})
    assert split_fraction(shapes, network.SHARDING) > 0.97
    config = AuxiliaryConfig(forward_horizon=2, caption=True)
    init = partial(auxiliary.init, feature_size=256, target_sizes={"tokens": 32}, vocab_size=512)
    assert split_fraction(shapes_of(init, config), auxiliary.SHARDING) > 0.97


def test_the_rules_of_a_training_are_those_of_its_parts():
    config = tiny_demos.imitation("", "", auxiliary=AuxiliaryConfig(forward_horizon=1))
    rules = setup.sharding_rules(config)
    shapes = setup.param_shapes(config)
    shardings = parallel.make_shardings(shapes, parallel.make_mesh("fsdp=2,tensor=2"), rules)
    specs = {path: leaf.spec for path, leaf in trees.leaves_by_path(shardings).items()}
    assert specs["backbone/words/embed/embedding"] == PartitionSpec(None, "fsdp")
    assert specs["decoder/recurrence/layers_0/forward/recurrent_kernel"] == PartitionSpec("fsdp")
    assert specs["decoder/heads/arm/layers_0/kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["auxiliary/forward/tokens/layers_1/kernel"] == PartitionSpec("tensor", "fsdp")


def collectives_in_loops(loss_fn, init, batch, rules):
    """Shapes of the arrays that the devices of an update exchange in loops, by operation."""
    mesh, optimizer = parallel.make_mesh("fsdp=4"), optax.sgd(0.1)
    shapes = jax.eval_shape(
        lambda key: update.init_train_state(init(key), optimizer), jax.random.key(0)
    )
    step = update.make_update(loss_fn, optimizer)
    shardings = parallel.make_shardings(shapes, mesh, rules)
    lowered = parallel.jit_update(step, mesh, shardings).lower(shapes, batch, jax.random.key(0))
    loops = lowered.compile().as_text().partition("ENTRY")[0]
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = rf"= (.+) ({names})(?:-start)?\("
    return [(operation, shapes) for shapes, operation in re.findall(found, loops)]


def in_loops_of_decoder(config):
    batch = (
        jax.ShapeDtypeStruct((B, W, N, D), jnp.float32),
        jax.ShapeDtypeStruct((B, W, K, A), jnp.float32),
    )
    init, rules = partial(decoders.init, config=config), decoders.sharding_rules(config)
    return collectives_in_loops(make_loss(config), init, batch, rules)


def test_a_recurrence_gathers_its_kernels_before_the_loop(monkeypatch):
    config = config_of("lstm", "continuous")
    assert not in_loops_of_decoder(config)
    monkeypatch.setattr(sharded_params, "_is_split", lambda: False)
    assert in_loops_of_decoder(config)


@pytest.mark.slow
def test_layers_of_a_model_gather_their_kernels_and_exchange_no_activations(monkeypatch):
    config = tiny_vlm.CONFIGS["paligemma"]
    member = BACKBONES["paligemma"]
    batch = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct((B, *part.shape), part.dtype), member.example(config)
    )

    def loss_fn(params, observation, key):
        return jnp.mean(member.apply(params, config, observation).tokens ** 2), {}

    def find():
        init = partial(member.init, config=config)
        return collectives_in_loops(loss_fn, init, batch, member.sharding_rules)

    gathered = [shapes for operation, shapes in find() if operation == "all-gather"]
    assert gathered
    # [in, out] of one layer; activations have three axes
    assert all(re.fullmatch(r"f32\[\d+,\d+\]\S*", shapes) for shapes in gathered), gathered
    assert not {"all-to-all", "collective-permute"} & {operation for operation, _ in find()}
    monkeypatch.setattr(sharded_params, "_is_split", lambda: False)
    assert any("all-gather" not in operation for operation, _ in find())


def test_a_dimension_that_does_not_divide_stays_whole():
    tree = {"a": np.zeros((3, 4)), "b": np.zeros((4, 6)), "c": np.zeros((3, 5))}
    rules = (("*", PartitionSpec("fsdp", ("data", "tensor"))),)
    mesh = parallel.make_mesh("fsdp=2,tensor=2")
    specs = {
        name: sharding.spec for name, sharding in parallel.make_shardings(tree, mesh, rules).items()
    }
    assert specs == {
        "a": PartitionSpec(None, ("data", "tensor")),
        "b": PartitionSpec("fsdp", ("data", "tensor")),
        "c": PartitionSpec(None, None),
    }
