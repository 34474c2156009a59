"""Send notices to Discord. The webhook URL is a secret and never appears in a message, log line or error."""

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import urllib3

from aggregator.alerts import Notice, Rule
from aggregator.calendar import duration
from shared.errors import Halt, Retryable

TIMEOUT_S = 10.0
MAX_WAIT_S = 30.0
COLOURS = {"page": 0xC0392B, "warn": 0xD68910, "resolved": 0x1E8449}
_TITLE, _DESCRIPTION = 256, 4096
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\*_`~|<>[]()#@"})


def payload(notice: Notice, rack: str = "", docs_url: str = "") -> dict[str, object]:
    """The message for one notice, within Discord's limits; names are escaped and mentions disabled. It names the
    command that shows the runbook, and the page below ``docs_url`` where there is one."""
    rule, firing = notice.rule, notice.firing
    since = datetime.fromtimestamp(firing.since_ms / 1000, UTC)
    where = f" (rack {_escaped(rack)})" if rack else ""
    rest = f"\n{_runbook(rule, docs_url)}"
    embed = {
        "title": f"{'Resolved: ' if notice.resolved else ''}{rule.title}: {_escaped(firing.subject)}{where}"[:_TITLE],
        "description": _escaped(_sentences(notice))[: _DESCRIPTION - len(rest)] + rest,
        "color": COLOURS["resolved" if notice.resolved else rule.severity],
        "timestamp": since.isoformat(),
        "footer": {"text": f"{rule.code} {'resolved' if notice.resolved else 'firing'}"},
    }
    return {"username": "mlxrack", "embeds": [embed], "allowed_mentions": {"parse": []}}


def _sentences(notice: Notice) -> str:
    """What is or was the matter, since when, and for how long."""
    firing = notice.firing
    since = datetime.fromtimestamp(firing.since_ms / 1000, UTC)
    lasted = duration(max(0, notice.at_ms - firing.since_ms) / 1000)
    if not notice.resolved:
        return f"{firing.text}.\nIt began at {since:%Y-%m-%d %H:%M:%S} UTC, {lasted} ago."
    ended = datetime.fromtimestamp(max(notice.at_ms, firing.since_ms) / 1000, UTC)
    return (
        f"Over after {lasted}: from {since:%Y-%m-%d %H:%M:%S} to {ended:%Y-%m-%d %H:%M:%S} UTC.\nIt was: {firing.text}."
    )


def _runbook(rule: Rule, docs_url: str) -> str:
    """Where the runbook is: the command works on every node, a link on a phone."""
    page = f"\n{docs_url.rstrip('/')}/runbooks.md#{rule.runbook}" if docs_url else ""
    return f"runbook: `mlxrack-agent help {rule.runbook}`{page}"


class Discord:
    """Posts to webhooks by channel name; notices for a channel without a URL are not sent. ``rack`` is named in each,
    since several racks may write to one channel; ``docs_url`` is where the documentation is published."""

    def __init__(
        self,
        urls: Mapping[str, str],
        *,
        rack: str = "",
        docs_url: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._urls, self._rack, self._docs_url, self._sleep = urls, rack, docs_url, sleep
        self._http = urllib3.PoolManager(timeout=TIMEOUT_S, retries=False)

    def post(self, notice: Notice) -> bool:
        """Send one notice and wait for its acceptance; False if no channel is configured.

        Raises Retryable if it may succeed later, Halt if the webhook no longer exists.
        """
        url = self._urls.get(notice.rule.channel) or self._urls.get("alerts", "")
        if not url:
            return False
        body = json.dumps(payload(notice, self._rack, self._docs_url)).encode()
        for attempt in (1, 2, 3):
            status, wait_s = self._try(url, body)
            if status in (200, 204):
                return True
            if status in (401, 403, 404):
                raise Halt(f"discord {notice.rule.channel}: webhook deleted or invalid ({status}); create a new one")
            if attempt < 3:
                self._sleep(min(MAX_WAIT_S, wait_s if wait_s is not None else 2.0**attempt))
        raise Retryable(f"discord {notice.rule.channel}: not accepted (status {status}); a later run retries")

    def _try(self, url: str, body: bytes) -> tuple[int, float | None]:
        """The HTTP status (0 for none) and Discord's Retry-After in seconds."""
        joint = "&" if "?" in url else "?"
        try:
            answer = self._http.request(
                "POST", f"{url}{joint}wait=true", body=body, headers={"Content-Type": "application/json"}
            )
        except urllib3.exceptions.HTTPError:
            return 0, None
        try:
            return answer.status, float(answer.headers["Retry-After"])
        except (KeyError, ValueError):
            return answer.status, None


def _escaped(text: str) -> str:
    """A text in which nothing is active: no markup, no mention, and no address that Discord would link."""
    return text.translate(_MARKDOWN).replace("://", ":\u200b//")
