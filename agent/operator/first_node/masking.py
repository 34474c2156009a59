"""Takes out of any text what names a machine, a person or a secret. Pure.

Two walls: a step keeps of a program's output what it needs (agent/operator/first_node/steps.py), and all that
is kept goes through ``masked``. What is put in place of something has no such thing in it, so masking again changes
nothing.
"""

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Mask = Callable[[str], str]
_NOT_NAMES = frozenset({"local", "localhost", "root", "mlxrack", "_mlxrack", "nobody", "daemon", ""})
"""Names that tell nothing of anybody."""
_PUBLIC = re.compile(r"(?:www\.apple\.com|localhost|127\.0\.0\.1|\[::1\])(?::\d+)?")
_SECRET_WORDS = r"(?:pass(?:word|wd|phrase)?|secret|token|api[_-]?key|access[_-]?key|authorization|credentials?)"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"-----BEGIN [A-Z0-9 ]+-----[\s\S]*?(?:-----END [A-Z0-9 ]+-----|\Z)", "<secret>"),
        (r"\beyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)?", "<secret>"),
        (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}", r"\1 <secret>"),
        (
            rf"(?i)(\b[\w.-]*{_SECRET_WORDS}s?[\"']?\s*(?:=>|[:=](?!>))\s*)(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;<]+)",
            r"\1<secret>",
        ),
        (rf"(?i)(<key>[^<]*{_SECRET_WORDS}[^<]*</key>\s*<(string|data)>)[^<]*", r"\1(secret)"),
        (r"\b(?:hf|sk|pk|gh[opsu]|github_pat|glpat|xox[abps]|ops|mlxrack)[_-][\w-]{8,}", "<secret>"),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b", "<secret>"),
        (r"\b[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}\b", "<uuid>"),
        (r"\b[0-9A-Fa-f]{8}-[0-9A-Fa-f]{16}\b", "<uuid>"),
        (r"(?i)((?:serial|udid)[^:=\n<>]{0,40}[:=]\s*\"?)[^\s\"<>,;]+", r"\1<serial>"),
        (r"(?i)(<key>[^<]*serial[^<]*</key>\s*<string>)[^<]*", r"\1(serial)"),
        (
            r"(?im)^(\s*\"?(?:computer|host|local ?host|user|real|boot volume)[ _]?name\"?\s*[:=]\s*\"?)[^\n\",]+",
            r"\1<name>",
        ),
        (r"(?i)(<key>(?:computer|host|local ?host|user)[ _]?name</key>\s*<string>)[^<]*", r"\1(name)"),
        (r"(?i)([\\/](?:Users|home)[\\/])(?!Shared\b|<)[^/\\\s\"':,;)<>]+", r"\1<user>"),
        (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "<mail>"),
        (r"(?<![0-9A-Za-z:-])(?:[0-9A-Fa-f]{1,2}[:-]){5}[0-9A-Fa-f]{1,2}(?![0-9A-Za-z:-])", "<mac>"),
        (r"\b(?:[0-9A-Fa-f]{4}\.){2}[0-9A-Fa-f]{4}\b", "<mac>"),
        (r"(?i)\b(?:[\w-]+\.)+(?:local|lan|home|internal|intra|corp|localdomain|arpa)\b", "<host>"),
        (r"(?<![A-Za-z0-9_])(?=[A-Z]*[0-9])(?=[0-9]*[A-Z])[A-Z0-9]{10,14}(?![A-Za-z0-9_])", "<serial>"),
        (r"(?<![\w+=-])(?=(?:[^\d\s]*\d){3})(?=(?:[^A-Za-z\s]*[A-Za-z]){3})[\w+=-]{24,}(?![\w+=-])", "<secret>"),
    )
)
"""In this order: those that know a label come before those that know a form."""
_ADDRESS = re.compile(
    r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,}[0-9A-Fa-f:.]*|(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\.?\d)"
)
_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)([^/\s\"'<>]+)")


def masker(names: Mapping[str, Iterable[str]]) -> Mask:
    """The mask that also knows this machine's names, by what is put in their place (like "host")."""
    known = [(name, f"<{kind}>") for kind, found in names.items() for name in found]
    kept = sorted({one for one in known if one[0].lower() not in _NOT_NAMES}, key=lambda one: -len(one[0]))
    rules = [(_named(name), into) for name, into in kept]

    def mask(text: str) -> str:
        for pattern, into in rules:
            text = pattern.sub(into, text)
        return masked(text)

    return mask


def _named(name: str) -> re.Pattern[str]:
    """Wherever it is a word. A short one may be part of an identifier, as the host vm is of vm.swapusage."""
    if len(name) > 3:
        return re.compile(rf"(?<![A-Za-z0-9_<]){re.escape(name)}(?![A-Za-z0-9_>])", re.IGNORECASE)
    return re.compile(rf"(?<![\w.<-]){re.escape(name)}(?![\w>-]|\.\w)")


def masked(text: str) -> str:
    """The text without anything that has the form of a name, an address or a secret."""
    text = _URL.sub(_of_url, text)
    for pattern, into in _RULES:
        text = pattern.sub(into, text)
    return _ADDRESS.sub(_of_address, text)


def masked_json(text: str, mask: Mask) -> str:
    """The same for the strings of a JSON document, so that it stays one; its keys are words of a program, so that in
    them only forms are masked. Anything else is masked as text."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return mask(text)
    return json.dumps(_walked(tree, mask))


def _walked(tree: Any, mask: Mask) -> Any:
    if isinstance(tree, str):
        return mask(tree)
    if isinstance(tree, dict):
        return {masked(name): _walked(one, mask) for name, one in tree.items()}
    return [_walked(one, mask) for one in tree] if isinstance(tree, list) else tree


def _of_url(found: re.Match[str]) -> str:
    return found[0] if _PUBLIC.fullmatch(found[2]) else f"{found[1]}(host)"


def _of_address(found: re.Match[str]) -> str:
    text = found[0].rstrip(".")
    try:
        address = ipaddress.ip_address(text.rstrip(":") if text.endswith(":") and not text.endswith("::") else text)
    except ValueError:
        return found[0]
    return found[0] if address.is_loopback or address.is_unspecified else f"<address>{found[0][len(text) :]}"
