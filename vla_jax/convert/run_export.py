"""The vision-language model of a run in the formats of Hugging Face."""

import pathlib
from typing import Any, Literal

from vla_jax.backbones import models, peft, weight_export
from vla_jax.convert.weight_files import Path
from vla_jax.runs import load_params, read_agent

Format = Literal["huggingface", "peft"]


def export_run(run_dir: Path, folder: Path, target: Format, *, like: Path = "") -> None:
    """Writes the model of a run; complete or not at all.

    Args:
      run_dir: run folder, whose backbone is a vision-language model.
      folder: to create; must not exist.
      target: "huggingface" = a model's folder, with low-rank factors merged; "peft" = an adapter.
      like: folder of the original model, see `weight_export.export`; "" = none.

    Raises:
      FileExistsError: `folder` exists.
      FileNotFoundError: a file of the run or of the original model is missing.
      ValueError: the run has no vision-language model, that of `like` is another, or the run has
        no low-rank factors for "peft".
    """
    config: Any = read_agent(run_dir).policy.backbone
    models.get(config)  # another backbone is an error here, before the params are read
    if pathlib.Path(folder).exists():
        raise FileExistsError(f"{folder} exists already; choose another name.")
    if target == "peft" and not config.options.lora.rank:
        raise ValueError(
            f"{run_dir} must be a run with low-rank adaptation to write an adapter, got rank 0; "
            "use --to huggingface."
        )
    if like:
        weight_export.read_original(like, config)
    params = load_params(run_dir)["backbone"]
    if target == "peft":
        peft.write_adapter(folder, config, params)
    else:
        weight_export.export(folder, config, params, like=like or None)
