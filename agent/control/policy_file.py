"""The policy of this node: read at the start, put in force whenever its file changes, kept while that is invalid."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from agent.config import AgentConfig, Live, key_ids
from agent.policy.doubts import Known, doubts
from agent.policy.reading import PolicyRead, Stamp, read, stamp_of
from agent.policy.rules import DEFAULT, Rules, differing, digest
from shared.config import ConfigError
from shared.logs import get_logger

POLL_S = 3.0
"""How often the file is compared with what was read last."""

log = get_logger("agent.control.policy_file")


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Rules in force. ``digest`` names their content, ``since_ms`` is when this node put them in force (Unix time)."""

    rules: Rules
    version: str
    digest: str
    since_ms: int


class PolicyFile:
    """``now`` is in force: parts hold this and never its rules, so that all of them have new ones with one assignment.

    An invalid or missing file ends a start: what an older policy permitted, a newer one may forbid, so none is kept
    over a restart. While the agent runs, the last good one stays in force until the file is valid again.
    """

    def __init__(self, live: Live, *, wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self._live, self._wall_ms = live, wall_ms
        self._followers: list[Callable[[Policy], None]] = []
        self._path, self.problem = "", ""
        self._read: Stamp = None
        self._tried: Stamp = None
        self._doubts: tuple[tuple[str, Known], list[str]] | None = None
        self.now = self._policy(DEFAULT, digest(DEFAULT))

    def load(self) -> None:
        """Put the configured file in force at a start. Blocks. Raises ConfigError with every problem."""
        self.prepare(self._live.now)()

    def follow(self, take: Callable[[Policy], None]) -> None:
        """Call ``take`` with the policy, now and whenever another one is put in force. It must not fail."""
        self._followers.append(take)
        take(self.now)

    async def poll(self) -> None:
        """Put the file in force if it has changed since it was last read. A file that cannot be used changes nothing,
        and is told once."""
        if not (path := self._path):
            return
        before = self._read
        stamp = await asyncio.to_thread(stamp_of, path)
        if stamp is not None and stamp in (self._read, self._tried):
            return
        try:
            found = await asyncio.to_thread(read, path)
        except ConfigError as error:
            if (path, before) == (self._path, self._read):
                self._tried = stamp
                self._cannot_use(error.message)
            return
        if (path, before) == (self._path, self._read):  # no reload was faster
            self._put(found)

    def prepare(self, config: AgentConfig) -> Callable[[], str]:
        """Read what a configuration names; what is returned puts it in force, without an await, and gives a sentence
        about what changed, "" for nothing. Blocks, for any thread. Raises ConfigError with every problem."""
        return partial(self._put, read(config.policy.path))

    def view(self) -> dict[str, Any]:
        """The policy in force, and why its file is not ("" when it is), for display."""
        plain = {name: getattr(self.now, name) for name in ("version", "digest", "since_ms")}
        return {"path": self._path, **plain, "problem": self.problem}

    def warnings(self, served: Mapping[str, int], others: Mapping[str, str]) -> list[str]:
        """What an operator has to know, a sentence each. ``served`` are the names that the rack serves now, with the
        rows of each model, ``others`` the digests of the policies of other nodes."""
        stays = f"version {_named(self.now)} stays in force until then, and at most until a restart"
        problem = f"the policy file is not in force: {self.problem}; correct it; {stays}" if self.problem else ""
        told = [problem, differing(self.now.digest, others), *(f"policy: {one}" for one in self._doubtful(served))]
        return [one for one in told if one]

    def _put(self, found: PolicyRead) -> str:
        before = self.now
        if found.digest != before.digest:
            self._replace(self._policy(found.rules, found.digest))
        if self.problem:
            log.info("policy_file_valid", digest=self.now.digest)
        self._path, self._read, self._tried, self.problem = found.path, found.stamp, None, ""
        if self.now is before:
            return ""
        log.info("policy_in_force", version=self.now.version, digest=self.now.digest, before=before.digest)
        for one in self._doubtful({}):
            log.warning("policy_doubtful", reason=one)
        return f"policy: {_named(before)} -> {_named(self.now)}"

    def _doubtful(self, served: Mapping[str, int]) -> list[str]:
        """Worked out again only when something has changed."""
        known = Known(keys=key_ids(self._live.now), models=dict(served))
        asked = (self.now.digest, known)
        if self._doubts is None or self._doubts[0] != asked:
            self._doubts = (asked, doubts(self.now.rules, known))
        return self._doubts[1]

    def _policy(self, rules: Rules, name: str) -> Policy:
        return Policy(rules=rules, version=rules.version, digest=name, since_ms=self._wall_ms())

    def _replace(self, policy: Policy) -> None:
        before, self.now = self.now, policy
        try:
            for take in self._followers:
                take(policy)
        except BaseException:
            self.now = before
            for take in self._followers:
                take(before)
            raise

    def _cannot_use(self, reason: str) -> None:
        if reason != self.problem:
            self.problem = reason
            log.error("policy_not_in_force", reason=reason, version=self.now.version, digest=self.now.digest)


def _named(policy: Policy) -> str:
    return f"{policy.version} ({policy.digest})"
