"""The life of a policy file: in force when it is valid and settled, the last good one while it is not."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import AgentConfig, Key, Live, Node, Policy
from agent.control.policy_file import PolicyFile, log
from agent.policy.reading import MOST_BYTES, PolicyRead, read
from agent.policy.rules import DEFAULT, digest
from shared.config import ConfigError
from shared.errors import Halt

GOOD = 'version = "{}"\n[[keys]]\nid = "web"\n'


def config(path: str) -> AgentConfig:
    return AgentConfig(node=Node(id="n1", rack="r"), policy=Policy(path=path), keys=(Key(id="web", sha256="0" * 64),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD.format("one"))
    return path


@pytest.fixture
def file(path: Path) -> PolicyFile:
    made = PolicyFile(Live(config(str(path))), wall_ms=iter(range(1, 100)).__next__)
    made.load()
    return made


def rewrite(path: Path, text: str) -> None:
    """As editors and deployments do it: another file takes the name."""
    other = path.with_name("other")
    other.write_text(text)
    other.replace(path)


def poll(file: PolicyFile) -> str:
    """The version in force after one look."""
    asyncio.run(file.poll())
    return file.now.version


def test_without_a_path_nothing_is_read(tmp_path: Path) -> None:
    made = PolicyFile(Live(config("")))
    made.load()
    assert (made.now.rules, made.view()["path"], made.warnings({}, {})) == (DEFAULT, "", [])
    assert poll(made) == "default"


def test_a_changed_file_is_put_in_force_and_followers_are_told(path: Path, file: PolicyFile) -> None:
    told: list[str] = []
    file.follow(lambda policy: told.append(policy.version))
    before = file.now
    assert poll(file) == "one"
    assert file.now is before, "nothing has changed"
    rewrite(path, GOOD.format("two"))
    assert poll(file) == "two"
    assert told == ["one", "two"]
    assert file.now.digest == digest(file.now.rules) != before.digest
    assert file.now.since_ms > before.since_ms


def test_a_file_with_the_same_content_is_the_same_policy(path: Path, file: PolicyFile) -> None:
    before = file.now
    rewrite(path, GOOD.format("one") + "# a comment\n")
    poll(file)
    assert file.now is before


def _gone(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: rewrite(path, text)


def _latin(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def _link(to: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(to)

    return link


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (_gone, "no such file"),
    "a folder": (_folder, "cannot be read"),
    "a pipe": (_pipe, "not a regular file"),
    "not TOML": (_text("[["), "invalid TOML"),
    "not text": (_latin, "cannot be read"),
    "wrong": (_text('versoin = "x"\n[[keys]]\nid = ""\n'), "2 problems"),
    "too large": (_text("#" * (MOST_BYTES + 1)), "at most 1,048,576"),
    "a link that leads nowhere": (_link("nowhere"), "no such file"),
    "a loop of links": (_link("policy.toml"), "no such file"),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_a_file_that_cannot_be_used_leaves_the_last_good_one_in_force(
    how: str, path: Path, file: PolicyFile, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, why = UNUSABLE[how]
    before, told = file.now, []
    file.follow(lambda policy: told.append(policy.version))
    spoil(path)
    assert poll(file) == poll(file) == "one"
    assert file.now is before
    assert told == ["one"]
    (warning,) = file.warnings({}, {})
    assert why in warning
    assert f"version one ({before.digest}) stays in force" in warning
    assert why in file.view()["problem"]
    if path.is_dir():
        path.rmdir()
    rewrite(path, GOOD.format("two"))
    assert poll(file) == "two"
    assert file.warnings({}, {}) == []


@pytest.mark.parametrize("how", UNUSABLE)
def test_a_start_with_such_a_file_ends(how: str, path: Path) -> None:
    spoil, why = UNUSABLE[how]
    spoil(path)
    with pytest.raises(Halt) as caught:
        PolicyFile(Live(config(str(path)))).load()
    assert isinstance(caught.value, ConfigError)
    assert why in caught.value.message


@pytest.mark.parametrize("path", ["~nobody-of-this-name/policy.toml", "a\0b", "/dev/null/policy.toml", "x" * 5000])
def test_a_path_that_cannot_exist_is_no_such_file(path: str) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        PolicyFile(Live(config(path))).load()


def test_a_file_that_comes_back_as_it_was_is_no_problem_any_more(path: Path, file: PolicyFile) -> None:
    before, away = file.now, path.with_name("away")
    path.rename(away)
    poll(file)
    assert file.view()["problem"]
    away.rename(path)
    poll(file)
    assert (file.now, file.view()["problem"]) == (before, "")


def test_a_problem_is_logged_once_and_read_once(path: Path, file: PolicyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, dict[str, Any]]] = []
    reads: list[str] = []
    for level in ("info", "warning", "error"):
        monkeypatch.setattr(log, level, lambda event, **more: lines.append((event, more)), raising=False)

    def counted(path: str) -> PolicyRead:
        reads.append(path)
        return read(path)

    monkeypatch.setattr("agent.control.policy_file.read", counted)
    rewrite(path, "x = 1")
    for _ in range(3):
        poll(file)
    assert [event for event, _ in lines] == ["policy_not_in_force"]
    assert len(reads) == 1
    rewrite(path, "y = 1")
    poll(file)
    assert [event for event, _ in lines] == ["policy_not_in_force"] * 2
    rewrite(path, GOOD.format("one"))
    poll(file)
    assert [event for event, _ in lines][2:] == ["policy_file_valid"]
    assert "web" not in str(lines), "nothing of the file is logged but its problems"
    path.unlink()
    for _ in range(3):
        poll(file)
    assert [event for event, _ in lines][3:] == ["policy_not_in_force"]


def test_a_file_that_cannot_be_read_yet_is_read_when_its_mode_changes(path: Path, file: PolicyFile) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    rewrite(path, GOOD.format("two"))
    path.chmod(0)
    assert poll(file) == "one"
    path.chmod(0o600)
    assert poll(file) == "two"


def test_a_reload_and_a_look_at_the_file_do_not_undo_each_other(
    path: Path, file: PolicyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look is held up while a reload puts a newer file in force; what it read by then does not count."""
    rewrite(path, GOOD.format("two"))

    async def meanwhile() -> None:
        loop = asyncio.get_running_loop()
        begun, done = asyncio.Event(), asyncio.Event()

        def late(path: str) -> PolicyRead:
            found = read(path)
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(done.wait(), loop).result(60)
            return found

        monkeypatch.setattr("agent.control.policy_file.read", late)
        looking = asyncio.create_task(file.poll())
        await begun.wait()
        monkeypatch.setattr("agent.control.policy_file.read", read)
        rewrite(path, GOOD.format("three"))
        (await asyncio.to_thread(file.prepare, config(str(path))))()
        done.set()
        await looking

    asyncio.run(meanwhile())
    assert file.now.version == "three"


def test_what_is_prepared_is_in_force_only_when_it_is_put(path: Path, file: PolicyFile) -> None:
    other = path.with_name("b.toml")
    other.write_text(GOOD.format("b"))
    put = file.prepare(config(str(other)))
    assert file.now.version == "one"
    told = put()
    assert told.startswith("policy: one (")
    assert "-> b (" in told
    assert file.prepare(config(str(other)))() == "", "nothing has changed"
    other.write_text(GOOD.format("c"))
    assert poll(file) == "c", "it is the new file that is looked at"
    assert file.prepare(config(""))().endswith(f"-> default ({digest(DEFAULT)})")
    with pytest.raises(ConfigError, match="no such file"):
        file.prepare(config(str(path.with_name("none"))))
    assert file.now.version == "default"


def test_a_follower_that_fails_leaves_the_policy_before_in_force(path: Path, file: PolicyFile) -> None:
    taken: list[str] = []

    def take(policy: Any) -> None:
        taken.append(policy.version)
        if policy.version == "two":
            raise ValueError

    file.follow(take)
    rewrite(path, GOOD.format("two"))
    with pytest.raises(ValueError):
        asyncio.run(file.poll())
    assert (file.now.version, taken) == ("one", ["one", "two", "one"])


def test_doubts_follow_agent_toml_and_what_the_rack_serves(path: Path) -> None:
    live = Live(config(str(path)))
    made = PolicyFile(live)
    path.write_text(GOOD.format("one") + '[[routes]]\ntask_class = "ROUTINE"\nmodel = "m"\n')
    made.load()
    assert made.warnings({"m": 8}, {}) == []
    assert made.warnings({"other": 8}, {}) == ["policy: routes[0].model: no node that answers serves 'm'"]
    live.replace(msgspec.structs.replace(live.now, keys=(Key(id="bot", sha256="0" * 64),)))
    assert "agent.toml has no [[keys]] with the id 'web'" in " ".join(made.warnings({"m": 8}, {}))
    assert "n2 (aa)" in made.warnings({"m": 8}, {"n2": "aa", "n3": made.now.digest})[0]
