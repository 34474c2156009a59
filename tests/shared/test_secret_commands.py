"""Secrets of the keychain and of 1Password: what each failure means, and that what a sentence says to run helps."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Halt
from shared.secrets import commands, resolve
from tests.mac_stand_ins import known, put

VALUE, TOKEN = "v4lue-of-the-secret", "ops_t0ken"
ITEM = {"value": VALUE, "for": ["/usr/bin/security"]}
REFERENCE = "op://a/b/c"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = put(tmp_path / "bin", "security", "op", "sudo", op={"token": TOKEN, "items": {REFERENCE: VALUE}})
    monkeypatch.setattr(commands, "SECURITY", str(folder / "security"))
    monkeypatch.setattr(commands, "OP_TOKEN", tmp_path / "mlxrack/op.token")
    return folder


def chains(folder: Path, system: dict[str, Any], login: dict[str, Any], **more: Any) -> None:
    put(folder, "security", security={"keychains": {commands.SYSTEM_KEYCHAIN: system, "login": login}, **more})


def paths(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}


def told(reference: str, environ: dict[str, str]) -> str:
    """The sentence; it never has a value in it."""
    with pytest.raises(Halt) as caught:
        resolve(reference, environ)
    assert (caught.value.code, VALUE in caught.value.message, TOKEN in caught.value.message) == (
        "no_secret",
        False,
        False,
    )
    return caught.value.message


def follow(text: str, folder: Path, typed: str = "") -> None:
    """Run the commands that a sentence gives in backticks."""
    for command in re.findall(r"`([^`]+)`", text):
        subprocess.run(["bash", "-euc", command], input=typed, text=True, env=paths(folder), check=True, timeout=30)


def test_a_service_finds_its_item_in_the_system_keychain(programs: Path) -> None:
    chains(programs, {"mlxrack-access": ITEM}, {})
    assert resolve("keychain:mlxrack-access", paths(programs)) == VALUE
    # whoever has an item of the same name of his own is shown what the service gets
    chains(programs, {"mlxrack-access": ITEM}, {"mlxrack-access": {**ITEM, "value": "another"}})
    assert resolve("keychain:mlxrack-access", paths(programs)) == VALUE
    # an agent that somebody starts by hand may have it in the login keychain
    chains(programs, {}, {"mlxrack-access": ITEM})
    assert resolve("keychain:mlxrack-access", paths(programs)) == VALUE


@pytest.mark.parametrize("name", ["mlxrack-access", "mlxrack access", "100% of it"])
def test_an_item_that_is_missing_is_stored_by_the_command_that_is_printed(programs: Path, name: str) -> None:
    chains(programs, {}, {})
    said = told(f"keychain:{name}", paths(programs))
    assert "exits with 44: neither the System keychain nor one of this user's has such an item" in said
    follow(said.replace(commands.SECURITY, "/usr/bin/security"), programs, VALUE + "\n")
    stored = known(programs, "security")["keychains"]
    assert stored == {commands.SYSTEM_KEYCHAIN: {name: ITEM}, "login": {}}
    assert resolve(f"keychain:{name}", paths(programs)) == VALUE


@pytest.mark.parametrize(
    ("status", "words"),
    [(36, "would ask on the screen"), (29, "would ask on the screen"), (51, "refuses it to this user")],
)
def test_an_item_that_only_a_person_may_open_is_stored_again(programs: Path, status: int, words: str) -> None:
    chains(programs, {"a": {"value": VALUE, "for": []}}, {}, refuses=status)
    said = told("keychain:a", paths(programs))
    assert f"exits with {status}: macOS " in said
    assert words in said
    # its first command in backticks deletes, its second is about access, its third stores
    follow(said.replace(commands.SECURITY, "/usr/bin/security").replace("`security`", ""), programs, VALUE + "\n")
    assert resolve("keychain:a", paths(programs)) == VALUE


def test_a_locked_login_keychain_is_not_taken_for_a_missing_item(programs: Path) -> None:
    chains(programs, {}, {"a": ITEM}, locked=["login"])
    assert "exits with 36" in told("keychain:a", paths(programs))


def test_an_unknown_status_and_an_empty_item_are_said(programs: Path) -> None:
    chains(programs, {"a": {"value": VALUE, "for": []}}, {}, refuses=7)
    assert told("keychain:a", paths(programs)).endswith("security exits with 7")
    chains(programs, {"a": {**ITEM, "value": ""}}, {})
    assert told("keychain:a", paths(programs)).endswith("the item is empty")


def test_without_macos_there_is_no_keychain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "SECURITY", "/nowhere/security")
    assert "there is no such program; it is part of macOS" in told("keychain:a", {})


# ---- 1Password ----


def place(file: Path, token: str = TOKEN, mode: int = 0o400) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(token + "\n")
    file.chmod(mode)
    return file


def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders of this test count as root's, whoever runs it."""
    monkeypatch.setattr(commands, "ROOTS", (0, os.getuid()))


def test_the_token_of_a_service_account_reaches_op_in_its_environment_alone(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted(monkeypatch)
    place(commands.OP_TOKEN)
    assert resolve(REFERENCE, paths(programs)) == VALUE
    started = known(programs, "op")["started_with"]
    assert started["token"] == TOKEN
    assert started["argv"] == ["read", "--no-newline", REFERENCE]
    assert set(started["variables"]) - {"LC_CTYPE"} == {"PATH", "HOME", commands.OP_VARIABLE}
    assert commands.OP_VARIABLE not in os.environ


def test_a_token_in_the_environment_goes_first(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted(monkeypatch)
    place(commands.OP_TOKEN, "ops_another")
    assert resolve(REFERENCE, {**paths(programs), commands.OP_VARIABLE: TOKEN}) == VALUE


def test_without_a_token_the_command_that_puts_one_is_printed(programs: Path) -> None:
    said = told(REFERENCE, paths(programs))
    assert "a service needs the token of a service account" in said
    assert f"sudo install -o _mlxrack -m 400 /dev/null {commands.OP_TOKEN}" in said


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("(401) (Unauthorized), You aren't authorized to perform this action.", "refuses the token"),
        ("(403) Forbidden", "may not read that vault"),
        ('"z" isn\'t a vault in this account.', "no such item"),
        ("(429) Too Many Requests: You have reached the rate limit", "too many requests"),
        ("dial tcp: lookup my.1password.com: no such host", "cannot be reached"),
        ("something that nobody has seen before", "op exits with 1"),
    ],
)
def test_what_op_says_is_told_in_our_words(programs: Path, says: str, words: str) -> None:
    put(programs, "op", op={"token": TOKEN, "items": {}, "says": f"{says} {VALUE}"})
    assert words in told(REFERENCE, {**paths(programs), commands.OP_VARIABLE: TOKEN})


def test_a_wrong_token_is_not_quoted(programs: Path) -> None:
    assert "refuses the token" in told(REFERENCE, {**paths(programs), commands.OP_VARIABLE: TOKEN + "x"})


def _fifo(file: Path) -> None:
    file.parent.mkdir()
    os.mkfifo(file, 0o400)


def _link(file: Path) -> None:
    place(file.with_name("real"))
    file.symlink_to(file.with_name("real"))


def _second_name(file: Path) -> None:
    os.link(place(file), file.with_name("other"))


def _open_folder(file: Path) -> None:
    place(file).parent.chmod(0o777)


def _linked_folder(file: Path) -> None:
    place(file.parent.with_name("open") / "deep" / file.name)
    file.parent.with_name("open").chmod(0o777)
    file.parent.symlink_to(file.parent.with_name("open") / "deep")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: place(file, mode=0o600), "has mode 0600, not 0400"),
        (lambda file: place(file, mode=0o440), "has mode 0440"),
        (lambda file: place(file, token=" "), "is empty"),
        (lambda file: place(file, token="ops_a\nops_b"), "holds more than one word"),
        (lambda file: place(file, token="ops_a\0"), "holds more than one word"),
        (lambda file: file.mkdir(parents=True), "not a regular file"),
        (_fifo, "not a regular file"),
        (_link, "is a link"),
        (_second_name, "not a regular file with one name"),
        (_open_folder, "which others than root may change"),
        (_linked_folder, "which others than root may change"),
    ],
)
def test_a_token_that_others_could_read_or_replace_is_refused(
    programs: Path, monkeypatch: pytest.MonkeyPatch, make: Any, words: str
) -> None:
    trusted(monkeypatch)
    make(commands.OP_TOKEN)
    said = told(REFERENCE, paths(programs))
    assert words in said
    assert "make it again: `sudo install" in said
    assert "started_with" not in known(programs, "op"), "op is not asked"


def test_a_folder_of_another_user_is_refused(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "ROOTS", (4242,))
    place(commands.OP_TOKEN)
    assert "which does not belong to root" in told(REFERENCE, paths(programs))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_token_of_another_user_is_refused(programs: Path) -> None:
    os.chown(place(commands.OP_TOKEN), 65534, 65534)
    assert "belongs to another user" in told(REFERENCE, paths(programs))


def test_the_command_that_puts_a_token_puts_one_that_is_taken(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted(monkeypatch)
    me = (
        os.environ.get("USER")
        or subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    )
    owner = "-o root" if os.geteuid() == 0 else f"-o {me}"
    follow(f"`{commands.placing(commands.OP_TOKEN, me).replace('-o root', owner)}`", programs, TOKEN + "\n")
    assert resolve(REFERENCE, paths(programs)) == VALUE


@pytest.mark.parametrize("reference", ["file:/a\0b", "keychain:a\0b", "op://a\0b/c/d"])
def test_a_reference_that_no_program_can_take_is_said(reference: str) -> None:
    with pytest.raises(Halt, match="NUL"):
        resolve(reference, {"PATH": "/bin"})


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o622])
def test_a_secret_that_others_can_replace_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    file.write_text("x")
    file.chmod(mode)
    with pytest.raises(Halt, match="writable"):
        resolve(f"file:{file}", {})
