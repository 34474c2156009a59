"""A state folder is its user's alone and one agent's at a time, whatever the umask and whatever was there."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared import private
from shared.durable import created, write_whole
from shared.errors import Halt

SECRET = ("spool", "logs", "desired.json")


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.lstat().st_mode & 0o777 for path in folder.rglob("*")}


@pytest.mark.usefixtures("umask")
def test_what_is_made_is_private(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with private.held(state, SECRET) as corrected:
        write_whole(state / "desired.json", b"x")
        assert corrected == []
    assert state.stat().st_mode & 0o777 == 0o700
    assert modes(state) == {0o600}


def test_what_an_older_version_left_open_is_corrected(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "spool" / "bad").mkdir(parents=True)
    (state / "models").mkdir()
    for name in ("spool/a.batch", "spool/bad/b", "desired.json", "models/m.json"):
        (state / name).write_bytes(b"x")
        (state / name).chmod(0o644)
    state.chmod(0o755)
    assert len(private.problems(state, SECRET)) == 6
    with private.held(state, SECRET) as corrected:
        assert sorted(line.split("/")[-1].split()[0] for line in corrected) == sorted(
            ["state", "spool", "bad", "b", "a.batch", "desired.json"]
        )
    assert not private.problems(state, SECRET)
    assert (state / "models" / "m.json").stat().st_mode & 0o777 == 0o644, "models are no secret"


@pytest.mark.parametrize("as_owner", [False, True])
@pytest.mark.parametrize("mode", [0o000, 0o200, 0o004, 0o400])
def test_what_its_own_user_may_not_use_is_corrected(
    tmp_path: Path, mode: int, as_owner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    (state / "spool").mkdir(parents=True, mode=0o700)
    (state / "spool" / "a.batch").write_bytes(b"x")
    (state / "spool" / "a.batch").chmod(mode)
    (state / "spool").chmod(mode)
    if as_owner:
        monkeypatch.setattr(os, "open", as_a_user_opens(os.open))
    with private.held(state, SECRET) as corrected:
        assert [line.split("/")[-1].split()[0] for line in corrected if "spool" in line] == ["spool", "a.batch"]
    assert (state / "spool").stat().st_mode & 0o777 == 0o700
    assert (state / "spool" / "a.batch").stat().st_mode & 0o777 == 0o600


def as_a_user_opens(real: Callable[..., int]) -> Callable[..., int]:
    """Root opens what it has no right to."""

    def opened(path: Path, flags: int, *more: int, **named: int) -> int:
        if os.path.lexists(path) and not os.lstat(path).st_mode & 0o400:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *more, **named)

    return opened


@pytest.mark.parametrize("how", ["refuses", "cannot", "ignores"])
def test_a_file_system_without_modes_is_said_once_and_used(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    (state / "spool").mkdir(parents=True)
    for path in (state / "spool", state):
        path.chmod(0o777)

    def fchmod(_: int, __: int) -> None:
        if how != "ignores":
            raise OSError(errno.EPERM if how == "refuses" else errno.ENOTSUP, "x")

    monkeypatch.setattr(os, "fchmod", fchmod)
    with private.held(state, SECRET) as said:
        (line,) = said
    assert f"{state} has mode 777, and its file system keeps no modes" in line
    assert "set paths.state to a folder on another disk" in line


def test_what_root_left_open_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with sudo, and then one without."""
    state = tmp_path / "state"
    (state / "spool").mkdir(parents=True, mode=0o700)
    state.chmod(0o755)

    def fchmod(_: int, __: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    owner = state.stat().st_uid
    monkeypatch.setattr(os, "fchmod", fchmod)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    monkeypatch.setattr(private, "_another_owner", lambda _: "")
    with pytest.raises(Halt) as caught:
        private.held(state, SECRET).__enter__()
    assert f"{state} is user {owner}'s, and its mode cannot be changed" in caught.value.message
    assert "run `chown 4321` on it, or set paths.state" in caught.value.message
    assert caught.value.code == "state_not_private"


def test_links_in_it_are_left_alone(tmp_path: Path) -> None:
    """An operator's way to another drive, or a stranger's to another file."""
    state, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    state.mkdir(mode=0o755)
    elsewhere.mkdir(mode=0o755)
    (elsewhere / "file").write_bytes(b"x")
    (elsewhere / "file").chmod(0o644)
    (state / "spool").symlink_to(elsewhere)
    (state / "desired.json").symlink_to(elsewhere / "file")
    with private.held(state, SECRET) as corrected:
        assert corrected == [f"{state} has mode 755; corrected"]
    assert (elsewhere / "file").stat().st_mode & 0o777 == 0o644
    os.symlink(elsewhere / "file", state / "new")
    with pytest.raises(OSError, match="symbolic links"):
        created(state / "new")


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o750, 0o701])
def test_a_folder_for_other_things_is_refused_and_not_changed(tmp_path: Path, mode: int) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "Documents").mkdir(mode=0o755)
    home.chmod(mode)
    with pytest.raises(Halt, match=r"has mode 7.. and holds 'Documents'; set paths.state to a folder for the agent"):
        private.held(home, SECRET).__enter__()
    assert home.stat().st_mode & 0o777 == mode
    home.chmod(0o700)
    with private.held(home, SECRET):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("what", ["", "spool", "spool/planted.batch", "desired.json"])
def test_what_is_another_users_is_refused(tmp_path: Path, what: str) -> None:
    state = tmp_path / "state"
    (state / "spool").mkdir(parents=True)
    for name in ("spool/planted.batch", "desired.json"):
        (state / name).write_bytes(b"x")
    shutil.chown(state / what, 54321)
    with pytest.raises(Halt, match=rf"state folder: {state / what} belongs to user 54321; if it is this node's, run"):
        private.held(state, SECRET).__enter__()
    assert any("belongs to user 54321" in one for one in private.problems(state, SECRET))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    state = tmp_path / "state"
    code = f"from pathlib import Path; from shared import private; private.held(Path({str(state)!r}), ()).__enter__()"
    with private.held(state, ()):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert "in use by another agent; stop that one, or set another paths.state here" in run.stderr
    with private.held(state, ()):
        pass


def test_only_a_file_of_this_user_alone_is_private(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"x")
    for mode in (0o640, 0o604, 0o620, 0o602, 0o611):
        path.chmod(mode)
        assert not private.is_private(path.lstat())
    path.chmod(0o600)
    assert private.is_private(path.lstat())
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for other in ("link", "pipe", "."):
        assert not private.is_private((tmp_path / other).lstat())
