"""An exported policy, loaded without the library, acts like the agent it was exported from."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run
import tiny_vlm

from vla_jax import export as export_command
from vla_jax import trees
from vla_jax.acting.agent import make_agent, read_instruction
from vla_jax.backbones import word_hashing
from vla_jax.backbones.perceiver import PerceiverConfig
from vla_jax.config import save
from vla_jax.export import ExportRunConfig, export_run
from vla_jax.policies import policy, trunks
from vla_jax.runs import Run
from vla_jax.serving import policy_export
from vla_jax.serving.exported_policy import load
from vla_jax.serving.policy_export import ExportConfig
from vla_jax.types import Observation

WINDOW = dataclasses.replace(
    tiny_vlm.CONFIGS["smolvlm"], options=dataclasses.replace(tiny_vlm.OPTIONS, history="window")
)
B, T = 2, 7  # T > window_size
CASES = [
    *(
        (kind, mode, "none", "continuous")
        for kind in ("lstm", "gru", "gpt", "fc")
        for mode in trunks.get(kind).modes
    ),
    ("rotary_gpt", "persistent", "none", "continuous"),
    ("memory_gpt", "persistent", "none", "continuous"),
    ("s_lstm", "refresh", "mlp", "continuous"),
    ("rg_lru", "persistent", "gated", "continuous"),
    ("lstm", "refresh", "none", "flow"),
]
# Runs the policy of a folder in a process that cannot import this library.
SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vla_jax", "flax", "safetensors", "chex"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import numpy as np
from load import load

policy, inputs = load(sys.argv[1]), np.load(sys.argv[2])
reset = inputs["reset"]
state, actions = policy.init(reset.shape[1]), []
for t in range(len(reset)):
    observation = {name: inputs[name][t] for name in policy.spec["observation"]}
    state, action = policy.step(state, observation, reset[t])
    actions.append(action)
np.savez(sys.argv[3], actions=actions, **{f"state/{name}": leaf for name, leaf in state.items()})
"""


def run_of(folder, kind="lstm", mode="refresh", block="none", head="continuous"):
    decoder = dataclasses.replace(
        tiny_run.DECODER, kind=kind, block=block, head=head, num_heads=2, segment_size=2
    )
    parts = policy.connect(tiny_run.AGENT.policy.backbone, decoder)
    agent = dataclasses.replace(tiny_run.AGENT, policy=parts, mode=mode)
    params = policy.init(jax.random.key(0), parts)
    return Run(folder, agent, tiny_run.norm_stats(), params, None, 10)


def inputs(batch_size=B):
    """Raw observations `[T, B, ...]`; the second robot starts again after three steps."""
    rng = np.random.default_rng(1)
    reset = np.zeros((T, batch_size), bool)
    reset[0], reset[3, 1:2] = True, True
    return {
        "proprio": rng.normal(size=(T, batch_size, 8)).astype(np.float32),
        "environment_state": rng.normal(size=(T, batch_size, 22)).astype(np.float32),
        "instruction": np.tile(rng.integers(1, 256, 12).astype(np.int32), (T, batch_size, 1)),
        "reset": reset,
    }


def act(run, seen):
    """Returns actions and the last state of the agent in process."""
    agent = make_agent(run.agent, run.norm_stats)
    step, state, actions = jax.jit(agent.step), agent.init(run.params, seen["reset"].shape[1]), []
    for t in range(T):
        observation = Observation(**{k: v[t] for k, v in seen.items() if k != "reset"})
        state, action = step(run.params, state, observation, seen["reset"][t])
        actions.append(action)
    return np.stack(actions), trees.leaves_by_path(state)


def act_elsewhere(folder, seen, tmp_path):
    """Returns actions and the last state of an exported policy in another process."""
    np.savez(tmp_path / "in.npz", **seen)
    files = [str(tmp_path / name) for name in ("in.npz", "out.npz")]
    command = [sys.executable, "-I", "-W", "error", "-c", SCRIPT, str(folder), *files]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = dict(np.load(files[1]))
    return found.pop("actions"), {k.removeprefix("state/"): v for k, v in found.items()}


def check_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, leaf in expected[1].items():
        assert found[1][name].dtype == leaf.dtype
        np.testing.assert_allclose(found[1][name], leaf, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    """The tiny run, exported for any batch size."""
    return export_run(run_dir, tmp_path_factory.mktemp("out") / "policy")


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "mode", "block", "head"), CASES)
def test_an_exported_policy_equals_its_agent_without_the_library(kind, mode, block, head, tmp_path):
    run, folder = run_of(tmp_path, kind, mode, block, head), tmp_path / "policy"
    folder.mkdir()
    policy_export.write(folder, run, ExportConfig())
    check_equal(act_elsewhere(folder, inputs(), tmp_path), act(run, inputs()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        (PerceiverConfig(image_size=16, width=8, token_dim=8, num_heads=2, vocab_size=256), "gru"),
        (tiny_vlm.CONFIGS["smolvlm"], "lstm"),
        (tiny_vlm.CONFIGS["qwen3_vl"], "fc"),
        (WINDOW, "fc"),
    ],
    ids=["perceiver", "smolvlm", "qwen3_vl", "window"],
)
def test_policies_on_images_equal_their_agents(backbone, kind, tmp_path):
    parts = policy.connect(backbone, dataclasses.replace(tiny_run.DECODER, kind=kind))
    agent = dataclasses.replace(tiny_run.AGENT, policy=parts)
    params = policy.init(jax.random.key(0), parts)
    run = Run(tmp_path, agent, tiny_run.norm_stats(), params, None, 10)
    policy_export.write(tmp_path, run, ExportConfig(instructions=("lift the red block",)))
    found, rng, seen = load(tmp_path), np.random.default_rng(0), {"reset": inputs()["reset"]}
    for name, about in found.spec["observation"].items():
        values = rng.integers(0, 255, (T, B, *about["shape"]))
        seen[name] = values.astype(about["dtype"])
    seen["instruction"][:] = found.tokenize("lift the red block")
    state = found.init(B)
    for t in range(T):
        observation = {name: value[t] for name, value in seen.items() if name != "reset"}
        state, action = found.step(state, observation, seen["reset"][t])
    actions, expected_state = act(run, seen)
    check_equal((action, jax.device_get(state)), (actions[-1], expected_state))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5])
def test_any_batch_size_equals_the_agent(batch_size, exported, tmp_path):
    seen = inputs(batch_size)
    expected = act(run_of(tmp_path)._replace(params=tiny_run.params(10)), seen)
    check_equal(act_elsewhere(exported, seen, tmp_path), expected)


def test_a_fixed_instruction_and_batch_size_are_part_of_the_program(tmp_path):
    run, seen, folder = run_of(tmp_path), inputs(), tmp_path / "policy"
    folder.mkdir()
    config = ExportConfig(batch_size=B, platforms=("cpu",), fixed_instruction="lift the red block")
    policy_export.write(folder, run, config)
    seen["instruction"][:] = read_instruction(run.agent, "lift the red block")
    found = load(folder)
    assert set(found.spec["observation"]) == {"proprio", "environment_state"}
    state = found.init(B)
    for t in range(T):
        parts = {name: seen[name][t] for name in found.spec["observation"]}
        state, action = found.step(state, parts, seen["reset"][t])
    np.testing.assert_allclose(action, act(run, seen)[0][-1], atol=1e-6)
    with pytest.raises(ValueError, match="batch_size must be 2, got 3"):
        found.init(3)


def test_the_loader_tokenises_like_the_library(exported):
    found = load(exported)
    texts = ["", "Lift the RED block!", "poser l'étoile près du mur", "लाल ब्लॉक उठाओ", "ﬁne ２３"]
    for text in texts:
        expected = word_hashing.tokenize(text, max_words=12, vocab_size=256)
        np.testing.assert_array_equal(found.tokenize(text), expected)


def test_a_tokenizer_that_the_loader_lacks_has_a_table_of_instructions(exported, tmp_path):
    folder = copy(exported, tmp_path)
    file = folder / "policy.json"
    spec = json.loads(file.read_text())
    spec["tokenizer"] = {"kind": "ids", "instructions": {"lift": [3, 4]}}
    file.write_text(json.dumps(spec))
    found = load(folder)
    assert found.tokenize("lift").tolist() == [3, 4]
    with pytest.raises(ValueError, match="instruction must be one of"):
        found.tokenize("drop")


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("name", ["params.safetensors", "step.stablehlo", "state.safetensors"])
def test_a_damaged_file_is_refused(name, exported, tmp_path):
    file = copy(exported, tmp_path) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load(file.parent)


def test_a_policy_for_other_platforms_is_refused(run_dir, tmp_path):
    folder = export_run(run_dir, tmp_path / "p", ExportRunConfig(platforms=("tpu",), batch_size=1))
    with pytest.raises(ValueError, match=r"platform must be one of .*got 'cpu'"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("proprio", np.zeros((B, 8)), "proprio of observation must be float32 .2, 8., got float64"),
        ("proprio", np.zeros((B, 9), np.float32), r"got float32 \[2, 9\]"),
        ("proprio", [0.0] * 8, "must be float32"),
        ("image_top", np.zeros((B, 4, 4, 3), np.uint8), "observation must have"),
        ("environment_state", np.full((B, 22), np.nan, np.float32), "action must be finite"),
    ],
)
def test_a_wrong_observation_is_refused_in_one_sentence(name, value, message, exported):
    found = load(exported)
    seen = {k: v[0] for k, v in inputs().items() if k != "reset"}
    with pytest.raises(ValueError, match=message):
        found.step(found.init(B), {**seen, name: value}, np.ones(B, bool))
    with pytest.raises(ValueError, match="reset must be bool"):
        found.step(found.init(B), seen, np.ones(B))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ("gpu",)}, "unknown name 'gpu' in platforms"),
        ({"platforms": ()}, "platforms must be one or more"),
        ({"platforms": ("cpu", "cpu")}, "different names"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"instructions": ("a",), "fixed_instruction": "a"}, "instructions must be empty"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExportRunConfig(**options)


def test_only_an_exported_policy_is_replaced(run_dir, exported, tmp_path):
    with pytest.raises(FileExistsError, match="use --overwrite"):
        export_run(run_dir, exported)
    with pytest.raises(FileExistsError, match="not an exported policy"):
        export_run(run_dir, run_dir, ExportRunConfig(overwrite=True))
    folder = copy(exported, tmp_path)
    export_run(run_dir, folder, ExportRunConfig(overwrite=True, batch_size=3, platforms=("cpu",)))
    assert load(folder).spec["batch_size"] == 3
    (folder / "my_loop.py").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"must hold an exported policy only, got my_loop\.py"
    ):
        export_run(run_dir, folder, ExportRunConfig(overwrite=True))


def test_nothing_is_left_after_an_error(run_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(policy_export, "_write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        export_run(run_dir, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_an_unsupported_mode_is_refused_before_tracing(tmp_path, run_dir):
    folder = tmp_path / "run"
    copied = copy(run_dir, tmp_path)
    copied.rename(folder)
    decoder = dataclasses.replace(tiny_run.DECODER, kind="gpt")
    agent = policy.connect(tiny_run.AGENT.policy.backbone, decoder)
    save(dataclasses.replace(tiny_run.AGENT, policy=agent), folder / "agent.json")
    with pytest.raises(ValueError, match="mode must be 'refresh' or 'periodic'"):
        export_run(folder, tmp_path / "policy", ExportRunConfig(mode="persistent"))


def test_a_program_that_depends_on_the_batch_size_asks_for_one(tmp_path, monkeypatch):
    def init(key, batch_size):
        return make_agent(tiny_run.AGENT, tiny_run.norm_stats()).init(key, batch_size)

    def step(params, state, observation, reset):
        del params, observation
        return state, np.zeros((len(reset), 7), np.float32)

    agent = policy_export.Agent(init, None, step)
    monkeypatch.setattr(policy_export, "make_agent", lambda *_, **__: agent)
    with pytest.raises(ValueError, match=r"batch_size must be a number.*use --batch-size 1"):
        policy_export.write(tmp_path, run_of(tmp_path), ExportConfig())


def test_the_command_prints_the_folder(run_dir, tmp_path, capsys):
    argv = [str(run_dir), str(tmp_path / "p"), "--batch-size", "1", "--platforms", "cpu", "cuda"]
    export_command.main([*argv, "--mode", "persistent"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "p")
    spec = json.loads((tmp_path / "p/policy.json").read_text())
    assert spec["platforms"] == ["cpu", "cuda"]
    assert spec["memory"]["mode"] == "persistent"
