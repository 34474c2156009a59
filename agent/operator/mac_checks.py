"""What only a Mac can show. On one, most of it is decided from what was read there; the rest needs somebody who looks.
Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agent.operator.checks import Finding

PLAN_ERROR = 0.1
"""Share by which a model's memory may differ from its plan."""


class MacFacts(NamedTuple):
    """What was read on this Mac. ``sources`` are readings of sensors, as (seen, why there is none); ``service`` is the
    installed property list, ``status`` that of the running agent; both are None where there is none."""

    sources: Mapping[str, tuple[str, str]]
    gpu_bytes: int | None
    drain_s: float
    service: Mapping[str, Any] | None
    status: Mapping[str, Any] | None
    renames: bool = False
    missing_tools: Sequence[str] = ()


def decided(facts: MacFacts) -> Iterator[Finding]:
    """What this Mac shows."""
    missing = ", ".join(facts.missing_tools)
    yield Finding("macOS tools", "warning" if missing else "ok", f"missing: {missing}" if missing else "all found")
    for what, judge, _ in _CHECKS:
        if (found := judge(facts)) is not None:
            yield Finding(what, "ok" if found[0] else "warning", found[1])


def undecided(facts: MacFacts | None) -> Iterator[Finding]:
    """What is still to be looked at on a Mac; all of it where ``facts`` are those of another machine (None)."""
    for what, judge, text in _CHECKS:
        if facts is None or judge(facts) is None:
            yield Finding(f"on a Mac: {what}", "warning", text)


def awake(status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Whether the running agent keeps this machine awake; nothing where it does not have to."""
    found = (status or {}).get("awake", {})
    if found.get("state") == "held":
        yield Finding("awake", "ok", f"the running agent keeps this machine awake (caffeinate, process {found['pid']})")
    elif found.get("state") == "not_held":
        why = found["problem"] or "caffeinate is being started"
        yield Finding("awake", "warning", f"the running agent does not keep this machine awake: {why}")


def _source(name: str) -> Callable[[MacFacts], tuple[bool, str] | None]:
    def judge(facts: MacFacts) -> tuple[bool, str] | None:
        if name not in facts.sources:
            return None
        seen, why = facts.sources[name]
        return not why, why or f"{name} reads {seen}"

    return judge


def service(facts: MacFacts) -> tuple[bool, str] | None:
    """Whether launchd lets the agent end in peace, and its output is rotated; None where no service is installed."""
    if facts.service is None:
        return None
    allowed_s = facts.service.get("ExitTimeOut", 0)
    if allowed_s < facts.drain_s:
        return False, f"launchd kills after {allowed_s} s, limits.drain_s is {facts.drain_s:g}; `mlxrack-agent install`"
    if facts.renames:
        return False, "newsyslog still renames the service's output file, which then grows on; `mlxrack-agent install`"
    return True, f"launchd waits {allowed_s} s for the agent to end"


def _metal(facts: MacFacts) -> tuple[bool, str] | None:
    if facts.service is None or facts.status is None:
        return None
    source = str(facts.status.get("budget_from", ""))
    return source.startswith(("recommended", "configured")), f"the running service's memory budget is {source}"


def gpu(recommended_bytes: int | None) -> tuple[bool, str]:
    """Whether the GPU says how much of the memory it may have."""
    if not recommended_bytes:
        return False, "Metal reports no recommended working set; is this a virtual machine?"
    return True, f"Metal recommends {recommended_bytes / 1e9:.1f} GB for models"


def plans(models: Sequence[Mapping[str, Any]]) -> tuple[bool, str] | None:
    """How far the models' memory is from its plan, the worst of them; None where none was measured."""
    errors = [one["plan_error_ppm"] / 1e6 for one in models if one["plan_error_ppm"] is not None]
    if not errors:
        return None
    worst = max(errors, key=abs)
    seen = f"the largest difference between memory and plan is {worst:+.1%} ({len(errors)} models)"
    return abs(worst) <= PLAN_ERROR, seen


def _unknown(_: MacFacts) -> tuple[bool, str] | None:
    return None


_CHECKS: tuple[tuple[str, Callable[[MacFacts], tuple[bool, str] | None], str], ...] = (
    ("thermal pressure", _source("notify"), "notify(3)'s descriptor signals, and the level reaches heavy under load"),
    ("SMC", _source("PSTR"), "it is readable from a LaunchDaemon without a login: F0Ac and PSTR, P-cores warm up"),
    ("wall power", _unknown, "PSTR agrees with a wall power meter, less the power supply's loss"),
    ("energy counters", _source("ioreport"), "IOReport's CPU counter advances, or is reported as stuck (macOS 27)"),
    ("APC outlet", _unknown, "an APC outlet reports watts, or needs `scale` (test with a known load)"),
    ("Metal", _metal, "the agent runs as a LaunchDaemon without a login and reaches Metal"),
    ("memory", _unknown, "host_statistics64, vm.swapusage and the pressure level agree with Activity Monitor"),
    ("launchd", service, "launchd waits ExitTimeOut before SIGKILL, and its output file is cut in place"),
    ("answers", _unknown, "MLX's Metal build gives the same answers as the CPU build in the tests"),
    ("GPU memory", lambda facts: gpu(facts.gpu_bytes), "the GPU's recommended working set is reported"),
    ("footprint", _unknown, "proc_pid_rusage's physical footprint agrees with Activity Monitor"),
    (
        "memory plan",
        lambda facts: plans((facts.status or {}).get("models", ())),
        "it holds with Metal's fused attention and buffer cache (PLAN ERROR in `status`)",
    ),
)
"""What, how it is decided, and what to look at where it cannot be."""
