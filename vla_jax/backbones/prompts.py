"""Token ids of an instruction with images, in the layout of each vision-language model.

Every function returns the whole `input_ids` of one sample, with the places of the images' features
filled by placeholders:

- Kosmos-2: `<s>`, for each image `<image>` 4, 5, 6, … `</image>`, then the text.
- PaliGemma: `<image>` for each feature, `<bos>`, the text, a newline.
- SmolVLM: a chat; `<image>` for each feature, between `<fake_token_around_image>`.
- Qwen-VL: a chat; `<|image_pad|>` for each feature, between `<|vision_start|>` and
  `<|vision_end|>`.

The placeholders of Kosmos-2 are ids of ordinary tokens too, so its images are found by position
(`kosmos2_image_positions`), those of the others by the placeholder's id.

Source: the processors of Hugging Face transformers 4.37 to 5.23, and the chat templates in the
published folders of SmolVLM2-Instruct, Qwen2.5-VL-Instruct and Qwen3-VL-Instruct.
"""

from typing import Any

from vla_jax.backbones.tokenizers import ids, token_id

QWEN25_SYSTEM = "You are a helpful assistant."  # default system message of Qwen2-VL and Qwen2.5-VL
# Tokens that a tokenizer must have; the first one is the placeholder.
KOSMOS2_TOKENS = ("<image>", "</image>", "<s>", "<unk>")
PALIGEMMA_TOKENS = ("<image>", "<bos>", "<eos>")
SMOLVLM_TOKENS = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<end_of_utterance>",
)  # fmt: skip
QWEN_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")


def kosmos2(tokenizer: Any, text: str, num_images: int, tokens_per_image: int) -> list[int]:
    """Returns the ids for Kosmos-2, without `</s>`, as its processor.

    The original takes one image; further ones follow in the same way.

    Args:
      tokenizer: from `read_tokenizer`.
      text: the instruction; `<grounding>` at its start asks for a grounded answer.
      num_images: images, before the text.
      tokens_per_image: features per image.

    Raises:
      ValueError: the text names a token of the layout, or the tokenizer is of another model.
    """
    image = "<image>" * (1 + tokens_per_image) + "</image>"
    expected = (1 + tokens_per_image) * num_images
    found = _encode(tokenizer, f"<s>{image * num_images}{text}", KOSMOS2_TOKENS, expected)
    first = token_id(tokenizer, "<unk>") + 1
    for index, position in enumerate(kosmos2_image_positions(num_images, tokens_per_image)):
        found[position] = first + index % tokens_per_image
    return found


def kosmos2_image_positions(num_images: int, tokens_per_image: int) -> list[int]:
    """Returns the positions of the placeholders in the ids of `kosmos2`, ascending."""
    starts = [2 + image * (tokens_per_image + 2) for image in range(num_images)]
    return [start + place for start in starts for place in range(tokens_per_image)]


def paligemma(tokenizer: Any, text: str, num_images: int, tokens_per_image: int) -> list[int]:
    """Returns the ids for PaliGemma; arguments and errors as `kosmos2`.

    All of them are the prefix, which is seen in both directions (token type 0).
    """
    images = "<image>" * (num_images * tokens_per_image)
    expected = num_images * tokens_per_image
    return _encode(tokenizer, f"{images}<bos>{text}\n", PALIGEMMA_TOKENS, expected)


def paligemma_suffix(tokenizer: Any, suffix: str) -> list[int]:
    """Returns the ids of the answer that follows `paligemma`'s in training (token type 1)."""
    return _encode(tokenizer, f"{suffix}<eos>", PALIGEMMA_TOKENS, 0)


def smolvlm(
    tokenizer: Any,
    text: str,
    num_images: int,
    tokens_per_image: int,
    *,
    rows: int = 0,
    columns: int = 0,
) -> list[int]:
    """Returns the ids for SmolVLM and SmolVLM2, up to where the assistant answers.

    Args:
      tokenizer: from `read_tokenizer`.
      text: the instruction.
      num_images: images, before the text.
      tokens_per_image: features per crop.
      rows: of crops in every image; 0 = the whole picture alone.
      columns: crops in a row of every image; 0 as for `rows`.

    Raises:
      ValueError: the text names a token of the layout, or the tokenizer is of another model.
    """
    mark, places = "<fake_token_around_image>", "<image>" * tokens_per_image
    lines = [
        "".join(f"{mark}<row_{row + 1}_col_{column + 1}>{places}" for column in range(columns))
        for row in range(rows)
    ]
    image = "".join(f"{line}\n" for line in lines) + "\n" * bool(lines)
    image += f"{mark}<global-img>{places}{mark}"
    role = "User:" if num_images else "User: "
    chat = f"<|im_start|>{role}{image * num_images}{text}<end_of_utterance>\nAssistant:"
    expected = num_images * (rows * columns + 1) * tokens_per_image
    crops = [f"<row_{row + 1}_col_{columns}>" for row in range(rows) if columns]
    return _encode(tokenizer, chat, (*SMOLVLM_TOKENS, *crops), expected)


def qwen(
    tokenizer: Any, text: str, num_images: int, tokens_per_image: int, *, system: str = ""
) -> list[int]:
    """Returns the ids for Qwen-VL, up to where the assistant answers.

    Args:
      tokenizer: from `read_tokenizer`.
      text: the instruction.
      num_images: images, before the text.
      tokens_per_image: features per image, after merging.
      system: system message; "" = none, as Qwen3-VL; Qwen2.5-VL has `QWEN25_SYSTEM`.

    Raises:
      ValueError: the text names a token of the layout, or the tokenizer is of another model.
    """
    image = f"<|vision_start|>{'<|image_pad|>' * tokens_per_image}<|vision_end|>"
    chat = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    chat += f"<|im_start|>user\n{image * num_images}{text}<|im_end|>\n<|im_start|>assistant\n"
    return _encode(tokenizer, chat, QWEN_TOKENS, num_images * tokens_per_image)


def _encode(tokenizer: Any, prompt: str, tokens: tuple[str, ...], expected: int) -> list[int]:
    """Returns the ids of a prompt, in which the first of `tokens` must occur `expected` times."""
    placeholder, *_ = [token_id(tokenizer, token) for token in tokens]
    found = ids(tokenizer, prompt, special=False)
    surplus = found.count(placeholder) - expected
    if surplus:
        raise ValueError(
            f"instruction must not contain the image placeholder '{tokens[0]}', got it {surplus} "
            "times; delete it from the text."
        )
    return found
