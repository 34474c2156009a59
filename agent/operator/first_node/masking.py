"""Takes out of any text what names a machine, a person or a secret. Pure.

Two walls: a step keeps of a program's output what it needs (agent/operator/first_node/steps.py), and all that
is kept goes through ``masked``. What is put in place of something has no such thing in it, so masking again changes
nothing.
"""

import ipaddress
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Mask = Callable[[str], str]
_NOT_NAMES = frozenset({"local", "localhost", "root", "mlxrack", "_mlxrack", "nobody", "daemon", ""})
"""Names that tell nothing of anybody."""
_PUBLIC = re.compile(r"(?:www\.apple\.com|localhost|127\.0\.0\.1|\[::1\])(?::\d+)?")
_SECRET_WORDS = r"(?:pass(?:word|wd|phrase)?|secret|token|api[_-]?key|access[_-]?key|authorization|credentials?)"
_VALUE = r"(?:\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[^\s\"',;<]+)"
_STEP = r"[ \t]{0,40}+"
"""Between a label and its value. Bounded, as every part of a rule is that may begin anywhere: a program that floods its
output must not make the search quadratic."""
_FOLLOWS = r"[^<]{0,80}</key>\s{0,40}<(string|data|integer)>)[^<]*"
_DOMAINS = "com|net|org|edu|gov|cloud|io|co|de|ch|at|eu|uk|fr|nl|se|dk|fi|pl|jp|box"
_LONG = re.compile(r"[^\s<>\"',;(){}]{256,}")
"""No word that a judge reads; a key, or a flood."""
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"-----BEGIN [A-Z0-9 ]{1,60}(?:-----)?[\s\S]*?(?:-----END [A-Z0-9 ]{1,60}-----|\Z)", "<secret>"),
        (r"\beyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*)?", "<secret>"),
        (r"(?i)\b(bearer|basic)\s{1,40}[\w.~+/=-]{6,}", r"\1 <secret>"),
        (rf"(?im)(\bpass(?:word|wd|phrase)[\"']?{_STEP}[:=]{_STEP})(?![\"'<])[^\n,;<]+", r"\1<secret>"),
        (rf"(?i)(\b[\w.-]*{_SECRET_WORDS}s?[\"']?{_STEP}(?:=>|[:=](?!>)){_STEP}){_VALUE}", r"\1<secret>"),
        (rf"(?i)((?<!\w)--?[\w-]*{_SECRET_WORDS}[ =]){_VALUE}", r"\1<secret>"),
        (rf"(?i)(<key>[^<]*{_SECRET_WORDS}{_FOLLOWS}", r"\1(secret)"),
        (
            rf"(?i)(<key>[^<]*{_SECRET_WORDS}[^<]{{0,80}}</key>\s{{0,40}}<(array|dict)>)[\s\S]*?(?=</\2>|\Z)",
            r"\1(secret)",
        ),
        (r"\b(?:hf|sk|pk|gh[opsu]|github_pat|glpat|xox[abps]|ops|mlxrack)[_-][\w-]{8,}", "<secret>"),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b", "<secret>"),
        (r"(?<![0-9A-Za-z-])[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}(?![0-9A-Za-z-])", "<uuid>"),
        (r"(?<![0-9A-Za-z-])[0-9A-Fa-f]{8}-[0-9A-Fa-f]{16}(?![0-9A-Za-z-])", "<uuid>"),
        (
            rf"(?i)((?:serial|udid|\bs/n|\bimei)[^:=\n<>]{{0,40}}[:=]{_STEP}\"?)(?:<[0-9a-f \t]+>|[^\s\"<>,;]+)",
            r"\1<serial>",
        ),
        (
            r"(?i)(\b(?:serial|udid|s/n|imei)\b(?:[ \t](?:number|no\.?|is))?[ \t]+)(?=[a-z-]*[0-9])[\w-]{5,}",
            r"\1<serial>",
        ),
        (rf"(?i)(<key>[^<]*(?:serial|udid){_FOLLOWS}", r"\1(serial)"),
        (
            (
                rf"(?im)^([ \t]{{0,80}}\"?(?:(?:computer|host|local ?host|user|real|full|log|bonjour)[ _]?name"
                rf"|boot volume(?: name)?|owner|apple ?id)\"?{_STEP}[:=]{_STEP}\"?)[^\n\",]+"
            ),
            r"\1<name>",
        ),
        (rf"(?i)(\b(?:ssid|network name)\"?{_STEP}[:=]{_STEP}\"?)[^\n\",]+", r"\1<name>"),
        (rf"(?i)(<key>(?:computer|host|local ?host|user|full)[ _]?name{_FOLLOWS}", r"\1(name)"),
        (
            (
                r"(?i)([\\/](?:Users|home|Volumes)[\\/])(?!Shared\b|Macintosh HD\b|<)"
                r"(?:[^/\\\n\"<>:,;]{1,60}(?=[/\\])|[^/\\\s\"':,;)<>]+)"
            ),
            r"\1<user>",
        ),
        (r"(?<![\w/~.])~[A-Za-z_][\w.-]*", "~<user>"),
        (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "<mail>"),
        (r"\b((?:en|bridge|utun|awdl|llw|anpi|ap|lo|vlan|bond|gif|stf)\d{1,3}):(?=[0-9A-Fa-f]{0,4}:)", r"\1 "),
        (r"(?<![0-9A-Za-z:-])(?:[0-9A-Fa-f]{1,2}[:-]){5}[0-9A-Fa-f]{1,2}(?![0-9A-Za-z:-])", "<mac>"),
        (r"\b(?:[0-9A-Fa-f]{4}\.){2}[0-9A-Fa-f]{4}\b", "<mac>"),
        (r"(?<![0-9A-Za-z])(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{12}(?![0-9A-Za-z])", "<mac>"),
        (r"(?i)(?:\"[^\"\n]{1,80}\"|[^\s\"<>=:,;]{1,80})\._[a-z0-9-]{1,20}\._(?:tcp|udp)(?:\.[\w-]+)*\.?", "<host>"),
        (r"(?i)\b(?:[\w-]+\.)+(?:local|lan|home|internal|intra|corp|localdomain|arpa)\b(?!\.[\w-])", "<host>"),
        (rf"(?i)(?<![\w.@-])(?!www\.apple\.com\b|com\.)(?:[\w-]+\.)+(?:{_DOMAINS})\b(?!\.?[\w-])", "<host>"),
        (r"(?<![A-Za-z0-9])(?=[A-Z]*[0-9])(?=[0-9]*[A-Z])[A-Z0-9]{10,14}(?![A-Za-z0-9])", "<serial>"),
        (
            r"(?<![\w+/=.~-])(?=[a-z0-9+/]*[A-Z])(?=[A-Za-z+/]*[0-9])[A-Za-z0-9][A-Za-z0-9+/]{30,}=*(?![\w+/=.-])",
            "<secret>",
        ),
        (r"(?<![\w+=-])(?=(?:[A-Za-z_+=-]*\d){3})(?=(?:[\d_+=-]*[A-Za-z]){3})[\w+=-]{24,}(?![\w+=-])", "<secret>"),
    )
)
"""In this order: those that know a label come before those that know a form."""
_ADDRESS = re.compile(
    r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,}[0-9A-Fa-f:.]*|(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\.?\d)"
)
_OP = re.compile(r"op://(?!\(host\))(?:[^/\"'\n<>:,;]{1,60}/){1,3}[^/\s\"'<>:,;)]{1,60}")
_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)([^/\s\"'<>]+)")


def masker(names: Mapping[str, Iterable[str]]) -> Mask:
    """The mask that also knows this machine's names, by what is put in their place (like "host")."""
    known = {form: f"<{kind}>" for kind, found in names.items() for name in found for form in _forms(name)}
    kept = sorted((one for one in known if one.lower() not in _NOT_NAMES), key=len, reverse=True)
    rules = [(_named(name, known[name]), known[name]) for name in kept]

    def mask(text: str) -> str:
        text = _hidden(text)
        for pattern, into in rules:
            text = pattern.sub(into, text)
        return masked(text)

    return mask


def _forms(name: str) -> set[str]:
    """As programs write it: with letters composed or not, and escaped in JSON."""
    composed = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    return {name, *composed, *(json.dumps(one)[1:-1] for one in composed)}


def _named(name: str, into: str) -> re.Pattern[str]:
    """Wherever it is a word, and a serial number wherever it is. A short name may be part of an identifier, as the
    host vm is of vm.swapusage."""
    if into == "<serial>":
        return re.compile(re.escape(name), re.IGNORECASE)
    if len(name) > 3:
        return re.compile(rf"(?<![A-Za-z0-9_<]){re.escape(name)}(?![A-Za-z0-9_>])", re.IGNORECASE)
    return re.compile(rf"(?<![\w.<-]){re.escape(name)}(?![\w>-]|\.\w)")


def masked(text: str) -> str:
    """The text without anything that has the form of a name, an address or a secret."""
    text = _hidden(text)
    for pattern, into in _RULES:
        text = pattern.sub(into, text)
    return _ADDRESS.sub(_of_address, text)


def _hidden(text: str) -> str:
    """Without what a name that is replaced within it would make another: long words, references, addresses."""
    return _URL.sub(_of_url, _OP.sub("op://(host)", _LONG.sub("(long)", text)))


def masked_json(text: str, mask: Mask) -> str:
    """The same for the strings of a JSON document, so that it stays one; its keys are words of a program, so that in
    them only forms are masked. Anything else is masked as text."""
    try:
        tree = json.loads(text)
        return json.dumps(_walked(tree, mask))
    except (ValueError, RecursionError):
        return mask(text)


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
