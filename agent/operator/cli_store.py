"""mlxrack-agent store serve: an S3 server for a rack without one, as a service in the foreground."""

import argparse
import contextlib
import json
import os
import plistlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from agent.config import AgentConfig
from agent.operator import store_server
from agent.operator.install import program_path
from agent.operator.store_server import DEFAULT_PORT, Options, Server
from shared.errors import Refused

LABEL = "dev.mlxrack.store"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SERVE = "Run an S3 server for the rack until SIGTERM: makes folder, credentials and bucket, prints the [store] table."
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and state folder."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""


class _Ended(BaseException):
    """A signal asked for the end."""


def add(outer: Outer, load: Load, common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add ``store`` with its verb."""
    text = "Run a store for racks that have none."
    store = outer("store", text, lambda args: _serve(args, *load(args)))
    verbs = store.add_subparsers(metavar="VERB", required=True)
    serve = verbs.add_parser("serve", help=SERVE, description=SERVE)
    common(serve)
    serve.set_defaults(json=False)
    serve.add_argument(
        "--folder", type=Path, default=None, help="where the data lie (default: store in the state folder)"
    )
    serve.add_argument("--bucket", default="", help="bucket to make (default: the configured one, else RACK-rack)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of S3 (default: %(default)s)")
    serve.add_argument("--name", default="", help="name or address that clients connect to (default: --host)")
    serve.add_argument("--certificate", type=Path, default=None, help="TLS certificate in PEM, with its chain")
    serve.add_argument("--key", type=Path, default=None, help="its private key")
    serve.add_argument("--ca", type=Path, default=None, help="the CA that signed it, for the printed table")
    serve.add_argument("--insecure-http", action="store_true", help="serve other machines without TLS")
    serve.add_argument("--plist", action="store_true", help="print a LaunchDaemon that runs this command, and end")
    serve.add_argument("--user", default="_mlxrack", help="its service user (default: %(default)s)")


def _serve(args: argparse.Namespace, config: AgentConfig, state: Path) -> int:
    options = _options(args, config, state)
    if why := store_server.check(options):
        print(f"mlxrack-agent store serve: {why}", file=sys.stderr)
        return os.EX_USAGE
    if args.plist:
        sys.stdout.write(plist(options, args.user))
        return os.EX_OK
    for file in filter(None, (options.certificate, options.key, options.ca)):
        if not os.access(file, os.R_OK):
            raise Refused(f"store serve: {file} cannot be read")
    with _signals(), store_server.held(options.folder) as lock:
        access, secret = store_server.credentials(options.folder)
        server = Server(options, [store_server.identity("rack", access, secret, options.bucket)])
        try:
            server.start(lock)
            _announce(server, as_json=args.json)
            while (status := server.ended(600)) is None:
                server.rotate()
        except _Ended:
            return os.EX_OK
        finally:
            with _ignoring():
                server.stop()
        raise store_server.died(status, server)


def _options(args: argparse.Namespace, config: AgentConfig, state: Path) -> Options:
    configured = config.store.bucket if config.store.kind == "s3" else ""
    certificate, key, ca = (
        str(one.expanduser().resolve()) if one else "" for one in (args.certificate, args.key, args.ca)
    )
    return Options(
        folder=(args.folder or state / "store").expanduser().resolve(),
        bucket=args.bucket or configured or store_server.bucket_for(config.node.rack),
        host=args.host,
        port=args.port,
        name=args.name,
        certificate=certificate,
        key=key,
        ca=ca,
        insecure_http=args.insecure_http,
    )


def _announce(server: Server, *, as_json: bool) -> None:
    options, table = server.options, store_server.store_table(server.options)
    if as_json:
        told = {"endpoint": options.endpoint, "bucket": options.bucket, "folder": str(options.folder)}
        print(json.dumps({**told, "pid": server.pid, "log": str(server.log), "store": table}), flush=True)
        return
    print(f"# S3 at {options.endpoint}, bucket {options.bucket}; log {server.log}; Ctrl-C or SIGTERM ends it")
    print(f"# in agent.toml of each node, and in aggregator.toml:\n\n{table}")
    print(f"# for another machine: copy {store_server.ACCESS} and {store_server.SECRET} there, readable by the agent's")
    print(f"# user alone, and name their paths instead. All data lie in {options.folder}: back it up.")
    if not options.certificate and options.insecure_http:
        print("# WARNING: other machines connect without TLS: what is stored can be read on the network, and changed.")
    sys.stdout.flush()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP raise _Ended, unless they are ignored, as after nohup."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended

    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    except _Ended:  # before there was anything to end
        raise SystemExit(os.EX_OK) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ignoring() -> Iterator[None]:
    """A second signal does not cut the end short; launchd kills after its time."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    yield


def plist(options: Options, user: str) -> str:
    """A LaunchDaemon that runs `store serve` with these options."""
    flags = {
        "--folder": str(options.folder),
        "--bucket": options.bucket,
        "--host": options.host,
        "--port": str(options.port),
        "--name": options.name,
        "--certificate": options.certificate,
        "--key": options.key,
        "--ca": options.ca,
    }
    arguments = [part for flag, value in flags.items() if value for part in (flag, value)]
    output = str(options.folder.parent / f"{options.folder.name}.stdout.log")
    made = {
        "Label": LABEL,
        "ProgramArguments": [
            *(str(program_path()), "store", "serve", *arguments),
            *(["--insecure-http"] if options.insecure_http else []),
        ],
        "UserName": user,
        "RunAtLoad": True,
        "KeepAlive": True,
        "ExitTimeOut": int(store_server.STOP_S) + 20,
        "SoftResourceLimits": {"NumberOfFiles": 65536, "Core": 0},
        "StandardOutPath": output,
        "StandardErrorPath": output,
    }
    return plistlib.dumps(made, sort_keys=False).decode()
