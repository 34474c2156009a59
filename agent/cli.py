"""mlxrack-agent: run, inspect and control the agent.

The only module that reads the environment and the command line. Exit codes are os.EX_*: 0 success, 64 usage error,
69 agent not running, address in use or package missing, 75 temporary failure, 78 invalid configuration, 1 any other.
"""

from agent.operator import early_hangups  # noqa: F401  # from here on SIGHUP does not end a daemon

# isort: split
import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent import config as agent_config
from agent import config_checks
from agent.config import AgentConfig, Node, is_open
from agent.operator import (
    cli_audit,
    cli_chips,
    cli_claim,
    cli_doctor,
    cli_install,
    cli_limits,
    cli_models,
    cli_orders,
    cli_policy,
    cli_reload,
    cli_secrets,
    cli_store,
    cli_taint,
    cli_tls,
    completion,
    legend,
    logview,
    obtain,
    serve_one,
    startup,
)
from agent.operator.admin_client import PORT_NAME, AdminClient
from agent.operator.hangups import Hangups
from agent.operator.service import output
from agent.operator.state_folder import held as state_held
from agent.operator.statusview import fold, status_text, why_text
from shared import __version__, logs, private
from shared import config as shared_config
from shared.commandline import Parser, reader_left
from shared.durable import write_whole
from shared.errors import Halt, RackError, Refused, Retryable
from shared.manual import cli_help
from shared.missing import broken_import, guarded

if TYPE_CHECKING:
    from agent.api.openai.stated import Stated
    from agent.daemon import Daemon

CONFIG_NAME, CONFIG_VARIABLE = "agent.toml", "MLXRACK_AGENT_CONFIG"
PLACES = shared_config.places(CONFIG_NAME, CONFIG_VARIABLE)
Load = Callable[[Path, type[AgentConfig], Callable[[AgentConfig], Sequence[str]]], AgentConfig]
ALONE = AgentConfig(node=Node(id="local", rack="local"))
"""The configuration of a machine that has none, for `serve` and what goes with it."""


@guarded("mlxrack-agent", "agent")
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = _parser().parse_args(argv)
    before = os.umask(private.UMASK)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        return 130
    except RackError as error:
        width = cli_doctor.width_of(sys.stderr)
        print("\n".join(fold(line, width) for line in f"mlxrack-agent: {error.message}".split("\n")), file=sys.stderr)
        return exit_status(error)
    except OSError as error:
        if broken_import(error) or reader_left(error):
            raise
        print(f"mlxrack-agent: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return os.EX_IOERR
    finally:
        os.umask(before)
    return status


def exit_status(error: RackError) -> int:
    """Exit status (os.EX_*) for an error."""
    if isinstance(error, shared_config.ConfigError) or error.code in (
        "no_secret",
        "weak_secret",
        "bad_tls",
        "wrong_identity",
        "not_reloaded",
    ):
        return os.EX_CONFIG
    if error.code in ("not_running", "port_in_use", "spool_in_use"):
        return os.EX_UNAVAILABLE
    return os.EX_TEMPFAIL if isinstance(error, Retryable) else os.EX_UNAVAILABLE if isinstance(error, Halt) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mlxrack-agent", description="Serve language models on this node; report telemetry.")
    parser.add_argument("--version", action="version", version=f"mlxrack {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        _config_option(added)
        added.set_defaults(run=run)
        return added

    run = verb("run", "Run the agent in the foreground until it receives SIGTERM or SIGINT.", _run)
    run.add_argument("--console", action="store_true", help="also write the log to the terminal")
    serve = verb("serve", "Serve one model on this machine until Ctrl-C; pulls it first if necessary.", _serve)
    serve_one.add_options(serve)
    status = _json(verb("status", "Show models, peers and telemetry of the running agent.", _status))
    status.add_argument("--legend", action="store_true", help="explain the columns and states")
    models = verb("models", "List the models of this node; pull, push and remove models in its store.", _status)
    _json(models)
    cli_models.add(models, _config_and_state, _common)
    cli_orders.add(verb, _config_and_state, _common)
    cli_taint.add(verb, _config_and_state, _common)
    cli_limits.add(verb, _config_and_state)
    probes = verb("probes", "Record a model's answers to its probes: the file that a standby must reproduce.", _probes)
    probes.add_argument("model", help="served name of a model that is known to be good")
    why = verb("why", "Explain the routing of a request: candidates, costs, retries, continuations.", _why)
    why.add_argument("request", help="X-Mlxrack-Request-Id of an answer for which this node was the gateway")
    _json(why)
    _json(verb("seal", "Close the open telemetry window now and push it to the store.", _seal))
    log = verb("logs", "Show the agent's log.", _logs)
    log.add_argument("--follow", "-f", action="store_true", help="keep printing new lines")
    log.add_argument("--since", default=None, help="90s, 15m, 1h, 2d, or a time like 2026-11-20T08:00")
    log.add_argument("--level", choices=logview.LEVELS, default="info", help="minimum level (default: info)")
    log.add_argument("--request", default=None, help="only lines with this request id")
    cli_doctor.add(verb, _config_and_state, _path, lambda config: (state_folder(config), log_file(config)))
    sample = verb("sample", "Read every sensor and print the sample that a batch would carry.", _sample)
    sample.add_argument("--seconds", type=float, default=2.0, help="sampling time in seconds (default: %(default)s)")
    cli_install.add(verb, _config, lambda config: (state_folder(config), log_file(config).parent))
    completion.add(verbs, parser)
    cli_help.add(verbs, parser)
    cli_store.add(verb, _config_and_state, _common)
    cli_tls.add(verb, _config_and_state, _common)
    cli_claim.add(verb, _configured, _common)
    cli_chips.add(verb)
    cli_audit.add(verb, _config_and_state, _common)
    cli_reload.add(verb, _config_and_state)
    cli_policy.add(verb, _config_and_state, _common, _stated, cli_audit.recorded)
    cli_secrets.add(verb, _config_and_state, lambda args: _config(args)[1], _common)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    """Options of nested verbs; SUPPRESS keeps values given before the inner verb."""
    _config_option(parser, default=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _config_option(parser: argparse.ArgumentParser, default: Any = None) -> None:
    parser.add_argument("--config", type=Path, default=default, help=f"agent.toml (default: {PLACES})")


def _config_and_state(args: argparse.Namespace, load: Load = shared_config.load) -> tuple[AgentConfig, Path]:
    """The configuration, or that of a machine without one, and its state folder."""
    config = _config(args, load)[0] if _located(args) is not None else _with_own_store(ALONE)
    return config, state_folder(config)


def _configured(args: argparse.Namespace) -> tuple[AgentConfig, Path]:
    """The same for a verb that acts under a node's own name: without a configuration there is none to act under."""
    config, _ = _config(args)
    return config, state_folder(config)


def _with_own_store(config: AgentConfig) -> AgentConfig:
    return agent_config.with_own_store(config, str(state_folder(config) / obtain.OWN_BUCKET))


def _json(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _config(args: argparse.Namespace, load: Load = shared_config.load) -> tuple[AgentConfig, Path]:
    path = _path(args)
    return _with_own_store(load(path, AgentConfig, config_checks.check)), path


def _path(args: argparse.Namespace) -> Path:
    return _located(args) or Path(CONFIG_NAME)


def _located(args: argparse.Namespace) -> Path | None:
    return shared_config.located(CONFIG_NAME, args.config, os.environ.get(CONFIG_VARIABLE))


def state_folder(config: AgentConfig) -> Path:
    """Folder of the agent's spool and tokens."""
    if config.paths.state:
        return Path(config.paths.state).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/mlxrack" / config.node.id
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state", "mlxrack", config.node.id)


def log_file(config: AgentConfig) -> Path:
    """Path of the agent's structured log."""
    folder = Path(config.paths.logs).expanduser() if config.paths.logs else state_folder(config) / "logs"
    return folder / "agent.jsonl"


def _note(line: str) -> None:
    print(f"mlxrack-agent: {line}", file=sys.stderr)


def _line(text: str) -> None:
    print(text, flush=True)


def _client(args: argparse.Namespace) -> AdminClient:
    return AdminClient(*_config_and_state(args))


def _run(args: argparse.Namespace) -> int:
    hangups = Hangups()
    config, path = _config(args)
    watching: list[asyncio.Task[None]] = []

    def started(daemon: "Daemon", port: int) -> None:
        host = config.listen.host
        base = f"{agent_config.scheme(config)}://{host}:{port}/v1"
        _line(f"mlxrack-agent {config.node.id}: listens on {base.removesuffix('/v1')} (pid {os.getpid()})")
        _line(f"status: mlxrack-agent status --config '{path}'")
        preloaded = [model.name for model in config.models if model.preload]
        said = startup.Said(base, preloaded, keys=not is_open(config))
        loop, folder = asyncio.get_running_loop(), log_file(config).parent
        watching.append(loop.create_task(startup.watch(daemon.status.node, said, _line)))
        watching.append(loop.create_task(output.keep_short(folder)))

    with state_held(state_folder(config), _note):
        read = partial(_config, args, shared_config.load_settled)
        _foreground(config, args.console, started, hangups, lambda: read()[0])
    return 0


def _foreground(
    config: AgentConfig,
    console: bool,
    started: Callable[["Daemon", int], None],
    hangups: Hangups,
    read: Callable[[], AgentConfig],
    *,
    lasting: bool = True,
) -> None:
    """Run the daemon until a signal ends it; ``started`` is called in its loop once it listens, and ``read`` for each
    reload."""
    from agent.daemon import Daemon

    state = state_folder(config)
    logs.configure(log_file(config), level=config.log_level, console=console)
    logs.catch_unraisable()

    async def serve() -> None:
        daemon = Daemon(config, state, os.environ, read, lasting=lasting)

        def listening(port: int) -> None:
            with contextlib.suppress(OSError):  # a full disk must not keep it from serving
                write_whole(state / PORT_NAME, str(port).encode(), synced=False)
            started(daemon, port)
            hangups.listen(daemon.reloader.begin, daemon.stop)

        await daemon.run(listening)
        (state / PORT_NAME).unlink(missing_ok=True)
        if daemon.hangs:
            # a thread blocked on an unresponsive store or sensor would delay the exit by minutes; batches are on disk
            sys.stdout.flush()
            os._exit(0)

    asyncio.run(serve())


def _serve(args: argparse.Namespace) -> int:
    began_s, args.json, hangups = time.monotonic(), False, Hangups()
    config, state = _config_and_state(args)
    options = serve_one.Options(args.name, args.revision, args.port, args.rows, args.context)
    with state_held(state, _note):
        serving = serve_one.prepare(args.model, config, obtain.access_of(config, state, os.environ, args), options)
        return _serve_held(args, serving, state, hangups, began_s)


def _serve_held(
    args: argparse.Namespace, serving: serve_one.Serving, state: Path, hangups: Hangups, began_s: float
) -> int:
    waiting: list[asyncio.Task[None]] = []
    failed: list[str] = []

    async def announce(daemon: "Daemon", port: int) -> None:
        client = AdminClient(serving.config, state)
        if why := await serve_one.announce(client, serving, port, began_s, lambda line: print(line, flush=True)):
            failed.append(why)
            daemon.stop()

    _foreground(
        serving.config,
        args.console,
        lambda daemon, port: waiting.append(asyncio.get_running_loop().create_task(announce(daemon, port))),
        hangups,
        lambda: serve_one.one_node(
            _config_and_state(args, shared_config.load_settled)[0], serving.spec.model, args.port
        ),
        lasting=False,  # `serve MODEL` is itself the newest order
    )
    if failed:
        raise Refused(f"serve {serving.spec.model.name}: {failed[0]}")
    return 0


def _status(args: argparse.Namespace) -> int:
    if getattr(args, "legend", False):
        print(legend.text(cli_doctor.width_of(sys.stdout) or 80))
        return 0
    status, width = _client(args).status(), cli_doctor.width_of(sys.stdout)
    print(json.dumps(status, indent=2) if args.json else status_text(status, width))
    if width and not args.json:
        print(f"\n{legend.HINT}")
    return 0


def _stated(body: bytes, headers: Mapping[str, str], api: agent_config.Api) -> "Stated":
    from agent.api.openai.stated import stated

    return stated(body, headers, api)


def _probes(args: argparse.Namespace) -> int:
    print(json.dumps(_client(args).order("probes", model=args.model), indent=2, ensure_ascii=False))
    return 0


def _why(args: argparse.Namespace) -> int:
    answer = _client(args).why(args.request)
    print(json.dumps(answer, indent=2) if args.json else why_text(answer["parts"]))
    return 0


def _seal(args: argparse.Namespace) -> int:
    answer = _client(args).order("seal")
    print(json.dumps(answer) if args.json else f"window {answer['seq']} closed, {answer['sent']} batches sent")
    return 0


def _logs(args: argparse.Namespace) -> int:
    config, _ = _config_and_state(args)
    since = logview.parse_since(args.since, datetime.now(UTC)) if args.since else None
    which = logview.Filter(since=since, level=args.level, request=args.request)
    for line in logview.lines(log_file(config), which, follow=args.follow):
        print(line, flush=args.follow)
    return 0


def _sample(args: argparse.Namespace) -> int:
    from agent.telemetry.sensors import Sensors
    from agent.telemetry.sensors.reading import merged
    from shared.records import HostSample

    sensors = Sensors()
    samples: list[HostSample] = []
    failed: dict[str, str] = {}
    try:
        for collector in sensors.all:
            collector.read()
        # rates and means need a time span
        time.sleep(args.seconds)
        for collector in sensors.all:
            reading = collector.read()
            samples.append(reading.sample)
            failed.update(reading.failed)
    finally:
        sensors.close()
    sample = merged(*samples, HostSample(sources_failed=failed))
    print(msgspec.json.format(msgspec.json.encode(sample), indent=2).decode())
    return 0
