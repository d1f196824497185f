"""Interface of a vision-language model, and the backbone that is made from one.

A model is a `VisionLanguageModel`: its tables and functions. `make_backbone` turns it into a member
of the family of backbones.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vla_jax import trees
from vla_jax.backbones import sequence, tokenizers, vlm_params, vlm_window, word_hashing
from vla_jax.backbones.backbone import Backbone, Globs, History, ImageSpec
from vla_jax.backbones.blocks import init_tree
from vla_jax.backbones.image_settings import Preprocessing
from vla_jax.backbones.parts import mask_token
from vla_jax.backbones.sequence import IMAGE
from vla_jax.backbones.tensor_names import Tensor
from vla_jax.backbones.vlm_inputs import example, read_inputs
from vla_jax.backbones.vlm_options import History as Steps
from vla_jax.backbones.vlm_options import Layout, VLMOptions
from vla_jax.backbones.vlm_window import EmbeddedStep
from vla_jax.files import Path
from vla_jax.nn import lora
from vla_jax.nn.layers import dense
from vla_jax.types import Array, Key, Observation, Params, ShardingRules, Tokens

TOKENIZER = "tokenizer.json"  # its name in the folder of a model, and in a run folder
_MOST_TOKENS = 2**16  # per image: their positions are listed
# Maps into a wide layer are split along their outputs over `tensor`, maps out of it along their
# inputs: what is between them needs no communication. The other dimension is split over `fsdp`.
_INTO = PartitionSpec(None, "fsdp", "tensor")
_OUT = PartitionSpec(None, "tensor", "fsdp")
SHARDING_RULES: ShardingRules = (
    ("*/layers/out/kernel", _OUT),
    ("*/layers/*/out/kernel", _OUT),
    ("*/layers/down/kernel", _OUT),
    ("*/layers/*/down/kernel", _OUT),
    # three maps side by side: a part of their outputs is not a part of the heads
    ("*/layers/*/qkv/kernel", PartitionSpec(None, "fsdp", None)),
    ("*/layers/*/kernel", _INTO),
    ("*/deepstack/*/kernel", PartitionSpec(None, None, "fsdp")),
    ("*/merger/*/kernel", PartitionSpec(None, "fsdp")),
    ("*/embedding", PartitionSpec(None, "fsdp")),
    ("*/head/kernel", PartitionSpec("fsdp", None)),
    ("projection*/kernel", PartitionSpec("fsdp")),
    ("*/patches/kernel", PartitionSpec("fsdp")),
)


ALL: Mapping[str, tuple[str, ...]] = {"layout": get_args(Layout), "history": get_args(Steps)}


class VLMSizes(abc.ABC):
    """Sizes of a step's tokens, from the config of a vision-language model."""

    # fields that say how a policy uses the model; the others are sizes of the model
    POLICY_FIELDS: ClassVar[tuple[str, ...]] = ("options",)
    # values of options that not every model has
    SUPPORTED: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layout": ("native",),
        "history": ("step",),
    }

    kind: Any  # name of the model
    language: Any  # config of the language model, with vocab_size and hidden_size
    images: Preprocessing
    options: VLMOptions

    def __post_init__(self):
        for name, values in self.SUPPORTED.items():
            value = getattr(self.options, name)
            if value not in values:
                raise ValueError(
                    f"{name} must be '{values[0]}' for backbone '{self.kind}', got '{value}'; "
                    "choose another backbone, such as kosmos2 or paligemma."
                )
        if self.tokens_per_image > _MOST_TOKENS:
            raise ValueError(
                f"the image size must give at most {_MOST_TOKENS} tokens per image, got "
                f"{self.tokens_per_image}; reduce image_size or num_latents, or raise patch_size."
            )

    @property
    @abc.abstractmethod
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image takes."""

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""

    @property
    def token_dim(self) -> int:
        """D, features of a token."""
        return self.language.hidden_size

    @property
    def num_tokens(self) -> int:
        """N, tokens per step."""
        return sequence.num_tokens(self) + bool(self.options.proprio_dim)

    @property
    def vocab_size(self) -> int:
        """V, with the learned tokens, whose ids follow those of the language model."""
        return self.language.vocab_size + self.options.num_learned

    @property
    def sequence_length(self) -> int:
        """S, positions of a step's sequence."""
        num_images = len(self.options.cameras) * self.tokens_per_image
        return num_images + self.options.max_text_tokens + self.options.num_learned


class VisionLanguageModel(NamedTuple):
    """Tables and functions of a vision-language model."""

    config: type  # dataclass of its config, with the properties of `VLMSizes`
    model_types: tuple[str, ...]  # `model_type` of its config.json
    from_json: Callable[[Mapping[str, Any]], Any]  # config.json -> config
    to_json: Callable[[Any], dict[str, Any]]  # the inverse
    shapes: Callable[[Any], Params]  # config -> shapes of the params
    tensors: Callable[[Any], tuple[Tensor, ...]]  # config -> places of the params in a file
    renames: tuple[tuple[str, str], ...]  # (pattern, replacement) from other names to those
    # (pattern, replacement) from the table's names to those of live modules in transformers 5
    live_names: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]  # patterns of tensors of a file that have no param
    # (params, config, sequences [B, S], images [B, C, h, w, 3] uint8) -> hidden states [B, S, D]
    hidden_states: Callable[[Params, Any, Array, Array], jax.Array]
    # (params, config, embeddings [B, T, D], positions [B, T], or [3, B, T] for a Qwen-VL,
    # mask [B, T, T]) -> hidden states [B, T, D]
    language_model: Callable[..., jax.Array]
    # (params, config, inputs of the original's forward) -> last_hidden, logits
    forward: Callable[[Params, Any, Mapping[str, Array]], dict[str, jax.Array]]
    # (config, tokenizer, text) -> ids of a prompt with `IMAGE` for every feature of an image
    prompt: Callable[[Any, Any, str], Sequence[int]]
    read_images: Callable[[Path], Any]  # folder -> settings of its image processor
    image_sizes: Callable[[Any], Mapping[str, Any]]  # config -> what they must have
    # (params, config, sequences [B, S], images [B, C, h, w, 3] uint8) -> embeddings [B, S, D], for
    # history "window"; None = not supported
    embed: Callable[[Params, Any, Array, Array], jax.Array] | None = None


def make_backbone(model: VisionLanguageModel) -> Backbone:
    """Returns the member of the family of backbones for a vision-language model."""
    return Backbone(
        config=model.config,
        init=partial(init, model),
        apply=partial(apply, model),
        tokenize=partial(tokenize, model),
        check_instructions=partial(check_instructions, model),
        image_spec=image_spec,
        sharding_rules=SHARDING_RULES,
        files=files,
        with_files=with_files,
        example=example,
        frozen=frozen,
        start_from=start_from,
        adopt=vlm_params.adopt,
        needs_training=lambda config: config.options.num_learned > 0,
        history=partial(history, model),
    )


def init(model: VisionLanguageModel, key: Key, config: Any) -> Params:
    """Returns random params; `key` is consumed."""
    model_key, added_key = jax.random.split(key)
    params = init_tree(model_key, model.shapes(config))
    offset = getattr(config.language, "norm_offset", 0.0)  # Gemma's norms scale by 1 + scale
    language = {
        path: jnp.full_like(leaf, 1.0 - offset) if path.endswith("scale") else leaf
        for path, leaf in trees.leaves_by_path(params["language"]).items()
    }
    params["language"] = jax.tree.unflatten(
        jax.tree.structure(params["language"]), language.values()
    )
    return vlm_params.complete(added_key, params, config)


def apply(
    model: VisionLanguageModel, params: Params, config: Any, observation: Observation
) -> Tokens:
    """Returns the tokens of each observation, independently of other time steps.

    Args:
      model: the model.
      params: from `init`.
      config: config of the params.
      observation: the cameras' images uint8 `[..., h, w, 3]`, `instruction [..., S]` from
        `tokenize`, `proprio [..., P]` if the options have a `proprio_dim`; any leading axes. The
        tokens of cameras without an image (`image_mask`) are padding to the model; the token of a
        proprio without any number (`column_mask`) is padding.

    Returns:
      Tokens `[..., N, D]` float32, mask `[..., N]`.

    Raises:
      ValueError: a part is missing or has another size; with `resize` "device" an image may have
        any size.
    """
    options = config.options
    inputs = read_inputs(config, observation)
    ids, images, real = inputs.ids, inputs.images, inputs.real
    if real is None:
        tokens = sequence.read_out(model.hidden_states(params, config, ids, images), ids, config)
    else:
        seen, moved = sequence.hide_cameras(ids, images, real)
        hidden = model.hidden_states(params, config, seen, moved)
        shown = ids if options.readout in ("image", "image_mean") else seen
        tokens = sequence.mask_cameras(sequence.read_out(hidden, shown, config), real, options)
    if inputs.proprio is not None:
        tokens = _with_proprio(params["proprio"], tokens, inputs.proprio, inputs.present)
    lead = inputs.lead
    return Tokens(*(x.reshape(*lead, *x.shape[1:]) for x in tokens))


def history(model: VisionLanguageModel, config: Any) -> History | None:
    """Returns the functions of history "window"; None for "step"."""
    if config.options.history == "step":
        return None
    return History(partial(embed_step, model), partial(attend_window, model))


def embed_step(
    model: VisionLanguageModel, params: Params, config: Any, observation: Observation
) -> EmbeddedStep:
    """Returns the embedded sequences of steps; arguments and errors as `apply`."""
    assert model.embed is not None
    inputs = read_inputs(config, observation)
    ids, images = inputs.ids, inputs.images
    if inputs.real is not None:
        ids, images = sequence.hide_cameras(ids, images, inputs.real)
    present = inputs.present
    if inputs.proprio is not None and present is None:
        present = jnp.ones(ids.shape[0], bool)
    step = EmbeddedStep(model.embed(params, config, ids, images), ids, inputs.proprio, present)
    lead = inputs.lead
    return jax.tree.map(lambda part: jnp.reshape(part, (*lead, *part.shape[1:])), step)


def attend_window(
    model: VisionLanguageModel, params: Params, config: Any, steps: EmbeddedStep, visible: Array
) -> Tokens:
    """Returns the tokens of the steps of a window, each from the steps that it may see.

    Args:
      model: the model.
      params: from `init`.
      config: config of the params.
      steps: from `embed_step`, `[B, W, ...]`.
      visible: bool `[B, W, W]`, True where a step may see another.

    Returns:
      Tokens `[B, W, N, D]` float32, mask `[B, W, N]`.
    """
    options = config.options
    window = vlm_window.concatenate(
        steps, visible, count_padding=options.layout == "robovlms_padded"
    )
    hidden, ids = vlm_window.split(model.language_model(params, config, *window), steps)
    tokens = sequence.read_out(hidden, ids, config)
    if steps.proprio is not None:
        proprio = jnp.reshape(steps.proprio, (-1, options.proprio_dim))
        present = None if steps.present is None else jnp.reshape(steps.present, -1)
        tokens = _with_proprio(params["proprio"], tokens, proprio, present)
    lead = jnp.shape(steps.ids)[:2]
    return Tokens(*(x.reshape(*lead, *x.shape[1:]) for x in tokens))


def tokenize(model: VisionLanguageModel, config: Any, text: str) -> np.ndarray:
    """Returns the sequence `[S]` int32 of a step with this instruction.

    Raises:
      ValueError: the prompt is longer than `max_text_tokens`, or the tokenizer is of another model.
      FileNotFoundError: the tokenizer's file is missing.
    """
    options = config.options
    prompt = options.prompt.replace("{instruction}", text.strip())
    if options.tokenizer:
        vocab_size = config.language.vocab_size
        tokenizer = tokenizers.read_tokenizer(options.tokenizer, vocab_size=vocab_size)
        ids = model.prompt(config, tokenizer, prompt)
    else:
        ids = _hashed(config, prompt)
    return sequence.arrange(
        ids, options, vocab_size=config.language.vocab_size, length=config.sequence_length
    )


def start_from(config: Any, loaded: Any) -> Any:
    """Returns the config with the sizes, tokenizer and adaptation of a model on disk.

    The use of the model (`POLICY_FIELDS`) stays that of the config, and so does a low-rank
    adaptation if it has one.

    Args:
      config: of the policy's backbone.
      loaded: of the model on disk, of the same class.
    """
    own: dict[str, Any] = {name: getattr(config, name) for name in config.POLICY_FIELDS}
    adaptation = config.options.lora if config.options.lora.rank else loaded.options.lora
    own["options"] = dataclasses.replace(
        config.options, tokenizer=loaded.options.tokenizer, lora=adaptation
    )
    return dataclasses.replace(loaded, **own)


def frozen(config: Any) -> tuple[Globs, Globs]:
    """Returns the globs of frozen params, and of those trained nevertheless.

    With low-rank adaptation, or weights stored in bfloat16, only the factors and what the policy
    adds to the model are trained. A kernel of the logits is never trained.
    """
    options = config.options
    if not options.lora.rank and options.param_dtype == "float32":
        # The logits are not used: weight decay would shrink their kernel.
        tied = getattr(config.language, "tied_head", True)
        return (() if tied else ("language/head/kernel",)), ()
    added = [
        *(lora.TRAINED if options.lora.rank else ()),
        *(("action_token",) if options.num_learned else ()),
        *(("proprio/*",) if options.proprio_dim else ()),
    ]
    return ("*",), tuple(added)


def check_instructions(model: VisionLanguageModel, config: Any, texts: Iterable[str]) -> None:
    """Raises a ValueError if two instructions give the same ids, or one is too long."""
    text_by_ids: dict[bytes, str] = {}
    for text in sorted(set(texts)):
        other = text_by_ids.setdefault(tokenize(model, config, text).tobytes(), text)
        if other.strip() != text.strip():
            raise ValueError(
                f"the tokenizer must give all instructions different ids, but {other!r} and "
                f"{text!r} have the same; change one of them, or the tokenizer."
            )


def image_spec(config: Any) -> ImageSpec:
    """Returns the images of all cameras."""
    height, width = config.image_shape
    images = config.images
    return ImageSpec(
        height,
        width,
        config.options.cameras,
        images.resampling,
        images.mean,
        images.std,
        any_size=config.options.resize == "device",
    )


def files(config: Any) -> Mapping[str, Path]:
    """Returns the tokenizer's file by its name in a run folder; none for hashed words."""
    return {TOKENIZER: config.options.tokenizer} if config.options.tokenizer else {}


def with_files(config: Any, folder: Path) -> Any:
    """Returns the config with the tokenizer of another folder; unchanged for hashed words."""
    if not config.options.tokenizer:
        return config
    options = dataclasses.replace(config.options, tokenizer=str(pathlib.Path(folder) / TOKENIZER))
    return dataclasses.replace(config, options=options)


def _with_proprio(params: Params, tokens: Tokens, proprio: Array, present: Array | None) -> Tokens:
    """Returns the tokens and one more, linear in the proprioception `[B, P]`, 0 where absent."""
    token = dense(proprio, **params)[:, None]
    together = Tokens(
        jnp.concatenate([tokens.tokens, token], axis=1),
        jnp.pad(tokens.mask, ((0, 0), (0, 1)), constant_values=True),
    )
    return mask_token(together, -1, present)


def _hashed(config: Any, prompt: str) -> list[int]:
    """Returns the places of all images, then hashed words, for a model with random weights."""
    words = [
        word_hashing.word_id(word, config.language.vocab_size)
        for word in word_hashing.words(prompt)
    ]
    return [IMAGE] * (len(config.options.cameras) * config.tokens_per_image) + [0, *words]
