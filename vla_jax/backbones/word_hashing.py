"""Instructions as word ids: a hash of every word, so that no word is ever unknown."""

import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable

import numpy as np

NO_WORD = 0


def words(text: str) -> list[str]:
    """Lower-cased words of a text, split at everything that is not a letter or a digit."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def word_id(word: str, vocab_size: int) -> int:
    """Id of a word in [1, vocab_size): `1 + crc32(word) mod (vocab_size - 1)`."""
    return 1 + zlib.crc32(word.encode()) % (vocab_size - 1)


def tokenize(text: str, *, max_words: int, vocab_size: int) -> np.ndarray:
    """Word ids of an instruction `[S]` int32, padded with 0 = no word.

    Ids come from a hash, so a word that training never saw still has one; `check_collisions`
    tells whether two known words share theirs.

    Args:
      text: the instruction, any language; empty gives zeros.
      max_words: `S`; further words are cut off with a warning.
      vocab_size: ids lie in [0, vocab_size).

    Returns:
      Ids `[S]` int32.
    """
    found = words(text)
    if len(found) > max_words:
        warnings.warn(
            f"instruction has {len(found)} words, kept the first {max_words} (max_words): {text!r}",
            stacklevel=2,
        )
    ids = np.full(max_words, NO_WORD, np.int32)
    kept = found[:max_words]
    ids[: len(kept)] = [word_id(word, vocab_size) for word in kept]
    return ids


def check_collisions(texts: Iterable[str], vocab_size: int) -> None:
    """Refuses a vocabulary in which two words of the given texts share an id.

    Args:
      texts: every instruction of a data set.
      vocab_size: as for `tokenize`.

    Raises:
      ValueError: two words share an id.
    """
    owners: dict[int, str] = {}
    for word in sorted({word for text in texts for word in words(text)}):
        other = owners.setdefault(word_id(word, vocab_size), word)
        if other != word:
            raise ValueError(
                f"vocab_size must keep the words of the instructions apart, got {vocab_size}, "
                f"where {other!r} and {word!r} share id {word_id(word, vocab_size)}; "
                f"choose another vocab_size, such as {2 * vocab_size}."
            )
