"""The compiled shim is run: it comes from a folder that nobody else can write to."""

import os
import shutil
from pathlib import Path

import pytest

from agent.loader import blas


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    (tmp_path / "cc").write_text('#!/bin/sh\nprintf ours > "$5"\n')
    (tmp_path / "cc").chmod(0o755)
    (tmp_path / "library").write_bytes(b"x")
    return tmp_path / "library"


def test_the_folder_is_ours_alone(library: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        shim = blas._built(library)
    finally:
        os.umask(before)
    assert shim.read_text() == "ours"
    assert blas._built(library) == shim
    assert shim.parent.stat().st_mode & 0o777 == 0o700
    shim.parent.parent.chmod(0o777)
    shim.parent.chmod(0o775)
    blas._built(library)
    assert {folder.stat().st_mode & 0o022 for folder in (shim.parent, shim.parent.parent)} == {0}


def test_a_link_in_its_place_is_not_run(library: Path, tmp_path: Path) -> None:
    shim = blas._built(library)
    (tmp_path / "planted").write_text("planted")
    shim.unlink()
    shim.symlink_to(tmp_path / "planted")
    assert blas._built(library).read_text() == "ours"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("what", ["mlxrack", "mlxrack/blas"])
def test_another_users_folder_is_refused_and_its_library_not_run(library: Path, tmp_path: Path, what: str) -> None:
    shim = blas._built(library)
    shutil.chown(tmp_path / "cache" / what, 54321)
    with pytest.raises(PermissionError):
        blas._built(library)
    shutil.chown(tmp_path / "cache" / what, 0)
    shim.write_text("planted")
    shutil.chown(shim, 54321)
    assert blas._built(library).read_text() == "ours"
