"""A backbone defined outside of the library, added by one line to `BACKBONES`, obeys the laws.

Its tokens are padded with NaN to a fixed number, so that any use of padding would show.
"""

import dataclasses
import json
import pathlib
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import memory_check, setup
from train.configs import ImitateConfig
from train.imitate import make_loss
from vla_jax import runs
from vla_jax.acting.agent import AgentConfig, make_agent
from vla_jax.backbones import registry
from vla_jax.backbones.backbone import Backbone
from vla_jax.backbones.parts import shape
from vla_jax.data import normalize
from vla_jax.data.dataset import Episode, from_episodes
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.policies import policy
from vla_jax.policies.decoder_config import DecoderConfig
from vla_jax.training.auxiliary import AuxiliaryConfig
from vla_jax.training.loss_terms import LossWeights
from vla_jax.types import Observation, Tokens

B, T, W, S = 2, 5, 3, 6
PAD = 127  # token id of padding; no other code may depend on it


# --- the backbone -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LettersConfig:
    """One token per letter of the instruction, and one for the robot's state."""

    kind: Literal["letters"] = "letters"
    token_dim: int = 4
    vocab_size: int = 128
    alphabet: str = ""  # path of a file

    @property
    def num_tokens(self) -> int:
        return 1 + S


def init(key, config):
    proprio_key, letters_key = jax.random.split(key)
    return {
        "proprio": jax.random.normal(proprio_key, (2, config.token_dim)),
        "letters": jax.random.normal(letters_key, (config.vocab_size, config.token_dim)),
    }


def apply(params, config, observation):
    ids = jnp.asarray(observation.instruction)
    letters = jnp.where(ids[..., None] != PAD, params["letters"][ids], jnp.nan)
    own = (observation.proprio @ params["proprio"])[..., None, :]
    mask = jnp.concatenate([jnp.ones((*ids.shape[:-1], 1), bool), ids != PAD], axis=-1)
    return Tokens(jnp.concatenate([own, letters], axis=-2), mask)


def tokenize(config, text):
    ids = [ord(letter) % config.vocab_size for letter in text[:S]]
    return np.array(ids + [PAD] * (S - len(ids)), np.int32)


def check_instructions(config, texts):
    if any(len(text) > S for text in texts):
        raise ValueError(f"instructions must have at most {S} letters.")


def files(config):
    return {"alphabet.txt": config.alphabet} if config.alphabet else {}


def with_files(config, folder):
    alphabet = str(pathlib.Path(folder) / "alphabet.txt") if config.alphabet else ""
    return dataclasses.replace(config, alphabet=alphabet)


def example(config):
    return Observation(proprio=shape(2), instruction=shape(S, dtype=jnp.int32))


LETTERS = Backbone(
    config=LettersConfig,
    init=init,
    apply=apply,
    tokenize=tokenize,
    check_instructions=check_instructions,
    image_spec=lambda config: None,
    example=example,
    files=files,
    with_files=with_files,
)


# --- its registration -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(registry.BACKBONES, "letters", LETTERS)


# --- the laws ---------------------------------------------------------------------------------


def make_config(pooling="max", kind="lstm"):
    decoder = DecoderConfig(
        kind=kind, window_size=W, action_horizon=2, hidden_size=6, num_layers=1, num_heads=2,
        pooling=pooling, head_sizes=(8,),
    )  # fmt: skip
    return policy.connect(LettersConfig(), decoder)


def observe():
    random = np.random.default_rng(0)
    ids = np.stack([tokenize(LettersConfig(), text) for text in ("touch", "li")])
    return Observation(
        proprio=random.normal(size=(B, T, 2)).astype(np.float32),
        instruction=np.tile(ids[:, None], (1, T, 1)),
    )


def test_the_caption_head_refuses_other_padding_than_0():
    agent, auxiliary = AgentConfig(make_config()), AuxiliaryConfig(caption=True)
    config = ImitateConfig(agent=agent, auxiliary=auxiliary, loss=LossWeights(caption=0.1))
    with pytest.raises(ValueError, match=r"caption must be False .* backbone 'letters'"):
        setup.check(config)


def test_the_memory_of_its_training_is_estimated():
    config = ImitateConfig(agent=AgentConfig(make_config()))
    shapes = setup.param_shapes(config)
    estimate = memory_check.estimate_memory(config, make_loss(config), shapes)
    assert estimate.params == estimate.gradients == 4 * sum(x.size for x in jax.tree.leaves(shapes))
    assert estimate.activations > 0


def test_a_run_folder_holds_its_files(tmp_path):
    file = tmp_path / "letters.txt"
    file.write_text("abc")
    backbone = LettersConfig(alphabet=str(file))
    agent = AgentConfig(policy.connect(backbone, make_config().decoder))
    runs.write_acting(tmp_path / "run", agent, {}, None)
    saved = json.loads((tmp_path / "run" / "agent.json").read_text())
    assert saved["policy"]["backbone"]["alphabet"] == "alphabet.txt"
    assert (tmp_path / "run" / "alphabet.txt").read_text() == "abc"


def select_steps(tree, steps):
    return jax.tree.map(lambda part: part[:, steps], tree)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


@pytest.mark.sampled
@pytest.mark.parametrize("pooling", ["max", "mean", "attention", "none"])
@pytest.mark.parametrize("kind", ["lstm", "gpt", "fc"])
def test_streamed_equals_windowed_and_padding_is_ignored(pooling, kind):
    config, observation = make_config(pooling, kind), observe()
    params = jax.jit(policy.init, static_argnums=1)(jax.random.key(0), config)
    step = jax.jit(policy.step, static_argnums=1)
    state = policy.init_stream(params, config, B)
    for t in range(T):
        state, chunk = step(params, config, state, select_steps(observation, t))
        window = select_steps(observation, slice(max(0, t + 1 - W), t + 1))
        assert_close(chunk, select_steps(policy.apply(params, config, window), -1))
        assert np.isfinite(chunk.arm).all()


@pytest.mark.parametrize("instruction_steps", [-1, 1])
def test_cached_tokens_keep_their_mask_in_windows(instruction_steps):
    config = make_config()
    params = policy.init(jax.random.key(0), config)
    random = np.random.default_rng(0)
    episodes = [
        Episode(
            {"proprio": random.normal(size=(T, 2)).astype(np.float32)},
            random.uniform(-1, 1, (T, 7)).astype(np.float32),
            text,
        )
        for text in ("touch", "li")
    ]
    data = from_episodes(episodes, fps=10)
    tokenize_text = registry.make_tokenizer(config.backbone, data.instructions)

    def windows(tokens=None, size=W):
        sizes = WindowConfig(
            window_size=size, action_horizon=2, instruction_steps=instruction_steps
        )
        stats = normalize.compute_norm_stats(data)
        source = Windows(data, sizes, tokenize=tokenize_text, norm_stats=stats, tokens=tokens)
        return source[np.arange(len(source))]

    frames = policy.encode(params, config, windows(size=1).observation)
    cached = windows(Tokens(*(np.asarray(part[:, 0]) for part in frames)))
    fresh = windows()
    assert not cached.tokens.mask.all()
    one = policy.apply(params, config, Observation(), tokens=cached.tokens)
    assert_close(one, policy.apply(params, config, fresh.observation))


@pytest.mark.parametrize("kind", ["lstm", "fc"])
def test_an_agent_hides_the_instruction_with_the_ids_of_the_empty_text(kind):
    config = AgentConfig(policy=make_config(kind=kind), instruction_steps=1)
    random = np.random.default_rng(0)
    sizes = {"action": 7, "proprio": 2}
    stats = {
        name: normalize.compute(random.normal(size=(50, size))) for name, size in sizes.items()
    }
    agent = make_agent(config, stats)
    params = policy.init(jax.random.key(0), config.policy)
    observation, start = select_steps(observe(), 0), np.ones(B, bool)
    empty = np.tile(tokenize(LettersConfig(), ""), (B, 1))
    hidden = observation._replace(instruction=empty)
    state, visible_action = agent.step(params, agent.init(params, B), observation, start)
    _, action = agent.step(params, state, observation, ~start)
    _, expected = agent.step(params, state, hidden, ~start)
    _, hidden_action = agent.step(params, agent.init(params, B), hidden, start)
    np.testing.assert_array_equal(action, expected)
    assert np.isfinite(action).all()
    assert not np.allclose(visible_action, hidden_action)


def test_the_backbone_checks_the_instructions():
    with pytest.raises(ValueError, match="at most 6 letters"):
        registry.make_tokenizer(LettersConfig(), ["pick up the block"])


def test_an_unknown_backbone_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.delitem(registry.BACKBONES, "letters")
    with pytest.raises(ValueError, match="unknown backbone 'letters'"):
        policy.init(jax.random.key(0), make_config())
