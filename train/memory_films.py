"""Films of the memory suite: what is shown in an episode, and what the expert and policies do.

Episodes run on the JAX table from its state; only those that are filmed are drawn.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train import memory_grid
from train.memory_grid import CloningConfig, Score
from vla_jax import records, runs
from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.envs.memory_table import memory_env, memory_rules, scenery, tasks
from vla_jax.envs.memory_table.memory_env import JaxMemoryConfig
from vla_jax.envs.memory_table.memory_task import MemoryState
from vla_jax.envs.table import rules
from vla_jax.evaluation import video
from vla_jax.files import delete, write_json
from vla_jax.types import Array, Env, Key, Observation

FILMS = "films"  # folder in the run folder
_SIZE = 256  # pixels along each side
_BATCH = 32  # frames that are drawn at once
_DIMMED = 3  # divisor of the brightness of what happens in the dark
_NUM_EPISODES = 24  # of a policy, among which a success and a failure are looked for
# (carry, states, observations, step) -> (carry, actions), in batches
_Act = Callable[[Any, MemoryState, Observation, Array], tuple[Any, Array]]


class EpisodeFilm(NamedTuple):
    """A film in the run folder, and its caption."""

    path: str  # relative to the run folder
    actor: str  # "expert" or the name of a policy
    success: bool
    sentence: str  # the instruction
    group: str  # group of the results
    shown: str  # what had to be remembered
    did: str  # result


class TaskFilms(NamedTuple):
    """Films of a task, and what they depend on: content of its JSON file."""

    origin: dict[str, Any]
    films: list[EpisodeFilm]


class _Played(NamedTuple):
    """Episodes of a memory table."""

    states: MemoryState  # leaves [T + 1, B, ...]
    success: np.ndarray  # [T, B] bool, of a step
    terminated: np.ndarray  # [T, B] bool


def film_tasks(
    run_dir: pathlib.Path,
    scores: Sequence[Score],
    cloning: CloningConfig,
    progress: Callable[[int], None],
) -> dict[str, list[EpisodeFilm]]:
    """Films the expert and a policy in every task of the scores.

    Films of an earlier call with the same training and scores are kept.

    Args:
      run_dir: run folder with the policies of the scores.
      scores: in the order of the grid; of each task the first world is filmed.
      cloning: training of the scores; its seed decides the episodes.
      progress: is called with the number of tasks so far.

    Returns:
      Films by task.
    """
    by_task: dict[str, list[Score]] = {}
    for score in scores:
        own = by_task.setdefault(score.cell.world.task, [])
        if not own or own[0].cell.world == score.cell.world:
            own.append(score)
    films: dict[str, list[EpisodeFilm]] = {}
    for count, (task, own) in enumerate(by_task.items(), start=1):
        films[task] = _film_task(run_dir, own, cloning)
        progress(count)
    return films


def _film_task(
    run_dir: pathlib.Path, scores: Sequence[Score], cloning: CloningConfig
) -> list[EpisodeFilm]:
    world = scores[0].cell.world
    rates = {memory_grid.clone_name(score.cell): score.success.tolist() for score in scores}
    path = run_dir / FILMS / f"{world.task}.json"
    origin = {"rates": rates, "cloning": memory_grid.settings(cloning, world.task)}
    if path.exists():
        saved = records.read_file(TaskFilms, path, "the films of a task")
        if saved.origin == origin:
            return saved.films
        for film in saved.films:
            delete(path.with_name(pathlib.Path(film.path).name))
    key = jax.random.fold_in(jax.random.key(cloning.seed), list(tasks.TASKS).index(world.task))
    films = list(_make_films(run_dir, world, scores, cloning, key))
    write_json(path, {"origin": origin, "films": [film._asdict() for film in films]})
    return films


def _make_films(
    run_dir: pathlib.Path,
    world: JaxMemoryConfig,
    scores: Sequence[Score],
    cloning: CloningConfig,
    key: Key,
) -> Iterator[EpisodeFilm]:
    """Films a success of the expert and of the best policy, and a failure of a policy."""
    env = memory_env.make(world)
    expert = _play(env, _expert(env), None, key, num_episodes=2)
    yield from _choose(run_dir, world, env, "expert", expert, (True,))
    wanted = (True, False)
    for score in sorted(scores, key=lambda score: -float(score.success.mean())):
        folder = memory_grid.find_clone(run_dir, score.cell, cloning)
        if not wanted or folder is None:
            continue
        act, carry = _policy(folder, env)
        played = _play(env, act, carry, key, num_episodes=_NUM_EPISODES)
        films = list(_choose(run_dir, world, env, score.cell.decoder, played, wanted))
        found = {film.success for film in films}
        wanted = tuple(success for success in wanted if success not in found)
        yield from films


def _expert(env: Env) -> _Act:
    assert env.expert is not None  # all memory tasks have one
    expert = jax.vmap(env.expert)
    return lambda carry, states, observations, step: (carry, expert(states))


def _policy(folder: pathlib.Path, env: Env) -> tuple[_Act, Any]:
    run = runs.load_run(folder)
    agent = make_agent(run.agent, run.norm_stats)
    words = jnp.stack([read_instruction(run.agent, sentence) for sentence in env.instructions])

    def act(
        carry: Any, states: MemoryState, observations: Observation, step: Array
    ) -> tuple[Any, Array]:
        index = jax.vmap(env.instruction_index)(states)
        observations = observations._replace(instruction=words[index])
        return agent.step(run.params, carry, observations, jnp.full(len(index), step == 0))

    return act, agent.init(run.params, _NUM_EPISODES)


def _play(env: Env, act: _Act, carry: Any, key: Key, *, num_episodes: int) -> _Played:
    """Plays episodes that `key` decides; `carry` is the first one of `act`."""

    def step(before, number):
        carry, states, observations = before
        carry, actions = act(carry, states, observations, number)
        states, transition = jax.vmap(env.step)(states, actions)
        kept = (states, transition.success, transition.terminated)
        return (carry, states, transition.observation), kept

    @jax.jit
    def play(carry: Any, keys: Key) -> tuple[MemoryState, tuple[MemoryState, Array, Array]]:
        states, observations = jax.vmap(env.reset)(keys)
        _, kept = jax.lax.scan(step, (carry, states, observations), jnp.arange(env.max_steps))
        return states, kept

    first, (later, success, terminated) = jax.device_get(
        play(carry, jax.random.split(key, num_episodes))
    )
    states = jax.tree.map(lambda one, more: np.concatenate([one[None], more]), first, later)
    return _Played(states, success, terminated)


def _choose(
    run_dir: pathlib.Path,
    world: JaxMemoryConfig,
    env: Env,
    actor: str,
    played: _Played,
    wanted: Sequence[bool],
) -> Iterator[EpisodeFilm]:
    """Films the first episode of each wanted result, if there is one."""
    num_steps = len(played.success)
    ended = np.where(played.terminated.any(axis=0), played.terminated.argmax(axis=0) + 1, num_steps)
    before_end = np.arange(num_steps)[:, None] < ended
    success = (played.success & before_end).any(axis=0)
    for result in wanted:
        if np.any(success == result):
            episode = int(np.argmax(success == result))
            states = jax.tree.map(lambda leaf, at=episode: leaf[: ended[at] + 1, at], played.states)
            is_wrong = bool(played.terminated[:, episode].any()) and not result
            yield _film(run_dir, world, env, actor, states, success=result, is_wrong=is_wrong)


def _film(
    run_dir: pathlib.Path,
    world: JaxMemoryConfig,
    env: Env,
    actor: str,
    states: MemoryState,
    *,
    success: bool,
    is_wrong: bool,
) -> EpisodeFilm:
    """Writes the film of an episode; leaves of `states` are `[T + 1, ...]`."""
    num_steps, task = len(states.table.num_steps) - 1, tasks.get(world.task)
    last = jax.tree.map(lambda leaf: leaf[-1], states)
    index = int(last.table.instruction)
    verdict = "success" if success else ("a mistake" if is_wrong else "out of time")
    did = ", ".join(filter(None, (f"{verdict} after {num_steps} steps", task.result_text(last))))
    shown = task.cue_text(world, last)
    path = pathlib.Path(FILMS) / f"{world.task}_{actor}_{'success' if success else 'failure'}.mp4"
    film = EpisodeFilm(
        path.as_posix(), actor, success, env.instructions[index], env.tasks[index], shown, did
    )
    acts = states.table.num_steps >= last.cue.shown + last.cue.delay
    frames = _draw(world, states)
    parts = []
    for is_acting in (False, True):
        own = [frame for frame, act in zip(frames, acts, strict=True) if act == is_acting]
        if own:
            lines = [film.sentence, f"{world.task} · {actor} · {_PHASES[is_acting]}"]
            parts += video.caption(own, lines, success if is_acting else None)
    video.write_mp4(run_dir / path, parts, rules.CONTROL_HZ)
    return film


_PHASES = {False: "watches", True: "acts"}


def _draw(world: JaxMemoryConfig, states: MemoryState) -> list[np.ndarray]:
    """Returns the images of the primary camera, in batches of one size: one compilation."""
    num_frames = len(states.table.num_steps)
    displays = jax.vmap(functools.partial(memory_rules.display, world))(states)
    # Whoever watches the film sees what happens in the dark, only darker.
    is_dark = np.asarray(displays.dark)
    visible = displays.seen | (is_dark[:, None] & (states.table.blocks[..., 0] < scenery.FAR))
    displays = displays._replace(dark=jnp.zeros_like(displays.dark), seen=visible)
    frames = []
    for start in range(0, num_frames, _BATCH):
        places = np.minimum(np.arange(start, start + _BATCH), num_frames - 1)
        part = jax.tree.map(lambda leaf, at=places: leaf[at], (states, displays))
        frames += list(np.asarray(_pictures(*part, has_dots=tasks.get(world.task).has_dots)))
    return [
        frame // _DIMMED if dark else frame for frame, dark in zip(frames, is_dark, strict=False)
    ]


@functools.partial(jax.jit, static_argnames="has_dots")
def _pictures(states: MemoryState, displays: Any, *, has_dots: bool) -> Array:
    def draw(state: MemoryState, display: Any) -> Array:
        return scenery.pictures(state, display, image_size=_SIZE, has_dots=has_dots)[0]

    return jax.lax.map(lambda pair: draw(*pair), (states, displays))
