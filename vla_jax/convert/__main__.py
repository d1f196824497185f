"""A foreign checkpoint to ours, and back.

    python -m vla_jax.convert kosmos_ph_calvin_abcd.pt converted --window-size 8
    python -m vla_jax.convert model.pt converted --prefix encoder.rnn.
    python -m vla_jax.convert converted again.pt

The first two make a folder, of RoboVLMs' policy head and of a `torch.nn.LSTM`, `GRU` or `RNN`: a
config, the params, and what they have no place for. The third makes the foreign file again from
such a folder: the same tensors, byte for byte.
"""

import pathlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
from rich.console import Console

from vla_jax.convert import conversion_report, weight_files
from vla_jax.convert.conversion_report import Report
from vla_jax.convert.folder import check_target, is_folder, read_folder, write_folder
from vla_jax.convert.robovlms.checkpoints import from_robovlms, report_robovlms
from vla_jax.convert.torch_rnn import from_torch, report_torch
from vla_jax.convert.weight_files import TensorFile
from vla_jax.nn.recurrence import RecurrenceConfig
from vla_jax.policies.decoders import DecoderConfig
from vla_jax.types import Params


@dataclass(frozen=True)
class ConvertConfig:
    """What the shapes of a file do not say, and what it may lack."""

    window_size: int | None = None  # W, in steps; None = a GPT's positions, 8 of another kind
    pooling: Literal["max", "none"] = "max"  # RoboVLMs' down_sample: pooling, none
    num_latents: int = 1  # RoboVLMs' latent
    num_heads: int = 8  # attention heads of a GPT
    allow_missing: tuple[str, ...] = ()  # globs of names that may be missing, and are drawn
    prefix: str = ""  # what stands before the names of a torch.nn.LSTM, GRU or RNN
    overwrite: bool = False  # replace DST


def convert(src: str, dst: str, config: ConvertConfig) -> None:
    """Converts a file to a folder, or a folder of an earlier conversion to a file.

    Args:
      src: `.pt`, `.pth`, `.ckpt`, `.safetensors`, or a folder.
      dst: what to write.
      config: what the file does not say.

    Raises:
      OSError: `src` is missing, `dst` is there, or cannot be written.
      ImportError: torch is needed and missing.
      ValueError: `src` is not such a file or folder, or its tensors are not those of a head
        or a recurrence.
    """
    if is_folder(src):
        content = read_folder(src)
        weight_files.write(dst, content, overwrite=config.overwrite)
        print(f"{len(content.tensors)} tensors, {_count(content.tensors):,} numbers written")
    elif pathlib.Path(src).is_dir():
        raise ValueError(f"{src} holds no conversion.json; name a file, or a folder made here.")
    else:
        _from_file(src, dst, config)


def _from_file(src: str, dst: str, config: ConvertConfig) -> None:
    if pathlib.Path(dst).suffix in weight_files.SUFFIXES:
        raise ValueError(f"{dst} must be a folder's name where SRC is a file; drop the suffix.")
    check_target(dst, overwrite=config.overwrite)  # now, since a large file takes its time
    source = weight_files.read(src)
    is_torch = config.prefix or "weight_ih_l0" in source.tensors
    ours, params, told = (_from_torch if is_torch else _from_robovlms)(source, config)
    told = told._replace(ignored=source.ignored)
    write_folder(dst, source, ours, params, told, prefix=config.prefix, overwrite=config.overwrite)
    Console().print(conversion_report.table(told))
    print(f"{_describe(ours)}, {_count(params):,} parameters")


def _from_robovlms(
    source: TensorFile, config: ConvertConfig
) -> tuple[DecoderConfig, Params, Report]:
    decoder, params = from_robovlms(
        source.tensors,
        window_size=config.window_size,
        pooling=config.pooling,
        num_latents=config.num_latents,
        num_heads=config.num_heads,
        allow_missing=config.allow_missing,
    )
    return decoder, params, report_robovlms(source.tensors, decoder)


def _from_torch(
    source: TensorFile, config: ConvertConfig
) -> tuple[RecurrenceConfig, Params, Report]:
    own = ConvertConfig(prefix=config.prefix, overwrite=config.overwrite)
    if config != own:
        raise ValueError(
            "a torch.nn.LSTM, GRU or RNN takes --prefix and --overwrite alone, got options of "
            "RoboVLMs' heads; leave them out."
        )
    recurrence, params = from_torch(source.tensors, prefix=config.prefix)
    return recurrence, params, report_torch(source.tensors, recurrence, prefix=config.prefix)


def _describe(config: DecoderConfig | RecurrenceConfig) -> str:
    if isinstance(config, RecurrenceConfig):
        both = " in both directions" if config.bidirectional else ""
        return f"{config.cell}, {config.num_layers} layers of {config.hidden_size}{both}"
    return (
        f"{config.kind}, {config.num_layers} layers of {config.hidden_size} on tokens of "
        f"{config.token_dim}, {config.action_horizon} actions of {config.action_dim}, "
        f"window {config.window_size}"
    )


def _count(tensors: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tensors))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; whatever is wrong is told in a line, with exit code 1."""
    import tyro

    def command(
        src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
        dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
        config: Annotated[ConvertConfig, tyro.conf.arg(name="")] = ConvertConfig(),
    ) -> None:
        """Converts a foreign checkpoint to a folder of ours, and such a folder back.

        A checkpoint is RoboVLMs' policy head, or a torch.nn.LSTM, GRU or RNN. Flax has no such
        files: its trees are converted in code, by vla_jax.convert.from_flax.

        Args:
          src: .pt, .pth, .ckpt or .safetensors, or the folder of an earlier conversion.
          dst: folder to make, or file to make again.
          config: what the file does not say.
        """
        convert(src, dst, config)
        print(dst)

    try:
        tyro.cli(command, args=argv, prog="python -m vla_jax.convert")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    main()
