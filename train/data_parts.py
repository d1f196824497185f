"""Numbers and statistics of the data sets of a training, one or those of a mixture."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from train.configs import ImitateConfig
from train.mixture_file import read_mixture
from train.setup import check_action_dim, compute_norm_stats, read_dataset
from vla_jax.acting.mixture_robots import MixtureRobot
from vla_jax.backbones import registry
from vla_jax.backbones.registry import BackboneConfig
from vla_jax.data.dataset import Dataset
from vla_jax.data.normalize import NormStats
from vla_jax.data.readers import reader
from vla_jax.types import Observation


class DataPart(NamedTuple):
    """One data set of a training."""

    name: str  # "" if it is the only one
    weight: float  # share of the batches, on any scale
    config: Any  # of the training script, with this data set
    dataset: Dataset
    norm_stats: dict[str, NormStats]

    @property
    def robot(self) -> MixtureRobot:
        """Returns everything that acting on the robot of the data set needs."""
        return MixtureRobot(self.norm_stats, self.dataset.action_layout, tuple(self.dataset.frames))


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
        datasets = [part.dataset for part in parts]
        check_action_dim(config, max(each.columns["action"].shape[1] for each in datasets))
        check_column_sizes(config.agent.policy.backbone, datasets, config.mixture)
    return parts


def check_column_sizes(backbone: BackboneConfig, datasets: Sequence[Dataset], mixture: str) -> None:
    """Checks that a backbone reads as many numbers as the data set of a mixture with most of them.

    Raises:
      ValueError: it has another number for proprio or environment state.
    """
    example = registry.get(backbone).example
    like = Observation() if example is None else example(backbone)
    for name, option in {"proprio": "proprio_dim", "environment_state": "state_dim"}.items():
        expected = getattr(like, name)
        columns = [each.columns[name] for each in datasets if name in each.columns]
        largest = max((column.shape[1] for column in columns), default=0)
        if expected is not None and largest != expected.shape[-1]:
            raise ValueError(
                f"{option} must be the largest number of dimensions of {name} in {mixture}, "
                f"which is {largest}, got {expected.shape[-1]}; use "
                f"--{option.replace('_', '-')} {largest}, or choose columns with feature_keys."
            )
