"""The code of docs/from_rnn_to_attention.md runs and gives the documented shapes."""

import pathlib
import re

import numpy as np
import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "from_rnn_to_attention.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_code_blocks_run_in_order_and_give_the_documented_shapes():
    carry, gates, associative, bidirectional, bottleneck, attention = BLOCKS
    names: dict = {}
    exec(carry, names)
    assert names["outputs"].shape == (12, 3, 16)
    exec(gates, names)
    assert names["outputs"].shape == (3, 12, 16)
    sequential = names["recurrence"].apply(
        names["params"], names["RecurrenceConfig"]("min_gru", 2, 16), names["inputs"]
    )[1]
    np.testing.assert_allclose(names["outputs"], sequential, atol=1e-6)
    exec(associative, names)
    assert names["outputs"].shape == (3, 12, 16)
    exec(bidirectional, names)
    assert names["outputs"].shape == (3, 12, 32)
    exec(bottleneck, names)
    assert names["decoded"].outputs.shape == (2, 3, 8)
    assert names["decoded"].weights is None
    exec(attention, names)
    assert names["greedy"].ids.shape == (2, 10)
    assert names["greedy"].weights.shape == (2, 10, 4)
    assert not np.any(np.asarray(names["greedy"].weights)[1, :, 2:])  # source padding
    assert names["beams"].ids.shape == (2, 4, 10)


def test_no_code_block_is_longer_than_ten_lines():
    assert max(len(block.splitlines()) for block in BLOCKS) <= 10


def test_its_images_exist():
    images = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    assert images
    assert all((DOCS / name).is_file() for name in images)
