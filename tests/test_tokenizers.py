"""Token ids and prompts of the original tokenizers and processors."""

import json
import os
import pathlib
import re
import sys

import pytest

from vla_jax.backbones import prompts, tokenizers

GOLDEN = pathlib.Path(__file__).parent / "golden/tokenizers"
KINDS = ("kosmos2", "paligemma", "qwen3vl", "smolvlm")
each = pytest.mark.parametrize("kind", KINDS)
IMAGES = {
    "kosmos2": prompts.kosmos2,
    "paligemma": prompts.paligemma,
    "smolvlm": prompts.smolvlm,
    "qwen3vl": prompts.qwen,
}


def tokenizer(kind):
    return tokenizers.read_tokenizer(GOLDEN / kind / "tokenizer.json")


def read(kind, name):
    return json.loads((GOLDEN / kind / f"{name}.json").read_text())


@each
def test_ids_are_those_of_the_original(kind):
    data, reader = read(kind, "expected"), tokenizer(kind)
    expected = data["expected"]
    for index, text in enumerate(data["sentences"]):
        found = tokenizers.ids(reader, text, special=True)
        assert found == expected["ids"][index]
        plain = tokenizers.ids(reader, text, special=False)
        assert plain == expected["ids_without_special_tokens"][index]
        assert [reader.id_to_token(i) for i in found] == expected["tokens"][index]
        assert reader.decode(plain, skip_special_tokens=False) == expected["decoded"][index]


def test_kosmos2_prompts_are_those_of_the_original():
    data, reader = read("kosmos2", "prompts"), tokenizer("kosmos2")
    size = data["num_image_tokens"]
    for call in data["calls"]:
        found = prompts.kosmos2(reader, call["text"], 1, size)
        end = [2] if call["add_eos_token"] else []
        assert found + end == call["input_ids"]
        positions = [i for i, mask in enumerate(call["image_embeds_position_mask"]) if mask]
        assert prompts.kosmos2_image_positions(1, size) == positions


def test_further_images_of_kosmos2_follow_the_first():
    reader = tokenizer("kosmos2")
    one, two = (prompts.kosmos2(reader, "open", images, 3) for images in (1, 2))
    assert two == one[:6] + one[1:]
    assert [two[i] for i in prompts.kosmos2_image_positions(2, 3)] == [4, 5, 6, 4, 5, 6]


def test_paligemma_prompts_are_those_of_the_original():
    data, reader = read("paligemma", "prompts"), tokenizer("paligemma")
    for call in data["calls"]:
        suffixes = call["suffix"] or [None, None]
        for index, (text, suffix) in enumerate(zip(call["text"], suffixes, strict=True)):
            prefix = prompts.paligemma(reader, text, 1, data["image_seq_length"])
            answer = [] if suffix is None else prompts.paligemma_suffix(reader, suffix)
            length = sum(call["attention_mask"][index])
            assert prefix + answer == call["input_ids"][index][:length]
            if suffix is not None:
                types = [0] * len(prefix) + [1] * len(answer)
                assert types == call["token_type_ids"][index][:length]


def test_smolvlm_prompts_are_those_of_the_original():
    data, reader = read("smolvlm", "prompts"), tokenizer("smolvlm")
    for call in data["calls"]:
        rows, columns, size = call["rows"], call["cols"], data["image_seq_len"]
        found = prompts.smolvlm(reader, "open the drawer", 1, size, rows=rows, columns=columns)
        assert found == call["input_ids"]
    none = tokenizers.ids(reader, "<|im_start|>User: open<end_of_utterance>\nAssistant:", False)
    assert prompts.smolvlm(reader, "open", 0, size) == none


def test_qwen_prompts_are_those_of_the_original():
    data, reader = read("qwen3vl", "prompts"), tokenizer("qwen3vl")
    one = data["calls"][0]
    assert prompts.qwen(reader, "open the drawer", 1, 6) == one["input_ids"]
    # the images of the other call are of two sizes, 1 and 2 tokens
    pad, two = tokenizers.token_id(reader, "<|image_pad|>"), data["calls"][1]["input_ids"]
    second = len(two) - two[::-1].index(pad)
    assert prompts.qwen(reader, "open the drawer", 2, 1) == two[: second - 1] + two[second:]
    system = tokenizers.ids(
        reader, f"<|im_start|>system\n{prompts.QWEN25_SYSTEM}<|im_end|>\n", False
    )
    found = prompts.qwen(reader, "open the drawer", 1, 6, system=prompts.QWEN25_SYSTEM)
    assert found == system + one["input_ids"]


@each
def test_an_instruction_with_the_placeholder_is_refused(kind):
    text = "open <image> <|image_pad|>"
    message = r"must not contain the image placeholder .*, got it 1 times"
    with pytest.raises(ValueError, match=message):
        IMAGES[kind](tokenizer(kind), text, 1, 2)


@each
def test_the_tokenizer_of_another_model_is_refused(kind):
    other = tokenizer(KINDS[KINDS.index(kind) - 1])
    with pytest.raises(ValueError, match=r"tokenizer must have the token '.*use the tokenizer"):
        IMAGES[kind](other, "open", 1, 2)


def test_crops_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="must have the token '<row_3_col_1>'"):
        prompts.smolvlm(tokenizer("smolvlm"), "open", 1, 2, rows=3, columns=1)


@each
def test_a_vocabulary_that_the_model_has_no_embeddings_for_is_refused(kind):
    reader = tokenizer(kind)
    size = max(reader.get_vocab().values()) + 1
    tokenizers.check_vocabulary(reader, size)
    with pytest.raises(ValueError, match=f"vocab_size {size - 1}, got {size - 1} for '<"):
        tokenizers.check_vocabulary(reader, size - 1)


def test_a_file_is_read_again_only_after_it_has_changed(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes((GOLDEN / "smolvlm/tokenizer.json").read_bytes())
    first = tokenizers.read_tokenizer(path)
    assert tokenizers.read_tokenizer(str(path)) is first
    os.utime(path, ns=(1, 1))
    assert tokenizers.read_tokenizer(path) is not first


def test_padding_and_truncation_of_a_file_are_switched_off(tmp_path):
    data = read("smolvlm", "tokenizer")
    expected = tokenizers.ids(tokenizer("smolvlm"), "open the drawer", special=True)
    reader = tokenizers.read_tokenizer(GOLDEN / "smolvlm/tokenizer.json")
    padded = type(reader).from_str(json.dumps(data))
    padded.enable_padding(length=20)
    padded.enable_truncation(2)
    padded.save(str(tmp_path / "tokenizer.json"))
    found = tokenizers.read_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizers.ids(found, "open the drawer", special=True) == expected


def test_missing_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing: expected the token"):
        tokenizers.read_tokenizer(path)
    path.write_bytes((GOLDEN / "smolvlm/tokenizer.json").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer \(.*copy it again"):
        tokenizers.read_tokenizer(path)


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'vla-jax[vlm]'")):
        tokenizers.read_tokenizer(path)
