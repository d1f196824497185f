"""Laws of a backbone, for every member of the family."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vlm
from flax import traverse_util

from vla_jax.backbones import registry, word_hashing
from vla_jax.backbones.perceiver import Perceiver, PerceiverConfig
from vla_jax.backbones.registry import BACKBONES
from vla_jax.backbones.state import StateConfig
from vla_jax.types import Observation

B, S, VOCAB = 3, 4, 64
GOLDEN = pathlib.Path(__file__).parent / "golden/perceiver.npz"
# The family, and the state once more with an MLP over all its parts.
MEMBERS = {**BACKBONES, "joint state": BACKBONES["state"]}
CONFIGS = {
    "perceiver": PerceiverConfig(
        image_size=16,
        width=16,
        num_latents=2,
        token_dim=8,
        num_heads=2,
        vocab_size=VOCAB,
        max_words=S,
    ),
    "state": StateConfig(token_dim=8, vocab_size=VOCAB, max_words=S),
    "joint state": StateConfig(token_dim=8, vocab_size=VOCAB, max_words=S, joint_sizes=(8, 6)),
    **tiny_vlm.CONFIGS,
}
PICTURES = ("image_primary", "image_wrist", "proprio", "instruction")
PARTS = {
    **dict.fromkeys(CONFIGS, PICTURES),
    **dict.fromkeys(("state", "joint state"), ("environment_state", "proprio", "instruction")),
}
TEXTS = ("touch red", "lift blue", "red touch")
each = pytest.mark.parametrize("kind", MEMBERS)
with_hashed_words = pytest.mark.parametrize("kind", ["perceiver", "state", "joint state"])
with_images = pytest.mark.parametrize("kind", [kind for kind in PARTS if PARTS[kind] == PICTURES])


def test_every_backbone_is_tested_here():
    assert CONFIGS.keys() == PARTS.keys() == MEMBERS.keys()


def observe(kind, lead=(B,), seed=0):
    """Random observation with an instruction of two words."""
    random = np.random.default_rng(seed)
    pictures = random.integers(0, 256, (2, *lead, 16, 16, 3), np.uint8)
    parts = Observation(
        image_primary=pictures[0],
        image_wrist=pictures[1],
        proprio=random.normal(size=(*lead, 8)).astype(np.float32),
        environment_state=random.normal(size=(*lead, 22)).astype(np.float32),
        instruction=instruction(kind, TEXTS[seed], lead),
    )
    return Observation(**{name: getattr(parts, name) for name in PARTS[kind]})


def instruction(kind, text, lead=(B,)):
    ids = MEMBERS[kind].tokenize(CONFIGS[kind], text)
    return np.tile(ids, (*lead, 1))


@functools.cache
def params(kind):
    if kind in tiny_vlm.CONFIGS:
        return tiny_vlm.params(CONFIGS[kind])
    return jax.jit(MEMBERS[kind].init, static_argnums=1)(jax.random.key(0), CONFIGS[kind])


@functools.cache
def compiled(kind):
    return jax.jit(MEMBERS[kind].apply, static_argnums=1)


def encode(kind, observation, config=None):
    """Tokens `[..., N, D]`, none of them padding."""
    tokens, mask = compiled(kind)(params(kind), config or CONFIGS[kind], observation)
    assert mask.all()
    return tokens


@each
def test_the_example_has_the_shapes_of_an_observation(kind):
    example, real = MEMBERS[kind].example(CONFIGS[kind]), observe(kind, lead=())
    for shape, part in zip(example, real, strict=True):
        assert (shape is None) is (part is None)
        assert shape is None or (shape.shape, shape.dtype) == (part.shape, part.dtype)


@pytest.mark.sampled
@each
@pytest.mark.parametrize("lead", [(B,), (2, B), ()])
def test_tokens_have_the_leading_axes_of_the_observation(kind, lead):
    config = CONFIGS[kind]
    tokens = jax.eval_shape(
        functools.partial(MEMBERS[kind].apply, config=config),
        params(kind),
        observation=observe(kind, lead),
    )
    assert tokens.tokens.shape == (*lead, config.num_tokens, config.token_dim)
    assert tokens.tokens.dtype == jnp.float32
    assert tokens.mask.shape == (*lead, config.num_tokens)
    assert tokens.mask.dtype == bool


@pytest.mark.slow
@pytest.mark.sampled
@each
def test_vmap_equals_a_loop_and_jit_does_not_change_tokens(kind):
    observation, backbone = observe(kind), MEMBERS[kind]
    together = encode(kind, observation)

    def apply(observation):
        return backbone.apply(params(kind), CONFIGS[kind], observation).tokens

    np.testing.assert_allclose(apply(observation), together, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(apply))(observation), together, atol=1e-5)
    for i in range(B):
        alone = jax.tree.map(lambda part, i=i: part[i], observation)
        np.testing.assert_allclose(encode(kind, alone), together[i], atol=1e-5)


@pytest.mark.sampled
@each
def test_tokens_depend_on_every_input_and_on_word_order(kind):
    observation = observe(kind)
    tokens = encode(kind, observation)
    other = observe(kind, seed=1)
    for name in PARTS[kind]:
        changed = encode(kind, observation._replace(**{name: getattr(other, name)}))
        assert np.abs(changed - tokens).max() > 1e-3, name
    swapped = instruction(kind, TEXTS[2])
    assert np.abs(encode(kind, observation._replace(instruction=swapped)) - tokens).max() > 1e-3


@pytest.mark.sampled
@with_images
@pytest.mark.parametrize("camera", ["image_primary", "image_wrist"])
def test_a_camera_without_an_image_does_not_reach_the_tokens(kind, camera):
    observation = observe(kind)
    real = np.array([False, True, True])
    masked = observation._replace(image_mask={camera: real})
    other = masked._replace(**{camera: getattr(observe(kind, seed=1), camera)})
    tokens, changed, whole = (encode(kind, each) for each in (masked, other, observation))
    np.testing.assert_allclose(tokens[0], changed[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tokens[1:], whole[1:], rtol=1e-5, atol=1e-5)
    assert np.abs(tokens[0] - whole[0]).max() > 1e-4
    assert np.abs(tokens[1] - changed[1]).max() > 1e-4


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in PARTS
        for name in ("proprio", "environment_state")
        if name in PARTS[kind]
    ],
)
def test_numbers_that_a_robot_lacks_do_not_reach_the_tokens(kind, name):
    """Row 0 lacks all numbers of the column, row 1 all but two, row 2 none."""
    observation = observe(kind)
    values = getattr(observation, name)
    real = np.arange(values.shape[-1]) < np.array([0, 2, values.shape[-1]])[:, None]
    apply = functools.partial(compiled(kind), params(kind), CONFIGS[kind])
    tokens, changed, whole = (
        apply(observation._replace(**{name: each}, column_mask=mask and {name: real}))
        for each, mask in (
            (values, True),
            (np.where(real, values, np.nan), True),
            (np.where(real, values, 0), None),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, tokens, changed)
    np.testing.assert_array_equal(tokens.mask[1:], True)
    assert (~tokens.mask[0]).sum() == 1  # the token of the column, which is 0
    np.testing.assert_array_equal(tokens.tokens[0][~tokens.mask[0]], 0)
    # a missing number is not in the linear map
    np.testing.assert_allclose(tokens.tokens[1:], whole.tokens[1:], rtol=1e-5, atol=1e-5)
    wrong = observation._replace(column_mask={name: real[:, :1]})
    with pytest.raises(ValueError, match=rf"column_mask of {name} must be \[3, \d+\] as its"):
        apply(wrong)


@with_hashed_words
def test_an_empty_instruction_gives_the_learned_silence_token(kind):
    without_words = observe(kind)._replace(instruction=np.zeros((B, S), np.int32))
    tokens = encode(kind, without_words)
    silence = params(kind)["words"]["silence"]
    np.testing.assert_allclose(tokens[:, -1], np.tile(silence, (B, 1)), atol=1e-6)


@with_hashed_words
def test_words_unseen_in_training_get_distinct_finite_tokens(kind):
    sentences = ("touch the red block", "zzyzx über 触る 7", "?!")
    ids = np.stack([word_hashing.tokenize(s, max_words=S, vocab_size=VOCAB) for s in sentences])
    tokens = encode(kind, observe(kind)._replace(instruction=ids))[:, -1]
    assert np.all(np.isfinite(tokens))
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-3
    np.testing.assert_allclose(tokens[2], params(kind)["words"]["silence"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.sampled
@each
def test_the_gradient_reaches_every_param(kind):
    observation = observe(kind)
    observation.instruction[0] = instruction(kind, "")[0]  # so that `silence` has a gradient too

    def loss_fn(params):
        weights = jax.random.normal(jax.random.key(1), (B, 1, CONFIGS[kind].token_dim))
        tokens = MEMBERS[kind].apply(params, CONFIGS[kind], observation).tokens
        return jnp.sum(weights * tokens * tokens)

    grads = jax.jit(jax.grad(loss_fn))(params(kind))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # Softmax is invariant to the bias of keys.
        if not name.endswith(("['key']['bias']", "['lora_scale']")):
            assert np.abs(grad).max() > 0, name


def in_bfloat16(config):
    if hasattr(config, "dtype"):
        return dataclasses.replace(config, dtype="bfloat16")
    options = dataclasses.replace(config.options, dtype="bfloat16")
    return dataclasses.replace(config, options=options)


@pytest.mark.sampled
@each
def test_bfloat16_products_give_nearly_the_same_float32_tokens(kind):
    low_precision = in_bfloat16(CONFIGS[kind])
    observation = observe(kind)
    tokens, exact = encode(kind, observation, low_precision), encode(kind, observation)
    assert tokens.dtype == jnp.float32
    shapes = jax.eval_shape(lambda key: MEMBERS[kind].init(key, low_precision), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    difference = np.abs(tokens - exact)
    assert 0 < difference.max() < 0.15 * np.abs(exact).max()


@each
def test_a_backbone_tokenises_and_declares_its_images(kind):
    backbone, config = MEMBERS[kind], CONFIGS[kind]
    ids = backbone.tokenize(config, "touch the red block")
    assert ids.dtype == np.int32
    assert ids.shape == observe(kind).instruction.shape[1:]
    assert ids.max() < config.vocab_size
    spec = backbone.image_spec(config)
    cameras = () if spec is None else spec.cameras
    assert {name for name in PARTS[kind] if name.startswith("image_")} == set(cameras)
    if spec is not None:
        assert getattr(observe(kind), cameras[0]).shape[1:3] == (spec.height, spec.width)


@with_hashed_words
def test_instructions_with_the_same_ids_are_refused(kind):
    small = dataclasses.replace(CONFIGS[kind], vocab_size=3)
    with pytest.raises(ValueError, match="vocab_size must give all words"):
        registry.make_tokenizer(small, ["lift the red block"])
    tokenize = registry.make_tokenizer(CONFIGS[kind], ["lift the red block"])
    assert tokenize("lift").any()


@with_hashed_words
@pytest.mark.parametrize(("field", "value", "least"), [("max_words", 0, 1), ("vocab_size", 1, 2)])
def test_a_vocabulary_without_words_is_refused(kind, field, value, least):
    with pytest.raises(ValueError, match=f"{field} must be at least {least}, got {value}"):
        dataclasses.replace(CONFIGS[kind], **{field: value})


@each
def test_a_missing_input_is_refused(kind):
    for name in PARTS[kind]:
        observation = observe(kind)._replace(**{name: None})
        with pytest.raises(ValueError, match=rf"^observation\.{name} is missing; .*{name}"):
            MEMBERS[kind].apply(params(kind), CONFIGS[kind], observation)


@each
def test_an_input_of_another_size_is_refused(kind):
    for name in PARTS[kind]:
        cut = getattr(observe(kind), name)[..., :-1]
        with pytest.raises(ValueError, match=rf"must be \[.*\], got \[{B}.*same leading axes"):
            MEMBERS[kind].apply(params(kind), CONFIGS[kind], observe(kind)._replace(**{name: cut}))


@with_images
def test_an_image_that_is_not_uint8_is_refused(kind):
    observation = observe(kind)
    scaled = observation._replace(image_wrist=observation.image_wrist / np.float32(255))
    with pytest.raises(ValueError, match="image_wrist must be uint8 in 0 … 255, got float32"):
        MEMBERS[kind].apply(params(kind), CONFIGS[kind], scaled)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_size": 60}, "image_size must be a multiple of patch_size 8, got 60"),
        ({"num_heads": 3}, "width must be a multiple of num_heads 3, got 64"),
    ],
)
def test_a_perceiver_whose_sizes_do_not_divide_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        PerceiverConfig(**fields)


@pytest.mark.parametrize("patches", ["overlap", "tiles"])
def test_the_tokens_of_a_perceiver_equal_those_of_an_earlier_version(patches):
    """The golden tokens were computed by revision ba0bd99, with a convolution over the patches."""
    config = PerceiverConfig(
        image_size=16, patch_size=8, overlap=patches == "overlap", width=8, num_heads=2,
        num_latents=3, token_dim=4, proprio_dim=2, vocab_size=16, max_words=3,
    )  # fmt: skip
    with np.load(GOLDEN) as file:
        arrays = traverse_util.unflatten_dict(dict(file), sep="/")[patches]
    observation = Observation(**{name: arrays[name] for name in PARTS["perceiver"]})
    apply = jax.jit(BACKBONES["perceiver"].apply, static_argnums=1)
    tokens = apply(arrays["params"], config, observation).tokens
    np.testing.assert_allclose(tokens, arrays["tokens"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False])
def test_every_pixel_of_both_images_affects_the_perceiver(overlap):
    config = dataclasses.replace(CONFIGS["perceiver"], overlap=overlap)
    init = jax.jit(BACKBONES["perceiver"].init, static_argnums=1)
    weights = init(jax.random.key(0), config)
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 1, 16, 16, 3)).astype(np.float32)
    observation = observe("perceiver", (1,))

    def loss_fn(pictures):
        seen = observation._replace(image_primary=pictures[0], image_wrist=pictures[1])
        parts = {name: getattr(seen, name) for name in PARTS["perceiver"]}
        return jnp.sum(jnp.sin(3 * Perceiver(config).apply({"params": weights}, parts)))

    grads = jax.jit(jax.grad(loss_fn))(pictures)
    assert np.all(np.abs(grads).max(axis=-1) > 0)


@pytest.mark.parametrize("sizes", [(), (6,), (6, 5)])
def test_the_token_of_a_state_is_linear_or_an_mlp_over_all_three_parts(sizes):
    config = dataclasses.replace(CONFIGS["state"], joint_sizes=sizes)
    drawn = BACKBONES["state"].init(jax.random.key(0), config)
    params, observation = jax.tree.map(np.asarray, drawn), observe("state")
    tokens = np.asarray(BACKBONES["state"].apply(params, config, observation).tokens)
    seen = observation.environment_state
    if sizes:
        seen = np.concatenate([seen, observation.proprio, tokens[:, 2]], axis=-1)
    for layer in range(len(sizes)):
        joint = params[f"joint_{layer}"]
        seen = np.maximum(seen @ joint["kernel"] + joint["bias"], 0)
    state = params["environment_state"]
    np.testing.assert_allclose(tokens[:, 0], seen @ state["kernel"] + state["bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((0,), r"be at least 1, got 0\."),
        ((1,) * 101, r"be at most 100 layers, got 101\."),
        ((2**16, 2**16), r"give at most 67108864 weights, got \d+; use narrower layers\."),
    ],
)
def test_an_mlp_that_has_no_units_or_would_fill_the_memory_is_refused(sizes, sentence):
    with pytest.raises(ValueError, match=f"joint_sizes must {sentence}$"):
        StateConfig(joint_sizes=sizes)
