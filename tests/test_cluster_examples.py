"""Launch files of clusters: their options exist, and what depends on each other agrees."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from train.presets import IMITATE
from vla_jax.command_line import command_line
from vla_jax.training import distributed, peers

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
KUBERNETES = ("kubernetes/train.yaml", "kubernetes/jobset.yaml")
SHELL = ("slurm/train.sbatch", "tpu/train.sh")


def read(name):
    return (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*KUBERNETES, *SHELL])
def test_the_options_of_a_launch_file_exist(name):
    text = read(name)
    options = re.search(r"--preset .*?--mesh \S+", text, re.DOTALL)
    words = shlex.split(re.sub(r"\n#?|\\\n", " ", options[0].replace("\\\n", "\n")))
    config = command_line(IMITATE, words, description="Trains a policy.")
    assert config.loop.mesh
    (option,) = set(re.findall(r"--distributed ([\w:.,-]+)", text))
    address = option.replace("4,", "4,0") if ":" in option else option
    command_line(IMITATE, ["--distributed", address], description="Trains a policy.")


@pytest.mark.parametrize("name", SHELL)
def test_the_shell_code_of_a_launch_file_parses(name):
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)


@pytest.mark.parametrize("name", KUBERNETES)
def test_all_pods_of_a_job_find_the_first_one(name):
    *services, workload = yaml.safe_load_all(read(name))
    name = workload["metadata"]["name"]
    if workload["kind"] == "JobSet":
        (group,) = workload["spec"]["replicatedJobs"]
        assert workload["spec"]["network"]["enableDNSHostnames"]
        job, first_pod = group["template"]["spec"], f"{name}-{group['name']}-0-0"
        subdomain = name  # of a JobSet that names no other
    else:
        (service,) = services
        job, first_pod = workload["spec"], f"{name}-0"
        subdomain = job["template"]["spec"]["subdomain"]
        assert service["spec"] == {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": name},
        }
        assert service["metadata"]["name"] == subdomain
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    option = container["command"][-1].split()[-1]
    address = distributed.parse(option.replace("$JOB_COMPLETION_INDEX", "3"))
    assert address.coordinator.split(":")[0] == f"{first_pod}.{subdomain}"
    assert address.num_processes == job["completions"] == job["parallelism"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_job_fails_at_once_if_an_option_is_wrong_and_continues_if_a_peer_died(name):
    *_, workload = yaml.safe_load_all(read(name))
    spec = workload["spec"]
    if workload["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    (codes,) = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
    assert codes == {"operator": "In", "values": [peers.FAILED]}


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_job_ends_after_some_starts_of_each_pod(name):
    *_, workload = yaml.safe_load_all(read(name))
    spec = job = workload["spec"]
    if workload["kind"] == "JobSet":
        (group,) = spec["replicatedJobs"]
        job, limit = group["template"]["spec"], spec["failurePolicy"]["maxRestarts"]
    else:
        limit = spec["backoffLimit"]
    assert limit == 20 * job["completions"]


def requeued(code, restarts):
    """Whether the sbatch file puts its job in the queue again after an exit code of `srun`."""
    text = read("slurm/train.sbatch")
    commands = f"srun() {{ return {code}; }}; scontrol() {{ echo scontrol $*; }}\n{text}"
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    found = subprocess.run(
        ["bash", "-c", commands], env=variables, capture_output=True, text=True, check=False
    )
    assert found.returncode == code
    assert found.stderr == ""
    assert found.stdout in ("", "scontrol requeue 7\n")
    return bool(found.stdout)


def test_slurm_queues_again_what_can_continue():
    assert [code for code in (0, 2, peers.OTHER_DIED, 134, 137, 143) if requeued(code, 0)] == [
        peers.OTHER_DIED, 134, 137, 143,
    ]  # fmt: skip
    assert [code for code in (0, 2, peers.OTHER_DIED, 134, 137, 143) if requeued(code, 20)] == [143]


def test_slurm_gives_each_task_its_cores():
    text = read("slurm/train.sbatch")
    assert "#SBATCH --cpus-per-task=" in text
    assert '--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"' in text.partition("\nsrun ")[2]
