"""The API as an OpenAPI 3.1 document, from the tables of fields that the parsers use. Pure."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from agent.api.openai import requests as fields
from agent.api.openai.conversation import MAX_MESSAGES, MAX_TOOLS, MESSAGE, ROLES
from agent.api.openai.known import ADVISORY, ELSEWHERE, NEUTRAL, TEXT_NEUTRAL, Neutral
from agent.wire.frames import EFFORTS

Schema = dict[str, Any]

JSON = "application/json"
OPENAPI = "3.1.0"


def _maybe(**schema: Any) -> Schema:
    """A value, or null, which is the same as absent."""
    kind = schema.pop("type")
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    return {"type": [kind, "null"], **schema}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Schema = {"type": "string"}
_FLAG = _maybe(type="boolean")
_COUNT = {"minimum": -1, "maximum": (1 << 63) - 1, "not": {"const": 0}}
_ANY_OBJECT: Schema = {"type": "object"}
_TOKENS = _list({"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}, minItems=1)
_FACTOR: Schema = {"anyOf": [{"enum": [0, None]}, {"type": "number", "minimum": 0.1, "maximum": 10}]}
FIELDS: Mapping[str, Schema] = {
    "model": {**_TEXT, "minLength": 1, "maxLength": 256, "description": "A served name; see /v1/models."},
    "messages": _list(_ref("Message"), minItems=1, maxItems=MAX_MESSAGES),
    "prompt": {"anyOf": [_TEXT, _list(_TEXT, minItems=1)]},
    "input": {
        "anyOf": [
            {**_TEXT, "minLength": 1},
            _TOKENS,
            _list({"anyOf": [{**_TEXT, "minLength": 1}, _TOKENS]}, minItems=1, maxItems=fields.MAX_INPUTS),
        ]
    },
    "n": _maybe(type="integer", minimum=1, maximum=fields.MAX_CHOICES),
    "stream": _FLAG,
    "stream_options": _maybe(type="object", properties={"include_usage": _FLAG}, description="With stream only."),
    "temperature": _maybe(type="number", minimum=0, maximum=2),
    "top_p": _maybe(type="number", minimum=0, maximum=1),
    "top_k": _maybe(type="integer", minimum=-1, maximum=fields.MAX_TOK),
    "min_p": _maybe(type="number", minimum=0, maximum=1),
    "seed": _maybe(type="integer", minimum=-(1 << 63), maximum=(1 << 63) - 1),
    "stop": {
        "anyOf": [
            {"type": "null"},
            {**_TEXT, "minLength": 1, "maxLength": fields.MAX_STOP_CHARS},
            _list({**_TEXT, "minLength": 1, "maxLength": fields.MAX_STOP_CHARS}, maxItems=fields.MAX_STOPS),
        ]
    },
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), _maybe(type="integer", **_COUNT)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), _maybe(type="number", minimum=-2, maximum=2)),
    "logit_bias": _maybe(
        type="object",
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        maxProperties=1024,
    ),
    "timings": _FLAG,
    "ignore_eos": _FLAG,
    "repetition_penalty": _FACTOR,
    "repeat_penalty": _FACTOR,
    **dict.fromkeys(
        ("repetition_context_size", "repeat_last_n"), _maybe(type="integer", minimum=-1, maximum=fields.MAX_TOK)
    ),
    "top_logprobs": _maybe(type="integer", minimum=0, maximum=20, description="With logprobs only."),
    "response_format": _maybe(
        type="object",
        properties={
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "properties": {"schema": _ANY_OBJECT}},
            "schema": _ANY_OBJECT,
        },
        required=["type"],
    ),
    "tools": _maybe(type="array", items=_ref("Tool"), maxItems=MAX_TOOLS),
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", None]}, _ANY_OBJECT]},
    "parallel_tool_calls": _FLAG,
    "reasoning_effort": _maybe(type="string", enum=list(EFFORTS)),
    "chat_template_kwargs": _maybe(type="object"),
    "encoding_format": _maybe(type="string", enum=["float", "base64"]),
    "dimensions": _maybe(type="integer", minimum=1, maximum=fields.MAX_TOK),
}
"""Fields that have an effect. ``logprobs`` differs: a flag in chats, a number in text completions."""
_LOGPROBS = {"chat": _FLAG, "text": _maybe(type="integer", minimum=0, maximum=5)}
_YES_OR_NO: Schema = {"enum": ["yes", "no"]}
_TEXT_OR_NULL = _maybe(type="string")
_CALL: Schema = {
    "type": "object",
    "properties": {
        "id": _TEXT_OR_NULL,
        "type": {"enum": ["function", None]},
        "function": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": {"type": ["string", "object", "null"]}},
            "required": ["name"],
        },
    },
    "required": ["function"],
}
_AMOUNT: Schema = {"type": ["integer", "string"], "description": "A count; US dollars as text."}
_LIMIT: Schema = {
    "type": "object",
    "properties": {
        "name": {**_TEXT, "description": "Like requests_per_minute or day.usd."},
        "period": {"enum": ["minute", "day", "week", "month"]},
        "unit": {"enum": ["requests", "tokens", "prompt_tok", "completion_tok", "usd"]},
        **dict.fromkeys(("limit", "used", "left"), _AMOUNT),
        "starts_at": _TEXT_OR_NULL,
        "resets_at": _TEXT,
    },
    "required": ["name", "period", "unit", "limit", "used", "left", "starts_at", "resets_at"],
}
_USAGE: Schema = {
    "type": "object",
    "properties": {
        "object": {"const": "usage"},
        **dict.fromkeys(("key", "node", "as_of", "note"), _TEXT),
        "local_tokens_priced": {"type": "boolean"},
        "limits": _list(_LIMIT),
    },
    "required": ["object", "key", "node", "as_of", "limits"],
}
_MESSAGE_FIELDS: Mapping[str, Schema] = {
    "role": {"enum": list(ROLES)},
    "content": {"anyOf": [{"type": ["string", "null"]}, _list(_ref("Part"))]},
    **dict.fromkeys(("name", "refusal", "reasoning_content", "tool_call_id"), _TEXT_OR_NULL),
    "tool_calls": _maybe(type="array", items=_CALL),
}


class Operation(NamedTuple):
    """What one route does, as the document tells it: who may call it, and the names of the schemas of its body, its
    answer and what it answers instead."""

    summary: str
    security: str = ""
    body: str = ""
    answer: str = "Object"
    kind: str = JSON
    failed: str = "Error"


def document(version: str, routes: Iterable[tuple[str, str]]) -> Schema:
    """The document of these (method, path) routes; each has its entry in ``OPERATIONS``."""
    paths: dict[str, Schema] = {}
    for method, path in routes:
        paths.setdefault(path, {})[method.lower()] = _operation(path, OPERATIONS[method, path])
    return {
        "openapi": OPENAPI,
        "info": {"title": "mlxrack", "version": version, "description": "Language models behind the OpenAI API."},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key of the rack."},
                "admin": {"type": "http", "scheme": "bearer", "description": "The token in admin.token."},
                "reader": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The token in metrics.token, or the one in admin.token.",
                },
                "rack": {"type": "http", "scheme": "mlxrack", "description": "A signature with the rack secret."},
            },
        },
    }


def _schemas() -> dict[str, Schema]:
    tool = {"type": {"enum": ["function", None]}, "function": _ref("Function")}
    function = {
        "name": {**_TEXT, "pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
        "description": _TEXT_OR_NULL,
        "parameters": _maybe(type="object", description="A JSON schema."),
        "strict": _FLAG,
    }
    error = {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT}
    messages = {**dict.fromkeys(sorted(MESSAGE), Schema()), **_MESSAGE_FIELDS}
    part = {"type": {"enum": ["text", "input_text", "output_text"]}, "text": _TEXT}
    order = {"model": _TEXT, "new": _TEXT, "pinned": _YES_OR_NO}
    clearing = {"model": _TEXT, "later": _YES_OR_NO, "unreadable": _YES_OR_NO}
    return {
        "ChatRequest": _request(fields.CHAT, NEUTRAL, ("model", "messages"), logprobs=_LOGPROBS["chat"]),
        "TextRequest": _request(fields.TEXT, TEXT_NEUTRAL, ("model", "prompt"), logprobs=_LOGPROBS["text"]),
        "EmbeddingsRequest": _request(fields.EMBED, {}, ("model", "input")),
        "Message": _object(messages, ("role",)),
        "Part": _object(part, ("type", "text")),
        "Tool": _object(tool, ("function",)),
        "Function": _object(function, ("name",)),
        "Order": {**_object(order, ("model",)), "additionalProperties": False},
        "Clearing": {**_object(clearing, ()), "additionalProperties": False},
        "Error": _object({"error": _object(error, error)}, ("error",)),
        "Answer": _object({"object": _TEXT, "model": _TEXT, "usage": _ANY_OBJECT}, ("object",)),
        "Usage": _USAGE,
        "Object": _ANY_OBJECT,
    }


def _request(known: Collection[str], neutral: Neutral, required: Collection[str], **own: Schema) -> Schema:
    """A request's fields: those with an effect, and those without, of which some take neutral values only. Fields
    beyond these are ignored, or refused where the node's policy says so."""
    idle = {name: {"description": "Accepted without effect."} for name in ADVISORY | ELSEWHERE.keys()}
    only = {name: {"enum": [*values, None]} for name, values in neutral.items()}
    with_effect = {name: own[name] if name in own else FIELDS[name] for name in known}
    return _object({**idle, **only, **with_effect}, required)


def _object(properties: Mapping[str, Schema], required: Collection[str]) -> Schema:
    return {"type": "object", "properties": dict(sorted(properties.items())), "required": list(required)}


def _operation(path: str, told: Operation) -> Schema:
    answer = _ref(told.answer) if told.kind == JSON else _TEXT
    ok: Schema = {"description": told.summary, "content": {told.kind: {"schema": answer}}}
    if told.body in ("ChatRequest", "TextRequest"):
        ok["content"]["text/event-stream"] = {"schema": _TEXT}
    failed = {"description": "An error, or what is not ready.", "content": {JSON: {"schema": _ref(told.failed)}}}
    found: Schema = {
        "summary": told.summary,
        "responses": {"200": ok, "4XX": failed, "5XX": failed},
        "security": [{told.security: []}] if told.security else [],
    }
    if told.security == "rack":
        found["responses"]["101"] = {"description": "A connection for frames between nodes."}
    if told.body:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(told.body)}}}
    named = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    if named:
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in named]
    return found


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation("Answer a conversation.", "key", "ChatRequest", "Answer"),
    ("POST", "/v1/completions"): Operation("Continue a prompt.", "key", "TextRequest", "Answer"),
    ("POST", "/v1/embeddings"): Operation("Make a vector for each input.", "key", "EmbeddingsRequest", "Answer"),
    ("GET", "/v1/models"): Operation("List the models that can be served now.", "key"),
    ("GET", "/v1/models/{model}"): Operation("Describe one model.", "key"),
    ("GET", "/v1/usage"): Operation("The limits of the key that asks, and its usage.", "key", answer="Usage"),
    ("GET", "/"): Operation("What this server is: a page, or JSON where that is preferred.", kind="text/html"),
    ("GET", "/openapi.json"): Operation("This document."),
    ("GET", "/health"): Operation("Whether the process responds."),
    ("GET", "/live"): Operation("Whether every loader that has work makes progress.", failed="Object"),
    ("GET", "/ready"): Operation("Whether a model of this node accepts requests.", failed="Object"),
    ("GET", "/metrics"): Operation("Prometheus metrics.", "reader", kind="text/plain"),
    ("GET", "/debug/decision/{request}"): Operation("Routing decisions of a recent request.", "reader"),
    ("GET", "/debug/rack"): Operation("The rack as this node sees it.", "reader"),
    ("GET", "/peer/v1/beat"): Operation("A heartbeat, for nodes of the rack.", "rack", kind="application/x-msgpack"),
    ("GET", "/peer/v1/link"): Operation("A connection of another node.", "rack"),
    ("POST", "/peer/v1/taints"): Operation(
        "Marks of SENSITIVE messages, between nodes.", "rack", kind="application/x-msgpack"
    ),
    ("GET", "/admin/v1/proof/{nonce}"): Operation("Prove that this listener knows the admin token."),
    ("GET", "/admin/v1/status"): Operation("The status of this node.", "admin"),
    ("GET", "/admin/v1/secrets"): Operation("Which secrets this agent can resolve.", "admin"),
    ("GET", "/admin/v1/policy"): Operation("The policy in force on this node.", "admin"),
    ("GET", "/admin/v1/limits"): Operation("The limits of all keys, and this node's parts of them.", "admin"),
    ("POST", "/admin/v1/load"): Operation("Load a model.", "admin", "Order"),
    ("POST", "/admin/v1/unload"): Operation("Unload a model.", "admin", "Order"),
    ("POST", "/admin/v1/swap"): Operation(
        "Replace the version behind a served name.", "admin", "Order", failed="Object"
    ),
    ("POST", "/admin/v1/pin"): Operation("Pin a model in memory, or unpin it.", "admin", "Order"),
    ("GET", "/admin/v1/orders"): Operation("The operator's orders that stand on this node.", "admin"),
    ("POST", "/admin/v1/orders/clear"): Operation("End orders, of one model or all.", "admin", "Clearing"),
    ("POST", "/admin/v1/probes"): Operation("Record the answers to a model's probes.", "admin", "Order"),
    ("POST", "/admin/v1/seal"): Operation("Close the telemetry window and push it.", "admin"),
    ("GET", "/admin/v1/taint"): Operation("What is remembered of SENSITIVE requests.", "admin"),
    ("POST", "/admin/v1/taint/clear"): Operation("Forget all of it, on every node.", "admin"),
    ("POST", "/admin/v1/reload"): Operation("Read the configuration again and put it in force.", "admin"),
}
