"""docs/from_rnn_to_attention.md: its code runs, and gives what it says."""

import pathlib
import re

import numpy as np

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "from_rnn_to_attention.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_blocks_run_from_the_top_to_the_bottom_and_give_the_shapes_they_tell():
    carry, gates, at_once, both_ways, bottleneck, attention = BLOCKS
    names: dict = {}
    exec(carry, names)
    assert names["outputs"].shape == (12, 3, 16)
    exec(gates, names)
    assert names["outputs"].shape == (3, 12, 16)
    slowly = names["recurrence"].apply(
        names["params"], names["RecurrenceConfig"]("min_gru", 2, 16), names["inputs"]
    )[1]
    np.testing.assert_allclose(names["outputs"], slowly, atol=1e-6)
    exec(at_once, names)
    assert names["outputs"].shape == (3, 12, 16)
    exec(both_ways, names)
    assert names["outputs"].shape == (3, 12, 32)
    exec(bottleneck, names)
    assert names["told"].outputs.shape == (2, 3, 8)
    assert names["told"].weights is None
    exec(attention, names)
    assert names["written"].ids.shape == (2, 10)
    assert names["written"].weights.shape == (2, 10, 4)
    assert not np.any(np.asarray(names["written"].weights)[1, :, 2:])  # the padding of the source
    assert names["beams"].ids.shape == (2, 4, 10)


def test_no_block_is_longer_than_ten_lines():
    assert max(len(block.splitlines()) for block in BLOCKS) <= 10


def test_its_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    assert pictures
    assert all((DOCS / name).is_file() for name in pictures)
