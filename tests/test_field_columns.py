"""Selection of columns and dimensions by the keys of a field map."""

import numpy as np
import pytest

from vla_jax.data.raw import Feature
from vla_jax.data.readers.field_columns import field_column, field_names

COLUMNS = {"a/b": np.arange(12.0).reshape(3, 4), "c": np.arange(3.0), "d[0]": np.ones((3, 1))}
FEATURES = {
    "a/b": Feature("float64", (4,), ("x", "y", "z", "w")),
    "c": Feature("float64", ()),
    "d[0]": Feature("float64", (1,)),
}


@pytest.mark.parametrize(
    ("keys", "dims", "names"),
    [
        (["a/b"], [0, 1, 2, 3], "xyzw"),
        (["a/b[:2]", "a/b[-1]"], [0, 1, 3], "xyw"),
        (["a/b[1:3]", "a/b[0]"], [1, 2, 0], "yzx"),
        (["a/b[-2:]"], [2, 3], "zw"),
    ],
)
def test_keys_select_dimensions(keys, dims, names):
    np.testing.assert_array_equal(field_column(COLUMNS, keys), COLUMNS["a/b"][:, dims])
    assert field_names(FEATURES, keys) == tuple(names)


def test_columns_are_put_side_by_side():
    found = field_column(COLUMNS, ["c", "a/b[0]", "d[0]"])
    np.testing.assert_array_equal(found, [[0, 0, 1], [1, 4, 1], [2, 8, 1]])
    assert field_names(FEATURES, ["c", "d[0]"]) == ("c", "d[0]")
    assert field_names({"o/j": Feature("float32", (2,))}, ["o/j"]) == ("j[0]", "j[1]")


def test_an_unknown_column_is_named():
    with pytest.raises(ValueError, match=r"column must be .* got 'e\[:2\]'; choose from a/b, c"):
        field_column(COLUMNS, ["e[:2]"])
