"""Normalisation and its inverse."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.data import clipping, dataset, normalize

METHODS = ["bounds", "quantiles", "mean_std", "none"]


@pytest.fixture
def column():
    """`[2, 50, 4]`: two ordinary dimensions, a constant, one that differs in a single frame."""
    values = np.random.default_rng(0).normal(size=(2, 50, 4)) * [1, 20, 0, 0] + [0, 5, 0.3, 1]
    values[1, 7, 3] = 2
    return values.astype(np.float32)


@pytest.fixture
def stats(column):
    return normalize.compute(column)


def test_statistics_equal_numpy_over_all_leading_axes(column, stats):
    flat = column.reshape(100, 4).astype(np.float64)
    expected = {
        "mean": flat.mean(0),
        "std": flat.std(0),
        "min": flat.min(0),
        "max": flat.max(0),
        "q01": np.percentile(flat, 1, axis=0),
        "q99": np.percentile(flat, 99, axis=0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-6, atol=1e-7)
    assert stats.count == 100


@pytest.mark.parametrize("method", METHODS)
def test_denormalize_inverts_normalize_inside_the_bounds(method, column, stats):
    low, high = (stats.q01, stats.q99) if method == "quantiles" else (stats.min, stats.max)
    moving = high > low  # where the quantiles coincide, the bounds are min and max
    inside = np.where(moving, np.clip(column, low, high), column)
    y = normalize.normalize(inside, stats, method)
    np.testing.assert_allclose(normalize.denormalize(y, stats, method), inside, atol=2e-5)


def test_each_method_equals_its_equation(column, stats):
    x, s = column[..., :2], normalize.NormStats(*(v[:2] for v in stats[:6]), count=100)
    np.testing.assert_allclose(
        normalize.normalize(x, s, "bounds"), 2 * (x - s.min) / (s.max - s.min) - 1, atol=1e-5
    )
    expected = np.clip(2 * (x - s.q01) / (s.q99 - s.q01) - 1, -1, 1)
    np.testing.assert_allclose(normalize.normalize(x, s, "quantiles"), expected, atol=1e-5)
    np.testing.assert_allclose(
        normalize.normalize(x, s, "mean_std"), (x - s.mean) / s.std, atol=1e-5
    )
    np.testing.assert_array_equal(normalize.normalize(x, s, "none"), x)


def test_quantiles_equal_bounds_q99_of_rlds(column, stats):
    low, high = np.percentile(column.reshape(-1, 4), [1, 99], axis=0)[:, :2]
    x = column[..., :2]
    y = np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)
    ours = normalize.normalize(column, stats, "quantiles")[..., :2]
    np.testing.assert_allclose(ours, y, atol=1e-5)
    back = normalize.denormalize(
        normalize.normalize(column, stats, "quantiles"), stats, "quantiles"
    )
    np.testing.assert_allclose(back[..., :2], 0.5 * (y + 1) * (high - low) + low, atol=2e-5)


@pytest.mark.parametrize("method", ["bounds", "quantiles"])
@pytest.mark.parametrize("high", [0.65, np.array([0.65, 2, 3, 4])])
def test_fixed_bounds_clip_and_scale_independently_of_the_data(method, high, column):
    fixed = normalize.fixed_bounds(-0.65, high, 4)
    y = normalize.normalize(column, fixed, method)
    middle, half = (high - 0.65) / 2, (high + 0.65) / 2
    np.testing.assert_allclose(y, np.clip((column - middle) / half, -1, 1), atol=1e-6)
    inside = np.clip(column, -0.65, high)
    np.testing.assert_allclose(normalize.denormalize(y, fixed, method), inside, atol=1e-6)


def test_fixed_bounds_survive_json_and_must_be_ordered():
    fixed = normalize.fixed_bounds(-1, 2, 3)
    again = normalize.from_json(json.loads(json.dumps(normalize.to_json({"action": fixed}))))
    np.testing.assert_array_equal(again["action"].max, [2, 2, 2])
    assert again["action"].count == 0
    with pytest.raises(ValueError, match="low must be below high in every dimension"):
        normalize.fixed_bounds(1, [2, 1, 2], 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mu", [0.0, 10.0, 255.0])
def test_denormalize_action_inverts_normalize_action_inside_the_bounds(method, mu, column, stats):
    low, high = (stats.q01, stats.q99) if method == "quantiles" else (stats.min, stats.max)
    inside = np.where(high > low, np.clip(column, low, high), column)
    inside[..., -1] = np.sign(column[..., 0])  # gripper
    config = normalize.NormalizeConfig(action=method, action_mu=mu)
    y = normalize.normalize_action(inside, stats, config)
    np.testing.assert_array_equal(y[..., -1], inside[..., -1])
    back = normalize.denormalize_action(y, stats, config)
    np.testing.assert_allclose(back, inside, rtol=1e-5, atol=3e-5)


def test_mu_law_equals_its_equation_and_keeps_signs_and_end_points():
    fixed, x = normalize.fixed_bounds(-1, 1, 2), np.linspace(-1, 1, 41, dtype=np.float32)
    action = np.stack([x, x], axis=1)
    config = normalize.NormalizeConfig(action_mu=255.0)
    y = normalize.normalize_action(action, fixed, config)
    expected = np.sign(x) * np.log(1 + 255 * np.abs(x)) / np.log(256)
    np.testing.assert_allclose(y[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(y[:, 1], x)
    assert y[[0, 20, 40], 0].tolist() == [-1, 0, 1]


def test_an_agent_inverts_the_mu_law_of_training(column, stats):
    config = normalize.NormalizeConfig(action_mu=255.0)
    grips = np.sign(column[..., :1])
    action = np.concatenate([column[..., :3], grips], axis=-1).reshape(100, 4)
    stats = normalize.compute(action)
    y = normalize.normalize_field("action", action, stats, config)
    assert y.dtype == np.float32
    back = jax.jit(lambda y: normalize.denormalize_action(y, stats, config))(jnp.asarray(y))
    np.testing.assert_allclose(back, action, atol=1e-4)


def test_a_negative_mu_is_refused():
    with pytest.raises(ValueError, match=r"action_mu must be 0 \(none\) or more, got -1"):
        normalize.NormalizeConfig(action_mu=-1)


@pytest.mark.parametrize("method", ["bounds", "quantiles", "mean_std"])
def test_a_constant_dimension_becomes_zero_and_is_inverted_to_the_constant(method, column, stats):
    assert not normalize.normalize(column + 7, stats, method)[..., 2].any()
    anything = np.full((3, 4), 0.9, np.float32)
    np.testing.assert_allclose(normalize.denormalize(anything, stats, method)[:, 2], 0.3)


def test_a_dimension_with_coinciding_quantiles_uses_min_and_max(column, stats):
    y = normalize.normalize(column, stats, "quantiles")[..., 3]
    assert y[1, 7] == 1
    assert np.delete(y.ravel(), 57).max() == -1


@pytest.mark.parametrize("method", METHODS)
def test_the_gripper_is_unchanged(method, column, stats):
    action = column.copy()
    action[..., -1] = np.sign(column[..., 0])
    y = normalize.normalize(action, stats, method, gripper=True)
    np.testing.assert_array_equal(y[..., -1], action[..., -1])
    back = normalize.denormalize(y, stats, method, gripper=True)
    np.testing.assert_array_equal(back[..., -1], action[..., -1])


@pytest.mark.parametrize("method", METHODS)
def test_jit_equals_numpy(method, column, stats):
    def round_trip(x):
        y = normalize.normalize(x, stats, method, gripper=True)
        return y, normalize.denormalize(y, stats, method, gripper=True)

    for ours, theirs in zip(
        round_trip(column), jax.jit(round_trip)(jnp.asarray(column)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        assert theirs.dtype == jnp.float32


def test_the_fraction_of_clipped_values_is_exact(column, stats):
    wide = column.copy()
    wide[0, 0, 0], wide[0, 1, 1] = 1e3, -1e3
    assert clipping.clipped_fraction(column, stats, "bounds") == 0
    assert clipping.clipped_fraction(wide, stats, "bounds") == 2 / 400
    assert clipping.clipped_fraction(wide, stats, "mean_std") == 0
    assert np.abs(normalize.normalize(wide, stats, "bounds")).max() == 1


@pytest.mark.parametrize("method", ["bounds", "none"])
def test_actions_outside_their_bounds_are_clipped_with_a_warning_that_gives_their_share(method):
    action = np.zeros((100, 3), np.float32)
    action[:, 0] = np.linspace(-1, 1, 100)
    stats = normalize.compute(action)
    action[:3, 0] = 2.0
    config = normalize.NormalizeConfig(action=method)
    with pytest.warns(UserWarning, match=f"1.00% of the values of action .* {method!r}"):
        clipping.warn_if_clipped("action", action, stats, config)
    assert normalize.normalize_field("action", action, stats, config).max() == 1


def test_clipping_by_quantiles_causes_no_warning():
    values = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    config = normalize.NormalizeConfig(proprio="quantiles")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipping.warn_if_clipped("proprio", values, normalize.compute(values), config)


def test_statistics_of_many_rows_are_computed_in_chunks(monkeypatch):
    rows = np.random.default_rng(0).normal((0, 50), size=(3000, 2)).astype(np.float32)
    exact = normalize.compute(rows)
    monkeypatch.setattr(normalize, "CHUNK_ROWS", 256)
    assert all(map(np.array_equal, normalize.compute(rows), exact))
    monkeypatch.setattr(normalize, "EXACT_ROWS", 2999)
    found = normalize.compute(rows)
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=1e-6, atol=1e-7)
    assert found.count == 3000
    for name, fraction in (("q01", 0.01), ("q99", 0.99)):
        ranks = (rows < getattr(found, name)).mean(axis=0)
        np.testing.assert_allclose(ranks, fraction, atol=4 / 256)  # ceil(log2(3000 / 256)) / 256


def test_statistics_of_a_data_set_cover_its_columns_without_reading_images():
    steps = dataset.Episode({"proprio": np.eye(3)}, np.ones((3, 2)), "go")
    data = dataset.from_episodes([steps, steps], fps=10)
    untouchable = {"image_primary": None}
    stats = normalize.compute_norm_stats(data._replace(frames=untouchable))
    assert set(stats) == {"proprio", "action"}
    np.testing.assert_allclose(stats["proprio"].mean, np.full(3, 1 / 3), rtol=1e-6)


def test_statistics_survive_json_bitwise(stats):
    there = json.loads(json.dumps(normalize.to_json({"action": stats})))
    back = normalize.from_json(there)["action"]
    for before, after in zip(stats, back, strict=True):
        np.testing.assert_array_equal(before, after)
    assert back.mean.dtype == np.float32


def test_json_with_missing_unknown_or_inconsistent_statistics_is_refused(stats):
    good = normalize.to_json({"action": stats})["action"]
    for bad in ({**good, "median": [0]}, {k: v for k, v in good.items() if k != "q99"}):
        with pytest.raises(ValueError, match="norm_stats of action must have exactly"):
            normalize.from_json({"action": bad})
    with pytest.raises(ValueError, match="norm_stats of action must be lists of one length"):
        normalize.from_json({"action": {**good, "q99": [0.0]}})


DAMAGE = {  # change of the statistics of one column -> sentence
    "null": ({"mean": [None, 0.0]}, r"action.mean\[0\] must be a number within ±1e\+12, got None"),
    "NaN": ({"std": [0.1, float("nan")]}, r"action.std\[1\] must be a number .*, got nan"),
    "infinity": ({"max": [float("inf"), 1.0]}, r"action.max\[0\] must be a number .*, got inf"),
    "huge": ({"max": [1e18, 1.0]}, r"action.max\[0\] must be a number .*, got 1e\+18"),
    "text": ({"q01": ["0", 0.0]}, r"action.q01\[0\] must be a number .*, got '0' \(str\)"),
    "negative spread": ({"std": [-0.1, 0.1]}, r"action.std\[0\] must be 0 or more, got -0.1"),
    "large spread": ({"std": [0.1, 9.0]}, r"action.std\[1\] must be at most half of max - min"),
    "max below min": ({"max": [-2.0, 1.0]}, r"action.min\[0\] must be at most max\[0\] = -2"),
    "mean outside": ({"mean": [0.0, 5.0]}, r"action.mean\[1\] must be at most max\[1\] = 1"),
    "count": ({"count": None}, "action.count must be a number of frames, got None"),
    "no list": ({"mean": 3}, r"action.mean must be a list of numbers, got 3"),
}


@pytest.mark.parametrize(("change", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_statistics_that_no_column_can_have_are_refused(change, sentence, tmp_path):
    ends = {"min": [-1.0, -1.0], "max": [1.0, 1.0], "q01": [-1.0, -1.0], "q99": [1.0, 1.0]}
    good = {"mean": [0.0, 0.0], "std": [0.5, 0.5], **ends, "count": 10}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"action": good}))
    assert normalize.read_norm_stats(path)["action"].count == 10
    path.write_text(json.dumps({"action": good | change}))
    with pytest.raises(ValueError, match=rf"norm_stats.json of {sentence}.*; restore the file"):
        normalize.read_norm_stats(path)


def test_another_size_or_method_is_refused(column, stats):
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 4\].*got \(2, 50, 3\)"):
        normalize.normalize(column[..., :3], stats, "bounds")
    with pytest.raises(ValueError, match=r"method must be one of .*got 'minmax'"):
        normalize.denormalize(column, stats, "minmax")
    with pytest.raises(ValueError, match=r"proprio must be one of .*got 'zscore'"):
        dataclasses.replace(normalize.NormalizeConfig(), proprio="zscore")


@pytest.mark.parametrize("method", ["mean_std", "bounds", "quantiles"])
def test_a_nearly_constant_dimension_is_clipped_counted_and_named(method):
    rng = np.random.default_rng(0)
    column = np.stack([rng.normal(0.5, 1e-5, 500), rng.normal(0, 1, 500)], axis=1)
    column = column.astype(np.float32)
    stats = normalize.compute(column)
    config = normalize.NormalizeConfig(proprio=method)
    with pytest.warns(UserWarning, match=r"nearly constant in the dimensions \[0\]: the spread"):
        clipping.warn_if_clipped("proprio", column, stats, config)
    y = normalize.normalize_field("proprio", column, stats, config)
    assert np.abs(y).max() < 5
    acting = np.array([[0.51, 0.0], [0.5, 0.1], [0.49, 400.0]], np.float32)
    for module in (np, jnp):
        seen = module.asarray(acting)
        assert np.abs(normalize.normalize(seen, stats, method)).max() < 15
        assert clipping.count_clipped(seen, stats, method).tolist() == [1, 0, 2]
        assert clipping.count_clipped(seen, stats, "none").tolist() == [0, 0, 0]


def test_values_up_to_the_margin_beyond_the_training_are_not_clipped():
    column = np.array([[-1.0], [1.0], [8.0]], np.float32)
    stats = normalize.compute(column)
    x = np.array([[8.0 + 9 * stats.std[0]], [-1.0]], np.float32)
    y = normalize.normalize(x, stats, "mean_std")
    np.testing.assert_allclose(normalize.denormalize(y, stats, "mean_std"), x, rtol=1e-5)
    assert clipping.count_clipped(x, stats, "mean_std").tolist() == [0, 0]


def test_the_share_of_actions_that_a_policy_cannot_send_is_stated():
    rng = np.random.default_rng(0)
    action = np.append(rng.normal(0, 1, (1000, 2)), np.ones((1000, 1)), axis=1)
    stats, config = normalize.compute(action), normalize.NormalizeConfig(action="quantiles")
    message = (
        r"^1\.33% of the values of action .* a policy cannot send them; choose --action bounds"
    )
    with pytest.warns(UserWarning, match=message):
        clipping.warn_if_clipped("action", action, stats, config)
