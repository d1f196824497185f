"""Several processes that work together, on one host or many, by one option.

`together` connects the processes before anything uses a device, and watches them: when one dies or
fails, the others end with one sentence that names it, instead of waiting in a collective for ever.
"""

import atexit
import contextlib
import functools
import importlib
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from vla_jax import stopping
from vla_jax.config import did_you_mean
from vla_jax.training import peers

_EVENTS = "vla_jax/events"  # key of what processes announce
_DONE, _STOPPED = "done", "stopped"  # events: a process has done its work, or ends by a signal
_BARRIER = 2**31 - 1  # ms that a process waits for the others at most; the watch ends it earlier
_POLL = 0.5  # s between two looks at the events
CONNECTION = 300.0  # s in which all processes must have started
SHUTDOWN = 30  # s in which all processes must leave, once all have done their work
# Errors of JAX may come from a lost peer, but not these. Some are a ValueError with a status.
_OWN_ERROR = re.compile(
    "RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|NOT_FOUND|[Cc]allback"
    "|FAILED_PRECONDITION(?!: Agent)"  # the agent is that of the connection
    "|INTERNAL: .*([Aa]utotun|ptxas|[Cc]ompil)"
)
_PERHAPS_LOST = "this may be a lost connection; the same command may continue"
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ")


class Cluster(NamedTuple):
    """A scheduler that tells its processes about each other by environment variables."""

    method: str  # JAX's name of it
    variables: tuple[str, ...]  # set by the scheduler
    remedy: str  # what to do if one is missing
    local: str = ""  # variable with the number of a process on its host; "" = one process per host


CLUSTERS = {
    "slurm": Cluster(
        "slurm",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
        "start the command with srun",
        local="SLURM_LOCALID",
    ),
    "openmpi": Cluster(
        "ompi",
        (
            "OMPI_MCA_orte_hnp_uri",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_LOCAL_RANK",
        ),
        "start the command with mpirun of Open MPI 4, or give host:port,processes,index",
        local="OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "kubernetes": Cluster(
        "k8s",
        ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
        "start the command in a Job with completionMode Indexed",
    ),
}
OPTIONS = ("none", "auto", *CLUSTERS)


class Address(NamedTuple):
    """Place of one process among all."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int


class HasOption(Protocol):
    """A part of a config with the option of this module."""

    @property
    def distributed(self) -> str:
        """Returns one of `OPTIONS`, or an address."""
        ...


class HasLoop(Protocol):
    """A config of a script that trains."""

    @property
    def loop(self) -> HasOption:
        """Returns the part with the option."""
        ...


Config = TypeVar("Config", bound=HasLoop)
Result = TypeVar("Result")


def together(script: Callable[[Config], Result]) -> Callable[[Config], Result]:
    """Returns a script that is connected to the other processes of `config.loop.distributed`.

    Args:
      script: takes a config with a part `loop`; nothing before it may use a device.
    """

    @functools.wraps(script)
    def connected_script(config: Config) -> Result:
        with connected(config.loop.distributed):
            return script(config)

    return connected_script


def parse(option: str) -> Address | None:
    """Returns the address in an option such as `"10.0.0.1:1234,4,0"`; None for one of `OPTIONS`.

    Raises:
      ValueError: the option is neither.
    """
    if option in OPTIONS:
        return None
    found = re.fullmatch(r"(\S+:\d{1,5}),(\d{1,6}),(\d{1,6})", option)
    if not found:
        raise ValueError(
            f"distributed must be host:port,processes,index or one of the clusters, got '{option}';"
            f" {did_you_mean(option, OPTIONS)}"
        )
    address = Address(found[1], int(found[2]), int(found[3]))
    if not address.process_id < address.num_processes:
        raise ValueError(
            f"distributed must have an index below the number of processes, got '{option}'; the "
            "first process has index 0."
        )
    return address


@contextlib.contextmanager
def connected(option: str) -> Iterator[None]:
    """Connects this process to the others inside the block; does nothing for `"none"`.

    Args:
      option: one of `OPTIONS`, or `"host:port,processes,index"`.

    Raises:
      ValueError: the environment does not say which processes there are.
      RuntimeError: the processes did not connect.
    """
    address = parse(option)
    if option == "none" or jax.distributed.is_initialized():
        _switch_off_cpu_cache()
        yield
        return
    _initialize(option, address)
    left = threading.Event()
    watch = threading.Thread(target=peers.watch, args=(_runtime().client, left), daemon=True)
    watch.start()
    with peers.explained_aborts(_runtime().coordinator_address, left):
        try:
            _switch_off_cpu_cache()
            yield
            _meet(_DONE)
        except BaseException as error:
            code = _exit_code(error)
            if code in stopping.EXIT_CODE.values():
                _leave_stopped(code, watch, left)
            else:
                _leave_failed(error, code, left)
            raise
        _leave(watch, left)


def take_local_devices(option: str) -> None:
    """Takes the GPU of this process on its host, as `connected` does, but connects to no other.

    For processes that need nothing from each other. Without a scheduler that numbers the processes
    of a host, a process takes all of its devices. `JAX_LOCAL_DEVICE_IDS` chooses others.

    Args:
      option: as for `connected`.

    Raises:
      ValueError: the environment lacks the number of the process.
    """
    parse(option)
    named = CLUSTERS.get(option)
    candidates = CLUSTERS.values() if option == "auto" else filter(None, [named])
    variables = [cluster.local for cluster in candidates if cluster.local]
    found = [os.environ[name] for name in variables if name in os.environ]
    if named is not None and variables and not found:
        raise _missing(option, named, variables)
    chosen = os.environ.get("JAX_LOCAL_DEVICE_IDS", found[0] if found else "")
    if option != "none" and chosen:
        jax.config.update("jax_cuda_visible_devices", chosen)
        jax.config.update("jax_rocm_visible_devices", chosen)


def _missing(option: str, cluster: Cluster, missing: Sequence[str]) -> ValueError:
    return ValueError(
        f"distributed {option} must have the environment variables "
        f"{', '.join(cluster.variables)}, got none named {', '.join(missing)}; "
        f"{cluster.remedy}."
    )


def wait_for_all(place: str) -> None:
    """Waits until every process has come to a place of the program, named by `place`.

    Uses no device, so that a process may wait for hours. Returns at once without other processes.
    """
    if jax.process_count() > 1:
        _runtime().client.wait_at_barrier(f"vla_jax/{place}", _BARRIER)


def announce(event: str) -> None:
    """Announces an event to the other processes; see `is_announced`."""
    if jax.distributed.is_initialized():
        key = f"{_EVENTS}/{event}/{jax.process_index()}"
        _runtime().client.key_value_set(key, "", allow_overwrite=True)


def is_announced(event: str) -> bool:
    """Returns True if any process has announced the event on this connection."""
    return jax.distributed.is_initialized() and bool(_announced(event))


def _announced(event: str) -> list[tuple[str, str]]:
    return _runtime().client.key_value_dir_get(f"{_EVENTS}/{event}")


def _initialize(option: str, address: Address | None) -> None:
    # JAX would take over SIGTERM, at which `stopping` saves the update at hand.
    jax.config.update("jax_enable_preemption_service", False)
    arguments: dict[str, Any] = {}
    if address is not None:
        arguments = {
            "coordinator_address": address.coordinator,
            "num_processes": address.num_processes,
            "process_id": address.process_id,
            "cluster_detection_method": "deactivate",
        }
    elif option in CLUSTERS:
        cluster = CLUSTERS[option]
        missing = [name for name in cluster.variables if name not in os.environ]
        if missing:
            raise _missing(option, cluster, missing)
        arguments = {"cluster_detection_method": cluster.method}
    try:
        # JAX would abort at the end of its own time. Its heartbeats are for a process whose watch
        # has failed; the watch is faster.
        with peers.time_limit(CONNECTION, lambda: _not_connected(option)):
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=int(CONNECTION) + 60,
                heartbeat_timeout_seconds=60,
                shutdown_timeout_seconds=SHUTDOWN,
            )
    except Exception as error:
        if "should be defined" in str(error) or "must be defined" in str(error):
            raise ValueError(
                f"distributed must name the processes, got {option}, which finds no cluster; give "
                "host:port,processes,index, or none."
            ) from error
        raise RuntimeError(
            f"distributed {option} could not connect the processes: {error}; check its host and "
            "port, or those of the cluster."
        ) from error


def _not_connected(option: str) -> str:
    return (
        f"distributed {option} must connect all processes within {CONNECTION:.0f} s, but some have "
        f"not come to {_runtime().coordinator_address}; check that all of them run, and that they "
        f"reach this host and port; {peers.RESUMES}"
    )


def _switch_off_cpu_cache() -> None:
    """Switches off JAX's cache of compiled programs for several processes on CPUs.

    Collectives of CPU programs that come from the cache run in an order that differs between
    processes, and Gloo then aborts one (JAX 0.10).
    """
    if not jax.distributed.is_initialized():
        return  # the next line would start the devices, which a process alone may still choose
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


def _runtime() -> Any:
    """Returns JAX's client of the keys that all processes share, and its address.

    Neither has a public name; these are those of JAX 0.10 to 0.12.
    """
    return importlib.import_module("jax._src.distributed").global_state


def _meet(*events: str, seconds: float = math.inf) -> bool:
    """Announces the first event, and waits until all have announced the same one of the events.

    A process that is done waits until all are done: one that was stopped may not leave it alone.
    Returns False if that takes longer. Handlers of signals run meanwhile, unlike at a barrier.
    """
    announce(events[0])
    end = time.monotonic() + seconds
    while max(len(_announced(event)) for event in events) < jax.process_count():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True


def _leave(watch: threading.Thread, left: threading.Event) -> None:
    """Disconnects; the others do it too."""
    left.set()
    watch.join()
    jax.distributed.shutdown()


def _exit_code(error: BaseException) -> int:
    """Returns the exit code of a process that ends by an error or a signal."""
    if isinstance(error, KeyboardInterrupt):
        return stopping.EXIT_CODE[signal.SIGINT]
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return peers.FAILED


def _leave_stopped(code: int, watch: threading.Thread, left: threading.Event) -> None:
    """Leaves after a signal; ends those of the others that do not stop too."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has ended
        if _meet(_STOPPED, _DONE, seconds=peers.SILENCE):  # all stop at the same update
            _leave(watch, left)
            return
    _end_all(f"was stopped; {peers.RESUMES}", code, left)


def _leave_failed(error: BaseException, code: int, left: threading.Event) -> None:
    """Leaves after an error, or an exit of one process alone, which ends the others too."""
    ended = f"has ended: {' '.join(str(error).split())}"
    if isinstance(error, SystemExit):
        ended = f"has ended with exit code {code}"
    elif _may_be_of_another(error):
        # The watch ends this process when it knows which one died or failed.
        time.sleep(peers.SILENCE + 2 * peers.INTERVAL)
        code, ended = peers.OTHER_DIED, f"{ended}; {_PERHAPS_LOST}"
    _end_all(ended, code, left)


def _may_be_of_another(error: BaseException | None) -> bool:
    """Returns True if an error, or its cause, may be that of a lost connection."""
    if jax.process_count() == 1 or error is None:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
        return not _OWN_ERROR.search(str(error))
    context = None if error.__suppress_context__ else error.__context__
    return _may_be_of_another(error.__cause__ or context)


def _end_all(ended: str, code: int, left: threading.Event) -> None:
    """Ends the others, and this process when Python ends, with the same exit code.

    The others, whose work is not done, end with that of an error instead of 0.
    """
    left.set()
    atexit.register(_exit_now, code)
    place = peers.place_of(jax.process_index(), f"{socket.gethostname()}, PID {os.getpid()}")
    with contextlib.suppress(Exception):  # another process was first
        _runtime().client.key_value_set(peers.NOTE, f"{code or peers.FAILED} {place} {ended}")
    if jax.process_index() == 0:  # it holds the note, which the others read
        time.sleep(2 * peers.GRACE)


def _exit_now(code: int) -> None:
    """Ends this process; JAX would wait for the others first, and then abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(code)
