"""RoboVLMs' whole policies: the numbers of the originals, converted to a run folder and back."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from robovlms_heads import assert_same, robovlms_head
from safetensors import safe_open

from vla_jax import convert, runs
from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.backbones import kosmos2, paligemma, resizing
from vla_jax.convert.__main__ import main
from vla_jax.convert.robovlms import policies, training_json
from vla_jax.policies import policy
from vla_jax.training import losses
from vla_jax.types import Observation

GOLDEN = pathlib.Path(__file__).parent / "golden" / "robovlms"
KINDS = ("kosmos_lstm", "paligemma_lstm")
W = 4
TINY = 1e-6  # absolute tolerance of the gradient norms of key biases, 0 in theory


class Case:
    """One original, converted by the command."""

    def __init__(self, kind, folder):
        self.root, self.folder = GOLDEN / kind, folder
        with safe_open(self.root / "io.safetensors", "np") as file:
            self.values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.texts = json.loads(file.metadata()["case"])["texts"]
        self.source = convert.read(self.root / "checkpoint.pt")
        main([str(self.root / "checkpoint.pt"), str(folder), "--vlm", str(self.root / "vlm")])
        self.run = runs.load_run(folder)

    @functools.cached_property
    def padded(self):
        """Config of the policy as RoboVLMs trains it, on this batch."""
        config = self.run.agent.policy
        length = self.values["in.input_ids"].shape[1]
        options = dataclasses.replace(
            config.backbone.options, layout="robovlms_padded", max_text_tokens=length
        )
        return policy.connect(dataclasses.replace(config.backbone, options=options), config.decoder)

    def observe(self, config, images, wrist, num_steps):
        agent = dataclasses.replace(self.run.agent, policy=config)
        ids = np.stack([read_instruction(agent, text) for text in self.texts])
        return Observation(images, wrist, instruction=np.tile(ids[:, None], (1, num_steps, 1)))

    @functools.cached_property
    def trained(self):
        """Outputs, masked loss with its parts, and gradients on the batch of windows."""
        values, config = self.values, self.padded
        observation = self.observe(
            config, values["in.rgb_resized"], values.get("in.hand_resized"), W
        )
        gripper = 2 * values["in.gripper_label"][..., None] - 1
        action = np.concatenate([values["in.arm_label"], gripper], axis=-1)

        def loss(params):
            outputs = policy.outputs(params, config, observation)
            mask = values["in.chunk_mask"]
            total, parts = losses.action_loss(outputs.prediction, action, mask)
            everywhere = losses.action_loss(outputs.prediction, action, np.ones_like(mask))
            return total, (outputs, parts, everywhere)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(self.run.params)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param) / "run")


@pytest.fixture(scope="module")
def kosmos(tmp_path_factory):
    return Case("kosmos_lstm", tmp_path_factory.mktemp("kosmos") / "run")


def assert_close(actual, expected, atol=1e-5, rtol=0.0):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


# --- numbers of the originals -----------------------------------------------------------------


@pytest.mark.sampled
def test_images_are_resized_as_the_processor_does(case):
    for name in ("rgb", "hand"):
        if f"in.{name}_uint8" in case.values:
            images = case.values[f"in.{name}_uint8"]
            expected = case.values[f"in.{name}_resized"]
            size = expected.shape[2:4]
            for image, resized in zip(images[0], expected[0], strict=True):
                np.testing.assert_array_equal(resizing.resize(image, size, "bicubic"), resized)


@pytest.mark.sampled
def test_embeddings_of_the_language_model(case):
    values, config = case.values, case.padded.backbone
    observation = case.observe(
        case.padded, values["in.rgb_resized"], values.get("in.hand_resized"), W
    )
    ids = observation.instruction.reshape(-1, observation.instruction.shape[-1])
    images = np.stack([getattr(observation, name) for name in config.options.cameras], axis=2)
    images = images.reshape(-1, *images.shape[2:])
    embed = {"kosmos2": kosmos2.embed, "paligemma": paligemma.embed}[config.kind]
    scale = {"kosmos2": 1.0, "paligemma": config.language.hidden_size**-0.5}[config.kind]
    mask = values["out.mask"]
    np.testing.assert_array_equal(ids != -1, mask)
    embeddings = scale * embed(case.run.params["backbone"], config, ids, images)
    assert_close(embeddings[mask], values["out.embeds"][mask])


@pytest.mark.sampled
def test_features_and_actions_of_windows(case):
    values, ((_, (outputs, _, _)), _) = case.values, case.trained
    assert_close(outputs.tokens.tokens, values["out.features"])
    assert_close(outputs.prediction.arm, values["out.arm"])
    assert_close(outputs.prediction.gripper_logit, values["out.gripper"][..., 0])


def test_losses_with_and_without_mask(case):
    values, ((masked, (_, parts, everywhere)), _) = case.values, case.trained
    total, all_parts = everywhere
    for name in ("loss_arm", "loss_gripper", "acc_gripper"):
        assert_close(all_parts[name], values[f"out.{name}"])
        assert_close(parts[name], values[f"out.{name}_masked"])
    assert_close(total, values["out.loss"])
    assert_close(masked, values["out.loss_masked"])


def test_gradients(case):
    values, (_, gradients) = case.values, case.trained
    agent = dataclasses.replace(case.run.agent, policy=case.padded)
    theirs = policies.to_robovlms_policy(agent, gradients, case.source.tensors)
    norms = {n: x for n, x in values.items() if n.startswith("out.grad_norm.")}
    assert len(norms) == len(theirs) - 1  # the kernel of the logits is the embedding
    for name, norm in norms.items():
        gradient = theirs[name.removeprefix("out.grad_norm.")]
        assert_close(np.linalg.norm(gradient), norm, atol=TINY, rtol=1e-4)
    wholes = {n: x for n, x in values.items() if n.startswith("out.grad.")}
    assert len(wholes) > 8
    for name, gradient in wholes.items():
        assert_close(theirs[name.removeprefix("out.grad.")], gradient)


def test_one_sample_by_itself(case):
    values, config = case.values, case.run.agent.policy
    observation = case.observe(config, values["in.rgb_resized"], values.get("in.hand_resized"), W)
    outputs = jax.jit(policy.outputs, static_argnums=1)(case.run.params, config, observation)
    assert_close(outputs.tokens.tokens[:1], values["out.alone_features"])
    assert_close(outputs.prediction.arm[:1], values["out.alone_arm"])
    # The longer prompt has no padding, so that both layouts agree.
    assert_close(outputs.tokens.tokens[1], values["out.features"][1])


@pytest.mark.sampled
def test_streamed_past_the_window(case):
    values, run = case.values, case.run
    images, size = values["in.stream_rgb_uint8"], run.agent.policy.backbone.image_shape
    num_steps = images.shape[1]

    def resize(images):
        return np.stack([[resizing.resize(x, size, "bicubic") for x in row] for row in images])

    wrist = values.get("in.stream_hand_uint8")
    observation = case.observe(
        run.agent.policy, resize(images), None if wrist is None else resize(wrist), num_steps
    )
    agent = make_agent(run.agent, run.norm_stats)

    @jax.jit
    def step(stream, state, now, reset):
        stream, chunk = policy.step(run.params, run.agent.policy, stream, now, reset=reset)
        return stream, chunk, *agent.step(run.params, state, now, reset)

    stream = policy.init_stream(run.params, run.agent.policy, 2, mode="refresh")
    state = agent.init(run.params, 2)
    assert num_steps > 2 * W
    for t in range(num_steps):
        now = jax.tree.map(lambda part, t=t: part[:, t], observation)
        stream, chunk, state, action = step(stream, state, now, np.full(2, t == 0))
        assert_close(chunk.arm, values["out.stream_arm"][:, t])
        assert_close(chunk.gripper_logit, values["out.stream_gripper"][:, t, :, 0])
        assert_close(action, values["out.stream_action"][:, t])


# --- conversion -------------------------------------------------------------------------------


def test_the_run_folder_acts_as_robovlms(case):
    agent, decoder = case.run.agent, case.run.agent.policy.decoder
    assert (agent.mode, agent.instruction_steps, agent.execution.kind) == ("refresh", -1, "first")
    assert (decoder.window_size, decoder.action_horizon, case.run.step) == (W, 3, 0)
    bounds = case.run.norm_stats["action"]
    assert_close(bounds.max, np.full(7, 0.65))
    assert_close(bounds.min, np.full(7, -0.65))
    tokenizer = agent.policy.backbone.options.tokenizer
    assert tokenizer == str(case.folder / "tokenizer.json")
    wrist = ("image_wrist",) if "in.hand_uint8" in case.values else ()
    assert agent.policy.backbone.options.cameras == (*wrist, "image_primary")


def test_the_same_file_comes_back(case, tmp_path):
    main([str(case.folder), str(tmp_path / "again.pt")])
    again = convert.read(tmp_path / "again.pt")
    assert list(again.tensors) == list(case.source.tensors)
    assert_same(again.tensors, case.source.tensors)
    logits = [name for name in again.tensors if name.endswith("lm_head.weight")]
    embedding = next(name for name in again.tensors if name.endswith("embed_tokens.weight"))
    np.testing.assert_array_equal(again.tensors[logits[0]], again.tensors[embedding])


def test_a_file_in_float16_is_read_as_float32_and_written_as_float16(kosmos, tmp_path):
    half = {name: x.astype(np.float16) for name, x in kosmos.source.tensors.items()}
    convert.write(tmp_path / "half.pt", kosmos.source._replace(tensors=half))
    shutil.copy(kosmos.root / "config.json", tmp_path / "half.json")
    with pytest.warns(UserWarning, match="127 tensors cast from float16 to float32"):
        main([str(tmp_path / "half.pt"), str(tmp_path / "run"), "--vlm", str(kosmos.root / "vlm")])
    assert {
        leaf.dtype.name for leaf in jax.tree.leaves(runs.load_run(tmp_path / "run").params)
    } == {"float32"}
    main([str(tmp_path / "run"), str(tmp_path / "again.pt")])
    assert_same(convert.read(tmp_path / "again.pt").tensors, half)


def settings(kosmos, **changes):
    """Changed training config; `head_` begins the names of entries of the action head."""
    data = json.loads((kosmos.root / "config.json").read_text())
    for name, value in changes.items():
        section = data["act_head"] if name.startswith("head_") else data
        section[name.removeprefix("head_")] = value
    return data


def make(kosmos, tensors=None, vlm=None, **changes):
    tensors = kosmos.source.tensors if tensors is None else tensors
    training = training_json.from_json(settings(kosmos, **changes))
    return policies.from_robovlms_policy(tensors, vlm or kosmos.root / "vlm", training)


def test_copies_of_the_learned_token(kosmos):
    tensors = dict(kosmos.source.tensors)
    name = "model.act_head.rnn.weight_ih_l0"
    tensors[name] = np.concatenate([tensors[name]] * 2, axis=1)
    agent, _, params, _ = make(kosmos, tensors, head_latent=2, head_hidden_size=6)
    assert params["backbone"]["action_token"].shape == (2, 16)
    assert agent.policy.decoder.num_tokens == 2
    back = policies.to_robovlms_policy(agent, params, tensors)
    assert_same({name: back[name] for name in tensors}, tensors)
    params["backbone"]["action_token"] = params["backbone"]["action_token"].at[0].add(1.0)
    with pytest.raises(ValueError, match="action_token must be 2 copies of one token"):
        policies.to_robovlms_policy(agent, params, tensors)


def test_history_pre_becomes_one_sequence_of_a_window(kosmos):
    head = robovlms_head("fc", in_features=16, hidden=6, chunk=3)
    tensors = {n: x for n, x in kosmos.source.tensors.items() if "act_head." not in n}
    tensors |= {f"model.{name}": x for name, x in head.items()}
    changes = {"head_type": "FCDecoder", "head_hidden_size": 6, "head_history_type": "pre"}
    agent, _, params, _ = make(kosmos, tensors, **changes)
    assert agent.policy.backbone.options.history == "window"
    assert agent.policy.decoder.kind == "fc"
    back = policies.to_robovlms_policy(agent, params, tensors)
    assert_same({name: back[name] for name in tensors}, tensors)


REFUSED = {  # changes of the training config -> sentence
    "model": ({"model": "flamingo"}, "unknown model 'flamingo'; choose from kosmos, paligemma"),
    "discrete": ({"head_action_space": "discrete"}, "act_head.action_space must be 'continuous'"),
    "history": ({"head_history_type": "pre"}, "kind of the decoder must be 'fc' .* got 'lstm'"),
    "head": ({"head_type": "DiscreteDecoder"}, "act_head.type must be 'LSTMDecoder' or"),
    "video": (
        {"head_history_type": "video"},
        "act_head.history_type must be .* got 'video'",
    ),
    "resampler": ({"use_vision_resampler": True}, "use_vision_resampler must be false, got true"),
    "state": ({"use_state": True}, "use_state must be false, got true"),
    "encoder": ({"act_encoder": {}}, "act_encoder must be absent"),
    "no head": ({"act_head": None}, "act_head must be the settings of an action head"),
    "window": ({"window_size": "8"}, "window_size must be a whole number from 1, got 8"),
    "bounds": ({"norm_min": None}, "norm_min must be a number, got None"),
    "chunk": ({"fwd_pred_next_n": 10}, "fwd_pred_next_n must be 3 as in the tensors .* got 10"),
    "width": ({"head_hidden_size": 1024}, "act_head.hidden_size must be 12 as in the tensors"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_refused(changes, sentence, kosmos):
    with pytest.raises(ValueError, match=sentence) as caught:
        make(kosmos, **changes)
    assert "\n" not in str(caught.value)


def test_settings_of_acting(kosmos):
    agent, stats, _, _ = make(kosmos, norm_min=-0.5, norm_max=0.7, use_mu_law=True, mu_val=100)
    assert agent.normalize.action_mu == 100
    assert (stats["action"].min[0], stats["action"].max[0]) == (np.float32(-0.5), np.float32(0.7))
    assert make(kosmos, norm_action=False).agent.normalize.action == "none"


def test_tensors_that_are_refused(kosmos):
    tensors, name = dict(kosmos.source.tensors), "model.backbone.text_model.model.layer_norm.bias"
    with pytest.raises(ValueError, match=f"1 of another shape: {name} .expected .16., got .4.."):
        make(kosmos, {**tensors, name: np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"1 missing: backbone.text_model.model.layer_norm.bias"):
        make(kosmos, {n: x for n, x in tensors.items() if n != name})
    with pytest.raises(ValueError, match=r"1 left over: model.embed_arm_state.weight"):
        make(kosmos, {**tensors, "model.embed_arm_state.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(ValueError, match="name the same tensor"):
        make(kosmos, {**tensors, name.removeprefix("model."): tensors[name]})


def test_constants_and_an_own_kernel_of_the_logits_are_kept_beside_the_params(kosmos):
    logits = "model.backbone.text_model.lm_head.weight"
    position_ids = "model.backbone.vision_model.model.embeddings.position_ids"
    own = np.array(kosmos.source.tensors[logits]) + 1
    tensors = {**kosmos.source.tensors, logits: own, position_ids: np.arange(17)}
    assert make(kosmos, tensors).report.buffers == {logits: (156, 16), position_ids: (17,)}


def test_the_folder_of_the_model_is_checked(kosmos, tmp_path):
    with pytest.raises(ValueError, match=r"must be the folder of a kosmos2 model .* got paligemma"):
        make(kosmos, vlm=GOLDEN / "paligemma_lstm" / "vlm")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        make(kosmos, vlm=tmp_path)


def test_the_training_config_is_found_beside_the_checkpoint(kosmos, tmp_path):
    with pytest.warns(UserWarning, match="no training config beside it: assuming cameras image_wr"):
        assert training_json.find_training(tmp_path / "a.pt", "") == training_json.Training()
    (tmp_path / "config.json").write_text(json.dumps(settings(kosmos, use_hand_rgb=False)))
    assert training_json.find_training(tmp_path / "a.pt", "").cameras == ("image_primary",)
    (tmp_path / "a.json").write_text(json.dumps(settings(kosmos, window_size=7)))
    assert training_json.find_training(tmp_path / "a.pt", "").window_size == 7
    given = training_json.find_training(tmp_path / "a.pt", str(tmp_path / "config.json"))
    assert given.window_size == W
    (tmp_path / "a.json").write_text(json.dumps(settings(kosmos, model="qwen")))
    with pytest.raises(ValueError, match=r"a\.json: unknown model 'qwen'"):
        training_json.find_training(tmp_path / "a.pt", "")


def test_options_that_do_not_fit_are_refused(kosmos, tmp_path, capsys):
    src, vlm = str(kosmos.root / "checkpoint.pt"), ["--vlm", str(kosmos.root / "vlm")]
    for options, sentence in (
        ([*vlm, "--num-latents", "2"], "--num-latents must be left out with --vlm"),
        (["--config", str(kosmos.root / "config.json")], "--config must come with --vlm"),
    ):
        with pytest.raises(SystemExit):
            main([src, str(tmp_path / "run"), *options])
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_code_of_the_page_runs(kosmos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "kosmos").symlink_to(kosmos.folder)
    page = (GOLDEN.parents[2] / "docs" / "robovlms_checkpoint.md").read_text(encoding="utf-8")
    code = page.split("runs this block -->\n```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert names["action"].shape == (1, 7)
