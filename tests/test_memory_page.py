"""Films and page of the memory suite."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from train import memory_films, memory_grid, memory_page
from train.memory_films import EpisodeFilm
from train.memory_grid import CloningConfig, GridCell, Score
from vla_jax.envs.memory_table import memory_env, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.table import rules

WORLD = JaxMemoryConfig(task="lit", delay=2)
TINY = CloningConfig(
    num_seeds=1, num_demonstrations=8, num_updates=1, batch_size=4, hidden_size=8, num_episodes=8
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run folder with a trained policy; its score, and the films."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("suite")
    score = memory_grid.run_cell(GridCell(WORLD, "fc"), TINY, clones=folder / memory_grid.CLONES)
    other = score._replace(cell=GridCell(WORLD, "first_and_now"))  # has no run
    counts = []
    films = memory_films.film_tasks(folder, [score, other], TINY, counts.append)
    assert counts == [1]
    return folder, [score, other], films


@pytest.mark.slow
def test_the_expert_and_the_policy_are_filmed(run):
    folder, _, films = run
    expert, *of_policy = films["lit"]
    assert (expert.actor, expert.success, expert.sentence) == (
        "expert", True, "touch the block that was lit",
    )  # fmt: skip
    colour = re.fullmatch("the (.*) block lights up", expert.shown)
    assert colour is not None
    assert expert.did.endswith(f"the hand at the {colour[1]} block")
    assert of_policy
    assert {film.actor for film in of_policy} == {"fc"}
    assert all((folder / film.path).stat().st_size > 1000 for film in films["lit"])


@pytest.mark.parametrize(
    ("decoders", "sentence"),
    [
        (("lstm",), "Policies: all remember the whole episode."),
        (("fc",), "Policies: <b>fc</b> has no memory."),
        (
            ("lstm", "fc"),
            "Policies: <b>fc</b> has no memory; all others remember the whole episode.",
        ),
    ],
)
def test_the_page_says_which_policies_remember(decoders, sentence):
    assert memory_page._policies(decoders) == sentence


OF_FC = Score(GridCell(WORLD, "fc"), np.array([0.5]), {}, 0.25, 1.0)
CALLS = {
    "the same": (OF_FC, TINY),
    "other success": (OF_FC._replace(success=np.array([1.0])), TINY),
    "another training": (OF_FC, replace(TINY, num_updates=2)),
    "another world": (OF_FC._replace(cell=GridCell(replace(WORLD, delay=3), "fc")), TINY),
}


@pytest.mark.parametrize("second", CALLS)
def test_films_are_made_again_and_old_ones_deleted_if_anything_differs(
    second, monkeypatch, tmp_path
):
    made = []

    def make_films(run_dir, world, scores, cloning, key):
        del world, scores, cloning, key
        made.append(f"films/lit_{len(made)}.mp4")
        (run_dir / made[-1]).touch()
        yield EpisodeFilm(made[-1], "expert", True, "touch it", "lit", "red", "success")

    monkeypatch.setattr(memory_films, "_make_films", make_films)
    (tmp_path / memory_films.FILMS).mkdir()
    for score, cloning in (CALLS["the same"], CALLS[second]):
        films = memory_films.film_tasks(tmp_path, [score], cloning, lambda count: None)
    assert [film.path for film in films["lit"]] == made[-1:]
    assert len(made) == (1 if second == "the same" else 2)
    left = [path.name for path in (tmp_path / memory_films.FILMS).glob("*.mp4")]
    assert left == [made[-1].removeprefix("films/")]


@pytest.mark.slow
def test_a_policy_of_another_training_is_not_filmed(run):
    folder, scores, _ = run
    other = replace(TINY, num_updates=2)
    assert memory_grid.find_clone(folder, scores[0].cell, TINY) is not None
    assert memory_grid.find_clone(folder, scores[0].cell, other) is None
    assert memory_grid.find_clone(folder, scores[1].cell, TINY) is None  # has no run


@pytest.mark.slow
def test_the_page_has_relative_links_alone(run):
    folder, scores, films = run
    page = memory_page.write(folder, scores, ("fc", "first_and_now", "gru"), TINY, films)
    text = page.read_text()
    links = re.findall(r"(?:src|href)=[\"']([^\"']*)", text)
    assert len(links) == len(films["lit"])
    assert all((folder / link).exists() for link in links)
    assert "1 seed," in text
    assert "touch the block that was lit" in text


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_says_what_must_be_remembered(task):
    world = JaxMemoryConfig(task=task)
    state = jax.device_get(memory_env.make(world).reset(jax.random.key(0))[0])
    text = tasks.get(task).cue_text(world, state)
    assert text
    if task in ("cups", "cups_swapped", "dark", "put_back", "lit", "kth"):
        assert rules.COLOURS[int(state.cue.colour)] in text


def test_the_page_explains_its_numbers_and_the_policies_in_it(tmp_path):
    world = JaxMemoryConfig(task="path")
    score = Score(GridCell(world, "fc"), np.array([0.5, 0.7]), {}, 0.002, 1.0)
    text = memory_page.write(tmp_path, [score], ("fc", "lstm"), CloningConfig(), {}).read_text()
    assert "<td>0.2 %</td>" in text
    assert "60 %<small>50 … 70</small>" in text
    assert "200 episodes give a rate near 50 % to ±\u00a07\u00a0%" in text
    assert "<b>fc</b> has no memory" in text
    assert "lstm_window" not in text
    assert "<img" not in text


def test_groups_are_tabled():
    world = JaxMemoryConfig(task="blinks")
    score = Score(GridCell(world, "fc"), np.array([0.5]), {"blinks 1": [0.2], "blinks 2": [0.8]},
                  0.25, 1.0)  # fmt: skip
    text = memory_page._groups([score], ("fc", "gru"))
    assert "blinks by group" in text
    assert "80 %" in text
