"""KV states on disk: found again, separated by model and secret, and never trusted."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.loader import prompt_cache
from agent.loader.disk_cache import BLOCK_TOK, Array, DiskCache
from agent.loader.prompt_cache import Tokens
from agent.wire.namespaces import OPEN, Namespace, namespace_of

SECRET = b"a secret of at least thirty-two characters"


def made(folder: Path, *, secret: bytes = SECRET, model: str = "v1", budget: int = 1 << 20) -> DiskCache:
    return DiskCache(folder, secret, model, budget)


def block_of(begin: int, end: int) -> list[Array]:
    return [("float32", (1, 1, end - begin, 1), np.arange(begin, end, dtype=np.float32).tobytes())]


def as_tokens(ids: list[int], namespace: Namespace = OPEN) -> Tokens:
    return prompt_cache.as_tokens(namespace, ids)


def prompt(blocks: int, *, last: int = 7, namespace: Namespace = OPEN) -> Tokens:
    return as_tokens([*range(1000, 1000 + blocks * BLOCK_TOK), last], namespace)


def keep(folder: Path, tokens: Tokens) -> None:
    cache = made(folder)
    cache.offer(tokens, block_of)
    cache.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"), key=lambda path: path.stat().st_mtime_ns)


def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    keep(tmp_path, prompt(3))
    again = made(tmp_path)
    assert again.held(prompt(3)) == 3 * BLOCK_TOK
    assert again.held(prompt(3)[: 3 * BLOCK_TOK]) == 2 * BLOCK_TOK, "the last token never counts"
    assert again.held(prompt(5)) == 3 * BLOCK_TOK
    assert again.held(as_tokens([1, *prompt(3).ids])) == 0
    assert again.read(prompt(3), 1, 3) == [block_of(BLOCK_TOK, 2 * BLOCK_TOK), block_of(2 * BLOCK_TOK, 3 * BLOCK_TOK)]
    moved: list[None] = []
    again.read(prompt(3), 0, 3, lambda: moved.append(None))
    assert len(moved) == 3, "a block is progress"
    again.close()


def test_common_prefixes_are_stored_once(tmp_path: Path) -> None:
    keep(tmp_path, prompt(2))
    keep(tmp_path, as_tokens([*prompt(2).ids[:-1], *range(BLOCK_TOK), 1]))
    assert len(files(tmp_path)) == 3


def test_another_model_or_secret_gets_no_hit(tmp_path: Path) -> None:
    keep(tmp_path, prompt(2))
    for other in (made(tmp_path, model="v2"), made(tmp_path, secret=b"another one")):
        assert other.held(prompt(2)) == 0
        other.close()


def test_another_namespace_gets_no_hit(tmp_path: Path) -> None:
    alice, bob = namespace_of("alice"), namespace_of("bob")
    keep(tmp_path, prompt(2, namespace=alice))
    cache = made(tmp_path)
    for other in (bob, OPEN, namespace_of("x", "alice")):
        assert cache.held(prompt(2, namespace=other)) == 0
        assert cache.read(prompt(2, namespace=other), 0, 2) == []
    assert cache.held(prompt(2, namespace=alice)) == 2 * BLOCK_TOK
    cache.offer(prompt(2, namespace=bob), block_of)
    cache.close()
    assert len(files(tmp_path)) == 4, "stored again, although the tokens are the same"


def test_a_block_under_another_namespaces_name_is_set_aside(tmp_path: Path) -> None:
    alice, bob = prompt(1, namespace=namespace_of("alice")), prompt(1, namespace=namespace_of("bob"))
    keep(tmp_path, alice)
    cache = made(tmp_path)
    files(tmp_path)[0].rename(tmp_path / f"{cache._chain(bob)[0]}.kv")
    cache.close()
    again = made(tmp_path)
    assert again.held(bob) == BLOCK_TOK
    assert (again.read(bob, 0, 1), again.quarantined, again.held(bob)) == ([], 1, 0)
    again.close()


def test_files_are_unreadable_to_others_and_contain_no_prompt_text(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    keep(folder, prompt(2))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in files(folder):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        raw = file.read_bytes()
        assert block_of(0, BLOCK_TOK)[0][2][:64] not in raw
        assert prompt(2).ids[:16].tobytes() not in raw
        assert b"float32" not in raw


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "another's", "gone"])
def test_an_invalid_file_is_set_aside(tmp_path: Path, how: str) -> None:
    keep(tmp_path, prompt(2))
    first, second = files(tmp_path)
    raw = bytearray(first.read_bytes())
    raw[len(raw) // 2] ^= 1
    match how:
        case "cut":
            first.write_bytes(first.read_bytes()[:-9])
        case "flipped":
            first.write_bytes(bytes(raw))
        case "empty":
            first.write_bytes(b"")
        case "another's":
            first.write_bytes(second.read_bytes())
        case "gone":
            first.unlink()
    cache = made(tmp_path) if how != "gone" else _made_before(tmp_path, first, second)
    assert cache.read(prompt(2), 0, 2) == []
    assert cache.held(prompt(2)) == 0
    assert cache.quarantined == (0 if how == "gone" else 1)
    assert len(list((tmp_path / "quarantine").glob("*"))) == (0 if how == "gone" else 1)
    cache.offer(prompt(2), block_of)
    cache.close()
    assert made(tmp_path).read(prompt(2), 0, 2) == [block_of(0, BLOCK_TOK), block_of(BLOCK_TOK, 2 * BLOCK_TOK)]


def _made_before(folder: Path, first: Path, second: Path) -> DiskCache:
    """A cache with an entry whose file was removed since."""
    first.write_bytes(second.read_bytes())
    cache = made(folder)
    first.unlink()
    return cache


def test_foreign_files_are_kept_and_partial_files_removed(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    (tmp_path / "abc.tmp").write_text("half")
    made(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_the_least_recently_used_block_is_evicted(tmp_path: Path) -> None:
    keep(tmp_path, prompt(1))
    size = files(tmp_path)[0].stat().st_size
    cache = made(tmp_path, budget=2 * size)
    for number in range(3):
        cache.offer(as_tokens([number] * (BLOCK_TOK + 1)), block_of)
        while cache._queue.qsize():
            pass
    cache.close()
    assert cache.bytes <= 2 * size
    assert cache.held(prompt(1)) == 0
    assert cache.held(as_tokens([2] * (BLOCK_TOK + 1))) == BLOCK_TOK


def test_a_full_disk_only_skips_new_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = made(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    cache.offer(prompt(2), block_of)
    cache.close()
    assert (cache.failures, cache.held(prompt(2)), files(tmp_path)) == (2, 0, [])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_the_longest_common_prefix_is_returned(
    tmp_path_factory: pytest.TempPathFactory, a: list[int], b: list[int]
) -> None:
    """Prompts made of whole blocks of one token each."""
    folder = tmp_path_factory.mktemp("states")

    def tokens(blocks: list[int]) -> Tokens:
        return as_tokens([n for n in blocks for _ in range(BLOCK_TOK)] + [9])

    first = made(folder)
    for number in range(1, len(a) + 1):  # one by one, so that the writer keeps up
        first.offer(tokens(a[:number]), block_of)
        while first._queue.qsize():
            pass
    first.close()
    again = made(folder)
    shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert again.held(tokens(b)) == shared * BLOCK_TOK
    again.close()
