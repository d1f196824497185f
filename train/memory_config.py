"""Config and presets of the memory experiment."""

from dataclasses import dataclass

from vla_jax.config import LEAST_FLOAT, MAX_SIZE, MAX_STEPS, check_names, checked
from vla_jax.nn.cells import CELLS, CellName
from vla_jax.nn.sequence_tasks import TASKS

ALL = "all"  # stands for every cell
BLOCK = 50  # updates per jitted call, one point of the curve each
EXPLODING = {"rnn": 5.0}  # factor of the recurrent kernel with which the gradient explodes


@dataclass(frozen=True)
@checked(
    hidden_size=(1, MAX_SIZE), num_layers=(1, 1000), batch_size=(1, 2**20),
    num_trials=(1, MAX_SIZE), max_updates=(1, 2**31 - 1), window_delay=(3, MAX_STEPS),
    num_seeds=(1, 10_000), extrapolation=(0, 2**16), chunk=(0, MAX_STEPS),
    burn_in=(0, MAX_STEPS), max_grad_norm=(LEAST_FLOAT, 1e12),
)  # fmt: skip
class MemoryConfig:
    """Cells, tasks and training of a memory experiment."""

    cells: tuple[CellName, ...] = (ALL,)  # cells to train; all = every cell
    # tasks to train on: adding, recall, s2 (parity), s3, s4, a5, counting
    tasks: tuple[str, ...] = tuple(TASKS)
    adding: tuple[int, ...] = (10, 50, 200)  # lengths T of the adding problem, steps
    recall: tuple[int, ...] = (10, 100, 1000)  # delays of delayed recall, steps
    tracking: tuple[int, ...] = (10, 100)  # lengths T of the words and of counting, steps
    extrapolation: tuple[int, ...] = (2, 4, 8)  # factors of T in further tests of tracking
    windows: tuple[int, ...] = (
        5,
        10,
        15,
        20,
        21,
        25,
        40,
    )  # window sizes W of recall, steps; none = skip
    window_delay: int = 20  # delay of the recall that is trained with windows, steps
    hidden_size: int = 64  # hidden units H of each recurrent layer
    num_layers: int = 1  # recurrent layers L; gradient norms are plotted only for 1
    batch_size: int = 64  # sequences B per update
    max_updates: int = 1500  # maximum updates on a task; on recall a fifth of it
    stop_when_solved: bool = True  # end a training as soon as its task is solved
    learning_rate: float = 1e-2  # learning rate of Adam
    max_grad_norm: float = 1.0  # clip gradients to this global norm
    spread_gates: bool = True  # chrono initialisation: gate time constants from 2 to T steps
    chunk: int = 0  # steps of truncated backpropagation, one update each; 0 = whole sequences
    burn_in: int = 0  # steps before each chunk that are run again to recompute its carry
    num_trials: int = 2000  # fresh sequences of the final test
    seed: int = 0  # seed of params and data
    num_seeds: int = 1  # trainings of every task, with the seeds seed, seed + 1, …
    small: bool = False  # use tiny sizes: a smoke test without meaningful results
    run_dir: str = "runs/memory"  # folder of results and plots
    overwrite: bool = False  # whether to delete earlier results in the folder

    def __post_init__(self):
        """Checks names and numbers."""
        check_names("cells", self.cells, (ALL, *CELLS))
        check_names("tasks", self.tasks, TASKS)
        if not self.cells:
            raise ValueError(f"cells must be one or more of {', '.join(CELLS)}, got none.")
        if not self.tasks:
            raise ValueError(f"tasks must be one or more of {', '.join(TASKS)}, got none.")
        for name, value in {"adding": 3, "recall": 3, "tracking": 3}.items():
            values = getattr(self, name)
            if not values or min(values) < value:
                raise ValueError(
                    f"{name} must be one or more, each at least {value}, got {values}."
                )
        if min((1, *self.windows)) < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}.")
        if self.extrapolation and min(self.extrapolation) < 1:
            raise ValueError(f"extrapolation must be at least 1, got {self.extrapolation}.")
        further = max(self.tracking) * max((1, *self.extrapolation))
        longest = max(
            *self.adding, *self.recall, *self.windows, self.window_delay, further, self.chunk
        )
        for name in ("batch_size", "num_trials"):
            if getattr(self, name) * longest > MAX_STEPS:
                raise ValueError(
                    f"{name} must be at most {MAX_STEPS // longest} for sequences of {longest} "
                    f"steps, got {getattr(self, name)}; shorten adding, recall, tracking, "
                    "windows and chunk."
                )
        if not 0 <= self.burn_in < max(self.chunk, 1):
            raise ValueError(
                f"burn_in must be 0 or below chunk = {self.chunk}, got {self.burn_in}; choose a "
                "longer chunk."
            )


def short() -> MemoryConfig:
    """Adding up to 200 steps, recall up to 1,000, tracking up to 100: all cells, hours."""
    return MemoryConfig()


def two_tasks() -> MemoryConfig:
    """Adding up to 200 steps and recall up to 1,000: all cells, minutes on 2 CPU cores."""
    return MemoryConfig(tasks=("adding", "recall"))


def long() -> MemoryConfig:
    """All tasks up to 1,000 steps, three seeds: all cells, a day on 2 CPU cores."""
    return MemoryConfig(
        adding=(10, 50, 200, 500, 1000), tracking=(10, 32, 100, 1000), max_updates=5000,
        num_seeds=3,
    )  # fmt: skip


PRESETS = {"short": short, "two_tasks": two_tasks, "long": long}
SMALL = {
    "adding": (4,), "recall": (3,), "tracking": (4,), "extrapolation": (2,), "windows": (2, 8),
    "window_delay": 4, "hidden_size": 4, "batch_size": 4, "max_updates": 2 * BLOCK, "num_trials": 8,
}  # fmt: skip


def cells_of(config: MemoryConfig) -> tuple[CellName, ...]:
    """Returns the cells to train."""
    return tuple(CELLS) if ALL in config.cells else config.cells


def lengths_of(config: MemoryConfig, task: str) -> tuple[int, ...]:
    """Returns the lengths of a task."""
    return {"adding": config.adding, "recall": config.recall}.get(task, config.tracking)
