import dataclasses
import io
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from train import memory_cloning, memory_decoders, memory_grid, memory_report, memory_suite
from train.memory_decoders import variants, with_first_observation
from train.memory_grid import CloningConfig, GridCell, Score
from train.memory_pictures import MemoryPicturesConfig, make_policy
from train.memory_suite import MemorySuiteConfig
from vla_jax import files
from vla_jax.envs.demonstrations import collect
from vla_jax.envs.memory_table import lit_blocks, memory_env, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_state import STATE_NAMES
from vla_jax.envs.memory_table.memory_task import INSTRUCTION_STEPS
from vla_jax.envs.table import rules
from vla_jax.evaluation import plots

TINY = CloningConfig(
    num_seeds=2, num_demonstrations=8, num_updates=1, batch_size=4, hidden_size=8, num_episodes=8
)
WORLD = JaxMemoryConfig(task="lit", delay=4)


def score(decoder, success, **world):
    return Score(GridCell(JaxMemoryConfig(**world), decoder), np.array(success), {}, 0.25, 1.0)


@pytest.mark.slow
@pytest.mark.sampled
def test_an_interrupted_grid_continues_and_other_cells_are_not_taken(tmp_path, monkeypatch):
    config = MemorySuiteConfig(
        tasks=("lit", "cups"), decoders=("fc", "lstm"), delays=(), items=(), swaps=0, touches=0,
        cloning=TINY, num_workers=1, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    ran = []

    def run_cell(cell, cloning, progress, *, clones):
        del cloning, progress, clones
        ran.append((cell.world.task, cell.decoder))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return Score(cell, np.array([0.5, 1.0]), {cell.world.task: [0.5, 1.0]}, 0.25, 1.0)

    monkeypatch.setattr(memory_grid, "run_cell", run_cell)
    with pytest.raises(KeyboardInterrupt):
        memory_suite.memory_suite(config)
    assert ran == [("lit", "fc"), ("lit", "lstm"), ("cups", "fc")]
    memory_suite.memory_suite(config)
    assert ran[3:] == [("cups", "fc"), ("cups", "lstm")]
    lines = (tmp_path / "run" / memory_grid.RESULTS).read_text().splitlines()
    assert [json.loads(line)["decoder"] for line in lines] == ["fc", "lstm"] * 2
    table = (tmp_path / "run" / memory_report.TABLE).read_text()
    assert table.count("75 % [50, 100]") == 4


def test_results_of_another_training_are_not_taken(tmp_path):
    cell = GridCell(WORLD, "lstm")
    line = memory_grid.to_json(score("lstm", [1.0, 0.5], task="lit", delay=4), TINY)
    (tmp_path / memory_grid.RESULTS).write_text(json.dumps(line) + "\n")
    (read,) = memory_grid.read_scores(tmp_path, [cell], TINY)
    assert read.success.tolist() == [1.0, 0.5]
    for other in ({"num_updates": 2}, {"joint_sizes": ()}, {"recall_weight": 0.0}):
        config = dataclasses.replace(TINY, **other)
        assert not list(memory_grid.read_scores(tmp_path, [cell], config))
    assert not list(memory_grid.read_scores(tmp_path, [GridCell(WORLD, "gru")], TINY))


def change_rules(monkeypatch):
    changed = tasks.get("lit")._replace(rules_version=9, chance=lambda config: 0.125)
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "lit": changed})


def change_network(monkeypatch):
    monkeypatch.setattr(memory_decoders, "_TOKEN_DIM", 8)


def change_state(monkeypatch):
    monkeypatch.setattr(memory_grid, "STATE_NAMES", STATE_NAMES[:48])


@pytest.mark.parametrize("change", [change_rules, change_network, change_state])
def test_results_and_clones_of_other_rules_or_another_network_are_not_taken(
    tmp_path, monkeypatch, change
):
    cell = GridCell(WORLD, "lstm")
    folder = tmp_path / memory_grid.CLONES / memory_grid.clone_name(cell)
    folder.mkdir(parents=True)
    assert memory_grid.find_clone(tmp_path, cell, TINY) is None  # a clone without settings

    def write():
        line = memory_grid.to_json(score("lstm", [1.0, 0.5], task="lit", delay=4), TINY)
        (tmp_path / memory_grid.RESULTS).write_text(json.dumps(line) + "\n")
        files.write_json(folder / memory_grid._OF_CLONE, line["cloning"])

    def is_taken():
        found = memory_grid.find_clone(tmp_path, cell, TINY) == folder
        assert found == bool(list(memory_grid.read_scores(tmp_path, [cell], TINY)))
        return found

    write()
    assert is_taken()
    change(monkeypatch)
    assert not is_taken()
    write()
    assert is_taken()
    (read,) = memory_grid.read_scores(tmp_path, [cell], TINY)
    assert read.chance == tasks.chance(WORLD)  # that of the present rules, not that of the line


def test_transformers_have_a_learning_rate_of_their_own():
    rates = {kind: memory_grid.learning_rate(TINY, kind) for kind in ("lstm", "gpt", "rotary_gpt")}
    assert rates == {"lstm": 2e-3, "gpt": 1e-3, "rotary_gpt": 1e-3}
    pictures = MemoryPicturesConfig(decoders=("lstm", "gpt"))
    for kind, rate in (("lstm", 5e-3), ("gpt", 1e-3)):
        assert make_policy(pictures, "lit", kind).optim.learning_rate == rate


@pytest.mark.parametrize(
    "decoder",
    [
        "first_and_now",
        *(
            pytest.param(name, marks=[pytest.mark.slow, pytest.mark.sampled])
            for name in variants()
            if name != "first_and_now"
        ),
    ],
)
def test_a_cell_trains_and_tests_every_seed(decoder):
    result = memory_grid.run_cell(GridCell(WORLD, decoder), TINY)
    assert result.success.shape == (2,)
    assert set(result.groups) == {"lit"}
    assert result.chance == 0.25


def test_windows_hold_the_steps_of_one_episode_and_no_action_of_the_shown_part():
    env = memory_env.make(WORLD)
    agent = memory_decoders.make_agent_config(
        variants()["lstm_window"], env, len(STATE_NAMES), 8, ()
    )
    demonstrations = memory_cloning._cut(memory_cloning.collect(env, jax.random.key(0), 8))
    stats = memory_cloning._norm_stats(demonstrations)
    data = memory_cloning._make_data(agent, env, stats, demonstrations)
    batch, recall = memory_cloning._draw(data, 8, 64, 6, jax.random.key(1))
    assert batch.timestep_mask.shape == (64, 8)
    assert batch.action.shape == (64, 8, memory_decoders.ACTION_HORIZON, 7)
    acts = np.asarray(data.acts)
    targets = np.asarray(data.action)[acts]
    found = np.asarray(batch.action)[np.asarray(batch.action_mask)]
    known = {row.tobytes() for row in targets}
    assert len(found)
    assert all(row.tobytes() in known for row in found)
    whole = {row.tobytes() for row in observed_and_recalled(data.observation, data.recall)}
    drawn = observed_and_recalled(batch.observation, recall)[
        np.asarray(batch.timestep_mask).ravel()
    ]
    assert all(row.tobytes() in whole for row in drawn)
    # the instruction is visible in the first steps alone, at which the arm is held still
    words = np.asarray(data.observation.instruction)
    shown, later = np.split(words, [INSTRUCTION_STEPS], axis=1)
    assert np.all(later == later[:1, :1])
    assert np.all(np.any(shown != later[:1, :1], axis=-1))
    assert not np.any(acts[:, :INSTRUCTION_STEPS])


def observed_and_recalled(observation, recall):
    parts = observation.environment_state, observation.proprio, recall.numbers, *recall.choices
    return np.concatenate([np.asarray(part).reshape(-1, part.shape[-1]) for part in parts], axis=1)


def test_demonstrations_have_the_recall_of_the_state_before_each_action():
    demonstrations = collect(memory_env.make(WORLD), jax.random.key(0), 8)
    numbers, (colour,) = demonstrations.recall
    assert not np.any(numbers[:, 0])  # nothing has been shown
    assert not np.any(colour[:, 0])
    observation = jax.tree.map(lambda part: np.asarray(part)[:, 1:], demonstrations.observation)
    which = np.argmax(colour[:, 1:], axis=-1)
    columns = [[STATE_NAMES.index(f"{name}.{axis}") for axis in "xy"] for name in rules.COLOURS]
    place = np.take_along_axis(observation.environment_state, np.array(columns)[which], axis=-1)
    expected = (place - observation.proprio[..., :2]) / 0.1
    np.testing.assert_allclose(numbers[:, 1:], expected, atol=1e-4)


def test_the_weight_of_recall_is_that_of_its_loss_and_trains_the_policy():
    env, lstm = memory_env.make(WORLD), variants()["lstm"]
    agent, _, data = memory_cloning.demonstrate(env, lstm, jax.random.key(0), 8, 8, ())
    inputs = memory_cloning._draw(data, data.real.shape[1], 4, 6, jax.random.key(1))
    params = memory_cloning._init(agent, inputs.recall, jax.random.key(2))
    loss = jax.value_and_grad(
        lambda params, weight: memory_cloning._loss(agent, weight, params, inputs, None)[0]
    )
    (without, grads), (half, grads_half), (one, _) = (loss(params, w) for w in (0.0, 0.5, 1.0))
    _, metrics = memory_cloning._loss(agent, 1.0, params, inputs, None)
    np.testing.assert_allclose(one - without, metrics["loss_recall"], rtol=1e-4)
    np.testing.assert_allclose(half - without, 0.5 * metrics["loss_recall"], rtol=1e-4)
    for part in ("backbone", "decoder"):
        change = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), grads[part], grads_half[part])
        assert max(jax.tree.leaves(change)) > 1e-4


def clone_lit(recall_weight, **fields):
    return memory_cloning.clone(
        memory_env.make(WORLD)._replace(**fields), variants()["fc"], keys=jax.random.key(0)[None],
        num_demonstrations=8, num_updates=1, batch_size=2, hidden_size=8, joint_sizes=(),
        recall_weight=recall_weight, learning_rate=1e-3,
    )  # fmt: skip


def test_clones_do_not_keep_the_layer_of_the_recall():
    assert set(clone_lit(1.0).params) == {"backbone", "decoder"}


def test_a_weight_of_recall_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"recall_weight must be 0 in an environment without rec"):
        clone_lit(1.0, recall=None)


def test_the_baseline_sees_the_first_observation_at_every_step():
    env = with_first_observation(memory_env.make(WORLD))
    state, first = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    for _ in range(3):
        state, transition = step(state, np.zeros(7, np.float32))
        both = transition.observation.environment_state
        size = len(STATE_NAMES)
        assert np.array_equal(both[size:], first.environment_state[:size])
    assert int(env.instruction_index(state)) == 0
    assert not env.is_acting(state)


@pytest.mark.parametrize("name", ["loss", "loss_gripper", "grad_norm", "params"])
def test_what_is_not_finite_stops_the_training_and_is_named(name):
    metrics = {each: np.zeros((2, 5)) for each in ("loss", "loss_gripper", "grad_norm")}
    params = {"decoder": {"kernel": np.zeros((2, 3), np.float32)}}
    memory_cloning.check_finite(metrics, params, 100)
    sentence = rf"{name} must be finite, got nan in update 104 of seed number 2; lower --learning"
    if name == "params":
        params["decoder"]["kernel"][1, 0] = np.inf
        sentence = "decoder/kernel of the params must be finite, got .* after update 105; lower --l"
    else:
        for each in (name, "grad_norm"):  # the gradient of a bad loss is bad too
            metrics[each][1, 3] = np.nan
    with pytest.raises(ValueError, match=sentence):
        memory_cloning.check_finite(metrics, params, 100)


@pytest.mark.slow
def test_clones_of_a_bad_last_gradient_are_neither_played_nor_saved(tmp_path, monkeypatch):
    loss = memory_cloning._loss

    def bad_gradient(agent, weight, params, batch, key):
        value, metrics = loss(agent, weight, params, batch, key)
        zero = sum(jnp.sum(0 * leaf) for leaf in jax.tree.leaves(params))
        return value + jnp.sqrt(zero), metrics  # finite, with a gradient that is not

    monkeypatch.setattr(memory_cloning, "_loss", bad_gradient)
    monkeypatch.setattr(memory_cloning, "play", None)
    with pytest.raises(ValueError, match="grad_norm must be finite, got nan in update 1 of seed"):
        memory_grid.run_cell(GridCell(WORLD, "fc"), TINY, clones=tmp_path)
    assert not list(tmp_path.iterdir())


def panel_of(task, scores):
    (own,) = (kind for kind in memory_report._PANELS if kind[0] == task)
    panel = memory_report._panel(scores, ("lstm",), *own)
    assert panel is not None
    return panel


def test_curves_are_at_the_numbers_of_the_world_with_chance_at_each():
    panel = panel_of("lit", [score("lstm", [0.3, 0.8, 0.7], delay=delay) for delay in (64, 0)])
    assert panel.x_ticks == [0, 64]
    assert panel.curves["lstm"][0].tolist() == [0, 64]
    assert panel.band(np.array([0.30, 0.82, 0.68])) == (0.30, 0.82)  # t over 3 seeds: -0.07, 1.27
    worlds = [JaxMemoryConfig(task="sequence", items=items) for items in (0, 2, 4)]
    panel = panel_of("sequence", [
        Score(GridCell(world, "lstm"), np.array([0.5]), {}, tasks.chance(world), 1.0)
        for world in worlds
    ])  # fmt: skip
    assert panel.references["chance"] == ([2, 3, 4], [1 / 12, 1 / 24, 1 / 24])
    few, many = ({f"touch_times {n}": [0.5] for n in range(2, most + 1)} for most in (4, 8))
    panel = panel_of("touch_times", [
        Score(GridCell(JaxMemoryConfig(task="touch_times", updates=most), "lstm"), np.array([0.5]),
              groups, chance, 1.0)
        for most, groups, chance in ((0, few, 0.16), (8, many, 0.08))
    ])  # fmt: skip
    assert panel.references["chance"] == ([*range(2, 9)], [0.08] * 7)


def test_the_table_of_all_policies_is_whole_in_a_terminal_of_80_columns():
    scores = [
        score(name, [0.99, 1.0, 1.0], task=task, delay=256, items=4, updates=8)
        for task in tasks.TASKS
        for name in variants()
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(memory_report.table(scores, tuple(variants())))
    text = console.export_text()
    assert "…" not in text
    assert all(text.count(f"│ {name} ") == len(tasks.TASKS) for name in variants())
    assert all(text.count(f"│ {task} ") == 1 for task in tasks.TASKS)


def test_curves_of_an_earlier_call_are_deleted(tmp_path):
    scores = [score("lstm", [0.5, 1.0], task="lit", delay=delay) for delay in (16, 64)]
    memory_report.write(tmp_path, scores, ("lstm",))
    assert (tmp_path / memory_report.CURVES).stat().st_size > 1000
    memory_report.write(tmp_path, scores[:1], ("lstm",))
    assert not (tmp_path / memory_report.CURVES).exists()


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"delay": 64}, {"delay": 64, "delays": (256,)}),
        ({"delays": (0, 16)}, {"delays": (0,)}),
        ({"tasks": ("lit", "lit")}, {"tasks": ("lit",)}),
        ({"decoders": ("lstm", "fc", "lstm")}, {"decoders": ("lstm", "fc")}),
        ({"items": (3,)}, {"items": ()}),
        ({"swaps": 3}, {"swaps": 0}),
        ({"touches": 4}, {"touches": 0}),
    ],
)
def test_every_cell_is_trained_once(options, same):
    keys, expected = (
        [memory_report.key(cell) for cell in memory_suite.cells(MemorySuiteConfig(**fields))]
        for fields in (options, same)
    )
    assert keys == expected
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("task", "options"),
    [("sequence", {"items": 3}), ("cups_swapped", {"updates": 3}), ("touch_times", {"updates": 4})],
)
def test_results_of_one_world_are_found_by_every_config_of_it(tmp_path, task, options):
    cells = [GridCell(JaxMemoryConfig(task=task, **each), "lstm") for each in ({}, options)]
    for written, asked in (cells, cells[::-1]):
        assert memory_grid.clone_name(written) == memory_grid.clone_name(asked)
        assert not memory_report.axes(asked)
        own = Score(written, np.array([1.0, 0.5]), {}, 0.25, 1.0)
        # an earlier version wrote the numbers of the config
        line = memory_grid.to_json(own, TINY) | options
        (tmp_path / memory_grid.RESULTS).write_text(json.dumps(line) + "\n")
        (read,) = memory_grid.read_scores(tmp_path, [asked], TINY)
        assert read.cell == asked


@pytest.mark.parametrize("task", tasks.TASKS)
def test_another_delay_or_number_of_updates_is_another_cell(task):
    changes = ({}, {"delay": 17}, {"updates": tasks.get(task).updates + 1})
    cells = [GridCell(JaxMemoryConfig(task=task, **each), "lstm") for each in changes]
    assert len(set(map(memory_grid.clone_name, cells))) == len(cells)


def test_curves_of_all_policies_look_different():
    assert len(set(map(str, plots._LOOKS))) == len(plots._LOOKS) >= len(variants())


def test_unknown_names_are_refused_before_any_training():
    with pytest.raises(ValueError, match=r"unknown name 'lsmt' in decoders; .*Did you mean 'lstm'"):
        MemorySuiteConfig(decoders=("lsmt",))
    with pytest.raises(ValueError, match="in tasks"):
        MemorySuiteConfig(tasks=("lid",))


def test_a_curve_with_nothing_to_remember_is_refused_by_its_option():
    with pytest.raises(ValueError, match=r"^touches must be at least 2, or 0 for no .*, got 1\.$"):
        MemorySuiteConfig(touches=1)
    every = MemorySuiteConfig(tasks=("touch_times", "cups_swapped"), decoders=("fc",))
    assert {cell.world.updates for cell in memory_suite.cells(every)} == {0, 6, 8}
    none = dataclasses.replace(every, touches=0, swaps=0)
    assert {cell.world.updates for cell in memory_suite.cells(none)} == {0}


@pytest.mark.slow
def test_the_task_of_the_guide_can_be_added(monkeypatch):
    text = (pathlib.Path(__file__).parents[1] / "docs/memory.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names = dict(vars(lit_blocks))
    exec(code, names)
    assert dict(lit_blocks.MEMBERS).items() <= names["MEMBERS"].items()
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "unlit": names["MEMBERS"]["unlit"]})
    env = memory_env.make(JaxMemoryConfig(task="unlit", delay=4))
    assert collect(env, jax.random.key(0), 64, noise=0.0).success.mean() >= 0.98


@pytest.mark.slow
@pytest.mark.sampled
def test_memory_is_what_success_depends_on():
    """A window that ends before the cue is at chance, memory of the episode is not."""
    config = CloningConfig(
        num_seeds=1, num_updates=500, num_demonstrations=4000, num_episodes=100, learning_rate=3e-3
    )
    world = JaxMemoryConfig(task="lit", delay=10)
    rates = {
        name: memory_grid.run_cell(GridCell(world, name), config).success[0]
        for name in ("fc", "lstm_window", "gru")
    }
    limit = 0.25 + 3.5 * np.sqrt(0.25 * 0.75 / config.num_episodes)
    assert rates["fc"] <= limit
    assert rates["lstm_window"] <= limit
    assert rates["gru"] >= 0.8


@pytest.mark.parametrize("fields", [{"pictures": True}, {"features": "runs/table_lstm"}])
def test_options_of_the_grid_are_refused_with_pictures(fields):
    MemorySuiteConfig(**fields, delay=4)
    with pytest.raises(ValueError, match="tasks must be left out with pictures or features"):
        MemorySuiteConfig(**fields, tasks=("lit",))
    preset = memory_suite.quick()
    with pytest.raises(
        ValueError, match=r"preset must be left out .*, got 'quick'; train.memory_p"
    ):
        dataclasses.replace(preset, **fields)
    with pytest.raises(ValueError, match="tasks must be left out with pictures or features"):
        dataclasses.replace(preset, **fields, tasks=("lit",))
