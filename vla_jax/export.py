"""Export of a run's policy as a program that needs jax only, without this library.

    python -m vla_jax.export RUN_DIR DST
    python -m vla_jax.export RUN_DIR DST --batch-size 1 --platforms cpu
    python -m vla_jax.export RUN_DIR DST --mode persistent --fixed-instruction "lift the red block"

DST/load.py loads it; `serving.policy_export` lists the files.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from vla_jax.acting.agent import AgentConfig, Mode, with_noise
from vla_jax.actions.execution import Kind
from vla_jax.command_line import exit_codes, parse
from vla_jax.config import MAX_LENGTH, checked
from vla_jax.files import Path, replacing
from vla_jax.runs import load_run, read_agent
from vla_jax.serving import policy_export
from vla_jax.serving.policy_export import ExportConfig


@dataclass(frozen=True)
@checked(
    instruction_steps=(-1, 2**31 - 1),
    window_size=(1, MAX_LENGTH),
    flow_steps=(1, 2**16),
)
class ExportRunConfig(ExportConfig):
    """Policy to export, and its form; None means as in training."""

    step: int | None = None  # checkpoint to export, in updates; None = the latest
    robot: str | None = None  # data set of a mixture whose robot acts; None without a mixture
    mode: Mode | None = None  # streaming mode: refresh, periodic or persistent
    window_size: int | None = None  # W, in environment steps
    instruction_steps: int | None = None  # initial steps with a visible instruction; -1 = all
    flow_steps: int | None = None  # Euler steps of the flow head; more are slower
    noise_seed: int | None = None  # random seed of the noise that the flow head acts from
    exec_kind: Kind | None = None  # rule that selects actions from predicted chunks
    exec_horizon: int | None = None  # steps of a chunk that receding_horizon executes
    overwrite: bool = False  # replace a policy that was exported to DST before


def export_run(run_dir: Path, target: Path, config: ExportRunConfig | None = None) -> pathlib.Path:
    """Exports the policy of a run; the folder is complete or absent.

    Args:
      run_dir: run folder.
      target: folder to create.
      config: what to export, and how.

    Returns:
      The folder.

    Raises:
      FileNotFoundError: the run or one of its files is missing.
      FileExistsError: the target exists.
      ImportError: the package flatbuffers is missing.
      ValueError: a file is damaged, or an option does not fit the policy.
      OSError: the target cannot be written.
    """
    config, target = config or ExportRunConfig(), pathlib.Path(target)
    policy_export.check_installed()
    _check_target(target, overwrite=config.overwrite)
    _agent(read_agent(run_dir), config)  # refuses wrong options before the params are read
    with replacing(target) as part:
        part.mkdir()  # fails before the slow work if it cannot be written
        run = load_run(run_dir, step=config.step, robot=config.robot)
        run = run._replace(agent=_agent(run.agent, config))
        policy_export.write(part, run, config, window_size=config.window_size)
    return target


def _agent(agent: AgentConfig, config: ExportRunConfig) -> AgentConfig:
    """Returns the run's agent config with the options of the export."""
    execution = {"kind": config.exec_kind, "exec_horizon": config.exec_horizon}
    acting = {"mode": config.mode, "instruction_steps": config.instruction_steps}
    given = [
        {name: value for name, value in options.items() if value is not None}
        for options in (acting, execution)
    ]
    agent = with_noise(agent, flow_steps=config.flow_steps, noise_seed=config.noise_seed)
    return dataclasses.replace(
        agent, **given[0], execution=dataclasses.replace(agent.execution, **given[1])
    )


def _check_target(target: pathlib.Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not (target / "policy.json").is_file():
        raise FileExistsError(
            f"{target} exists and is not an exported policy (no policy.json); choose another DST."
        )
    others = sorted({path.name for path in target.iterdir()} - set(policy_export.FILES))
    if others:
        raise FileExistsError(
            f"{target} must hold an exported policy only, got {', '.join(others[:3])} too; choose "
            "another DST, or move these."
        )
    if not overwrite:
        raise FileExistsError(f"{target} exists; choose another DST, or use --overwrite.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with arguments from the command line; exit codes are in `command_line`."""
    import tyro

    def arguments(
        run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
        config: Annotated[ExportRunConfig, tyro.conf.arg(name="")] = ExportRunConfig(),
    ) -> tuple[str, str, ExportRunConfig]:
        """Exports a run's policy as a program that needs jax only.

        Args:
          run_dir: run folder of train.imitate.
          target: folder to create.
          config: what to export, and how.
        """
        return run_dir, target, config

    with exit_codes():
        run_dir, target, config = parse(arguments, argv, prog="python -m vla_jax.export")
        print(export_run(run_dir, target, config))


if __name__ == "__main__":
    main()
