"""Tokenizers of vision-language models, read from a model's `tokenizer.json`.

Needs the package `tokenizers` (extra `vlm`), which gives the ids of the original tokenizers.
"""

import functools
import pathlib
from typing import Any

from vla_jax.files import Path


def read_tokenizer(path: Path, *, vocab_size: int | None = None) -> Any:
    """Returns the tokenizer in a `tokenizer.json`, without padding and truncation.

    A file that has not changed is read once per process; do not change the result.

    Args:
      path: the file, which is in the folder of the model.
      vocab_size: rows of the model's embedding, for `check_vocabulary`; None = not checked.

    Returns:
      A `tokenizers.Tokenizer`.

    Raises:
      ImportError: the package `tokenizers` is missing.
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or the vocabularies do not match.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected the tokenizer of a vision-language model; copy "
            "tokenizer.json from the published folder of the model."
        )
    status = path.stat()
    return _read(path.resolve(), status.st_mtime_ns, status.st_size, vocab_size)


def ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Returns the ids of a text.

    Names of special tokens in the text, such as `<image>`, become the ids of these tokens. What
    `special` adds is in the file: for PaliGemma `<bos>`, or nothing where its processor wrote it.

    Args:
      tokenizer: from `read_tokenizer`.
      text: any text.
      special: add the tokens that this tokenizer puts at the start and the end.
    """
    return tokenizer.encode(text, add_special_tokens=special).ids


def token_id(tokenizer: Any, token: str) -> int:
    """Returns the id of a token.

    Raises:
      ValueError: the tokenizer has no such token.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(
            f"tokenizer must have the token '{token}', got {tokenizer.get_vocab_size()} others; "
            "use the tokenizer.json of this model."
        )
    return found


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises an error if the tokenizer gives ids that the model has no embedding for.

    Args:
      tokenizer: from `read_tokenizer`.
      vocab_size: rows of the model's embedding; it may have more of them than the tokenizer.

    Raises:
      ValueError: the vocabularies do not match.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= vocab_size:
        raise ValueError(
            f"tokenizer must have ids below the model's vocab_size {vocab_size}, got "
            f"{vocabulary[token]} for '{token}'; use the tokenizer.json of this model."
        )


@functools.lru_cache(maxsize=8)
def _read(path: pathlib.Path, mtime_ns: int, size: int, vocab_size: int | None) -> Any:
    """Reads the file; the time of its last change and its size are part of the cache's key."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            "reading tokenizer.json needs the package tokenizers; install it with "
            "`pip install 'vla-jax[vlm]'`."
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise ValueError(
            f"{path} is not a tokenizer ({error}); copy it again from the published folder."
        ) from error
    tokenizer.no_padding()  # a file may hold the settings of an earlier call
    tokenizer.no_truncation()
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size)
    return tokenizer
