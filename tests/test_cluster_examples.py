"""Launch files of clusters: their options exist, and their shell code parses."""

import pathlib
import re
import shlex
import subprocess

import pytest

from train.presets import IMITATE
from vla_jax.command_line import command_line

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
FILES = ("slurm/train.sbatch", "kubernetes/train.yaml", "tpu/train.sh")


@pytest.mark.parametrize("name", FILES)
def test_the_options_of_a_launch_file_exist(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    options = re.search(r"--preset .*?--mesh \S+", text, re.DOTALL)
    words = shlex.split(re.sub(r"\n#?|\\\n", " ", options[0].replace("\\\n", "\n")))
    config = command_line(IMITATE, words, description="Trains a policy.")
    assert config.loop.mesh
    (distributed,) = set(re.findall(r"--distributed ([\w:.,-]+)", text))
    address = distributed.replace("4,", "4,0") if ":" in distributed else distributed
    command_line(IMITATE, ["--distributed", address], description="Trains a policy.")


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("yaml")])
def test_the_shell_code_of_a_launch_file_parses(name):
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)
