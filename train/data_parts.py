"""Numbers and statistics of the data sets of a training, one or those of a mixture."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from train.configs import ImitateConfig
from train.mixture_file import read_mixture
from train.setup import check_action_dim, compute_norm_stats, read_dataset
from vla_jax.backbones import registry
from vla_jax.data.dataset import Dataset
from vla_jax.data.mixing import NUMBERS
from vla_jax.data.normalize import NormStats
from vla_jax.data.readers import reader
from vla_jax.types import Observation


class DataPart(NamedTuple):
    """One data set of a training."""

    name: str  # "" if it is the only one
    weight: float  # share of the batches, on any scale
    config: ImitateConfig  # of the training, with this data set
    dataset: Dataset
    norm_stats: dict[str, NormStats]


def read_parts(config: ImitateConfig) -> list[DataPart]:
    """Reads the data sets; those of a mixture may lack cameras and numbers of the policy.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the data sets do not fit the policy; see `read_mixture` and `read_dataset`.
    """
    parts, entries = [], read_mixture(config.mixture, config.dataset)
    if config.mixture:  # before any numbers are read
        dims = [reader.action_dim(entry.dataset) for entry in entries]
        known = [dim for dim in dims if dim is not None]
        if len(known) == len(dims):
            check_action_dim(config, max(known))
    for name, weight, dataset in entries:
        own = replace(config, dataset=dataset)
        data = read_dataset(own, partial=bool(config.mixture))
        parts.append(DataPart(name, weight, own, data, compute_norm_stats(own, data)))
    if config.mixture:
        _check_sizes(config, [part.dataset for part in parts])
    return parts


def _check_sizes(config: ImitateConfig, datasets: Sequence[Dataset]) -> None:
    """Checks that the policy has the largest number of dimensions of all data sets.

    Raises:
      ValueError: it has another number for actions, proprio or environment state.
    """
    columns = [dataset.columns for dataset in datasets]
    check_action_dim(config, max(each["action"].shape[1] for each in columns))
    backbone = config.agent.policy.backbone
    example = registry.get(backbone).example
    like = Observation() if example is None else example(backbone)
    for name in NUMBERS:
        expected = getattr(like, name)
        largest = max((each[name].shape[1] for each in columns if name in each), default=0)
        if expected is not None and largest != expected.shape[-1]:
            option = {"proprio": "proprio_dim", "environment_state": "state_dim"}[name]
            raise ValueError(
                f"{option} must be the largest number of dimensions of {name} in {config.mixture}, "
                f"which is {largest}, got {expected.shape[-1]}; use "
                f"--{option.replace('_', '-')} {largest}, or choose columns with feature_keys."
            )
