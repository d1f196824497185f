"""Conversion of instructions to word ids by hashing."""

import unicodedata
import warnings
import zlib

import numpy as np
import pytest

from vla_jax.backbones import word_hashing

SIZES = {"max_words": 4, "vocab_size": 1000}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("put the block", ["put", "the", "block"]),
        ("Lift THE red-block, now!", ["lift", "the", "red", "block", "now"]),
        ("push_button 2", ["push", "button", "2"]),
        ("schließe die Schublade", ["schliesse", "die", "schublade"]),
        ("拿起 红色 积木", ["拿起", "红色", "积木"]),
        ("", []),
        ("  ?! ", []),
    ],
)
def test_words_are_lower_case_letters_and_digits(sentence, expected):
    assert word_hashing.words(sentence) == expected


def test_ids_are_word_hashes_above_zero_padded_with_zeros():
    expected = [1 + zlib.crc32(b"lift") % 999, 1 + zlib.crc32(b"blocks") % 999, 0, 0]
    ids = word_hashing.tokenize("Lift blocks", **SIZES)
    assert ids.tolist() == expected
    assert ids.dtype == np.int32


@pytest.mark.parametrize("sentence", ["", "éclair", "zyxwv 😀 qqq", "a\x00b", "𝔘nicode"])
def test_any_text_gives_ids_inside_the_vocabulary(sentence):
    ids = word_hashing.tokenize(sentence, max_words=4, vocab_size=2)
    assert ids.shape == (4,)
    assert ids.min() >= 0
    assert ids.max() < 2


def test_composed_and_decomposed_unicode_letters_are_the_same_word():
    assert word_hashing.words("caf\u00e9") == word_hashing.words("cafe\u0301")


def test_a_longer_text_is_truncated_with_one_warning():
    with pytest.warns(UserWarning, match=r"6 words, kept the first 4 \(max_words\)") as caught:
        ids = word_hashing.tokenize("one two three four five six", **SIZES)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(ids, word_hashing.tokenize("one two three four", **SIZES))


def test_colliding_words_are_named_with_a_remedy():
    word_hashing.check_collisions(["put the red block", "the red block"], 2048)
    with pytest.raises(ValueError, match=r"got 3, where 'block' and '\w+' share id .* such as 6"):
        word_hashing.check_collisions(["put the red block"], 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("दिन", "दीन"),
        ("डिब्बा खोलो", "डब्बा खोलो"),
        ("ปิดไฟ", "ปดไฟ"),
        ("கல்", "கால்"),
        ("كَتَبَ", "كُتُب"),
        ("gib den Ball", "gîb den Ball"),
        ("開けて", "閉めて"),
    ],
)
def test_texts_that_differ_in_letters_or_marks_have_different_ids(one, other):
    ids = [word_hashing.tokenize(text, max_words=12, vocab_size=2048) for text in (one, other)]
    assert not np.array_equal(*ids)
    word_hashing.check_collisions([one, other], 2048)  # no warning
    composed, separate = (unicodedata.normalize(form, one) for form in ("NFC", "NFD"))
    assert word_hashing.words(composed) == word_hashing.words(separate)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Lift the block", "lift the block!"),
        ("straße", "strasse"),
        ("press 🟥", "press 🟦"),
        ("move to x²", "move to x2"),
        ("a b c d left", "a b c d right"),
    ],
)
def test_different_texts_of_the_same_words_are_named(one, other):
    with pytest.warns(UserWarning, match="cannot distinguish them") as caught:
        word_hashing.check_collisions([one, other, f" {one}\t"], 2048, max_words=4)
    assert repr(one) in str(caught[0].message)
    assert repr(other) in str(caught[0].message)
    assert str(caught[0].message).startswith("1 groups")
