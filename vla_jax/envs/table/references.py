"""Reference policies of the tables, computed from privileged state.

- `expert`: the demonstrator, an upper bound for imitation.
- `expert_ignoring_colour`: the demonstrator with a random target colour: the result of a policy
  that remembers the task but not the colour.

Each is `(simulator, seed, step) -> action [7]`; the same seed gives the same actions.
"""

from typing import Any

import numpy as np

from vla_jax.envs.table import rules


def expert(simulator: Any, seed: int, step: int) -> np.ndarray:
    """Returns the action `[7]` of the demonstrator.

    Args:
      simulator: a table.
      seed: of the episode, not used.
      step: environment steps since the start of the episode, not used.
    """
    del seed, step
    return simulator.expert(target=None)


def expert_ignoring_colour(simulator: Any, seed: int, step: int) -> np.ndarray:
    """Returns the action `[7]` of the demonstrator for a colour drawn from the seed.

    Args:
      simulator: a table.
      seed: of the episode.
      step: environment steps since the start of the episode, not used.
    """
    del step
    return simulator.expert(target=random_colour(seed))


def random_colour(seed: int) -> int:
    """Returns an index into `rules.COLOURS`, independent of the layout and the instruction."""
    return int(np.random.default_rng([seed, 0, 2]).integers(rules.NUM_BLOCKS))


REFERENCES = {"expert": expert, "expert_ignoring_colour": expert_ignoring_colour}
