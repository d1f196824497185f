"""The steps before a training: data set, statistics, initial params, windows.

`train.imitate` and `train.cache` share them, so that both derive the same name for cached tokens.
"""

import pathlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from optax import GradientTransformation

from train.backbone_source import check_backbone, is_run, read_backbone
from train.configs import ImitateConfig
from train.mixture_file import read_mixture
from vla_jax import trees
from vla_jax.acting.agent import check_representable
from vla_jax.backbones import registry
from vla_jax.data import normalize
from vla_jax.data.dataset import Dataset
from vla_jax.data.normalize import NormStats
from vla_jax.data.readers import reader
from vla_jax.data.tool_frame import in_tool_frame
from vla_jax.data.windows import WindowConfig, Windows
from vla_jax.policies import policy
from vla_jax.runs import check_run
from vla_jax.training import auxiliary, checkpoint, loop, optim, parallel
from vla_jax.training.loop import Start
from vla_jax.training.optim import OptimConfig
from vla_jax.training.update import TrainState, init_train_state
from vla_jax.types import Key, Params, ShardingRules, Tokens


def make_optim_config(config: ImitateConfig) -> OptimConfig:
    """Returns the optimiser's config with the backbone frozen as far as the config says."""
    backbone = config.agent.policy.backbone
    freeze, train = registry.get(backbone).frozen(backbone)
    if config.frozen_backbone:  # it encodes every frame once
        freeze, train = ("*",), ()
    return replace(
        config.optim,
        freeze=(*config.optim.freeze, *(f"backbone/{glob}" for glob in freeze)),
        train=(*config.optim.train, *(f"backbone/{glob}" for glob in train)),
    )


def check(config: ImitateConfig) -> None:
    """Raises an error for settings that cannot work, without reading any data.

    Raises:
      FileNotFoundError: a data set or an earlier run to start from is missing.
      ValueError: warm-up, batch size, devices or run folder do not fit; the mixture is wrong; no
        reader, or several, recognise a data set; a glob of `freeze`, `train` or `lr_factors`
        matches no param; `train` names params of a backbone whose tokens are cached; the caption
        head cannot read the backbone's token ids.
      OSError: the run folder cannot be written.
    """
    shapes = param_shapes(config)
    loop.check(
        config.loop,
        config.optim,
        batch_size=config.loader.batch_size,
        sharding_rules=sharding_rules(config),
        params=shapes,
    )
    check_representable(config.agent)
    _check_caption(config)
    check_run(config.run_dir, config, overwrite=config.overwrite)
    read_mixture(config.mixture, config.dataset)
    _check_decoder(config.decoder_from)
    check_backbone(config, shapes)
    optim.make_optimizer(make_optim_config(config), config.loop.num_updates, shapes)
    cached = [path for path in trees.leaf_paths(shapes) if path.startswith("backbone/")]
    if config.frozen_backbone and any(trees.matches(path, config.optim.train) for path in cached):
        raise ValueError(
            f"train must match no param of the backbone with frozen_backbone, whose tokens are "
            f'computed once, got {config.optim.train}; use --freeze "backbone/*" instead of '
            "--frozen-backbone."
        )


def _check_caption(config: ImitateConfig) -> None:
    """Raises a ValueError for a caption head, whose id 0 means no word, with other padding."""
    backbone = config.agent.policy.backbone
    if config.auxiliary.caption and registry.get(backbone).tokenize(backbone, "").any():
        raise ValueError(
            "auxiliary.caption must be False with a backbone that pads instructions with an id "
            f"other than 0, got backbone '{backbone.kind}'; disable the caption head."
        )


def param_shapes(config: ImitateConfig) -> Params:
    """Returns the shapes of all params of a training."""
    return jax.eval_shape(partial(_random_params, config=config), jax.random.key(0))


def sharding_rules(config: ImitateConfig) -> ShardingRules:
    """Returns the sharding rules of the params of a training."""
    rules = policy.sharding_rules(config.agent.policy)
    return (*rules, *trees.under("auxiliary", auxiliary.SHARDING))


def read_dataset(config: ImitateConfig, *, partial: bool = False) -> Dataset:
    """Reads the demonstrations, in the policy's action frame, without images it does not use.

    Args:
      config: of the training.
      partial: the data set may lack cameras and numbers of actions that the policy has.

    Raises:
      ValueError: the actions have another number of dimensions than the policy's; a camera of the
        policy is missing.
    """
    backbone = config.agent.policy.backbone
    spec = registry.get(backbone).image_spec(backbone)
    size = None if spec is None or spec.any_size else (spec.height, spec.width)
    dataset = reader.read_dataset(
        config.dataset,
        cameras=() if spec is None else spec.cameras,
        image_size=size,
        resampling="area" if spec is None else spec.resampling,
        partial=partial,
    )
    if not partial:
        check_action_dim(config, dataset.columns["action"].shape[1])
    tool_frame = config.agent.tool_frame
    return dataset if tool_frame is None else in_tool_frame(dataset, tool_frame)


def check_action_dim(config: ImitateConfig, action_dim: int) -> None:
    """Checks that the policy's actions have as many numbers as those of the data.

    Raises:
      ValueError: they have not.
    """
    if action_dim != config.agent.policy.decoder.action_dim:
        raise ValueError(
            f"action_dim must be {action_dim} as in {config.mixture or config.dataset.path}, got "
            f"{config.agent.policy.decoder.action_dim}; use --action-dim {action_dim}."
        )


def compute_norm_stats(config: ImitateConfig, dataset: Dataset) -> dict[str, NormStats]:
    """Returns the statistics of every column, with the config's action bounds if it has some."""
    norm_stats = normalize.compute_norm_stats(dataset)
    if config.action_bounds is not None:
        dim = dataset.columns["action"].shape[1]
        norm_stats["action"] = normalize.fixed_bounds(*config.action_bounds, dim)
    return norm_stats


def init_params(key: Key, config: ImitateConfig) -> Params:
    """Returns initial params, with the backbone and decoder of earlier runs if configured.

    They are `{"backbone", "decoder"}`, and `"auxiliary"` if there are auxiliary heads, which do not
    change the other two. `key` is consumed. A training makes its params with `make_start`.

    Raises:
      FileNotFoundError: an earlier run has no checkpoint.
      ValueError: its backbone or decoder has other sizes.
    """
    saved = _read_params(config, param_shapes(config), mesh=None)
    # jit: one compilation instead of one for each param, without those that were read.
    return jax.jit(lambda key, saved: _random_params(key, config) | saved)(key, saved)


def init_backbone(config: ImitateConfig, mesh: Mesh) -> Params:
    """Returns the initial params of the backbone, on a mesh; errors as `init_params`."""
    key, _ = jax.random.split(jax.random.key(config.seed))
    shapes = {"backbone": param_shapes(config)["backbone"]}
    saved = _read_params(config, shapes, mesh=mesh)
    shardings = parallel.make_shardings(shapes, mesh, sharding_rules(config))
    if saved:
        return jax.device_put(saved, shardings)["backbone"]
    init = jax.jit(
        lambda key: {"backbone": _random_params(key, config)["backbone"]}, out_shardings=shardings
    )
    return init(key)["backbone"]


def trained_shapes(config: ImitateConfig) -> Params:
    """Returns the shapes of the params of the train state, without a backbone that only encodes."""
    shapes = param_shapes(config)
    return {
        part: shapes[part] for part in shapes if part != "backbone" or not config.frozen_backbone
    }


def make_start(key: Key, config: ImitateConfig, optimizer: GradientTransformation) -> Start:
    """Returns the state before the first update; each device makes or reads its own part.

    Args:
      key: consumed, if the state is made.
      config: of the training.
      optimizer: of the training.
    """
    init = make_init(config, optimizer)

    def make(shardings: Any) -> TrainState:
        saved = read_start(config, shardings.params)
        return jax.jit(init, out_shardings=shardings, donate_argnums=1)(key, saved)

    return Start(jax.eval_shape(init, key, {}), make)


def make_init(
    config: ImitateConfig, optimizer: GradientTransformation
) -> Callable[[Key, Params], TrainState]:
    """Returns `init(key, saved) -> train_state`, pure; `saved` is that of `read_start`.

    Args:
      config: of the training.
      optimizer: of the training.
    """
    settings, parts = make_optim_config(config), trained_shapes(config)

    def init(key: Key, saved: Params) -> TrainState:
        params = _random_params(key, config) | saved
        return init_train_state(
            {part: params[part] for part in parts},
            optimizer,
            ema=settings.ema_decay is not None,
            freeze=settings.freeze,
            train=settings.train,
        )

    return init


def read_start(config: ImitateConfig, shardings: Params) -> Params:
    """Returns the parts of the trained params that come from earlier runs or from a model.

    Args:
      config: of the training.
      shardings: of the params.

    Raises:
      FileNotFoundError: an earlier run has no checkpoint.
      ValueError: its backbone or decoder has other sizes.
    """
    saved = _read_params(config, trained_shapes(config), mesh=parallel.make_mesh(config.loop.mesh))
    return jax.device_put(saved, {part: shardings[part] for part in saved})


def _read_params(config: ImitateConfig, shapes: Params, *, mesh: Mesh | None) -> Params:
    """Returns the parts of `shapes` that the config takes from earlier runs or from a model."""
    folders = {"backbone": config.backbone_from, "decoder": config.decoder_from}
    readers = {
        "backbone": lambda folder: read_backbone(config, mesh),
        "decoder": _read_decoder,
    }
    saved = {
        part: readers[part](folder) for part, folder in folders.items() if folder and part in shapes
    }
    for part, params in saved.items():
        _check_same_sizes(part, params, shapes[part], folders[part])
    return saved


def _random_params(key: Key, config: ImitateConfig) -> Params:
    params = policy.init(key, config.agent.policy)
    if auxiliary.is_on(config.auxiliary):
        # 2: policy.init draws from the parts 0 and 1 of the key.
        params["auxiliary"] = _init_auxiliary(jax.random.fold_in(key, 2), config)
    return params


def make_windows(
    config: ImitateConfig,
    dataset: Dataset,
    norm_stats: dict[str, NormStats],
    *,
    window_size: int,
    action_horizon: int,
    stride: int = 1,
    tokens: Tokens | None = None,
) -> Windows:
    """Returns the windows of a data set in the form that this config's policy expects."""
    agent = config.agent
    sizes = WindowConfig(
        window_size=window_size,
        action_horizon=action_horizon,
        stride=stride,
        instruction_steps=agent.instruction_steps,
    )
    return Windows(
        dataset,
        sizes,
        tokenize=registry.make_tokenizer(agent.policy.backbone, dataset.instructions),
        norm_stats=norm_stats,
        normalization=agent.normalize,
        tokens=tokens,
    )


def _init_auxiliary(key: Key, config: ImitateConfig) -> Params:
    policy_config = config.agent.policy
    backbone = policy_config.backbone
    target_sizes: dict[str, int] = {"tokens": backbone.num_tokens * backbone.token_dim}
    spec = registry.get(backbone).image_spec(backbone)
    if config.auxiliary.forward_target == "pixels" and spec is not None:
        target_sizes = dict.fromkeys(spec.cameras, 3 * spec.height * spec.width)
    return auxiliary.init(
        key,
        config.auxiliary,
        feature_size=policy_config.decoder.hidden_size,
        target_sizes=target_sizes,
        vocab_size=backbone.vocab_size,
    )


def _check_decoder(folder: str) -> None:
    if not folder or is_run(folder):
        return
    from vla_jax.convert.folder import is_folder  # few runs need it, and it imports all converters

    if not is_folder(folder):
        raise FileNotFoundError(
            "decoder_from must be a run folder with checkpoints, or an output of vla_jax.convert, "
            f"got {folder}; train it first, or name another."
        )


def _read_decoder(folder: str) -> Params:
    if is_run(folder):
        return _read_checkpoint("decoder", folder)
    from vla_jax.convert.folder import read_params  # as above

    return read_params(folder)[1]


def _read_checkpoint(part: str, folder: str) -> Params:
    return checkpoint.restore_params(pathlib.Path(folder) / "checkpoints").get(part, {})


def _check_same_sizes(part: str, saved: Params, expected: Params, folder: str) -> None:
    difference = trees.first_difference(saved, expected)
    if difference:
        raise ValueError(
            f"the {part} of {folder} does not fit this config: {difference}; use the same options "
            "for both, or train it again."
        )
