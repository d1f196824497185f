"""From cloning to reward: the policy of a run of `train.imitate` goes on learning in closed loop.

    python -m train.reinforce --init-from runs/table_jax_state

REINFORCE on whole episodes of the JAX table: the policy streams as it will act, with noise on what
it does; every layout is tried several times, and a try counts by how much better it went than the
others on that layout. A divergence from the cloned policy, at what is seen on the way, keeps what
was known. The run's folder holds the policy that came of it, and is read like one of
`train.imitate`.

Source: tries of one start held against each other, Tan et al. 2025, "Interactive Post-Training for
Vision-Language-Action Models" (arXiv:2505.17016); the divergence, Jaques et al. 2017, "Sequence
Tutor" (arXiv:1611.02796).
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from train.learn import Learnt, learn, read_curve
from train.learner import Learner, LearnState, SeedsConfig
from train.loop import LoopConfig, open_run, save_json
from vla_jax import checkpoint, optim, plots, results
from vla_jax import config as configs
from vla_jax.agent import AgentConfig, make_agent, read_instruction
from vla_jax.data import normalize
from vla_jax.envs import table_jax
from vla_jax.optim import OptimConfig
from vla_jax.players import make_player
from vla_jax.results import Summary
from vla_jax.rl import episodes, gaussian
from vla_jax.rl.episodes import Tries
from vla_jax.rl.gaussian import NoiseConfig
from vla_jax.rl.policy_gradient import leave_one_out, score_loss
from vla_jax.rollout import run_env
from vla_jax.runs import Run, load_run
from vla_jax.types import Array, Env, Key, Metrics, Params
from vla_jax.update import init_train_state, make_update

LEARNING = "learning"  # folder inside the run's with metrics and checkpoints of all seeds


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning of a cloned policy by REINFORCE."""

    init_from: str = ""  # run folder of train.imitate whose policy goes on learning
    run_dir: str = "runs/finetune"  # folder to write to
    num_tries: int = 8  # of each layout between two updates; the others are a try's baseline
    kl_weight: float = 0.03  # of the divergence from the cloned policy, in successes per nat
    noise: NoiseConfig = NoiseConfig()
    seeds: SeedsConfig = SeedsConfig(num_seeds=1, num_worlds=256, num_steps=32)
    optim: OptimConfig = OptimConfig(
        learning_rate=3e-4, warmup_steps=10, weight_decay=0.0, freeze=("backbone/*",)
    )
    loop: LoopConfig = LoopConfig(num_updates=300, log_every=20, save_every=100)
    num_episodes: int = 600  # unseen layouts that both policies are held against each other on
    first_seed: int = 2_000_000  # of these; choose settings on others
    seed: int = 0
    overwrite: bool = False  # delete a run that is there

    def __post_init__(self):
        """Checks the counts and the weight."""
        if self.num_tries < 2 or self.seeds.num_worlds % self.num_tries:
            raise ValueError(
                "num_tries must be at least 2 and divide num_worlds = "
                f"{self.seeds.num_worlds}, got {self.num_tries}."
            )
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight must be >= 0, got {self.kl_weight}.")
        if self.num_episodes < 1:
            raise ValueError(f"num_episodes must be at least 1, got {self.num_episodes}.")


class Place(NamedTuple):
    """Where a policy learns."""

    world: table_jax.TableConfig
    env: Env
    instructions: Array  # [num instructions, S] word ids of the world's sentences


def finetune(config: FinetuneConfig) -> pathlib.Path:
    """Goes on training a cloned policy; returns the run's folder."""
    # The policy as it was cloned, and the world it was cloned for.
    cloned = load_run(config.init_from)
    place = read_place(cloned)
    episodes.check_memory(cloned.agent, config.seeds.num_steps)
    if pathlib.Path(config.run_dir).resolve() == cloned.folder.resolve():
        raise ValueError(f"run_dir must be another folder than init_from, got {config.run_dir}.")
    run_dir = open_run(config.run_dir, config, overwrite=config.overwrite)

    # Rollout, update, rollout, …; all seeds at once.
    learner = make_finetune(config, cloned, place)
    learnt = learn(
        config.seeds, config.loop, run_dir / LEARNING, learner, config.seed, name=run_dir.name
    )

    # The policy of the first seed, held against the cloned one.
    params = jax.tree.map(lambda leaf: leaf[0], learnt.params)
    _export(config, run_dir, cloned, params, int(learnt.num_updates[0]))
    seeds = range(config.first_seed, config.first_seed + config.num_episodes)
    before, after = (_play(cloned.agent, cloned, p, place, seeds) for p in (cloned.params, params))
    _show(config, run_dir, learnt, before, after)
    return run_dir


def read_place(run: Run) -> Place:
    """The world that a run's policy was cloned for.

    Raises:
      ValueError: it is not the JAX table.
    """
    if not isinstance(run.world, table_jax.TableConfig):
        found = "an unknown world" if run.world is None else f"world '{run.world.kind}'"
        raise ValueError(
            f"init_from must be a run for world 'table_jax', which a policy can learn in, got "
            f"{found} in {run.folder}; clone a policy for that one."
        )
    world = replace(run.world, image_size=getattr(run.agent.policy.backbone, "image_size", 0))
    env = table_jax.make(world)
    words = [read_instruction(run.agent, sentence) for sentence in env.instructions]
    return Place(world, env, jnp.stack(words))


def make_finetune(config: FinetuneConfig, cloned: Run, place: Place) -> Learner:
    """The fine-tuning of a cloned policy as a `Learner`."""
    loop, ema_decay = config.loop, config.optim.ema_decay
    optimizer = optim.make_optimizer(config.optim, loop.num_updates, cloned.params)
    loss_fn = make_loss(config, cloned.agent, cloned.params)
    update_params = make_update(loss_fn, optimizer, ema_decay=ema_decay, freeze=config.optim.freeze)

    def init(key: Key) -> LearnState:
        del key  # every seed starts from the cloned policy
        params = jax.tree.map(jnp.asarray, cloned.params)
        train_state = init_train_state(params, optimizer, ema=ema_decay is not None)
        return LearnState(train_state, jnp.arange(config.seeds.num_worlds), jnp.zeros((), bool))

    def update(state: LearnState, key: Key) -> tuple[LearnState, Metrics]:
        play_key, learn_key = jax.random.split(key)
        tries = _try(config, cloned, place, state.train_state.params, play_key, state.actor)
        train_state, metrics = update_params(state.train_state, tries, learn_key)
        reward = jnp.mean(jnp.sum(tries.reward, axis=1))  # of an episode
        return state._replace(train_state=train_state), {**metrics, "reward": reward}

    evaluate = make_evaluate(cloned, place)
    return Learner(
        init,
        update,
        partial(evaluate, config.seeds.eval_episodes),
        partial(evaluate, config.seeds.report_episodes),
    )


def make_loss(config: FinetuneConfig, agent: AgentConfig, reference: Params):
    """What an update descends: `loss_fn(params, tries, key) -> (loss, metrics)`.

    L = −1/BT Σ Âᵢ log π(aᵢₜ | sᵢₜ) + β · 1/BT Σ KL(π(· | sᵢₜ) ‖ π₀(· | sᵢₜ))
    """

    def loss_fn(params: Params, tries: Tries, key: Key) -> tuple[jax.Array, Metrics]:
        del key
        weight = jnp.asarray(tries.mask, jnp.float32)
        return_ = jnp.sum(tries.reward, axis=1).reshape(-1, config.num_tries)
        advantage = jax.vmap(leave_one_out)(return_).reshape(-1, 1)
        mean = episodes.means(agent, params, tries.seen)
        chosen = gaussian.log_probability(mean, tries.trial, config.noise)
        before = jax.lax.stop_gradient(episodes.means(agent, reference, tries.seen))
        divergence = jnp.mean(weight * gaussian.kl_divergence(mean, before, config.noise))
        score = jnp.mean(
            jax.vmap(score_loss)(chosen, jnp.broadcast_to(advantage, chosen.shape), weight)
        )
        loss = score + config.kl_weight * divergence
        return loss, {"loss_reinforce": score, "loss_kl": divergence}

    return loss_fn


def _try(
    config: FinetuneConfig, cloned: Run, place: Place, params: Params, key: Key, worlds: Array
) -> Tries:
    """One episode of each of the worlds `[B]`; `num_tries` in a row have the same layout."""
    layout_key, noise_key = jax.random.split(key)
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    return episodes.play(
        cloned.agent,
        cloned.norm_stats,
        params,
        place.env,
        place.instructions,
        config.noise,
        fold_in(layout_key, worlds // config.num_tries),
        fold_in(noise_key, worlds),
        num_steps=config.seeds.num_steps,
    )


def make_evaluate(cloned: Run, place: Place) -> Callable[[int, Params, Key], Metrics]:
    """Returns `evaluate(num_episodes, params, key)`: how often it succeeds, per task too."""
    agent = make_agent(cloned.agent, cloned.norm_stats)
    names = sorted(set(place.env.tasks))
    task_of = jnp.array([names.index(task) for task in place.env.tasks])

    def evaluate(num_episodes: int, params: Params, key: Key) -> Metrics:
        keys = jax.random.split(key, num_episodes)
        played = run_env(agent, params, place.env, place.instructions, keys)
        of_task = task_of[played.instruction_index][:, None] == jnp.arange(len(names))[None]
        rates = jnp.mean(played.success[:, None], axis=0, where=of_task)
        mean = jnp.mean(played.success)  # the table's reward is 1 for success, so it is the return
        by_task = {f"success_{name}": rates[i] for i, name in enumerate(names)}
        return {"success": mean, "return": mean, **by_task}

    return evaluate


def _export(
    config: FinetuneConfig, run_dir: pathlib.Path, cloned: Run, params: Params, num_updates: int
) -> None:
    """Writes what `train.imitate` writes, so that the folder is read as one of its own."""
    statistics = normalize.to_json(cloned.norm_stats)
    save_json(configs.to_dict(cloned.agent), run_dir / "agent.json")
    save_json(configs.to_dict(cloned.world), run_dir / "world.json")
    save_json(statistics, run_dir / "norm_stats.json")
    metadata = {"config": configs.to_dict(config), "norm_stats": statistics}
    checkpoints = checkpoint.open_checkpoints(run_dir / "checkpoints", keep=1)
    state = {"params": params, "ema_params": None}
    checkpoint.save(checkpoints, cloned.step + num_updates, state, metadata)
    checkpoint.close(checkpoints)


def _play(
    agent: AgentConfig, run: Run, params: Params, place: Place, seeds: Sequence[int]
) -> Summary:
    player = make_player(agent, run.norm_stats, params)
    return results.summarize(player.play_env(place.env, seeds))


def _show(
    config: FinetuneConfig,
    run_dir: pathlib.Path,
    learnt: Learnt,
    before: Summary,
    after: Summary,
) -> None:
    """Draws the curve, and tells and keeps what came of it (`report.json`)."""
    steps, success = read_curve(run_dir / LEARNING, "success")
    title = f"{config.seeds.num_seeds} seeds, mean and 95 % interval"
    levels = {"cloned": before.total.rate or 0.0}
    panel = plots.Panel(
        title, "environment steps of each seed", "success", {run_dir.name: (steps, success)}, levels
    )
    plots.curves(run_dir / "curve.png", [panel])
    save_json(
        {
            "env_steps": learnt.env_steps,
            "num_updates": learnt.num_updates.tolist(),
            "success": learnt.report["success"].tolist(),
            "cloned": results.to_json(before),
            "finetuned": results.to_json(after),
        },
        run_dir / "report.json",
    )
    for name, summary in (("cloned", before), ("fine-tuned", after)):
        Console().print(results.table(summary, title=f"{name}, same unseen layouts"))


def table() -> FinetuneConfig:
    """A policy of `train.imitate --preset table_jax_state`."""
    return FinetuneConfig()


FINETUNE = {"table_jax_state": table}
