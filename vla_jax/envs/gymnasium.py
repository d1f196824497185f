"""Gymnasium environments: `types.Simulator` (continuous actions), `gymnasium.Env` (discrete).

Needs the extra `gym`, and the packages of the environment.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from vla_jax.envs.gymnasium_values import (
    check_box,
    check_rate,
    has_flag,
    is_success,
    scale_action,
    to_float32,
    to_rgb,
)
from vla_jax.types import Simulator, SimulatorStep, SuccessRule

_DEFAULT_HZ = 10.0  # if the environment has no render_fps


def make(
    env: Any,
    *,
    instruction: str = "",
    image_size: int = 0,
    max_steps: int | None = None,
    success: Callable[[Mapping[str, Any], float], bool] = is_success,
    success_rule: SuccessRule = "once",
) -> Simulator:
    """Returns a simulator of a Gymnasium environment.

    The flattened observation becomes `proprio [P]`; the rendered image becomes `image_primary`,
    RGB, opaque RGBA or grey, resized to a square. Actions in [-1, 1] are scaled to the bounds of
    the environment's `Box`, of any dtype; integers are rounded.
    Exceptions of the environment during an episode are passed on.

    Args:
      env: id of a registered environment, or a `gymnasium.Env` with your options and wrappers.
      instruction: instruction of every episode.
      image_size: pixels along each side of `image_primary`; 0 = no images, also for videos, unless
        `env` has the render mode "rgb_array".
      max_steps: environment steps until truncation, at most the registered limit; None = the
        registered limit.
      success: `(info, reward)` of a step -> True if the task is done. Many environments have no
        success flag; the default then never reports success, and an episode ends with a warning.
      success_rule: "once" counts an episode in which a step was a success, "at_end" one whose last
        step was; many environments go on after a success (Meta-World, Fetch, ManiSkill).

    Returns:
      The simulator; its `task` is the environment's id.

    Raises:
      ImportError: gymnasium, or a package that the environment needs, is missing.
      ValueError: an unknown id, or an environment that does not fit.
    """
    gymnasium = _import_gymnasium()
    if isinstance(env, str):
        env = _make_env(gymnasium, env, "rgb_array" if image_size else None)
    name = env.spec.id if env.spec else type(env.unwrapped).__name__
    limit = _limit(env, name, max_steps)
    _check_box(gymnasium, env, name)
    _check_observation(env, name)
    env = gymnasium.wrappers.TimeLimit(env, limit)
    simulator = GymnasiumSimulator(env, name, instruction, image_size, limit, success, success_rule)
    if image_size:
        _try_to_draw(gymnasium, env, name)
    return simulator


def make_discrete(
    env_id: str, *, max_steps: int | None = None, success_rule: SuccessRule = "once"
) -> Any:
    """Returns a `gymnasium.Env` with discrete actions and a vector as observation.

    Args:
      env_id: id of a registered environment.
      max_steps: as for `make`.
      success_rule: as for `make`; with "once" a success flag stays set until the episode ends.

    Returns:
      The environment, with a `Discrete` action space and a `Box` `[D]` observation space.

    Raises:
      ImportError: gymnasium, or a package that the environment needs, is missing.
      ValueError: an unknown id, or an environment that does not fit.
    """
    gymnasium = _import_gymnasium()
    env = _make_env(gymnasium, env_id, None)
    limit = _limit(env, env_id, max_steps)
    if not isinstance(env.action_space, gymnasium.spaces.Discrete):
        raise ValueError(
            f"action_space of {env_id} must be Discrete, got {env.action_space}; register the "
            "environment with a gymnasium.ActionWrapper that has discrete actions."
        )
    _check_observation(env, env_id)
    env = gymnasium.wrappers.TimeLimit(env, limit)
    if success_rule == "once":
        env = _remember_success(gymnasium, env)
    return gymnasium.wrappers.FlattenObservation(env)


def _remember_success(gymnasium, env):
    """Returns the environment with a success flag that stays set until the episode ends."""

    class RememberSuccess(gymnasium.Wrapper):
        def reset(self, **options):
            self.succeeded = False
            return self.env.reset(**options)

        def step(self, action):
            *result, info = self.env.step(action)
            self.succeeded |= is_success(info, 0.0)
            return *result, {**info, "is_success": self.succeeded}

    return RememberSuccess(env)


class GymnasiumSimulator:
    """A Gymnasium environment as a `types.Simulator`; `make` checks that it fits."""

    def __init__(self, env, task, instruction, image_size, max_steps, success, success_rule):
        self._env, self._image_size, self._success = env, image_size, success
        self.success_rule: SuccessRule = success_rule
        self.task, self.instruction, self.max_steps = task, instruction, max_steps
        self.action_dim = int(np.prod(env.action_space.shape))
        if "render_fps" not in env.metadata:
            warnings.warn(
                f"{task} has no metadata['render_fps']: recordings and videos of it get "
                f"{_DEFAULT_HZ:g} frames per second; set it to the actions per second of the "
                "environment.",
                stacklevel=3,
            )
        self.control_hz = check_rate(env.metadata.get("render_fps", _DEFAULT_HZ), task)
        self._is_judged = success is not is_success  # False until a success flag was seen

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """Starts the episode of a seed; returns its first observation."""
        observation, _ = self._env.reset(seed=seed)
        return self._observe(observation)

    def step(self, action: np.ndarray) -> SimulatorStep:
        """Applies `action [A]` in [-1, 1], with `A` the dims of the environment's Box."""
        action = np.asarray(action, np.float64)
        if action.shape != (self.action_dim,) or not np.all(np.isfinite(action)):
            raise ValueError(
                f"action of {self.task} must be {self.action_dim} finite numbers, got "
                f"{action.tolist()}."
            )
        scaled = scale_action(self._env.action_space, action)
        observation, reward, terminated, truncated, info = self._env.step(scaled)
        self._is_judged = self._is_judged or has_flag(info)
        if (terminated or truncated) and not self._is_judged:
            warnings.warn(
                f"{self.task} has no success flag (info['is_success'] or info['success']): every "
                "episode counts as failed; give `success`, or a gymnasium.Wrapper that sets it.",
                stacklevel=2,
            )
        return SimulatorStep(
            observation=self._observe(observation),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            success=bool(self._success(info, float(reward))),
        )

    def draw(self, size: int = 256) -> np.ndarray:
        """Returns the rendered image `[size, size, 3]` uint8; grey if there is none."""
        if self._env.render_mode != "rgb_array":
            warnings.warn(
                f"videos of {self.task} are grey, as it is made without rendering; give image_size "
                "> 0, or an environment with render_mode 'rgb_array'.",
                stacklevel=2,
            )
            return np.full((size, size, 3), 128, np.uint8)
        frame = to_rgb(self._env.render(), self.task).astype(np.float32)
        image = jax.image.resize(frame, (size, size, 3), "linear")
        return np.asarray(image.round(), np.uint8)

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()

    def _observe(self, observation) -> Mapping[str, np.ndarray]:
        flatten = _import_gymnasium().spaces.flatten
        proprio = to_float32(flatten(self._env.observation_space, observation), self.task)
        if not self._image_size:
            return {"proprio": proprio}
        return {"proprio": proprio, "image_primary": self.draw(self._image_size)}


def _import_gymnasium():
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("gymnasium is missing; run pip install 'vla-jax[gym]'.") from error
    return gymnasium


def _make_env(gymnasium, env_id: str, render_mode: str | None):
    try:
        # Not every environment has the argument render_mode.
        return gymnasium.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except gymnasium.error.UnregisteredEnv as error:  # its message names the nearest id
        raise ValueError(f"env {env_id!r} is not registered in gymnasium: {error}") from error
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(f"{env_id} needs a package that is missing: {error}") from error
    except gymnasium.error.Error as error:  # such as an id of another form
        raise ValueError(f"env {env_id!r} cannot be made by gymnasium: {error}") from error


def _limit(env, name: str, max_steps: int | None) -> int:
    """Returns the environment steps until truncation, by the caller or the environment."""
    limits = [max_steps, env.spec.max_episode_steps if env.spec else None]
    known = [limit for limit in limits if limit is not None]
    if not known or min(known) < 1:
        raise ValueError(f"max_steps of {name} must be >= 1, got {max_steps}; give a number.")
    return min(known)


def _check_box(gymnasium, env, name: str) -> None:
    box = env.action_space
    if not isinstance(box, gymnasium.spaces.Box):
        raise ValueError(
            f"action_space of {name} must be a Box, got {box}; put a gymnasium.ActionWrapper "
            "with a Box around the environment and pass that."
        )
    check_box(box, name)


def _check_observation(env, name: str) -> None:
    if not env.observation_space.is_np_flattenable:
        raise ValueError(
            f"observation_space of {name} must be of fixed size, got {env.observation_space}; "
            "put a gymnasium.ObservationWrapper with a Box or Dict around it."
        )


def _try_to_draw(gymnasium, env, name: str) -> None:
    """Renders once, so that missing packages are an error before the first episode."""
    if env.render_mode != "rgb_array":
        raise ValueError(
            f"render_mode of {name} must be 'rgb_array' for image_size > 0, got "
            f"{env.render_mode!r}; pass it to gymnasium.make, or use image_size=0."
        )
    try:
        env.reset(seed=0)
        to_rgb(env.render(), name)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(f"rendering {name} needs a package that is missing: {error}") from error
