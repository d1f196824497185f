"""Each plot is a PNG that shows its data; data that cannot be drawn are refused."""

import sys

import numpy as np
import pytest
from PIL import Image

from vla_jax.acting.rollout import Outcome
from vla_jax.evaluation import plots, results

ACTION_AXES = {"names": ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "grip"), "control_hz": 10.0}


def summary(**successes):
    return results.summarize(
        Outcome(seed, task, "", seed < count, 5, "")
        for task, count in successes.items()
        for seed in range(10)
    )


def metrics(factor=1.0, **more):
    return [
        {"step": step, "loss": factor / step, "loss_arm": 0.5 / step, **more}
        for step in (10, 20, 30)
    ]


def read_image(path):
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.std() > 5  # not blank
    return image


def test_training_plots_the_loss_and_other_metrics_side_by_side(tmp_path):
    plots.training(tmp_path / "a.png", metrics(), title="one")
    plots.training(tmp_path / "b.png", metrics(factor=5.0), title="one")
    plots.training(tmp_path / "c.png", metrics(acc_gripper=0.5), title="one")
    a, b, c = (read_image(tmp_path / f"{name}.png") for name in "abc")
    assert (a != b).any()
    assert c.shape[1] > a.shape[1]


def test_a_negative_loss_is_plotted(tmp_path):
    plots.training(tmp_path / "a.png", metrics(factor=-1.0))
    assert (read_image(tmp_path / "a.png") == [0x00, 0x72, 0xB2]).all(-1).sum() > 50  # the line


def test_success_plots_every_policy_and_reference(tmp_path):
    policies = {"lstm": summary(touch=9, lift=8), "fc": summary(touch=2)}
    plots.success(tmp_path / "a.png", {"lstm": policies["lstm"]})
    plots.success(tmp_path / "b.png", policies, references={"expert": summary(touch=10)})
    plots.success(tmp_path / "c.png", {}, references={"expert": summary(touch=10)})
    a, b, _ = (read_image(tmp_path / f"{name}.png") for name in "abc")
    assert b.shape[1] > a.shape[1]
    for colour in ([0x00, 0x72, 0xB2], [0xE6, 0x9F, 0x00]):  # bars of the first and second policy
        assert (b == colour).all(-1).sum() > 500


def test_the_mean_over_tasks_is_plotted_unless_there_is_one():
    one, two = summary(touch=9), summary(touch=9, lift=8)
    assert len(plots._rates(one, ["touch"])) == 1
    assert plots._rates(two, ["lift", "touch"])[-1][0] == pytest.approx(85)


def test_actions_plots_prediction_and_expert(tmp_path):
    expert = np.sin(np.linspace(0, 6, 30))[:, None] * np.ones(7)
    plots.actions(tmp_path / "a.png", expert * 0.9, expert, title="lift", **ACTION_AXES)
    assert (read_image(tmp_path / "a.png") == [0x00, 0x72, 0xB2]).all(-1).sum() > 500


def test_growth_plots_every_axis_with_its_formula(tmp_path):
    points = [(4.0, (1.0, 2.0, 3.0), 2.0), (8.0, (2.0, 3.0, 5.0), 4.0)]
    plots.growth(tmp_path / "a.png", {"W": points})
    plots.growth(tmp_path / "b.png", {"W": points, "H": points})
    a, b = (read_image(tmp_path / f"{name}.png") for name in "ab")
    assert b.shape[1] > a.shape[1]
    assert (a == [0x00, 0x72, 0xB2]).all(-1).sum() > 100


def test_curves_of_several_seeds_show_the_mean_and_its_interval(tmp_path):
    spread = np.linspace(-0.2, 0.2, 8)
    curve = (np.arange(5.0), 0.5 + 0.05 * np.arange(5.0)[:, None] + spread[None])
    plots.curves(tmp_path / "a.png", [plots.Panel("", "steps", "success", {"one": curve})])
    a = read_image(tmp_path / "a.png").astype(int)
    assert (a == [0x00, 0x72, 0xB2]).all(-1).sum() > 200  # the mean
    fifth = [0xCC, 0xE3, 0xF0]  # one fifth of that colour, up to rounding: the interval
    assert (abs(a - fifth) <= 1).all(-1).sum() > 1000


def test_the_band_and_dashed_lines_are_those_of_the_panel(tmp_path):
    curve = {"one": ([0.0, 1.0], np.array([[0.3, 0.9, 0.6]] * 2))}
    panel = plots.Panel("", "x", "y", curve, y_range=(0, 1))
    wide = panel._replace(band=lambda seeds: (seeds.min(), seeds.max()))
    dashed = wide._replace(references={"chance": ([0.0, 1.0], [0.1, 0.2])})
    for name, each in (("a", panel), ("b", wide), ("c", dashed)):
        plots.curves(tmp_path / f"{name}.png", [each])
    a, b, c = (read_image(tmp_path / f"{name}.png").astype(int) for name in "abc")
    fifth = [0xCC, 0xE3, 0xF0]
    areas = [(abs(image - fifth) <= 1).all(-1).sum() for image in (a, b)]
    assert areas[1] < 0.7 * areas[0]  # the interval over three seeds is wider than their range
    assert (b != c).any(-1).sum() > 200


def test_curves_keep_their_colour_across_panels(tmp_path):
    one = plots.Panel("one", "x", "y", {"a": ([1, 2], [0.1, 0.2]), "b": ([1, 2], [0.3, 0.1])})
    two = plots.Panel("two", "x", "y", {"b": ([1, 2], [1.0, 9.0])}, {"chance": 3.0}, log="xy")
    plots.curves(tmp_path / "a.png", [one])
    plots.curves(tmp_path / "b.png", [two])
    plots.curves(tmp_path / "c.png", [one, two, one], columns=2)
    a, b, c = (read_image(tmp_path / f"{name}.png") for name in "abc")
    blue, orange = [0x00, 0x72, 0xB2], [0xE6, 0x9F, 0x00]
    assert (a == blue).all(-1).sum() > 100
    assert (a == orange).all(-1).sum() > 100
    assert not (b == orange).all(-1).any()  # alone, it gets the first colour
    assert (c[:, c.shape[1] // 2 :] == orange).all(-1).sum() > 100  # two panels on the right
    assert c.shape[0] > 1.5 * a.shape[0]


def test_attention_is_darkest_where_the_weight_is_largest(tmp_path):
    source, target = ("jump", "left"), ("I_TURN_LEFT", "I_JUMP", "end")
    for name, weights in (("a", np.eye(3, 2)), ("b", np.zeros((3, 2)))):
        plots.attention(tmp_path / f"{name}.png", weights, source, target, title="jump left")
    a, b = (read_image(tmp_path / f"{name}.png").astype(int) for name in "ab")
    assert (a.sum(axis=-1) < b.sum(axis=-1) - 200).sum() > 1000


def test_data_that_cannot_be_drawn_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be at least one line, got none"):
        plots.training(tmp_path / "a.png", [])
    with pytest.raises(ValueError, match="must hold at least one policy, got none"):
        plots.success(tmp_path / "a.png", {})
    with pytest.raises(ValueError, match=r"curves for .* must be at least one, got none"):
        plots.growth(tmp_path / "a.png", {})
    with pytest.raises(ValueError, match=r"panels for .* must be at least one, got none"):
        plots.curves(tmp_path / "a.png", [])
    with pytest.raises(ValueError, match=r"must be \[T, 7\] with one T, got \(3, 7\) and \(4, 7\)"):
        plots.actions(tmp_path / "a.png", np.zeros((3, 7)), np.zeros((4, 7)), **ACTION_AXES)
    with pytest.raises(
        ValueError, match=r"weights must be \[3, 2\] for as many names, got \(2, 3\)"
    ):
        plots.attention(tmp_path / "a.png", np.zeros((2, 3)), "ab", "abc")
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_raises_with_the_extra_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"run pip install 'vla-jax\[plots\]'"):
        plots.training(tmp_path / "a.png", metrics())
