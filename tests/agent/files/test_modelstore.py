"""Model folders: complete ones have a version, others an error with its reason."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from agent.config import Model
from agent.files.modelstore import ModelStore
from shared import model_shape
from shared.catalog import MANIFEST_NAME
from shared.errors import Refused


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    return copy


def describe(folder: Path, memo: Path, **more: object) -> tuple[str, int]:
    spec = ModelStore(memo, memo.parent / "store").describe(
        msgspec.convert({"name": "m", "path": str(folder), **more}, Model)
    )
    return spec.version, spec.need_bytes


def write_manifest(folder: Path, memo: Path) -> None:
    files = ModelStore(memo, memo.parent / "store").manifest("m", folder).files
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode({"files": files}))


def test_the_version_is_a_hash_of_the_bytes(folder: Path, tmp_path: Path) -> None:
    version, need = describe(folder, tmp_path / "memo")
    weights = (folder / "model.safetensors").stat().st_size
    assert need > weights
    (folder / "README.md").write_text("notes change nothing")
    assert version == describe(folder, tmp_path / "memo")[0]
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert version != describe(folder, tmp_path / "memo")[0]


def test_a_model_of_too_many_tensors_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_shape, "MOST_TENSORS", 3)
    with pytest.raises(Refused, match="model m: its weights have more than 3 tensors"):
        describe(folder, tmp_path / "memo")


def test_hashes_are_cached_until_a_file_changes(folder: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo"
    first = describe(folder, memo)
    tree = json.loads(memo.read_text())
    assert len(tree) == 4
    assert first == describe(folder, memo)
    memo.write_text("garbage")
    assert first == describe(folder, memo), "a lost memo only costs time"


def test_concurrent_hashing_and_an_unwritable_disk(folder: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "memo", tmp_path / "store")
    model = msgspec.convert({"name": "m", "path": str(folder)}, Model)
    with ThreadPoolExecutor(8) as pool:
        assert len({spec.version for spec in pool.map(store.describe, [model] * 40)}) == 1
    (tmp_path / "file").write_text("")
    assert (
        ModelStore(tmp_path / "file" / "memo", tmp_path / "store").describe(model).version
        == store.describe(model).version
    )


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json|is missing"),
        (lambda f: (f / "model.safetensors").unlink(), r"holds no \.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 999), "is corrupt"),
        (lambda f: (f / MANIFEST_NAME).write_text("{"), "cannot be read"),
    ],
)
def test_an_incomplete_folder_is_reported_with_its_reason(
    folder: Path, tmp_path: Path, break_it: Callable[[Path], object], why: str
) -> None:
    write_manifest(folder, tmp_path / "memo")
    break_it(folder)
    with pytest.raises(Refused, match=why):
        describe(folder, tmp_path / "memo")


def test_an_unknown_model_shape_needs_a_configured_size(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    del tree["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(tree))
    with pytest.raises(Refused, match=r"num_attention_heads is missing.*with need_bytes"):
        describe(folder, tmp_path / "memo")
    assert describe(folder, tmp_path / "memo", need_bytes=12_345)[1] == 12_345


def test_only_files_that_mlx_lm_reads_count_as_weights(folder: Path, tmp_path: Path) -> None:
    _, need = describe(folder, tmp_path / "memo")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert describe(folder, tmp_path / "memo")[1] == need
