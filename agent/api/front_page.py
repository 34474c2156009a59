"""What ``GET /`` says: what this is, which models answer, how to call them. As a page, or as JSON. Pure.

The page is whole: no script, nothing from elsewhere. Everything that was configured or sent is escaped.
"""

import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from agent.views import NodeView

WHAT = "Language models behind the OpenAI API, served by the machines of this rack."
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5c667a; --back: #f6f7f9; --card: #fff; --line: #dde1e8;
  --accent: #0b6e4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --back: #12151b; --card: #1b2029;
  --line: #2c3340; --accent: #5fd0a6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.02em; }
h2 { margin: 2.2rem 0 0.7rem; font-size: 1.05rem; }
p { margin: 0.5rem 0; }
.soft { color: var(--soft); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.88em; }
pre, ul { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
pre { padding: 0.9rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
ul { list-style: none; margin: 0; padding: 0.2rem 1rem; }
li { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0.2rem 1rem; padding: 0.5rem 0;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
li:first-child { border-top: 0; }
a { color: var(--accent); }
"""
_HASH = binascii.b2a_base64(hashlib.sha256(_STYLE.encode()).digest(), newline=False).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Vary": "Accept",
}
_QUALITY = re.compile(r"(?:0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")


class Served(NamedTuple):
    """A name that answers now, and the ids of the nodes it answers on, this one first."""

    name: str
    nodes: tuple[str, ...]


class Front(NamedTuple):
    """What is told. ``base_url`` ends in /v1; ``node`` and ``models`` are None for a client that may not know them."""

    base_url: str
    keys: bool
    node: str | None
    models: tuple[Served, ...] | None


def served(nodes: Iterable[NodeView]) -> tuple[Served, ...]:
    """The models that nodes have ready, by name; the first node is this one."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        for model in node.models:
            if model.ready and node.state != "down":
                found.setdefault(model.name, []).append(node.node)
    return tuple(Served(name, tuple(dict.fromkeys(found[name]))) for name in sorted(found))


def wants_json(accept: Sequence[str]) -> bool:
    """Whether a client asks for JSON rather than a page: its Accept headers name it, and no page as gladly."""
    named = {"application/json": 0.0, "text/html": 0.0}
    for part in ",".join(accept).split(","):
        kind, *parameters = (one.strip().lower() for one in part.split(";"))
        quality = next((one[2:] for one in parameters if one.startswith("q=")), "1")
        if kind in named and _QUALITY.fullmatch(quality):
            named[kind] = max(named[kind], float(quality))
    return named["application/json"] > named["text/html"]


def as_json(front: Front) -> dict[str, Any]:
    """The facts for a program."""
    told: dict[str, Any] = {"name": "mlxrack", "description": WHAT, "base_url": front.base_url}
    told |= {"openapi": "/openapi.json", "help": "mlxrack-agent help", "api_key_required": front.keys}
    if front.models is not None:
        told |= {"node": front.node, "models": [{"id": one.name, "nodes": list(one.nodes)} for one in front.models]}
    return told


def as_page(front: Front) -> str:
    """The facts for a person."""
    of_node = f" This is node <b>{escape(front.node)}</b>." if front.node is not None else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mlxrack</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body><main>\n"
        f'<h1>mlxrack</h1>\n<p class="soft">{WHAT}{of_node}</p>\n'
        f"<h2>Models that answer now</h2>\n{_models(front)}\n"
        f"<h2>From a program</h2>\n<p>Any client of the OpenAI API, with this base URL: "
        f"<code>{escape(front.base_url)}</code></p>\n"
        f"<pre>{escape(curl(front))}</pre>\n<pre>{escape(python(front))}</pre>\n{_hints(front)}"
        "<h2>Documentation</h2>\n"
        '<p><a href="/openapi.json">/openapi.json</a> describes the API. On a machine of the rack, '
        "<code>mlxrack-agent help</code> lists pages and runbooks, <code>mlxrack-agent status</code> shows models and "
        "peers.</p>\n</main></body></html>\n"
    )


def _models(front: Front) -> str:
    if front.models is None:
        return '<p class="soft">They are listed for clients with an API key: <code>GET /v1/models</code>.</p>'
    if not front.models:
        return '<p class="soft">None yet: <code>mlxrack-agent status</code> on this node says why.</p>'
    rows = "".join(
        f'<li><code>{escape(one.name)}</code><span class="soft">{escape(_where(one, front.node))}</span></li>'
        for one in front.models
    )
    return f"<ul>{rows}</ul>"


def _where(one: Served, here: str | None) -> str:
    others = [node for node in one.nodes if node != here]
    parts = ["here"] if here in one.nodes else []
    return " and ".join([*parts, ", ".join(others)] if others else parts)


def _hints(front: Front) -> str:
    hints = []
    if front.keys:
        hints.append("The operator of this rack gives out API keys (<code>mlxrack-agent new-key</code>).")
    if front.base_url.startswith("https:"):
        hints.append("If this rack has its own CA: <code>--cacert ca.pem</code>, or <code>SSL_CERT_FILE=ca.pem</code>.")
    return f'<p class="soft">{" ".join(hints)}</p>\n' if hints else ""


def _model(front: Front) -> str:
    return front.models[0].name if front.models else "MODEL"


def curl(front: Front) -> str:
    """A command line that asks a question."""
    body = {"model": _model(front), "messages": [{"role": "user", "content": "Hello"}]}
    key = '  -H "Authorization: Bearer $API_KEY" \\\n' if front.keys else ""
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl {front.base_url}/chat/completions \\\n{key}  -H 'Content-Type: application/json' \\\n  -d '{quoted}'"


def python(front: Front) -> str:
    """The same with OpenAI's client."""
    key = 'os.environ["API_KEY"]' if front.keys else '"none"'
    head = "import os\n\nfrom openai import OpenAI" if front.keys else "from openai import OpenAI"
    return (
        f"{head}\n\nclient = OpenAI(base_url={json.dumps(front.base_url)}, api_key={key})\n"
        "answer = client.chat.completions.create(\n"
        f'    model={json.dumps(_model(front))}, messages=[{{"role": "user", "content": "Hello"}}]\n)\n'
        "print(answer.choices[0].message.content)"
    )
