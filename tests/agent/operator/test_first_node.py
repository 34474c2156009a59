"""`doctor --first-node` on a fake Mac, `--replay` elsewhere, and archives that somebody made to do harm."""

import contextlib
import gzip
import io
import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import cli
from agent.config import AgentConfig, Node
from agent.operator.first_node import bundle, collect, judges, judging, masking
from agent.operator.first_node.bundle import FORMAT, Bundle, Taken
from agent.operator.first_node.steps import Step, steps
from agent.operator.mac import network
from shared.bucket import Store
from shared.errors import Refused
from tests.agent.operator.fake_mac import ASSERTIONS, PLANTED, PROGRAMS, build

AGENT = (sys.executable, "-P", "-m", "agent")
Ran = tuple[Path, list[dict[str, str]], str]


def doctor(*options: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    run = subprocess.run(
        [*AGENT, "doctor", *options], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    return run.returncode, run.stdout, run.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """A whole and a broken fake Mac, both looked at by the command: archive, verdicts, standard error."""

    def one(name: str) -> Ran:
        folder = tmp_path_factory.mktemp(name)
        path = folder / "bundle.tar.gz"
        _, said, progress = doctor("--first-node", str(path), "--json", env=build(folder, broken=name == "broken"))
        assert path.exists(), progress
        return path, json.loads(said), progress

    with ThreadPoolExecutor(2) as both:
        return dict(zip(("whole", "broken"), both.map(one, ("whole", "broken")), strict=True))


def of(found: list[dict[str, str]], what: str) -> tuple[str, str]:
    (one,) = (one for one in found if one["what"] == what)
    return one["verdict"], one["seen"]


@pytest.mark.parametrize("name", ["whole", "broken"])
def test_a_bundle_made_by_the_fake_mac_replays_to_the_same_verdicts(runs: dict[str, Ran], name: str) -> None:
    path, made, _ = runs[name]
    _, said, _ = doctor("--replay", str(path), "--json")
    assert json.loads(said) == made
    _, table, _ = doctor("--replay", str(path))
    assert all(one["what"] in table for one in made)


def test_a_whole_mac_is_judged_by_what_it_said(runs: dict[str, Ran]) -> None:
    _, found, progress = runs["whole"]
    assert of(found, "platform")[0] == "ok"
    assert of(found, "memory")[0] == "ok"
    assert "7.8 GB used, vm_stat: 7.8 GB" in of(found, "memory")[1]
    assert "2.9 GB of swap used by sysctlbyname, 2.9 GB by sysctl" in of(found, "swap")[1]
    assert "normal; 62 % free" in of(found, "memory pressure")[1]
    assert of(found, "thermal pressure") == ("ok", "notify(3) says nominal, notifyutil nominal")
    assert "package 61.2 °C" in of(found, "SMC")[1]
    assert "12.5 W" in of(found, "SMC")[1]
    assert of(found, "energy counters")[0] == "ok"
    assert of(found, "GPU statistics") == ("ok", "busy 37 %, 2.5 GB in use")
    assert of(found, "launchd") == ("ok", "state running, runs 3, last exit code 0")
    assert "0 of 64 tokens differ" in of(found, "answers")[1]
    assert of(found, "versions")[0] == "ok"
    assert of(found, "macOS") == ("ok", "macOS 27.0")
    assert of(found, "hardware") == ("ok", "Mac16,10, Apple M4")
    assert "M4" in of(found, "chip")[1]
    assert of(found, "power assertions") == ("ok", "kept awake by caffeinate; no running agent says that it does")
    assert of(found, "GPU memory")[0] == "warning"
    if os.geteuid() == 0:
        assert of(found, "powermetrics") == ("ok", "1 samples; the chip draws 2.80 W")
    assert "smc: " in progress, "each step with its time"


def test_doctor_and_the_archive_judge_settings_alike(runs: dict[str, Ran]) -> None:
    path, found, _ = runs["whole"]
    inner = json.loads(bundle.read(path).taken["doctor"].text)
    for what in ("sleep", "power loss", "energy mode", "FileVault", "firewall"):
        assert of(found, what) == of(inner, what)
    assert of(found, "sleep")[0] == of(found, "FileVault")[0] == of(found, "firewall")[0] == "ok"


@pytest.mark.parametrize(
    ("pid", "verdict", "words"),
    [(4711, "ok", "lists the agent's caffeinate"), (4712, "warning", "does not list it"), (None, "ok", "no running")],
)
def test_what_the_agent_says_of_sleep_is_compared_with_macos(pid: int | None, verdict: str, words: str) -> None:
    state = {"state": "held" if pid else "not_held", "pid": pid, "problem": "" if pid else "it ended"}
    texts = {"pmset-assertions": ASSERTIONS, "status": json.dumps({"models": [], "awake": state})}
    found = judges.verdicts(Bundle("", "", "darwin", {name: Taken(text) for name, text in texts.items()}))
    by = {one.what: one for one in found}
    assert (by["power assertions"].verdict, words in by["power assertions"].seen) == (verdict, True)
    assert by["awake"].verdict == ("ok" if pid else "warning")


@pytest.mark.parametrize(
    ("step", "text", "verdict"),
    [
        ("sw-vers", "ProductVersion: 13.6.1\n", "problem"),
        ("sw-vers", "ProductVersion:\t14\n", "ok"),
        ("sw-vers", "nothing", "warning"),
        ("hardware", "Modellkennung: Mac16,10\n", "warning"),
        ("hardware", "      Model Identifier: Mac16,10\n", "ok"),
    ],
)
def test_each_version_and_name_has_a_verdict(step: str, text: str, verdict: str) -> None:
    found = judges.verdicts(Bundle("", "", "darwin", {step: Taken(text)}))
    assert [one.verdict for one in found if one.what in ("macOS", "hardware")] == [verdict]


def test_names_in_the_output_of_settings_are_not_kept() -> None:
    keep = {step.name: step.keep for step in steps("", "s", 60.0)}
    listed = "1 : /Applications/Diary.app\n(Allow incoming connections)\n2 : /opt/python3\n(Block incoming connections)"
    assert network.apps(keep["firewall-apps"](listed)) == [network.App("/opt/python3", False)]
    assert "bertram" not in keep["filevault"]("Deferred enablement appears to be active for user 'bertram'.")
    assert "berts" not in keep["pmset-assertions"](ASSERTIONS)


def test_a_broken_mac_says_so_in_words(runs: dict[str, Ran]) -> None:
    _, found, _ = runs["broken"]
    assert of(found, "SMC") == ("warning", "smc: exit 1: SMC: service AppleSMC not found")
    assert "kern_return by words asked: 38 words: -307); vm_stat says 7.8 GB used" in of(found, "memory")[1]
    assert "inconsistent values" in of(found, "swap")[1]
    assert "did not advance although a core was busy" in of(found, "energy counters")[1]
    assert of(found, "launchd")[1].startswith("launchctl: exit 113: Could not find service")
    assert "status 5" in of(found, "thermal pressure")[1]


@pytest.mark.parametrize("name", ["whole", "broken"])
def test_nothing_planted_is_in_an_archive_and_it_is_its_owners_alone(runs: dict[str, Ran], name: str) -> None:
    path, _, _ = runs[name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as archive:
        texts = {m.name: archive.extractfile(m).read().decode() for m in archive}  # type: ignore[union-attr]
    assert len(texts) > 10
    secrets = {
        **PLANTED,
        "variable": "tok-planted",
        "token": "ops_abcdefgh12345678",
        "key of the SMC": b"SECRETSN".hex(),
    }
    leaks = [(kind, where) for kind, secret in secrets.items() for where, text in texts.items() if secret in text]
    assert not leaks


def test_a_corrected_parser_changes_the_verdict_of_an_old_archive(
    runs: dict[str, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bundle.read(runs["whole"][0])
    before = {one.what: one.seen for one in judges.verdicts(old)}
    monkeypatch.setattr("agent.telemetry.sensors.smc.is_valid", lambda celsius: celsius < 60.0)
    after = {one.what: one.seen for one in judges.verdicts(old)}
    assert "package 52.5 °C" in after["SMC"]
    assert {what for what in before if before[what] != after[what]} == {"SMC"}


# ---- masking ----


@given(
    st.sampled_from(sorted(PLANTED)),
    st.sampled_from(sorted(PROGRAMS)),
    st.integers(0),
    st.sampled_from(["\n", " ", "\t"]),
)
def test_whatever_is_planted_between_words_of_an_output_is_masked(
    kind: str, program: str, at: int, around: str
) -> None:
    said = PROGRAMS[program]
    gaps = [n for n, letter in enumerate(said) if letter in " \n"] or [len(said)]
    place = gaps[at % len(gaps)]
    text = said[:place] + around + PLANTED[kind] + around + said[place:]
    masked = masking.masked(text)
    assert PLANTED[kind] not in masked
    assert masking.masked(masked) == masked


@given(
    st.dictionaries(
        st.text(max_size=9), st.sampled_from(sorted(PLANTED.values())) | st.integers() | st.text(max_size=9)
    )
)
def test_a_masked_document_is_still_one(tree: dict[str, Any]) -> None:
    masked = masking.masked_json(json.dumps(tree), masking.masked)
    assert isinstance(json.loads(masked), dict)
    assert not [one for one in PLANTED.values() if one in masked]


@pytest.mark.parametrize(
    "text",
    [
        *PROGRAMS.values(),
        "host_statistics64 with 104 words, kern_return -307, 0xe00002c2",
        "Darwin Kernel Version 27.0.0; 11881.81.2; 2026-11-27T01:46:34Z; 01:46:34.123; 127.0.0.1:8080 and ::1",
    ],
)
def test_what_judges_read_is_not_masked(text: str) -> None:
    kept = "\n".join(line for line in text.splitlines() if "Serial" not in line and "TOKEN" not in line)
    assert masking.masked(kept) == kept


def test_a_name_that_is_a_part_of_an_identifier_leaves_it_alone() -> None:
    mask = masking.masker({"host": ["vm"]})
    assert mask("vm.swapusage: 1 on vm.") == "vm.swapusage: 1 on <host>."
    assert masking.masked_json('{"vm": "vm"}', mask) == '{"vm": "<host>"}'


def test_this_machines_names_are_masked_wherever_they_are() -> None:
    mask = masking.masker({"host": ["mini-4", "n1"], "user": ["bert", "root"]})
    assert mask("Mini-4 of bert, n1; N1 root albert n12") == "<host> of <user>, <host>; N1 root albert n12"


ODD = r"""serial-number = <48325758 4b345137>|48325758
kIOSerial_H2WXK4Q7TR_1|H2WXK4Q7TR
S/N: 4711471147|4711471147
UDID 0000813200471147|0000813200471147
Hardware 8F2C9A41-77AB-5C3D-9E10-0A1B2C3D4E5F_x|0A1B2C3D4E5F
en0:a4:83:e7:1b:0c:9d|a4:83
en0:fe80::a483:e7ff:fe1b:c9d|a483
a4-83-e7-1b-0c-9d|1b
ether a483e71b0c9d|a483e71b0c9d
x192.168.77.42|192.168
[2001:db8::1]:8470|2001
::ffff:192.168.1.5|192.168
/Users/Bertram O'Neil/Library|Neil
~bertram/x|bertram
/Volumes/Berts Disk/models|Berts
"Berts Mac mini"._mlxrack._tcp.local.|Berts
Berts-Mac-mini.fritz.box|Berts
no route to mini4.corp.example.com:8470|mini4
mini.tailnet-1234.ts.net|tailnet
op://Private/mlxrack rack/secret|rack
op://vault/item/field|item
dGhpcyBpcyBhIHNlY3JldCB0b2tlbiB3aXRo/c2xhc2hlcyBhbmQrcGx1cw==|c2xhc2hl
wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY|bPxRf
Password: correct horse battery|battery
"password": "a\"b hunter"|hunter
--token hunter2|hunter2
<key>secret</key><array><string>hunter2</string></array>|hunter2
<key>serial</key><data>SDJXWEs=</data>|SDJXWEs
<key>serial</key><integer>4711</integer>|4711
-----BEGIN PRIVATE KEY hunter|hunter
https://bert:hunter2@berts/x|hunter2
SSID: Berts Network|Berts
J\u00fcrgen says|rgen
h2wxk4q7tr|h2wxk4q7tr"""
"""A line of output, and what of it may not stay."""


@pytest.mark.parametrize("line", ODD.splitlines())
def test_what_names_somebody_is_masked_in_odd_places(line: str) -> None:
    text, _, planted = line.rpartition("|")
    mask = masking.masker({"user": ["bert", "Jürgen"], "serial": ["H2WXK4Q7TR"]})
    masked = mask(f"before {text} after\n{text}")
    assert planted not in masked
    assert mask(masked) == masked


@pytest.mark.parametrize("unit", ["a", "a1", " ", "\n", "a@", "a.", ":", "serial", 'a"1', "-----BEGIN ", "op://a/"])
def test_a_flood_is_masked_in_time_that_grows_with_it(unit: str) -> None:
    """Where the search is quadratic this takes hours."""
    assert masking.masked(unit * ((1 << 18) // len(unit))) is not None


def test_a_machine_s_own_serial_and_names_are_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("ioreg", '"IOPlatformSerialNumber" = "ZZTOPQWERTY"'), ("scutil", "Jo’s Mac")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr("agent.operator.mac.readings.FOLDERS", (str(tmp_path),))
    monkeypatch.setattr("agent.operator.first_node.machine.PLATFORM", "darwin")
    store = Store(kind="s3", endpoint="https://s3.berts.firm", bucket="berts-rack")
    mask = masking.masker(collect.names(AgentConfig(node=Node(id="n1", rack="r"), store=store)))
    assert mask("xzztopqwerty on Jo’s Mac, s3.berts.firm/berts-rack") == "x<serial> on <host>, <host>/<host>"


# ---- archives ----


def tarred(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(body) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(body))
    return whole.getvalue()


def manifest(**more: object) -> bytes:
    return json.dumps({"format": FORMAT, "made": "", "version": "", "platform": "darwin", "steps": [], **more}).encode()


M = "first-node/manifest.json"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "first-node/manifest.json|not a whole"),
    "no archive": (b"PK\x03\x04" * 40, "not a whole .tar.gz"),
    "cut": (tarred((M, manifest() * 40))[:60], "not a whole .tar.gz"),
    "bomb": (gzip.compress(bytes(40 << 20)), "unpacks to more than 32 MiB"),
    "large": (tarred((M, bytes(5 << 20))), "a file over 4 MiB"),
    "many": (tarred(*((f"first-node/a{n}.txt", b"") for n in range(120))), "more than 100 files"),
    "link": (tarred((M, b""), kind=tarfile.SYMTYPE, link="/etc/passwd"), "plain files"),
    "hard link": (tarred((M, b""), kind=tarfile.LNKTYPE, link="first-node/smc.txt"), "plain files"),
    "device": (tarred((M, b""), kind=tarfile.CHRTYPE), "plain files"),
    "fifo": (tarred((M, b""), kind=tarfile.FIFOTYPE), "plain files"),
    "folder": (tarred(("first-node", b""), kind=tarfile.DIRTYPE), "plain files"),
    "above": (tarred(("first-node/../../x.txt", b"")), "no bundle has"),
    "absolute": (tarred(("/etc/cron.d/x.txt", b"")), "no bundle has"),
    "twice": (tarred((M, manifest()), (M, manifest())), "two files of one name"),
    "other": (tarred(("first-node/smc.txt", b"")), "holds no first-node/manifest.json"),
    "newer": (tarred((M, manifest(format=2))), "its format is 2, and this version reads format 1; upgrade"),
    "older": (tarred((M, manifest(format=0))), "its format is 0, .* the version that made it"),
    "not JSON": (tarred((M, b"{" * 90_000)), "manifest is not JSON"),
    "list": (tarred((M, b"[]")), "its manifest is wrong"),
    "types": (tarred((M, manifest(steps=[{"name": 1}]))), "its manifest is wrong"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_archive_is_refused_with_a_sentence(name: str) -> None:
    raw, why = HOSTILE[name]
    with pytest.raises(Refused, match=why):
        bundle.unpacked(raw)


def test_a_sparse_file_is_refused() -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(M)
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 50), "GNU.sparse.major": "0"}
        archive.addfile(info)
    with pytest.raises(Refused):
        bundle.unpacked(whole.getvalue())


def test_the_command_refuses_what_is_no_file_of_a_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "none"):
        with pytest.raises(Refused, match=r"cannot be read"):
            bundle.read(path)
    (tmp_path / "there").write_text("")
    for place in (tmp_path / "there", tmp_path / "no/such/folder.tar.gz"):
        with pytest.raises(Refused, match=r"exists already|there is no folder"):
            bundle.check_place(place)


def headers(kind: bytes, times: int, record: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(record)
    one = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(-(-len(record) // 512) * 512, b"\0")
    return gzip.compress(one * times + tarfile.TarInfo(M).tobuf() + bytes(1024))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_before_headers_are_refused(kind: bytes) -> None:
    with pytest.raises(Refused, match="not a whole"):
        bundle.unpacked(headers(kind, 10_000, b"11 path=a\n\n"))


def test_an_archive_cut_anywhere_is_refused_or_says_what_is_missing() -> None:
    whole = bundle.packed(Bundle("", "", "darwin", {"smc": Taken("{}")}), "")
    for at in range(0, len(whole) - 1, 7):
        with pytest.raises(Refused):
            bundle.unpacked(whole[:at])


@pytest.mark.parametrize("number", [1e400, -1e400, math.nan, 10**400])
def test_numbers_that_are_none_do_no_harm(number: float) -> None:
    raw = tarred((M, manifest(steps=[{"name": "smc", "seconds": number}])))
    with contextlib.suppress(Refused):
        assert judges.verdicts(bundle.unpacked(raw))


def test_an_archive_cannot_speak_to_the_terminal() -> None:
    taken = {"smc": Taken(error="\x1b]0;x\x07\x1b[2J"), "\x1b[31m": Taken(skipped="this is not a Mac")}
    for one in judges.verdicts(Bundle("", "\x1b[2J", "\x1b[2J", taken)):
        assert one.seen.isprintable()


def test_what_was_written_is_never_in_the_place_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "x.tar.tmp").write_text("mine")
    bundle.write(tmp_path / "x.tar.gz", b"1")
    with pytest.raises(Refused, match="meanwhile"):
        bundle.write(tmp_path / "x.tar.gz", b"2")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.tar.gz": "1", "x.tar.tmp": "mine"}


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Refused, match=r"cannot be written \(File too large\)"):
            bundle.write(tmp_path / "x.tar.gz", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(raw: bytes) -> None:
    for made in (raw, gzip.compress(raw), tarred((M, raw))):
        with pytest.raises(Refused):
            bundle.unpacked(made)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=60) | json_values.map(json.dumps))
def test_whatever_a_step_is_said_to_have_printed_there_is_a_verdict(text: str) -> None:
    taken = {step.name: Taken(text) for step in steps("c", "s", 60.0)}
    found = {one.what for one in judges.verdicts(Bundle("", "", "darwin", taken))}
    assert found >= {*(one.what for one in judges.JUDGES), "platform", "steps", "sleep", "FileVault", "firewall"}


# ---- steps ----


def shell(script: str) -> Step:
    return Step("x", ("sh", "-c", script), mac=False)


def test_a_step_that_hangs_is_cut_with_all_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    one = collect.take(shell(f"echo said; sleep 600 & echo $! > {pids}; wait"), masking.masked, 1.0)
    assert one.text == "said\n"
    assert "did not end within its time" in one.error
    left = int(pids.read_text())
    until = time.monotonic() + 60
    while Path(f"/proc/{left}").exists() and "Z" not in Path(f"/proc/{left}/stat").read_text().split()[2]:
        assert time.monotonic() < until, "its child runs on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("yes 0123456789abcdef", "printed more than 768 KiB"),
        ("echo no 10.1.2.3 >&2; exit 3", "exit 3: no <address>"),
        ("kill -9 $$", "exit -9"),
    ],
)
def test_a_step_that_fails_says_why(script: str, why: str) -> None:
    assert why in collect.take(shell(script), masking.masked, 60.0).error


@pytest.mark.parametrize("piece", [r"\377", "1.1.1.1\\n"])
def test_whatever_a_step_floods_can_be_read_again(piece: str) -> None:
    one = collect.take(shell(f"while :; do printf '{piece * 500}'; done"), masking.masked, 60.0)
    assert "printed more than 768 KiB" in one.error
    assert (len(steps("", "", 60.0)) + 1) * bundle.MOST_TEXT_BYTES < bundle.MOST_BYTES
    made = Bundle("", "", "darwin", {"s": one})
    assert bundle.unpacked(bundle.packed(made, "")) == made


def test_a_step_that_never_pauses_is_ended_at_its_limit() -> None:
    one = collect.take(shell("while :; do echo; done"), masking.masked, 0.3)
    assert "did not end within its time" in one.error


def test_a_step_that_ignores_signals_is_ended() -> None:
    one = collect.take(shell("trap '' TERM HUP INT; echo said; while :; do sleep 1; done"), masking.masked, 0.5)
    assert (one.text, "did not end" in one.error) == ("said\n", True)


@pytest.mark.parametrize("said", ["null", "[1]", '{"models": 3}', "[" * 900 + "]" * 900, '{"models": [null]}'])
def test_output_of_another_shape_loses_its_own_step_only(said: str) -> None:
    keep = next(step.keep for step in steps("", "s", 60.0) if step.name == "status")
    one = collect.take(Step("x", ("printf", "%s", said), mac=False, keep=keep), masking.masked, 60.0)
    assert "unexpected output" in one.error or one.text == ""
    assert collect.take(Step("x", ("printf", "%s", said), mac=False), masking.masked, 60.0).text


def test_an_error_is_masked_before_it_is_cut() -> None:
    script = f"printf 'PASSWORD=%0900d' 7 >&2; printf '{'z' * 560}' >&2; exit 3"
    assert "00007" not in collect.take(shell(script), masking.masked, 60.0).error


def test_all_steps_together_are_bounded() -> None:
    said: list[str] = []
    found = collect.collect([shell("true")] * 2, masking.masked, said.append, limit_s=0.0)
    assert found.taken["x"].skipped == "all steps together may take 0 s"
    assert len(said) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_file(tmp_path: Path, number: int) -> None:
    command = [*AGENT, "doctor", "--first-node", str(tmp_path / "x.tar.gz")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        assert "versions" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(60) == 130
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_cannot_be_used_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agent.operator.first_node.steps.steps", lambda *_: [shell("echo 1")])
    (tmp_path / "bad.toml").write_text("bad")
    for name, status in (("bad.toml", 0), ("none.toml", 78)):
        options = ["--first-node", str(tmp_path / f"{name}.tar.gz"), "--config", str(tmp_path / name)]
        assert cli.main(["doctor", *options]) == status
    assert "going on without it" in capsys.readouterr().err
    assert bundle.read(tmp_path / "bad.toml.tar.gz").taken["x"].text == "1"


# ---- arithmetic ----


def told(change: Callable[[list[Any]], None] = lambda rows: None, device: str = "gpu") -> dict[str, Any]:
    rows = [{"tokens": [3, 4], "logits": [[2.0, 1.0], [2.0, 1.99]]}]
    found = json.loads(json.dumps(rows))
    change(found)
    return {"mlx": "1", "recorded": rows, "found": {device: found}}


def set_to(key: str, n: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda rows: rows[0][key].__setitem__(n, value)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda rows: None, "ok"),
        (set_to("tokens", 0, 9), "problem"),
        (set_to("tokens", 1, 9), "ok"),
        (set_to("logits", 0, [2.0, 1.05]), "ok"),
        (set_to("logits", 0, [2.0, 1.5]), "problem"),
        (set_to("logits", 0, [math.nan, 1.0]), "problem"),
    ],
)
def test_answers_are_compared_within_a_tolerance(change: Callable[[list[Any]], None], verdict: str) -> None:
    assert judging.answers(told(change))[0] == verdict


def test_answers_of_a_cpu_do_not_test_metal() -> None:
    assert "Metal is not tested" in judging.answers(told(device="cpu"))[1]
    assert judging.answers({**told(), "found": {}})[0] == "problem"


def counted(step_s: float) -> Iterator[tuple[float, dict[str, float]]]:
    for n in range(33):
        at = n / 4
        yield at, {"cpu_total_mj": 4000.0 * (at - at % step_s if step_s else 0), "gpu_mj": 100.0 * at}


@pytest.mark.parametrize(
    ("step_s", "verdict", "words"),
    [
        (0.25, "ok", "cpu 4.00 W, gpu 0.10 W over 8 s"),
        (2.0, "ok", "published in batches"),
        (0.0, "warning", "did not advance"),
    ],
)
def test_energy_counters_are_judged_over_several_windows(step_s: float, verdict: str, words: str) -> None:
    found = judging.energy(list(counted(step_s)))
    assert found[0] == verdict
    assert words in found[1]


def test_a_kernel_that_wants_more_room_is_read_and_said() -> None:
    words = [0] * 104
    words[3], words[22], words[35] = 100_000, 50_000, 400_000
    first = {"asked": 38, "status": -307, "came": 104, "words": []}
    second = {"asked": 104, "status": 0, "came": 104, "words": words}
    found, said, why = judging.host_statistics({"page_size": 16384, "calls": [first, second]})
    assert (said, why) == ("host_statistics64 with 104 words, after -307 with 38", "")
    assert found is not None
    assert found.wired_bytes == 100_000 * 16384
