"""What a Mac's settings say, and that the command which a sentence gives puts them right. The texts have the shape of
published outputs; the values are made up."""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AgentConfig, Node
from agent.operator import doctor, mac_checks
from agent.operator.checks import Finding
from agent.operator.first_node import machine
from agent.operator.mac import network, power, readings
from agent.operator.resolved import Resolver
from agent.process.gpu import Device
from tests.mac_stand_ins import put

MINI = """System-wide power settings:
Currently in use:
 disksleep            10
 powernap             1
 womp                 1
 networkoversleep     0
 sleep                10 (sleep prevented by sharingd, powerd, powerd, bluetoothd)
 Sleep On Power Button 1
 ttyskeepawake        1
 tcpkeepalive         1
 autorestart          0
 standby              0
 displaysleep         10
"""
MINI_CUSTOM = """AC Power:
 Sleep On Power Button 1
 autorestartatconnect 0
 standby              0
 powermode            0
 womp                 1
 sleep                10
 autorestart          0
 disksleep            10
"""
LAPTOP_CUSTOM = """Battery Power:
 hibernatefile        /var/vm/sleepimage
 sleep                1
 lowpowermode         1
AC Power:
 hibernatefile        /var/vm/sleepimage
 sleep                0
 disksleep            0
 womp                 1
 lowpowermode         0
"""
SERVER = {"sleep": "0", "disksleep": "0", "womp": "1", "autorestart": "1", "powermode": "0", "standby": "0"}


def shown(settings: dict[str, str], head: str = "AC Power") -> str:
    return "\n".join([f"{head}:", *(f" {name:20} {value}" for name, value in settings.items())])


def verdicts(found: Iterator[Finding]) -> dict[str, str]:
    return {one.what: one.verdict for one in found}


def seen(found: Iterator[Finding], what: str) -> str:
    return next(one.seen for one in found if one.what == what)


def test_every_published_shape_of_pmset_is_read() -> None:
    assert power.parse(MINI)["Currently in use"]["Sleep On Power Button"] == "1"
    assert power.parse(MINI)["Currently in use"]["sleep"] == "10"
    assert power.preventing(MINI) == ["sharingd", "powerd", "bluetoothd"]
    assert power.parse(LAPTOP_CUSTOM)["Battery Power"]["hibernatefile"] == "/var/vm/sleepimage"
    unindented = "System-wide power settings:\nSleepDisabled          1\nCurrently in use:\nsleep                0\n"
    assert power.parse(unindented) == {
        "System-wide power settings": {"SleepDisabled": "1"},
        "Currently in use": {"sleep": "0"},
    }
    old = "Active Profiles:\nBattery Power     -1\nAC Power          -1*\nCurrently in use:\n sleep\t5\n"
    assert power.parse(old) == {
        "Active Profiles": {"Battery Power": "-1", "AC Power": "-1"},
        "Currently in use": {"sleep": "5"},
    }


LINES = st.one_of(
    st.text(max_size=40),
    st.builds(
        " {} {} {}".format,
        st.sampled_from(["sleep", "disksleep", "womp", "autorestart", "lowpowermode", "powermode", "standby"]),
        st.sampled_from(["0", "1", "-1", "10", "/x", "99999999999", "x", ""]),
        st.sampled_from(["", "(sleep prevented by )", "("]),
    ),
    st.sampled_from(
        ["AC Power:", "UPS Power:", "FileVault is On.", "State = 1", "1 : /p", "(Block incoming connections)"]
    ),
)
TEXTS = st.lists(LINES, max_size=12).map("\n".join)


@given(TEXTS, TEXTS)
def test_any_text_gets_a_verdict(live: str, custom: str) -> None:
    assert list(power.judge(live, custom))
    assert power.filevault(live).verdict
    assert network.firewall(live, custom, live, ["/p"]).verdict


def test_a_mini_as_it_is_sold_is_told_what_to_set() -> None:
    found = list(power.judge(MINI, MINI_CUSTOM))
    assert verdicts(iter(found)) == {"sleep": "warning", "power loss": "warning", "energy mode": "ok"}
    sleep = seen(iter(found), "sleep")
    assert "sleeps after 10 min" in sleep
    assert "kept awake now by sharingd, powerd, bluetoothd" in sleep
    assert sleep.endswith("`sudo pmset -a sleep 0 disksleep 0`")
    assert seen(iter(found), "power loss").endswith("`sudo pmset -a autorestart 1`")
    assert seen(iter(found), "energy mode") == "automatic"


def test_the_settings_on_mains_count_and_those_on_battery_do_not() -> None:
    found = list(power.judge("", LAPTOP_CUSTOM))
    assert verdicts(iter(found)) == {"sleep": "ok", "power loss": "warning", "energy mode": "ok"}
    assert "lists no autorestart here" in seen(iter(found), "power loss")
    ups = shown({**SERVER, "sleep": "5"}, "UPS Power")
    assert verdicts(power.judge("", f"{shown(SERVER)}\n{ups}"))["sleep"] == "warning", "a power supply takes over"


@pytest.mark.parametrize(
    ("changed", "what", "words"),
    [
        ({"sleep": "1", "standby": "1"}, "sleep", "it then also goes into standby"),
        ({"disksleep": "10"}, "sleep", "disks stop after 10 min"),
        ({"womp": "0"}, "sleep", "`sudo pmset -a womp 1`"),
        ({"autorestart": "0"}, "power loss", "stays off until somebody presses its button"),
        ({"lowpowermode": "1"}, "energy mode", "`sudo pmset -a lowpowermode 0`"),
        ({"powermode": "1"}, "energy mode", "`sudo pmset -a powermode 0`"),
    ],
)
def test_each_setting_that_harms_a_server_is_a_warning(changed: dict[str, str], what: str, words: str) -> None:
    found = list(power.judge("", shown({**SERVER, **changed})))
    assert {one.what for one in found if one.verdict != "ok"} == {what}
    assert words in seen(iter(found), what)


def test_energy_modes_have_names() -> None:
    for changed, name in (({"powermode": "2"}, "high power"), ({"powermode": "0"}, "automatic"), ({}, "automatic")):
        assert seen(power.judge("", shown({**SERVER, **changed})), "energy mode") == name
    without = {name: value for name, value in SERVER.items() if name != "powermode"}
    assert seen(power.judge("", shown({**without, "highpowermode": "1"})), "energy mode") == "high power"
    assert seen(power.judge("", shown({**without, "lowpowermode": "0"})), "energy mode") == "not low power"


def test_disablesleep_counts_as_never() -> None:
    live = "System-wide power settings:\n SleepDisabled\t\t1\nCurrently in use:\n sleep                10\n"
    assert verdicts(power.judge(live, ""))["sleep"] == "ok"


def test_stored_settings_without_sleep_leave_it_to_the_live_ones() -> None:
    assert "after 10 min" in seen(power.judge(" Currently in use:\n sleep 10\n", "AC Power:\n womp 1\n"), "sleep")


@pytest.mark.parametrize("unit", [" ", "a ", "\n", "pid 1("])
def test_a_flood_is_judged_in_time_that_grows_with_it(unit: str) -> None:
    """Where the search is quadratic this takes hours."""
    text = "a" + unit * (1 << 20)
    assert list(power.judge(text, text))
    assert power.awake(text, 1).verdict == "warning"


def test_a_pmset_that_says_nothing_is_no_good_news() -> None:
    (found,) = power.judge("", "")
    assert (found.verdict, "look at System Settings, Energy" in found.seen) == ("warning", True)


@pytest.mark.parametrize(
    ("status", "verdict", "words"),
    [
        ("FileVault is Off.", "ok", "starts without a password"),
        ("FileVault is On.", "warning", "after a power loss no service starts"),
        ("FileVault is On.\nDecryption in progress: Percent completed = 12.5", "warning", "being decrypted"),
        ("FileVault is Off.\nEncryption in progress: Percent completed = 3", "warning", "being encrypted"),
        ("FileVault is Off.\nDeferred enablement appears to be active for user 'a'.", "warning", "at the next login"),
        ("", "warning", "does not say"),
        ("FileVault is Off, but will be enabled after the next restart.", "warning", "at the next restart"),
        ("Encryption paused: Percent completed = 33\nFileVault is On.", "warning", "being encrypted"),
    ],
)
def test_filevault(status: str, verdict: str, words: str) -> None:
    found = power.filevault(status)
    assert (found.verdict, words in found.seen) == (verdict, True)
    planned = "authrestart" in power.filevault(status, restarts="true").seen
    assert planned is (status == "FileVault is On.")


# ---- the firewall ----

PYTHON = "/opt/mlxrack/bin/python3.14"
LISTED = """Total number of apps = 3 
1 : /usr/sbin/smbd 
             (Allow incoming connections) 
2 : /Applications/An App: with a colon.app 
             ( Block incoming connections ) 
3 : {0}
             ({1} incoming connections)
"""  # noqa: W291
ON, OFF = "Firewall is enabled. (State = 1)", "Firewall is disabled. (State = 0)"
OPEN, SHUT = "Firewall has block all state set to disabled.", "Firewall has block all state set to enabled."


def test_the_rules_of_the_firewall_are_read() -> None:
    assert network.apps(LISTED.format(PYTHON, "Allow")) == [
        network.App("/usr/sbin/smbd", True),
        network.App("/Applications/An App: with a colon.app", False),
        network.App(PYTHON, True),
    ]


@pytest.mark.parametrize(
    ("state", "block_all", "listed", "verdict", "words"),
    [
        (OFF, SHUT, "", "ok", "off"),
        (ON, OPEN, LISTED.format(PYTHON, "Allow"), "ok", f"lets {PYTHON} in"),
        (ON, OPEN, LISTED.format("/opt/F/3.14/Resources/Python.app", "Allow"), "ok", "Python.app"),
        (ON, OPEN, LISTED.format(PYTHON, "Block"), "problem", f"--unblockapp '{PYTHON}'`"),
        (
            ON,
            OPEN,
            LISTED.format("/opt/other/python", "Allow"),
            "warning",
            f"--add '{PYTHON}' --unblockapp '{PYTHON}'`",
        ),
        (ON, OPEN, "", "warning", "without a rule"),
        (ON, SHUT, LISTED.format(PYTHON, "Allow"), "problem", "--setblockall off`"),
        ("Firewall is enabled. (State = 2)", "", "", "problem", "--setblockall off`"),
        (ON, "Block all ENABLED! ", "", "problem", "blocks all"),
        (ON, "Block all DISABLED! ", LISTED.format(PYTHON, "Allow"), "ok", "lets"),
        (
            "Firewall settings cannot be modified from command line on managed Mac computers.",
            "",
            "",
            "warning",
            "managed",
        ),
    ],
)
def test_the_firewall(state: str, block_all: str, listed: str, verdict: str, words: str) -> None:
    found = network.firewall(state, block_all, listed, [PYTHON, "/opt/F/3.14/"])
    assert (found.verdict, words in found.seen) == (verdict, True), found.seen


# ---- a whole Mac ----


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the programs of macOS, as a mini is sold, with its firewall on."""
    sold = {**SERVER, "sleep": "10", "disksleep": "10", "autorestart": "0", "womp": "0", "powermode": "1"}
    folder = put(
        tmp_path,
        *("pmset", "fdesetup", "socketfilterfw", "sudo"),
        pmset={
            "sources": {"AC Power": sold, "UPS Power": dict(sold)},
            "by": ["powerd"],
            "system": {"SleepDisabled": "0"},
        },
        fdesetup={"status": "FileVault is Off."},
        socketfilterfw={"state": 1, "block_all": True, "apps": {}},
    )
    monkeypatch.setattr(readings, "FOLDERS", (str(folder),))
    return folder


def test_what_is_printed_puts_a_mac_right_that_is_as_it_is_sold(mac: Path) -> None:
    wrong = {"sleep": "warning", "power loss": "warning", "energy mode": "warning", "firewall": "problem"}
    assert {what: v for what, v in verdicts(readings.settings()).items() if v != "ok"} == wrong
    for _ in range(2):  # once nothing is blocked, Python's own rule is asked for
        for one in readings.settings():
            for command in re.findall(r"`([^`]+)`", one.seen):
                line = command.replace(network.FIREWALL, "socketfilterfw")
                subprocess.run(["bash", "-euc", line], env={"PATH": f"{mac}:/usr/bin:/bin"}, check=True, timeout=30)
    assert set(verdicts(readings.settings()).values()) == {"ok"}


def test_programs_that_are_missing_fail_or_wait_are_no_good_news(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(mac, fdesetup={})
    (mac / "fdesetup.json").write_text("{}")
    (mac / "pmset").write_text("#!/bin/sh\nsleep 60\n")
    (mac / "socketfilterfw").unlink()
    monkeypatch.setattr(readings, "ANSWER_S", 0.2)
    monkeypatch.setattr(readings, "FOLDERS", (str(mac),))
    assert verdicts(readings.settings()) == {"sleep": "warning", "FileVault": "warning", "firewall": "warning"}


# ---- Local Network privacy ----


def test_a_peer_that_only_the_agent_cannot_reach_is_kept_from_it_by_macos() -> None:
    with socket.create_server(("127.0.0.1", 0)) as peer, socket.create_server(("127.0.0.1", 0)) as gone:
        port, refused = peer.getsockname()[1], gone.getsockname()[1]
        gone.close()
        no_route = "peer http://x: there is no route to x; check its address, and the network of both machines"
        peers = [
            {"node": "n2", "url": f"http://127.0.0.1:{port}", "problem": no_route},
            {"node": "n3", "url": f"http://127.0.0.1:{refused}", "problem": no_route},
            {"node": "n4", "url": "http://nowhere.invalid:8470", "problem": no_route},
            {"node": "n5", "url": "http://127.0.0.1:1", "problem": "nothing listens there"},
        ]
        blocked, away = readings.local_network({"peers": peers})
    assert (blocked.verdict, "no route to n2, n3, and this shell connects" in blocked.seen) == ("problem", True)
    assert "sudo mlxrack-agent install" in blocked.seen
    assert (away.verdict, "neither the agent nor this shell has a route to n4" in away.seen) == ("ok", True)
    assert list(readings.local_network(None)) == []


# ---- doctor ----


@pytest.mark.parametrize(
    ("awake", "found"),
    [
        ({"state": "held", "pid": 7, "problem": ""}, [("ok", "process 7")]),
        ({"state": "not_held", "pid": None, "problem": ""}, [("warning", "is being started")]),
        ({"state": "not_held", "pid": None, "problem": "it ended"}, [("warning", "it ended")]),
        ({"state": "not_needed", "pid": None, "problem": ""}, []),
        ({}, []),  # an older agent
    ],
)
def test_doctor_says_whether_the_agent_keeps_the_machine_awake(
    awake: dict[str, Any], found: list[tuple[str, str]]
) -> None:
    said = list(mac_checks.awake({"awake": awake}))
    assert [(one.verdict, words in one.seen) for one, (_, words) in zip(said, found, strict=True)] == [
        (verdict, True) for verdict, _ in found
    ]
    assert list(mac_checks.awake(None)) == []


def test_doctor_asks_a_mac_for_its_settings(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PLATFORM", "darwin")
    config = AgentConfig(node=Node(id="n1", rack="r"))
    device = Device(recommended_bytes=None, reason="")
    found = doctor._mac(config, Resolver({}, "this shell"), device, {}, to_look_at=False)
    asked = {one.what for one in found}
    assert {"sleep", "power loss", "energy mode", "FileVault", "firewall"} <= asked
