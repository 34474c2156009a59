"""mlxrack-agent install and uninstall: the agent as a macOS service, and nothing of it any more."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.config import AgentConfig
from agent.files.modelstore import model_folder
from agent.operator import checks, install, state_folder
from agent.operator.obtain import OWN_BUCKET
from agent.operator.service import launchd, output, plan, removal, run
from agent.operator.service.shell import script
from shared.errors import RackError, Refused
from shared.private import LOCK_NAME

DEFAULT_USER = "_mlxrack"
SYSTEM = run.System()
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_ASKED = ("models", OWN_BUCKET)
"""What may be wanted again: models, and the telemetry of a node without a [store]."""
_STATE = (*state_folder.SECRET, *state_folder.TOKENS)
_LOGS = r"agent\.(jsonl|stdout\.log)(\.\d+)*"
Load = Callable[[argparse.Namespace], tuple[AgentConfig, Path]]
"""Configuration and its file."""
Places = Callable[[AgentConfig], tuple[Path, Path]]
"""Folders of the state and of the logs."""
Outer = Callable[[str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]
"""Adds a verb of the program."""


def add(outer: Outer, load: Load, places: Places) -> None:
    """Add ``install`` and ``uninstall``."""
    text = (
        "Install the agent as a macOS service (LaunchDaemon): its user, folders and firewall rule. Run again, it takes "
        "what has changed, and leaves alone a service that runs as it should."
    )
    verb = outer("install", text, lambda args: _install(args, load, places))
    who = f"service user; one like _NAME is made (default: that of the installed service, else {DEFAULT_USER})"
    verb.add_argument("--user", default=None, help=who)
    verb.add_argument("--restart", action="store_true", help="start it again, even if nothing has changed")
    more = "variable of the service beside HOME and PATH, kept by later installations; NAME= removes it; no secrets"
    verb.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help=more)
    verb.add_argument("--dry-run", action="store_true", help="print each step as the command that it is")
    text = "Stop the service and remove it from this Mac, with its logs and state; says what stays."
    verb = outer("uninstall", text, lambda args: _uninstall(args, load, places))
    verb.add_argument("--user", action="store_true", help="remove the service user, too, if install has made it")
    verb.add_argument("--models", action="store_true", help="remove pulled models and the node's own store, too")
    verb.add_argument("--dry-run", action="store_true", help="print each step as the command that it is")


# ---- install ----


def _install(args: argparse.Namespace, load: Load, places: Places) -> int:
    config, path = load(args)
    wanted = _wanted(args, config, path, places)
    for why in filter(None, map(checks.unfit_for_service, checks.references(config))):
        _note(f"warning: {why}")
    made = plan.plan(wanted, _facts(wanted))
    if args.dry_run:
        print(script([*made.prepare, *made.swap, *made.finish]), end="")
        if not made.swap:
            print("# the service runs as it should and is left alone; --restart starts it again")
        return 0
    run.carry_out(made, SYSTEM, _note)
    done = "installed and started" if made.swap else "nothing to change: it runs as it should:"
    print(f"{done} {launchd.LABEL}; check it with `mlxrack-agent status --config '{wanted.reads[1]}'`")
    return 0


def _wanted(args: argparse.Namespace, config: AgentConfig, path: Path, places: Places) -> plan.Wanted:
    home, logs = places(config)
    user = _user(_former()[1]) if args.user is None else str(args.user)
    if not config.paths.state or not config.paths.logs or not home.is_absolute() or not logs.is_absolute():
        raise Refused(
            "install: a service requires absolute paths.state and paths.logs; for example "
            '"/usr/local/var/mlxrack" and "/usr/local/var/log/mlxrack"'
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", user):
        raise Refused(f"install: --user {user!r}: name a user of this Mac")
    program, path = install.program_path(), path.resolve()
    text = install.render_plist(
        config, program=program, config_path=path, user=user, home=home, logs=logs, environ=_variables(args.env)
    )
    references = [one.reference for one in checks.references(config)]
    return plan.Wanted(
        user=user,
        plist=text,
        arguments=[str(program), "run", "--config", str(path)],
        folders=[str(one) for one in dict.fromkeys((home, logs))],
        output=str(logs / output.NAME),
        reads=[str(program), str(path)],
        secrets=[one.removeprefix("file:") for one in references if one.startswith("file:/")],
        programs=run.interpreters(),
        needs_op=any(one.startswith("op://") for one in references),
        restart=args.restart,
    )


def _variables(given: Sequence[str]) -> dict[str, str]:
    """Those of the installed service, as ``--env`` changes them. Raises Refused."""
    tree = _former()[1] or {}
    known = {str(name): str(value) for name, value in tree.get("EnvironmentVariables", {}).items()}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in ("HOME", "PATH"):
            raise Refused(f"install: --env takes NAME=VALUE, and no HOME or PATH; {name!r} was given")
        if value and _SECRET_NAMES.search(name) and not value.startswith("/"):
            raise Refused(
                f"install: --env {name}: everybody can read the property list; keep a secret in a file of mode 0600 "
                "(`file:`), and 1Password's token in /etc/mlxrack/op.token"
            )
        known[name] = value
    return {name: value for name, value in known.items() if value and name not in ("HOME", "PATH")}


def _former() -> tuple[str | None, dict[str, Any] | None]:
    """The installed property list: its text and what it means; None where there is none, or it is broken."""
    try:
        raw = SYSTEM.place(launchd.PLIST).read_bytes()
    except OSError:
        return None, None
    return raw.decode(errors="replace"), install.parsed(raw)


def _facts(wanted: plan.Wanted) -> plan.Facts:
    """What is seen; of a machine without launchd only that it has nothing."""
    if not SYSTEM.mac:
        return plan.Facts(account=_elsewhere(wanted.user))
    former, tree = _former()
    found = run.account(SYSTEM, wanted.user)
    return plan.Facts(
        account=found,
        group=None if found else run.group(SYSTEM, wanted.user),
        taken=frozenset() if found else run.taken(SYSTEM),
        owners=_owners([*wanted.folders, *(str(Path(one).parent) for one in wanted.secrets)]),
        former=former,
        stop_s=_stop_s(tree),
        printed=run.printed(SYSTEM),
        let_in=run.let_in(SYSTEM, wanted.programs),
        newsyslog=SYSTEM.place(plan.NEWSYSLOG).exists(),
    )


def _user(tree: Mapping[str, Any] | None) -> str:
    """The installed service's user, else the one that would be made."""
    return str((tree or {}).get("UserName", "")) or DEFAULT_USER


def _elsewhere(user: str) -> plan.Account | None:
    """For --dry-run on another system: a user to be made is made, and any other exists."""
    return None if user.startswith("_") else plan.Account(501, 20)


def _owners(folders: Sequence[str]) -> dict[str, int]:
    return {one: Path(one).stat().st_uid for one in folders if Path(one).is_dir()}


def _stop_s(tree: Mapping[str, Any] | None) -> float:
    """How long the installed service may take to end: launchd's limit, or its default of 20 s, and a little more."""
    allowed = (tree or {}).get("ExitTimeOut", 20)
    return (allowed if isinstance(allowed, int) else 20) + 10.0


# ---- uninstall ----


def _uninstall(args: argparse.Namespace, load: Load, places: Places) -> int:
    found = _found(args, load, places)
    if not args.dry_run:
        run.may(SYSTEM, "uninstall")
        _ask(args, found)
    steps = removal.removal(found, user=args.user, models=args.models)
    if args.dry_run:
        print(script(steps), end="")
    else:
        run.Runner(SYSTEM, "uninstall", _note).run(steps)
    head = "# stays: " if args.dry_run else "stays: "
    for line in removal.stays(found, user=args.user, models=args.models):
        print(f"{head}{line}")
    if not args.dry_run:
        print(f"{launchd.LABEL} is not installed" + ("; nothing was to be removed" if not steps else " any more"))
    return 0


def _ask(args: argparse.Namespace, found: removal.Found) -> None:
    """On a terminal, for what is never removed without a word."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    models = [f"{place.path}/{name}" for place in found.places for name in place.asked]
    if models and not args.models:
        args.models = _yes(f"remove {' and '.join(models)}?")
    if removal.removable_user(found) and not args.user:
        args.user = _yes(f"remove the user {found.user}?")


def _yes(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _found(args: argparse.Namespace, load: Load, places: Places) -> removal.Found:
    _, tree = _former()
    config, path = _loaded(args, load)
    user = _user(tree)
    account = run.account(SYSTEM, user)
    home, logs = _folders(tree, config, places)
    away = model_folder(config, home) if config and home else None
    return removal.Found(
        loaded=run.printed(SYSTEM) is not None,
        stop_s=_stop_s(tree),
        files=[one for one in removal.files() if SYSTEM.place(one).exists()],
        user=user,
        uid=account.uid if account else None,
        rules=run.ruled(SYSTEM, run.interpreters()) if SYSTEM.mac else [],
        places=_contents(home, logs),
        models_elsewhere=str(away) if away and home and away.is_dir() and not away.is_relative_to(home) else "",
        config=str(path.resolve()) if path and path.is_file() else "",
    )


def _loaded(args: argparse.Namespace, load: Load) -> tuple[AgentConfig | None, Path | None]:
    """A configuration that is gone or wrong keeps nothing installed."""
    try:
        return load(args)
    except RackError as error:
        if args.config is not None:
            raise
        _note(f"uninstall: without a configuration ({error.message})")
        return None, None


def _folders(
    tree: Mapping[str, Any] | None, config: AgentConfig | None, places: Places
) -> tuple[Path | None, Path | None]:
    """Of the state and the logs: as the service was started, else as the configuration says."""
    if tree and "WorkingDirectory" in tree and "StandardOutPath" in tree:
        return Path(tree["WorkingDirectory"]), Path(tree["StandardOutPath"]).parent
    return places(config) if config else (None, None)


def _contents(home: Path | None, logs: Path | None) -> list[removal.Place]:
    """Logs first: they may lie in the state folder, or be there."""
    state = "|".join(re.escape(one) for one in (*_STATE, LOCK_NAME) if one not in (*_ASKED, "logs"))
    of_state, of_logs = re.compile(f"{state}|{_LOGS}" if home == logs else state), re.compile(_LOGS)
    found = [_place(logs, of_logs, (), home)] if logs is not None and logs.is_dir() and home != logs else []
    return [*found, _place(home, of_state, _ASKED, logs)] if home is not None and home.is_dir() else found


def _place(folder: Path, ours: re.Pattern[str], asked: Sequence[str], inner: Path | None) -> removal.Place:
    """``inner`` is a folder of ours in it, which is a place itself."""
    names = sorted(
        one.name for one in folder.iterdir() if inner is None or inner == folder or not inner.is_relative_to(one)
    )
    mine = [name for name in names if ours.fullmatch(name)]
    wanted = [name for name in names if name in asked]
    other = [name for name in names if name not in {*mine, *wanted}]
    return removal.Place(str(folder), mine, wanted, other)


def _note(line: str) -> None:
    print(f"mlxrack-agent: {line}", file=sys.stderr)
