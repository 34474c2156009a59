"""Verdicts that take some arithmetic: answers of MLX, energy counters, words of the kernel, what launchd says."""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from agent.operator.checks import Verdict
from agent.telemetry.sensors import vm
from agent.telemetry.sensors.power import energy_of
from agent.telemetry.sensors.reading import MOST_W

Said = tuple[Verdict, str]
TOLERANCE = 0.03
"""Of the largest logit: matrix units round a factor to ten bits; a wrong kernel is off by a multiple of this."""
SHORT_S, LONG_S = 1.0, 4.0
_UTILIZATION = re.compile(r'"Device Utilization %"=(\d+)')
_IN_USE = re.compile(r'"In use system memory"=(\d+)')
_LINE = re.compile(r"^\s*([a-z][a-z ]*) = (.+)$", re.MULTILINE)


def answers(told: Mapping[str, Any]) -> Said:
    """Logits and tokens of each device beside the recorded ones. A token counts where the record's best two differ by
    more than the tolerance."""
    words, bad = [], False
    for device, found in told["found"].items():
        error, wrong, tokens = _compared(told["recorded"], found)
        bad = bad or wrong > 0 or error > TOLERANCE
        words.append(f"{device}: {wrong} of {tokens} tokens differ, logits by at most {error:.2%}")
    if not words:
        return "problem", "MLX answered on no device"
    seen = f"MLX {told['mlx']}; " + "; ".join(words)
    if "gpu" not in told["found"]:
        seen += "; no GPU answered, so Metal is not tested"
    return ("problem" if bad else "ok"), f"{seen} (tolerance {TOLERANCE:.0%})" if bad else seen


def _compared(recorded: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> tuple[float, int, int]:
    """The largest difference of a logit as a share of the case's largest, wrong tokens, and tokens. Raises ValueError
    where something is missing."""
    error, wrong, tokens = 0.0, 0, 0
    for known, seen in zip(recorded, found, strict=True):
        largest = max(abs(one) for row in known["logits"] for one in row)
        rows = zip(known["tokens"], seen["tokens"], known["logits"], seen["logits"], strict=True)
        for token, chosen, expected, got in rows:
            differences = [abs(a - b) / largest for a, b in zip(expected, got, strict=True)]
            # not max alone: it would pass over a NaN
            error = max(error, *(one if one == one else float("inf") for one in differences))
            tokens += 1
            wrong += token != chosen and (expected[0] - expected[1]) / largest > 2 * TOLERANCE
    return error, wrong, tokens


def energy(samples: Sequence[tuple[float, Mapping[str, float]]]) -> Said:
    """Whether the counters advance, in what steps, and the watts over all of the time."""
    read = [(float(at), energy_of(SimpleNamespace(**counters)).parts) for at, counters in samples]
    seconds, spent = read[-1][0] - read[0][0], {p: read[-1][1][p] - read[0][1][p] for p in read[0][1]}
    parts = ", ".join(f"{part} {uj / seconds / 1e6:.2f} W" for part, uj in spent.items())
    if spent["cpu"] <= 0:
        why = "the CPU's counter did not advance although a core was busy (as on macOS 27)"
        return "warning", f"{why}; {len(read)} readings in {seconds:.0f} s: {parts}"
    if any(not 0 <= uj / seconds / 1e6 < MOST_W for uj in spent.values()):
        return "warning", f"a counter ran backwards or jumped: {parts}"
    zero = {length: _without(read, length) for length in (SHORT_S, LONG_S)}
    if zero[LONG_S]:
        return "warning", f"{zero[LONG_S]:.0%} of the windows of {LONG_S:g} s saw no energy: {parts}"
    short = (
        f"; {zero[SHORT_S]:.0%} of the windows of {SHORT_S:g} s saw none: published in batches" if zero[SHORT_S] else ""
    )
    return "ok", f"{parts} over {seconds:.0f} s{short}"


def _without(read: Sequence[tuple[float, Mapping[str, int]]], length: float) -> float:
    """The share of windows of this length in which the CPU's counter stood still."""
    windows = []
    for n, (at, parts) in enumerate(read):
        end = next((later for later in read[n:] if later[0] - at >= length), None)
        if end is not None:
            windows.append(end[1]["cpu"] == parts["cpu"])
    return sum(windows) / len(windows) if windows else 0.0


def host_statistics(told: Mapping[str, Any]) -> tuple[vm.Vm | None, str, str]:
    """Memory from the kernel's words, how they were had, and why there are none."""
    last = told["calls"][-1]
    if last["status"] != 0:
        tried = ", ".join(f"{one['asked']} words: {one['status']}" for one in told["calls"])
        return None, "", f"host_statistics64 fails (kern_return by words asked: {tried})"
    found = vm.of_words(last["words"], told["page_size"])
    words = f"host_statistics64 with {last['came']} words"
    if len(told["calls"]) > 1:
        words += f", after {told['calls'][0]['status']} with {told['calls'][0]['asked']}"
    return found, words, f"{words} has implausible values" if found is None else ""


def gpu(text: str) -> Said:
    """The GPU's statistics in ioreg."""
    busy, used = _UTILIZATION.search(text), _IN_USE.search(text)
    if busy is None and used is None:
        return "warning", "ioreg shows no statistics of a GPU"
    seen = [f"busy {busy[1]} %" if busy else "", f"{int(used[1][:18]) / 1e9:.1f} GB in use" if used else ""]
    return "ok", ", ".join(one for one in seen if one)


def launchd(text: str) -> Said:
    """State and last exit of the service."""
    found = {name.strip(): value.strip() for name, value in reversed(_LINE.findall(text))}
    state, last = found.get("state", ""), found.get("last exit code", "")
    seen = f"state {state or 'unknown'}, runs {found.get('runs', 'unknown')}, last exit code {last or 'unknown'}"
    return ("ok" if state == "running" else "warning"), seen
