"""``mlxrack-agent serve MODEL``: one model on this machine. Finds or pulls it, plans its memory, says when it is ready.

Plain functions choose; the daemon that serves is the same as for a rack.
"""

import argparse
import asyncio
import json
import re
import shlex
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from agent.config import STORED, AgentConfig, Listen, Model, Peers, scheme
from agent.files.hub_listing import Listing, parse_name
from agent.files.model_folder import ModelFolder
from agent.files.model_pull import BucketSource, snapshot_of
from agent.files.modelstore import ModelSpec
from agent.operator import recommended
from agent.operator.admin_client import AdminClient
from agent.operator.obtain import Access, fetched, obtain
from agent.operator.obtain import add_options as hub_options
from agent.operator.statusview import size
from agent.process import gpu, machine
from shared import catalog, memory_plan, model_shape
from shared.errors import Halt, RackError, Refused
from shared.model_shape import ModelShape
from shared.transport import Tls

SETTINGS = ((8, 4096), (8, 2048), (4, 2048), (2, 2048), (1, 2048))
"""Requests at the same time and tokens for each, in order of preference."""
POLL_S = 0.3

Kind = Literal["chat", "completions", "embeddings"]
Need = Callable[[int, int], int]
"""Bytes for so many requests of so many tokens."""


class Options(NamedTuple):
    """What the command line asks for; None and "" leave the choice to us."""

    name: str = ""
    revision: str = ""
    port: int | None = None
    rows: int | None = None
    context_tok: int | None = None


class Serving(NamedTuple):
    """The configuration of a node that serves one model, and what it can be asked."""

    config: AgentConfig
    spec: ModelSpec
    kind: Kind


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line of ``serve``."""
    parser.add_argument("model", help="org/model on the Hugging Face hub, a model folder, or a name in the store")
    parser.add_argument("--name", default="", help="served name (default: that of the model)")
    parser.add_argument("--port", type=int, default=None, help="port on 127.0.0.1 (default: the configured one, 8470)")
    parser.add_argument("--rows", type=int, default=None, help="requests at the same time (default: what fits)")
    parser.add_argument("--context", type=int, default=None, help="tokens planned for each (default: what fits)")
    parser.add_argument("--console", action="store_true", help="also write the log to the terminal")
    hub_options(parser)


# ---- decisions ----


def settle(need: Need, budget_bytes: int, options: Options) -> tuple[int, int] | None:
    """The first of SETTINGS that the budget allows, with what the options fix; None if none does."""
    tried = [(options.rows or rows, options.context_tok or tok) for rows, tok in SETTINGS]
    return next((one for one in tried if need(*one) <= budget_bytes), None)


def need_of(shape: ModelShape, weights_bytes: int, base: Model, *, fused: bool) -> Need:
    """The memory plan of a model as a function of rows and tokens."""

    def need(rows: int, row_tok: int) -> int:
        sizes = {"rows": rows, "row_tok": row_tok, "chunk_tok": base.prefill_chunk_tok, "cache_bytes": base.cache_bytes}
        return memory_plan.plan(shape, weights_bytes, **sizes, fused=fused).need_bytes

    return need


def does_not_fit(name: str, least_bytes: int, budget_bytes: int) -> Refused:
    """The refusal of a model that is too large, with the models that are not."""
    fitting = [fit.repo for fit in recommended.recommend(budget_bytes, 0, None)][:3]
    what_fits = (
        f"what fits: {', '.join(fitting)} (`mlxrack-agent models recommend`)" if fitting else "use a smaller one"
    )
    return Refused(
        f"serve {name}: it needs {size(least_bytes)} and this machine has {size(budget_bytes)} for models, "
        f"{size(least_bytes - budget_bytes)} too little; {what_fits}",
        code="no_memory",
    )


def served_name(folder: str) -> str:
    """A served name made from a folder's name; that of a Hugging Face cache folder ends with the model's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.rpartition("--")[2]).lstrip("._-")
    return name[:63] or "model"


def one_node(config: AgentConfig, model: Model, port: int | None) -> AgentConfig:
    """The configuration with this model alone, for clients on this machine alone."""
    there = config.listen
    listen = msgspec.structs.replace(there, host=Listen().host, port=there.port if port is None else port)
    return msgspec.structs.replace(config, models=(model,), listen=listen, peers=Peers(), meters=())


def curl_line(kind: Kind, name: str, url: str, *, keys: bool, trusted: str = "") -> str:
    """A request to try first, for a POSIX shell. ``url`` ends with /v1; ``trusted`` is a file of certificates."""
    body: dict[str, object] = {"model": name}
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        body |= {"input": "Hello"} if kind == "embeddings" else {"prompt": "Once upon a time", "max_tokens": 50}
    path = "chat/completions" if kind == "chat" else kind
    key = ' -H "Authorization: Bearer $MLXRACK_KEY"' if keys else ""
    trust = f" --cacert {shlex.quote(trusted)}" if trusted else ""
    return f"curl{trust} {url}/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def trusted_for(tls: Tls) -> str:
    """The file by which a client on this machine knows the listener: that of the CA, or its own certificate; "" without
    TLS."""
    return tls.ca if tls.ca and not tls.node_certificate else tls.certificate


def kind_of(shape: ModelShape | None, *, template: bool) -> Kind:
    """What a model can be asked: an encoder caches nothing per token."""
    if shape is not None and not shape.token_bytes and not shape.state_bytes:
        return "embeddings"
    return "chat" if template else "completions"


# ---- the world ----


def prepare(text: str, config: AgentConfig, access: Access, options: Options) -> Serving:
    """Find or fetch the model and choose its settings. Raises RackError: no such model, not enough memory or disk, the
    port is in use."""
    port = config.listen.port if options.port is None else options.port
    check_port(port)
    budget = _Budget(config, access.environ)
    model = _model(text, config, access, options, budget)
    if model.name in {one.name for one in config.models}:
        rows, row_tok = options.rows or model.rows, options.context_tok or model.plan_context_tok
        options = options._replace(rows=rows, context_tok=row_tok)
    spec = access.store.describe(model)
    if spec.shape is not None:
        need = need_of(spec.shape, spec.plan.weights_bytes, model, fused=access.store.fused)
        rows, row_tok = _settled(model.name, need, budget, options)
        spec = access.store.describe(msgspec.structs.replace(model, rows=rows, plan_context_tok=row_tok))
    elif spec.need_bytes > budget.bytes_for(spec.need_bytes):
        raise does_not_fit(model.name, spec.need_bytes, budget.bytes_for(spec.need_bytes))
    kind = kind_of(spec.shape, template=model.engine == "fake" or has_template(Path(spec.path)))
    return Serving(one_node(config, spec.model, options.port), spec, kind)


def check_port(port: int) -> None:
    """Raises Halt when the port is in use, before anything is downloaded."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = f"listen on 127.0.0.1:{port}: {error.strerror}; is an agent running? choose another with --port"
            raise Halt(why, code="port_in_use") from None


def has_template(folder: Path) -> bool:
    """Whether the folder says how its model wants a conversation written."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    raw = ModelFolder(folder, f"model {folder.name}").find("tokenizer_config.json") or b""
    try:
        return bool(msgspec.json.decode(raw, type=dict).get("chat_template"))
    except msgspec.DecodeError:
        return False


async def announce(client: AdminClient, serving: Serving, port: int, began_s: float, say: Callable[[str], None]) -> str:
    """Wait until the model is loaded and say how to reach it; returns why it never will be, "" when it is."""
    said = ""
    while True:
        (seen,) = (await asyncio.to_thread(client.status))["models"]
        if seen["state"] == "ready":
            break
        if seen["state"] in ("cold", "failed") and seen["reason"]:
            return str(seen["reason"])
        if seen["state"] != said:
            said = seen["state"]
            say(f"{said} {serving.spec.model.name} ...")
        await asyncio.sleep(POLL_S)
    for line in ready_lines(serving, port, time.monotonic() - began_s):
        say(line)
    return ""


def ready_lines(serving: Serving, port: int, seconds: float) -> list[str]:
    """What is said when the model is ready."""
    model, spec = serving.spec.model, serving.spec
    together = f"up to {model.rows} requests at the same time, {model.rows * model.plan_context_tok} tokens together"
    lines = [f"{model.name} is ready after {seconds:.1f} s: {size(spec.need_bytes)} planned, {together}"]
    if serving.kind == "completions":
        lines.append("it has no chat template: it serves /v1/completions, which continue a text")
    config = serving.config
    url, trusted = f"{scheme(config)}://{config.listen.host}:{port}/v1", trusted_for(config.tls)
    lines += [f"URL: {url}", curl_line(serving.kind, model.name, url, keys=bool(config.keys), trusted=trusted)]
    return [*lines, "Ctrl-C stops it"]


class _Budget:
    """The memory budget; the GPU is asked for it only where the default is too small, because that takes seconds."""

    def __init__(self, config: AgentConfig, environ: Mapping[str, str]) -> None:
        self._configured, self._environ = config.memory.budget_bytes, environ
        self._bytes = self._configured or machine.default_budget(0, machine.memory_bytes())
        self._asked = bool(self._configured)

    def bytes_for(self, need_bytes: int) -> int:
        """Bytes for all models together."""
        if need_bytes > self._bytes and not self._asked:
            self._asked = True
            self._bytes, _ = gpu.budget_bytes(0, asyncio.run(gpu.ask(self._environ)), self._bytes)
        return self._bytes


def _settled(name: str, need: Need, budget: _Budget, options: Options) -> tuple[int, int]:
    most, (rows, row_tok) = need(*SETTINGS[0]), SETTINGS[-1]
    if (found := settle(need, budget.bytes_for(most), options)) is None:
        least = need(options.rows or rows, options.context_tok or row_tok)
        raise does_not_fit(name, least, budget.bytes_for(least))
    return found


def _model(text: str, config: AgentConfig, access: Access, options: Options, budget: _Budget) -> Model:
    """The model as configured, in a folder, in the store, on the hub or in the bucket, in this order."""
    if (known := next((one for one in config.models if one.name == text), None)) is not None:
        return msgspec.structs.replace(known, preload=True)
    if (folder := Path(text).expanduser()).is_dir():
        name = options.name or served_name(folder.resolve().name)
        return Model(name=name, path=str(snapshot_of(folder.resolve())))
    name, _, _ = text.partition("@")
    if "/" not in text and any(one.name == name for one in access.store.installed()):
        return Model(name=options.name or name, path=f"{STORED}{text}")
    if (asked := parse_name(text)) is not None:
        asked = asked._replace(revision=options.revision or asked.revision)
        found = obtain(asked, access, before=lambda listing, raw: _check(listing, raw, access, options, budget))
    elif access.bucket is not None and "/" not in text:
        found = fetched(BucketSource(access.bucket(), name, text.partition("@")[2]), access, name)
    else:
        held = ", ".join(sorted({one.name for one in access.store.installed()})) or "nothing"
        where = f"no folder of that name, and the store holds {held}"
        raise Refused(f"serve {text}: no such model: {where}; or name one of the hub: org/model", code="not_found")
    return Model(name=options.name or found.name, path=f"{STORED}{found.name}@{found.version}")


def _check(listing: Listing, raw: bytes, access: Access, options: Options, budget: _Budget) -> None:
    """Refuse a model that cannot fit before it is downloaded; what cannot be read yet is checked afterwards."""
    weights = sum(file.size for file in listing.files if catalog.is_loaded(file.name))
    try:
        shape = model_shape.parse_shape(raw)
    except RackError:
        return
    need = need_of(shape, weights, Model(name="x"), fused=access.store.fused)
    _settled(listing.origin.repo, need, budget, options)
