"""Hashing tokenizer: every word has an id, including words that are not in the training data."""

import unicodedata
import warnings
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

NO_WORD = 0
_NAMED = 5  # groups of instructions that a warning names


def words(text: str) -> list[str]:
    """Returns the case-folded words of a text: its runs of letters, digits and combining marks.

    Marks are part of a word: vowel signs of Devanagari, Tamil or Thai are marks.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char if _is_in_word(char) else " " for char in folded).split()


def _is_in_word(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char).startswith("M")


def word_id(word: str, vocab_size: int) -> int:
    """Returns the id of a word in [1, vocab_size): `1 + crc32(word) mod (vocab_size - 1)`."""
    return 1 + zlib.crc32(word.encode()) % (vocab_size - 1)


def tokenize(text: str, *, max_words: int, vocab_size: int) -> np.ndarray:
    """Returns the word ids of an instruction, padded with 0 (no word).

    Two words may have the same id; `check_collisions` checks a set of known words.

    Args:
      text: the instruction, any language; an empty one gives zeros.
      max_words: S; further words are dropped with a warning.
      vocab_size: ids are in [0, vocab_size).

    Returns:
      Ids `[S]` int32.
    """
    all_words = words(text)
    if len(all_words) > max_words:
        warnings.warn(
            f"instruction has {len(all_words)} words, kept the first {max_words} (max_words): "
            f"{text!r}",
            stacklevel=2,
        )
    ids = np.full(max_words, NO_WORD, np.int32)
    first_words = all_words[:max_words]
    ids[: len(first_words)] = [word_id(word, vocab_size) for word in first_words]
    return ids


def check_collisions(
    texts: Iterable[str], vocab_size: int, *, max_words: int | None = None
) -> None:
    """Raises a ValueError if two words of the texts share an id.

    Warns of different texts with the same words, such as "stop" and "Stop!", which a policy cannot
    distinguish; texts are different if they differ in more than spaces after normalisation (NFC).

    Args:
      texts: every instruction of a data set.
      vocab_size: as for `tokenize`.
      max_words: as for `tokenize`; None means that all words count.

    Raises:
      ValueError: two words share an id.
    """
    texts = list(texts)
    words_by_id: dict[int, str] = {}
    for word in sorted({word for text in texts for word in words(text)}):
        other = words_by_id.setdefault(word_id(word, vocab_size), word)
        if other != word:
            raise ValueError(
                f"vocab_size must give all words of the instructions different ids, got "
                f"{vocab_size}, where {other!r} and {word!r} share id {word_id(word, vocab_size)}; "
                f"choose another vocab_size, such as {2 * vocab_size}."
            )
    _warn_of_same_words(texts, max_words)


def _warn_of_same_words(texts: Iterable[str], max_words: int | None) -> None:
    groups: dict[tuple[str, ...], list[str]] = {}
    for text in sorted({" ".join(unicodedata.normalize("NFC", text).split()) for text in texts}):
        groups.setdefault(tuple(words(text)[:max_words]), []).append(text)
    same = [group for group in groups.values() if len(group) > 1]
    if same:
        named = "; ".join(" = ".join(map(repr, group[:4])) for group in same[:_NAMED])
        more = f"; and {len(same) - _NAMED} more" if len(same) > _NAMED else ""
        warnings.warn(
            f"{len(same)} groups of instructions are the same words for the policy, which "
            "cannot distinguish them (case, punctuation and words after max_words do not count): "
            f"{named}{more}; reword them if they mean different things",
            stacklevel=2,
        )


def check_sizes(config: Any) -> None:
    """Raises a ValueError if the config's max_words or vocab_size is too small."""
    for name, least in (("max_words", 1), ("vocab_size", 2)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}.")


def tokenize_for(config: Any, text: str) -> np.ndarray:
    """Returns the ids `[S]` int32 of an instruction, for a config with max_words and vocab_size."""
    return tokenize(text, max_words=config.max_words, vocab_size=config.vocab_size)


def check_collisions_for(config: Any, texts: Iterable[str]) -> None:
    """Raises a ValueError if two words of the texts share an id in the config's vocabulary."""
    check_collisions(texts, config.vocab_size, max_words=config.max_words)
