"""The options that the MuJoCo table and the JAX table share."""

from dataclasses import dataclass

from vla_jax.config import checked


@dataclass(frozen=True)
@checked()
class TableConfig:
    """A table; both cameras give square images.

    Raises:
      ValueError: a size or share outside its range.
    """

    kind: str  # name of the simulator, fixed by each subclass
    image_size: int = 64  # pixels of both cameras; 0 = no images
    step_size: float = 0.03  # metres per unit of action and step
    turn_size: float = 0.2  # radians per unit of action and step
    rotated_share: float = 0.5  # share of layouts in which every block is rotated
    max_steps: int = 64  # environment steps until truncation

    def __post_init__(self):
        """Checks the sizes."""
        if self.step_size <= 0 or self.turn_size <= 0:
            raise ValueError(
                "step_size and turn_size must be > 0 (metres, radians per step), got "
                f"{self.step_size} and {self.turn_size}."
            )
        if not 0 <= self.rotated_share <= 1:
            raise ValueError(f"rotated_share must be in [0, 1], got {self.rotated_share}.")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be >= 1, got {self.max_steps}.")
