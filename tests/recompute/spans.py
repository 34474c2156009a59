"""Sets of moments: sorted lists of half-open intervals of milliseconds that do not touch."""

from collections.abc import Iterable
from itertools import pairwise

Spans = list[tuple[int, int]]


def union(spans: Iterable[tuple[int, int]], gap_ms: int = 0) -> Spans:
    """What any of them covers; gaps of at most ``gap_ms`` are closed."""
    found: Spans = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if found and start - found[-1][1] <= gap_ms:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def clip(spans: Iterable[tuple[int, int]], start: int, end: int) -> Spans:
    """The part within [start, end)."""
    return union((max(a, start), min(b, end)) for a, b in spans)


def intersect(one: Spans, other: Spans) -> Spans:
    """What both cover."""
    return union((max(a, c), min(b, d)) for a, b in one for c, d in other)


def subtract(one: Spans, other: Spans) -> Spans:
    """What the first covers and the other does not."""
    found: Spans = []
    for start, end in one:
        for gone_start, gone_end in other:
            if gone_end <= start or gone_start >= end:
                continue
            if gone_start > start:
                found.append((start, gone_start))
            start = max(start, gone_end)
        if start < end:
            found.append((start, end))
    return found


def length(spans: Spans) -> int:
    """Milliseconds."""
    return sum(end - start for start, end in spans)


def edges(several: Iterable[Spans], start: int, end: int) -> list[tuple[int, int]]:
    """The pieces of [start, end) in which nothing changes in any of several sets."""
    cuts = {start, end} | {at for spans in several for span in spans for at in span if start < at < end}
    return list(pairwise(sorted(cuts)))


def holds(spans: Spans, at: int) -> bool:
    """Whether a moment is covered."""
    return any(start <= at < end for start, end in spans)
