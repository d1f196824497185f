"""Conversion of a foreign checkpoint to a folder, of such a folder back, and of a run's model.

    python -m vla_jax.convert released.pt RUN --vlm kosmos-2-patch14-224 --config released.json
    python -m vla_jax.convert kosmos_ph_calvin_abcd.pt converted --window-size 8
    python -m vla_jax.convert model.pt converted --prefix encoder.rnn.
    python -m vla_jax.convert converted again.pt
    python -m vla_jax.convert runs/lora models/tuned --to huggingface --vlm models/smolvlm2
    python -m vla_jax.convert runs/lora adapters/tuned --to peft

The first converts a whole policy of RoboVLMs to a run folder, which `vla_jax.evaluate` reads. The
next two convert RoboVLMs' policy head and a `torch.nn.LSTM`, `GRU` or `RNN` to a folder: a config,
the params, and the tensors that have no counterpart in them. The fourth restores the foreign file
from such a folder: the same tensors, byte for byte. The last two write the vision-language model of
a run in the formats of Hugging Face.
"""

import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax
from rich.console import Console

from vla_jax.command_line import exit_codes, parse
from vla_jax.convert import conversion_report, weight_files
from vla_jax.convert.converters import CONVERTERS, ConvertConfig, kind_of_file
from vla_jax.convert.folder import check_target, is_folder, read_folder, write_folder
from vla_jax.convert.run_export import export_run

_DEFAULTS = ConvertConfig()


def convert(src: str, dst: str, config: ConvertConfig) -> None:
    """Converts a file to a folder, or a folder of an earlier conversion or a run, see `config.to`.

    Args:
      src: `.pt`, `.pth`, `.ckpt`, `.safetensors`, or a folder.
      dst: file or folder to write.
      config: options of the conversion.

    Raises:
      OSError: `src` is missing, `dst` exists, or cannot be written.
      ImportError: torch is needed and not installed.
      ValueError: `src` is not such a file or folder, or its tensors are not those of a head
        or a recurrence.
    """
    if config.to != "original":
        if config != ConvertConfig(to=config.to, vlm=config.vlm):
            raise ValueError(f"--to {config.to} takes no option but --vlm; remove the others.")
        export_run(src, dst, config.to, like=config.vlm)
    elif is_folder(src):
        content = read_folder(src)
        weight_files.write(dst, content, overwrite=config.overwrite)
        print(f"wrote {len(content.tensors)} tensors, {_count(content.tensors):,} parameters")
    elif pathlib.Path(src).is_dir():
        raise ValueError(
            f"{src} must contain conversion.json, as a folder written by this command does; give "
            "such a folder, or a file, or --to huggingface for a run."
        )
    else:
        _from_file(src, dst, config)


def _from_file(src: str, dst: str, options: ConvertConfig) -> None:
    if pathlib.Path(dst).suffix in weight_files.SUFFIXES:
        raise ValueError(f"{dst} must be a folder, since SRC is a file; remove the suffix.")
    check_target(dst, overwrite=options.overwrite)  # before reading, which is slow for large files
    source = weight_files.read(src)
    converter = CONVERTERS[kind_of_file(source, options)]
    config, params, report, norm_stats = converter.convert(source, options)
    unusual = conversion_report.unusual(source.tensors)
    report = report._replace(ignored=source.ignored, unusual=unusual)
    write_folder(
        dst,
        source,
        config,
        params,
        report,
        norm_stats=norm_stats,
        prefix=options.prefix,
        overwrite=options.overwrite,
    )
    Console().print(conversion_report.table(report))
    print(f"{converter.describe(config)}, {_count(params):,} parameters")


def _count(tensors: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tensors))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with arguments from the command line; exit codes are in `command_line`."""
    import tyro

    def arguments(
        src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
        dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
        config: Annotated[ConvertConfig, tyro.conf.arg(name="")] = _DEFAULTS,
    ) -> tuple[str, str, ConvertConfig]:
        """Converts a foreign checkpoint to a folder, such a folder back, or the model of a run.

        A checkpoint holds a policy of RoboVLMs, of which the head alone is converted unless --vlm
        is given, or a torch.nn.LSTM, GRU or RNN. Flax params are
        converted in Python, with vla_jax.convert.from_flax.

        Args:
          src: .pt, .pth, .ckpt or .safetensors, or the folder of an earlier conversion or a run.
          dst: folder to write, or file to restore.
          config: options of the conversion.
        """
        return src, dst, config

    with exit_codes():
        src, dst, config = parse(arguments, argv, prog="python -m vla_jax.convert")
        convert(src, dst, config)
        print(dst)


if __name__ == "__main__":
    main()
