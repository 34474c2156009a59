"""What installing the service takes on this Mac, from what was seen of it. Pure."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agent.operator.service import launchd
from agent.operator.service.steps import Command, Step, Write, command
from shared.errors import Halt

NEWSYSLOG = "/etc/newsyslog.d/dev.mlxrack.conf"
"""Versions before 0.2 had newsyslog rename launchd's output file, which goes on into the renamed one."""
FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"
DSCL, INSTALL, SUDO = "/usr/bin/dscl", "/usr/bin/install", "/usr/bin/sudo"
OP_FOLDER = "/etc/mlxrack"
"""Of the token for 1Password; root's, so that the service cannot put another one in its place."""
STOP_MARGIN_S = 30
"""Time that launchd allows beyond the drain: for ending loaders, the last window and the last push."""
_IDS: tuple[int, ...] = (*range(450, 500), *range(449, 400, -1))
"""Numbers of role accounts, which the login window does not show."""


class Account(NamedTuple):
    """The numbers of a user and of its group."""

    uid: int
    gid: int


class Wanted(NamedTuple):
    """What is to be installed. ``reads`` are files that the service cannot do without, ``secrets`` those of its
    secrets, ``programs`` the executables that macOS may know its Python by."""

    user: str
    plist: str
    arguments: Sequence[str]
    folders: Sequence[str]
    output: str
    reads: Sequence[str]
    secrets: Sequence[str] = ()
    programs: Sequence[str] = ()
    needs_op: bool = False
    restart: bool = False


class Facts(NamedTuple):
    """What was seen. ``owners`` are those of folders that exist; ``former`` is the installed property list, ``stop_s``
    the time that it allows for a stop, ``printed`` what launchd says of the service, None where it does not know it;
    ``let_in`` are programs that the firewall allows already."""

    account: Account | None = None
    group: int | None = None
    taken: frozenset[int] = frozenset()
    owners: dict[str, int] = {}  # noqa: RUF012
    former: str | None = None
    stop_s: float = 0.0
    printed: str | None = None
    let_in: frozenset[str] = frozenset()
    newsyslog: bool = False


class Plan(NamedTuple):
    """``prepare`` leaves the service that runs alone, ``swap`` replaces it (empty where nothing is to be replaced) and
    ``undo`` puts the former one back."""

    prepare: list[Step]
    swap: list[Step]
    finish: list[Step]
    undo: list[Step]


def plan(wanted: Wanted, facts: Facts) -> Plan:
    """Raises Halt where the user or its folders cannot be made."""
    account = facts.account or _new_account(wanted.user, facts)
    same = facts.former == wanted.plist and not wanted.restart and facts.printed is not None
    healthy = same and launchd.state(facts.printed or "") == "running"
    keeps = healthy and launchd.holds(facts.printed or "", wanted.arguments)
    prepare = [
        *([] if facts.account else _user(wanted.user, account)),
        *_folders(wanted, facts, account),
        *_checks(wanted),
        *_firewall(wanted, facts),
    ]
    finish: list[Step] = [command("/bin/rm", "-f", NEWSYSLOG)] if facts.newsyslog else []
    if keeps:
        return Plan(prepare, [], finish, [])
    prepare += [
        Write(launchd.NEW_PLIST, wanted.plist),
        command("/usr/bin/plutil", "-lint", launchd.NEW_PLIST, why="this is a fault of mlxrack; report it"),
    ]
    stop_s = facts.stop_s or STOP_MARGIN_S
    stop = launchd.stop(stop_s) if facts.printed is not None else []
    swap = [*stop, command("/bin/mv", "-f", launchd.NEW_PLIST, launchd.PLIST), *launchd.start()]
    return Plan(prepare, swap, finish, _undo(facts, stop_s))


def _undo(facts: Facts, stop_s: float) -> list[Step]:
    before: list[Step] = [*launchd.stop(stop_s), command("/bin/rm", "-f", launchd.NEW_PLIST)]
    if facts.former is None:
        return [*before, command("/bin/rm", "-f", launchd.PLIST)]
    again = launchd.start() if facts.printed is not None else []
    return [*before, Write(launchd.PLIST, facts.former), *again]


def free_id(taken: frozenset[int]) -> int:
    """A number that no user and no group has. Raises Halt when all are taken."""
    for number in _IDS:
        if number not in taken:
            return number
    raise Halt("install: every number from 401 to 499 is taken; name a user that exists with --user")


def _new_account(user: str, facts: Facts) -> Account:
    if not user.startswith("_"):
        raise Halt(
            f"install: user {user} does not exist; name one that does with --user. One that install makes, without a "
            "login, has a name that begins with _, like _mlxrack"
        )
    gid = facts.group if facts.group is not None else free_id(facts.taken)
    return Account(gid if gid not in facts.taken else free_id(facts.taken), gid)


def _user(user: str, account: Account) -> Iterator[Step]:
    """A role account: no password, no shell, no home, not in the login window. A half-made one is completed."""
    group = {"PrimaryGroupID": str(account.gid), "RealName": "mlxrack", "Password": "*"}
    person = {
        **group,
        "UniqueID": str(account.uid),
        "NFSHomeDirectory": "/var/empty",
        "UserShell": "/usr/bin/false",
        "IsHidden": "1",
    }
    for record, attributes in ((f"/Groups/{user}", group), (f"/Users/{user}", person)):
        yield command(DSCL, ".", "-create", record, why="the user cannot be made; run the command with sudo")
        for name, value in attributes.items():
            yield command(DSCL, ".", "-create", record, name, value)


def _folders(wanted: Wanted, facts: Facts, account: Account) -> Iterator[Step]:
    owner = ("-o", str(account.uid), "-g", str(account.gid))
    for folder in wanted.folders:
        if (seen := facts.owners.get(folder, 0)) not in (0, account.uid):
            raise Halt(
                f"install: {folder} belongs to user {seen}, and the service is to run as {wanted.user} "
                f"({account.uid}); run `sudo chown -R {account.uid}:{account.gid} '{folder}'`, or name its user with "
                "--user"
            )
        yield command(INSTALL, "-d", *owner, "-m", "700", folder)
    for folder in dict.fromkeys(_parent(one) for one in wanted.secrets):
        if folder not in facts.owners and folder not in wanted.folders:
            yield command(INSTALL, "-d", *owner, "-m", "700", folder)
    if wanted.needs_op:
        yield command(INSTALL, "-d", "-o", "root", "-g", "wheel", "-m", "755", OP_FOLDER)
    yield command("/usr/bin/touch", wanted.output)
    yield command("/usr/sbin/chown", "-h", f"{account.uid}:{account.gid}", wanted.output)
    yield command("/bin/chmod", "600", wanted.output)


def _checks(wanted: Wanted) -> Iterator[Step]:
    """As the user itself: a folder above may be closed to it."""
    as_user = (SUDO, "-n", "-u", wanted.user, "/bin/test")
    for path in wanted.reads:
        flag = "-x" if path == wanted.arguments[0] else "-r"
        why = f"user {wanted.user} cannot read it; let it in (chmod, chown), or name another user with --user"
        yield command(*as_user, flag, path, why=why)
    for path in wanted.secrets:
        why = f"user {wanted.user} has no secret there: `sudo install -m 600 -o {wanted.user} YOUR_FILE '{path}'`"
        yield command(*as_user, "-r", path, why=why, optional=True)


def _firewall(wanted: Wanted, facts: Facts) -> Iterator[Step]:
    why = (
        "the firewall does not take the rule (a managed Mac?): allow it in System Settings, Network, Firewall, if that "
        "is on"
    )
    for program in wanted.programs:
        if program not in facts.let_in:
            yield Command((FIREWALL, "--add", program), why=why, optional=True)
            yield Command((FIREWALL, "--unblockapp", program), why=why, optional=True)


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"
