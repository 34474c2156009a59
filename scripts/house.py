"""The measures of the house: prints them, and exits 1 where one is past its guide. ``--pure`` checks calls alone."""

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import grimp

from scripts.common import parser

ROOT = Path(__file__).parent.parent
PRODUCT = ("agent", "aggregator", "shared")
CLOCKS = {("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today")}
WORLD = {"open", "print", "input", "exec", "eval", "compile", "__import__", "breakpoint"}

PROVIDERS = re.compile(
    r"\b(api\.(openai|anthropic|mistral|groq|deepseek|together|cohere|x|perplexity|fireworks)\.(com|ai|xyz)|"
    r"openrouter\.ai|generativelanguage\.googleapis\.com|openai\.azure\.com|bedrock-runtime|ollama\.com)\b",
    re.IGNORECASE,
)
"""Hosts of providers: only what sends to them, and the policy file's schema, names them."""
KNOW_PROVIDERS = ("agent/egress/", "agent/policy/rules.py")
CLIENTS = {"http.client", "urllib.request", "smtplib", "ftplib", "xmlrpc.client", "socket", "imaplib", "poplib"}
"""Of the standard library, in which import contracts see packages alone."""
DIAL = {"open_connection", "create_connection", "create_datagram_endpoint", "open_unix_connection", "sock_connect"}
MAY_CONNECT = (
    *("agent/api/", "agent/mesh/", "agent/egress/", "agent/telemetry/meters/", "agent/files/hub", "agent/operator/"),
    *("agent/process/loader_process.py", "agent/loader/__main__.py", "agent/loader/serve.py"),  # a pair of sockets
    *("agent/gateway/analysis.py", "agent/gateway/analyzer.py"),  # another one, to the child that analyses
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Measure(NamedTuple):
    """One row; ``least`` turns the guide into a lower bound."""

    name: str
    value: float
    guide: float
    where: str = ""
    least: bool = False

    @property
    def ok(self) -> bool:
        """Whether the value keeps its guide."""
        return self.value >= self.guide if self.least else self.value <= self.guide


def impure_calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls of clocks, files and the interpreter, which no import contract sees: (line, what)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in WORLD:
            yield node.lineno, f"{called.id}()"
        elif isinstance(called, ast.Attribute):
            owner = called.value.attr if isinstance(called.value, ast.Attribute) else getattr(called.value, "id", "")
            if (owner, called.attr) in CLOCKS:
                yield node.lineno, f"{owner}.{called.attr}()"


def contract(root: Path, name: str) -> dict[str, list[str]]:
    """An import contract of pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    return next(one for one in settings["tool"]["importlinter"]["contracts"] if one["id"] == name)


def pure_files(root: Path) -> list[Path]:
    """Files of the modules that the contract calls pure."""
    found = list[Path]()
    for name in contract(root, "core-is-pure")["modules"]:
        path = root / name.removesuffix(".*").replace(".", "/")
        found += path.glob("*.py") if name.endswith(".*") else [path.with_suffix(".py"), path / "__init__.py"]
    return [path for path in found if path.is_file()]


def planted(root: Path) -> list[str]:
    """Every impure call in a pure module, for display."""
    return [
        f"{path.relative_to(root)}:{line}: {what} in a pure module"
        for path in pure_files(root)
        for line, what in impure_calls(ast.parse(path.read_text()))
    ]


def outbound(root: Path) -> list[str]:
    """Every place of the agent that could connect to something and is not one of those that may, and every place that
    names a provider's host, for display."""
    found = []
    for path in sorted(one for name in PRODUCT for one in (root / name).rglob("*.py")):
        where, tree = path.relative_to(root).as_posix(), ast.parse(path.read_text())
        if where.startswith("agent/") and not where.startswith(MAY_CONNECT):
            found += [f"{where}:{line}: {what}" for line, what in _connecting(tree)]
        if not where.startswith(KNOW_PROVIDERS):
            found += [f"{where}:{line}: names {host}" for line, host in _named(tree)]
    return found


def _named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else ""
        if isinstance(node, ast.Constant) and isinstance(text, str) and (seen := PROVIDERS.search(text)):
            yield node.lineno, seen.group()


def _connecting(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{one.name}" for one in node.names)]
        elif isinstance(node, ast.Attribute) and node.attr in DIAL:
            yield node.lineno, f"connects ({node.attr})"
        if clients := CLIENTS.intersection(names):
            yield getattr(node, "lineno", 0), f"imports {', '.join(sorted(clients))}"


SEALED = "agent/policy/redaction"
"""The only package that makes a Redacted."""


def unsealed(root: Path) -> list[str]:
    """Every place outside its package that could make a Redacted or change one, for display: the seal's name, a call of
    the class, and what goes around a constructor."""
    found = list[str]()
    for path in sorted(path for name in PRODUCT for path in (root / name).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if not file.startswith(f"{SEALED}/"):
            found += (f"{file}:{line}: {what}" for line, what in _unsealed(ast.parse(path.read_text())))
    return found


def _unsealed(tree: ast.Module) -> Iterator[tuple[int, str]]:
    made = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == "Redacted"
    } | {"Redacted"}
    for node in ast.walk(tree):
        named = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
        if "_SEAL" in (named, getattr(node, "value", None)):
            yield getattr(node, "lineno", 0), "the seal of Redacted"
        if isinstance(node, ast.Call):
            texts = [ast.unparse(one) for one in (node.func, *node.args)]
            around = texts[0].split(".")[-1] in ("__new__", "__setattr__", "partial", "type", "setattr", "cast")
            if texts[0].split(".")[-1] in made or (around and any(one.split(".")[-1] in made for one in texts)):
                yield node.lineno, "makes a Redacted"
        if isinstance(node, ast.ClassDef) and any(ast.unparse(one).split(".")[-1] in made for one in node.bases):
            yield node.lineno, "a subclass of Redacted"


def measures(root: Path) -> list[Measure]:
    """Every row of the table."""
    files = {path.relative_to(root): path.read_text() for name in PRODUCT for path in (root / name).rglob("*.py")}
    lines = {path: len(text.splitlines()) for path, text in files.items()}
    functions, classes, constructors, prose = [(0, "")], [(0, "")], [(0, "")], 0
    for path, text in files.items():
        tree = ast.parse(text)
        prose += _prose(tree, text)
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'name', '')}"
            if isinstance(node, Function):
                functions.append((_length(node), where))
            elif isinstance(node, ast.ClassDef):
                methods = [one for one in node.body if isinstance(one, Function)]
                classes.append((len(methods), where))
                constructors += [(_length(one), where) for one in methods if one.name == "__init__"]
    lengths = sorted(length for length, _ in functions[1:])
    folders = Counter(str(path.parent) for path in files)
    total = sum(lines.values())
    tests, scripts = (_lines(root / name) for name in ("tests", "scripts"))
    folder, most = folders.most_common(1)[0]
    longest = max(lines, key=lambda path: lines[path])
    layers = len(contract(root, "agent-layers")["layers"])
    return [
        Measure("files in one folder", most, 35, folder),
        Measure("layers of the agent", layers, 11),
        Measure("import arrows between its children", _arrows(grimp.build_graph("agent")), 118),
        Measure("methods of a class", *_most(classes, 24)),
        Measure("lines of a constructor", *_most(constructors, 39)),
        Measure("lines of a function, median", median(lengths), 8),
        Measure("lines of a function, p99", lengths[int(len(lengths) * 0.99)], 41),
        Measure("lines of a function, longest", *_most(functions, 60)),
        Measure("lines of a file", lines[longest], 450, str(longest)),
        Measure("lines of product code", total, 72_500),
        Measure("lines of scripts", scripts, 8_200),
        Measure("docstring and comment lines per 100", round(100 * prose / total, 2), 9.97, least=True),
        Measure("test lines per line of code", round(tests / total, 2), 0.6, least=True),
    ]


def _most(found: list[tuple[int, str]], guide: int) -> tuple[int, int, str]:
    length, where = max(found)
    return length, guide, where


def _length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _lines(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def _prose(tree: ast.Module, text: str) -> int:
    """Lines of docstrings, and comments."""
    found = sum(one.type == tokenize.COMMENT for one in tokenize.generate_tokens(io.StringIO(text).readline))
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            found += (first.end_lineno or first.lineno) - first.lineno + 1
    return found


def _arrows(graph: grimp.ImportGraph) -> int:
    """Pairs of the agent's children of which one imports the other."""
    modules = graph.modules - {"agent"}
    pairs = {
        (importer.split(".")[1], imported.split(".")[1])
        for importer in modules
        for imported in graph.find_modules_directly_imported_by(importer) & modules
    }
    return sum(one != other for one, other in pairs)


def main() -> int:
    """The table, or with --pure the calls."""
    options = parser(__doc__)
    options.add_argument("--pure", action="store_true", help="check only calls: of clocks and files, of Redacted, out")
    calls = [*planted(ROOT), *outbound(ROOT), *unsealed(ROOT)]
    print(
        "\n".join(calls) or "no pure module calls a clock, a file or the interpreter; only redaction makes a Redacted"
    )
    if options.parse_args().pure:
        return 1 if calls else 0
    rows = measures(ROOT)
    for row in rows:
        sign = ">=" if row.least else "<="
        print(f"{'ok  ' if row.ok else 'PAST'} {row.name:38} {row.value:>9,} {sign} {row.guide:>9,}  {row.where}")
    return 0 if all(row.ok for row in rows) and not calls else 1


if __name__ == "__main__":
    sys.exit(main())
