"""Policy server with memory: many robots, one policy, a session for each.

    python -m vla_jax.serve RUN_DIR
    python -m vla_jax.serve RUN_DIR --mode persistent --port 9000
    python -m vla_jax.serve RUN_DIR --host 0.0.0.0 --token-file token.txt

Clients of openpi connect as they are. After SIGTERM or Ctrl-C the server answers what is under
way, closes the connections and exits with 0.
"""

import asyncio
import contextlib
import dataclasses
import functools
import ipaddress
import logging
import os
import pathlib
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import jax

from vla_jax import folder_lock
from vla_jax.acting.agent import (
    AgentConfig,
    AgentState,
    Mode,
    read_instruction,
    with_noise,
)
from vla_jax.command_line import exit_codes, parse
from vla_jax.config import LEAST_FLOAT, checked
from vla_jax.files import Path
from vla_jax.runs import Run, load_run
from vla_jax.serving import metadata, observations, snapshot
from vla_jax.serving.dialects import DIALECTS
from vla_jax.serving.engine import Engine
from vla_jax.serving.metrics import Metrics, make_metrics
from vla_jax.serving.observations import KeysConfig, ResizeRule
from vla_jax.serving.observer import Observer
from vla_jax.serving.rehearsal import rehearse
from vla_jax.serving.server import Limits, Server, Service
from vla_jax.serving.session_warnings import NOTHING_KNOWN, Expected
from vla_jax.serving.sessions import Session, SessionBook
from vla_jax.serving.table import make_table

TOKEN = "VLA_JAX_TOKEN"  # environment variable: token that clients must send
_CPU_BATCH, _BATCH = 8, 64  # greatest number of sessions of a tick; large ones gain nothing on CPUs


@dataclass(frozen=True)
@checked(
    instruction_steps=(-1, 2**31 - 1),
    flow_steps=(1, 2**16),
    port=(0, 65_535),
    sessions=(1, 65_536),
    max_batch=(0, 65_536),
    session_ttl_s=(0.1, 1e7),
    message_bytes=(1024, 2**31 - 1),
    prompt_chars=(1, 2**20),
    connections=(1, 2**20),
    control_hz=(LEAST_FLOAT, 1e6),
    episode_length=(1, 2**31 - 1),
)
class ServeConfig:
    """Policy, address and limits of a server; None means as in training."""

    step: int | None = None  # checkpoint to serve, in updates; None = the latest
    robot: str | None = None  # data set of a mixture whose robot acts; None without a mixture
    mode: Mode | None = None  # streaming mode: refresh, periodic or persistent
    window_size: int | None = None  # W, in environment steps
    instruction_steps: int | None = None  # initial steps with a visible instruction; -1 = all
    flow_steps: int | None = None  # Euler steps of the flow head; more are slower
    noise_seed: int | None = None  # random seed of the noise that the flow head acts from
    host: str = "127.0.0.1"  # address to bind; other than loopback needs a token
    port: int = 8000  # TCP port; 0 chooses a free one
    # file with the token that clients must send; None = that of the environment variable
    # VLA_JAX_TOKEN, or none
    token_file: str | None = None
    sessions: int = 64  # greatest number of sessions at a time
    session_ttl_s: float = 300.0  # seconds without a request after which a named session ends
    # greatest number of sessions that step together; None = 8 on a CPU, else 64
    max_batch: int | None = None
    message_bytes: int = 16 * 2**20  # greatest size of one message, bytes
    prompt_chars: int = 4096  # greatest length of a prompt, characters
    connections: int = 1024  # greatest number of open connections
    # frames per second of the training data, Hz; robots that send fewer get a warning. None = not
    # known, as in a simulator, which has a time of its own
    control_hz: float | None = None
    # steps of the longest episode of the training; much longer ones get a warning. None = those of
    # the run's environment, if it has one
    episode_length: int | None = None
    # folder with the state of every named session, written before each reply, so that the sessions
    # go on after a restart; None = they end with the server
    snapshot: str | None = None
    # actions of a reply: "first" = the one for now, "chunk" = all that were predicted, for clients
    # that ask every few steps; a memory then sees these frames only
    actions: Literal["first", "chunk"] = "first"
    # images of another aspect ratio: "same_aspect" refuses them, "pad" adds black borders
    resize: ResizeRule = "same_aspect"
    keys: KeysConfig = KeysConfig()  # names of the observation's parts in messages

    def __post_init__(self):
        """Checks the options that have a least value."""
        for name in ("max_batch", "window_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


def serve(
    run: Run | Path,
    config: ServeConfig | None = None,
    *,
    ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Serves a policy until SIGTERM or Ctrl-C.

    Args:
      run: run of `load_run`, or its folder.
      config: policy, address and limits.
      ready: called with the port when clients can connect.

    Raises:
      FileNotFoundError: the run or one of its files is missing.
      ValueError: a file is damaged, an option does not fit, or the host needs a token.
      OSError: the port is taken.
      ImportError: a package of the extra `serve` is missing.
    """
    config = config or ServeConfig()
    token = _token(config)
    _check_packages()
    _check_port(config)
    run = run if isinstance(run, Run) else load_run(run, step=config.step, robot=config.robot)
    with _own_snapshots(config):
        service = make_service(run, config, token=token)
        asyncio.run(_run(Server(service), config, ready))


def _own_snapshots(config: ServeConfig) -> contextlib.AbstractContextManager[None]:
    """Keeps other servers out of the folder of the sessions' states, for the length of a block.

    Raises:
      BlockingIOError: another server uses it.
      OSError: the folder cannot be made.
    """
    if config.snapshot is None:
        return contextlib.nullcontext()
    folder = pathlib.Path(config.snapshot)
    folder.mkdir(parents=True, exist_ok=True)
    return folder_lock.hold(folder / ".lock", f"snapshot {folder}", "give every server its own")


def make_service(run: Run, config: ServeConfig, *, token: str | None = None) -> Service:
    """Returns a service with compiled programs and its engine running.

    Args:
      run: of `load_run`.
      config: policy and limits.
      token: that clients must send; None = any client may connect.

    Raises:
      ValueError: an option does not fit.
    """
    agent = _agent(run.agent, config)
    spec = observations.make_spec(agent, run.norm_stats, config.keys, resize=config.resize)
    on_cpu = jax.default_backend() == "cpu"
    table = make_table(
        agent,
        run.norm_stats,
        run.params,
        observations.blank(spec),
        num_rows=config.sessions,
        max_batch=config.max_batch or (_CPU_BATCH if on_cpu else _BATCH),
        window_size=config.window_size,
        chunks=config.actions == "chunk",
    )
    limits = Limits(
        config.message_bytes,
        config.sessions,
        config.session_ttl_s,
        config.prompt_chars,
        config.connections,
    )
    window_size = config.window_size or agent.policy.decoder.window_size
    about = metadata.make_metadata(run, agent, spec, limits, window_size, _horizon(agent, config))
    options = f"window {window_size}, actions {config.actions}"
    policy = snapshot.policy_name(run, agent, options)
    row = jax.device_get(table.read(table.init(), 0))
    info = {"run": about["run"]["name"], "step": str(run.step), "version": about["version"]}

    def make(book: SessionBook, snapshots: str | None, expected: Expected) -> Service:
        metrics = make_metrics(book, info)
        observer = make_observer(metrics, snapshots, policy)
        return Service(
            Engine(table, book, observer, expected=expected),
            spec,
            functools.lru_cache(256)(functools.partial(read_instruction, agent)),
            about,
            limits,
            DIALECTS,
            metrics,
            policy,
            row,
            token,
        )

    asyncio.run(rehearse(make(SessionBook(config.sessions, ttl=60.0), None, NOTHING_KNOWN)))
    stored = _read_sessions(config, row, policy)
    book = SessionBook(config.sessions, config.session_ttl_s, stored.damaged)
    service = make(book, config.snapshot, _expected(run, config))
    for session_id, session, memory in stored.sessions:
        service.engine.place(session_id, session, memory).result()
    return service


def _horizon(agent: AgentConfig, config: ServeConfig) -> int:
    """Returns how many actions a reply has."""
    return agent.policy.decoder.action_horizon if config.actions == "chunk" else 1


def _expected(run: Run, config: ServeConfig) -> Expected:
    """Returns the requests that the policy was trained for."""
    length = config.episode_length or getattr(run.world, "max_steps", None)
    return Expected(config.control_hz, length or None)  # 0 = not known


def _read_sessions(config: ServeConfig, row: AgentState, policy: str) -> snapshot.Stored:
    """Returns the sessions of an earlier server.

    Raises:
      ValueError: they are of another policy, or too many.
      OSError: the folder cannot be read or made.
    """
    if config.snapshot is None:
        return snapshot.Stored([], frozenset())
    pathlib.Path(config.snapshot).mkdir(parents=True, exist_ok=True)
    stored = snapshot.read_all(config.snapshot, row, policy)
    count = len(stored.sessions)
    if count > config.sessions:
        raise ValueError(
            f"sessions must be at least {count}, as many as are in {config.snapshot}, got "
            f"{config.sessions}; give more --sessions, or delete files."
        )
    return stored


def make_observer(metrics: Metrics, folder: str | None = None, policy: str = "") -> Observer:
    """Returns the functions that count what the engine does, and write the named sessions.

    Args:
      metrics: of the server.
      folder: of the sessions' files; None = they are not written.
      policy: name of the policy.
    """

    def ticked(rows: int, seconds: float) -> None:
        metrics.rows.observe(rows)
        metrics.seconds.labels("device").observe(seconds)

    def ended(why: str, age: int) -> None:
        metrics.ended.labels(why).inc()
        metrics.steps.observe(age)

    if folder is None:
        return Observer(ticked, ended)

    def saved(key: str, session: Session, row: AgentState) -> None:
        snapshot.write(folder, key, snapshot.to_bytes(key, session, row, policy))

    return Observer(ticked, ended, saved, functools.partial(snapshot.remove, folder))


async def _run(server: Server, config: ServeConfig, ready: Callable[[int], None]) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def request_stop() -> None:
        if stop.is_set():  # a second signal ends at once
            os._exit(1)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, request_stop)

    def announce(port: int) -> None:
        print(f"serving on ws://{config.host}:{port}", flush=True)
        ready(port)

    await server.run(config.host, config.port, stop, ready=announce)


def _agent(agent: AgentConfig, config: ServeConfig) -> AgentConfig:
    """Returns the run's agent config with the options of the server."""
    options = {"mode": config.mode, "instruction_steps": config.instruction_steps}
    given = {name: value for name, value in options.items() if value is not None}
    agent = with_noise(agent, flow_steps=config.flow_steps, noise_seed=config.noise_seed)
    return dataclasses.replace(agent, **given)


def _token(config: ServeConfig) -> str | None:
    """Returns the token that clients must send.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is empty, or the host can be reached by others and there is no token.
    """
    token = os.environ.get(TOKEN, "").strip()
    if config.token_file is not None:
        path = pathlib.Path(config.token_file)
        if not path.is_file():
            raise FileNotFoundError(f"token_file {path} is missing; write the token into it.")
        token = path.read_text(encoding="utf-8").strip()
        if not token:
            raise ValueError(f"token_file {path} must hold a token, got an empty file.")
    if not token and not _is_loopback(config.host):
        raise ValueError(
            f"host must be 127.0.0.1 without a token, got '{config.host}', where anyone can move "
            f"the robots; give --token-file, or set {TOKEN}."
        )
    return token or None


def _check_port(config: ServeConfig) -> None:
    """Raises an OSError if the port is taken, before the policy is loaded and compiled."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise OSError(
            f"port must be free on {config.host}, got {config.port} ({error.strerror}); choose "
            "another --port or --host."
        ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be of any network
        return False


def _check_packages() -> None:
    """Raises an ImportError if a package of the extra is missing."""
    try:
        import msgpack  # noqa: F401
        import prometheus_client  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the server needs {error.name}; run pip install 'vla-jax[serve]'."
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command with arguments from the command line; exit codes are in `command_line`."""
    import tyro

    def arguments(
        run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        config: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig(),
    ) -> tuple[str, ServeConfig]:
        """Serves a run's policy to robots, with a memory for each of them.

        Args:
          run_dir: run folder of train.imitate.
          config: policy, address and limits.
        """
        return run_dir, config

    with exit_codes():
        run_dir, config = parse(arguments, argv, prog="python -m vla_jax.serve")
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        serve(run_dir, config)


if __name__ == "__main__":
    main()
