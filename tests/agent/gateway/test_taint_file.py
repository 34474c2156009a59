"""The file of marks: what a crash, a full disk, another version and damage leave."""

import errno
import os
import stat
from pathlib import Path

import pytest

from agent.gateway.taint_file import TaintFile
from agent.mesh.signing import taint_key
from agent.policy.taint import RECORD_BYTES, mark
from shared.errors import Refused

KEY = taint_key("a rack secret of the tests, long enough")
MARKS = [mark(KEY, str(n).encode()) for n in range(40)]


def written(folder: Path, marks: list[bytes]) -> Path:
    """A file with these marks, closed; its path."""
    file = TaintFile(folder)
    file.read(KEY)
    file.append(marks)
    file.close()
    return folder / "marks"


def test_marks_and_keys_come_back_and_are_nobody_elses(tmp_path: Path) -> None:
    path = written(tmp_path / "taints", MARKS)
    for one in (path, path.with_name("keys")):
        assert stat.S_IMODE(one.stat().st_mode) == 0o600
    file = TaintFile(path.parent)
    found = file.read(taint_key("the secret after a rotation"))
    assert (found.keys, found.damaged, len(found.marks)) == ((KEY,), 0, len(MARKS))
    assert all(one in found.marks for one in MARKS)
    file.append(MARKS[:1])
    file.close()
    assert path.stat().st_size == (len(MARKS) + 2) * RECORD_BYTES


def test_without_a_secret_the_key_is_random_and_lasts(tmp_path: Path) -> None:
    keys = []
    for folder in ("a", "b", "a"):
        file = TaintFile(tmp_path / folder)
        keys.append(file.read(b"").keys)
        file.close()
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("cut", [1, RECORD_BYTES - 1, RECORD_BYTES, 3 * RECORD_BYTES + 5])
def test_a_tail_that_was_cut_off_is_repaired_and_written_over(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path, MARKS)
    os.truncate(path, path.stat().st_size - cut)
    with path.open("ab") as file:
        file.write(bytes(50))  # what a file system may leave of blocks that were not written
    again = TaintFile(tmp_path)
    found = again.read(KEY)
    kept = len(MARKS) - -(-cut // RECORD_BYTES)
    assert (len(found.marks), found.damaged) == (kept, 0)
    again.append(MARKS[kept:])
    again.close()
    final = TaintFile(tmp_path)
    assert len(final.read(KEY).marks) == len(MARKS)
    final.close()


@pytest.mark.parametrize("size", range(RECORD_BYTES + 1))
def test_a_head_that_was_cut_off_is_written_again(tmp_path: Path, size: int) -> None:
    path = written(tmp_path, [])
    os.truncate(path, size)
    assert len(TaintFile(tmp_path).read(KEY).marks) == 0
    assert path.stat().st_size == RECORD_BYTES


def test_damage_before_others_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, MARKS)
    raw = bytearray(path.read_bytes())
    raw[5 * RECORD_BYTES + 3] ^= 1
    path.write_bytes(raw)
    found = TaintFile(tmp_path).read(KEY)
    assert (found.damaged, len(found.marks)) == (1, len(MARKS) - 1)


def test_what_cannot_be_read_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, MARKS)
    (tmp_path / "keys").rename(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="keys is missing"):
        TaintFile(tmp_path).read(KEY)
    for content in ("", "nonsense\n", "aa\n", "é\n"):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(Refused, match="does not hold keys"):
            TaintFile(tmp_path).read(KEY)
    (tmp_path / "elsewhere").rename(tmp_path / "keys")
    path.write_bytes(b"mlxrack taints 2".ljust(RECORD_BYTES) + b"of a later version")
    file = TaintFile(tmp_path)
    with pytest.raises(Refused, match="not a file of marks that this version reads"):
        file.read(KEY)
    with pytest.raises(OSError, match="not open"):
        file.append(MARKS)
    assert path.read_bytes().endswith(b"of a later version")
    file.clear()
    file.append(MARKS[:2])
    file.close()
    assert len(TaintFile(tmp_path).read(KEY).marks) == 2


def test_a_file_of_somebody_elses_making_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "taints").mkdir()
    (tmp_path / "taints/marks").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        TaintFile(tmp_path / "taints").read(KEY)


@pytest.mark.parametrize("fails", ["write", "sync"])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    file = TaintFile(tmp_path)
    file.read(KEY)
    file.append(MARKS[:5])
    pwrite = os.pwrite

    def halfway(descriptor: int, raw: bytes, at: int) -> int:
        if at > 6 * RECORD_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, raw[: RECORD_BYTES + 7], at)

    def unsynced(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr(os, "pwrite", halfway)
        else:
            patch.setattr("agent.gateway.taint_file.sync", unsynced)
        with pytest.raises(OSError, match=r"No space left|Input/output"):
            file.append(MARKS[5:])
    assert (tmp_path / "marks").stat().st_size == 6 * RECORD_BYTES
    file.append(MARKS[5:])
    file.close()
    assert len(TaintFile(tmp_path).read(KEY).marks) == len(MARKS)
