"""Endpoints of the operator's CLI, behind the admin token: status, secrets, policy, load, unload, swap, pin, orders,
probes, seal, reload, taint."""

import asyncio
import re
from typing import Literal

import msgspec
from aiohttp import web

from agent.api.context import CONTEXT, Context, json_response, require_admin
from agent.api.peer import TAINTS
from agent.api.wire import body_of
from agent.files.probes import render
from agent.gateway.taints import Taints
from agent.mesh.signing import listener_proof
from shared import logs
from shared.errors import Refused

_NONCE = re.compile(r"[0-9a-f]{32,64}")


class _Names(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    new: str = ""
    pinned: Literal["yes", "no"] = "yes"


class _Clearing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``model`` is "" for all; ``unreadable`` is about the file that could not be read, and ends no order."""

    model: str = ""
    later: Literal["yes", "no"] = "no"
    unreadable: Literal["yes", "no"] = "no"


async def _order(request: web.Request) -> tuple[Context, _Names]:
    """What an operator orders, of which model. Raises what ``require_admin`` raises, and Refused for a wrong body."""
    require_admin(request)
    try:
        body = await body_of(request, request.app[CONTEXT].config.limits.body_s)
        return request.app[CONTEXT], msgspec.json.decode(body, type=_Names)
    except msgspec.DecodeError as error:
        raise Refused(f"admin request: {error}", code="invalid_json") from None


async def proof(request: web.Request) -> web.Response:
    """Proof that who listens here knows the admin token, for who is about to send it; needs no token itself."""
    nonce = request.match_info["nonce"]
    if not _NONCE.fullmatch(nonce):
        raise Refused("admin proof: nonce must be 32 to 64 hex digits", code="invalid_value", param="nonce")
    address = request.get_extra_info("sockname")
    return json_response({"proof": listener_proof(request.app[CONTEXT].admin_token, nonce, address[:2])})


async def status(request: web.Request) -> web.Response:
    """The full status of this node, in one response."""
    require_admin(request)
    context = request.app[CONTEXT]
    more = {"connections": context.connections.state(), "log": logs.state(), "reload": context.reloader.view()}
    return json_response(context.status.node() | more)


async def secrets(request: web.Request) -> web.Response:
    """By reference, why this agent cannot use a secret of its configuration ("" when it can); never a value."""
    require_admin(request)
    return json_response(await asyncio.to_thread(request.app[CONTEXT].secrets))


async def policy(request: web.Request) -> web.Response:
    """The policy in force, its rules, and what of it is doubtful."""
    require_admin(request)
    return json_response(request.app[CONTEXT].status.policy())


async def load(request: web.Request) -> web.Response:
    """Load a model; responds when it is ready."""
    context, names = await _order(request)
    orders = context.follower.orders
    spec = await orders.load(names.model)
    loaded = {"version": spec.version, "need_bytes": spec.need_bytes}
    return json_response({"model": names.model, **loaded, "lasts": context.follower.in_force.lasting(names.model)})


async def unload(request: web.Request) -> web.Response:
    """Drain and stop a model's loader; responds when its memory is freed."""
    context, names = await _order(request)
    orders = context.follower.orders
    await orders.unload(names.model)
    return json_response(
        {"model": names.model, "unloaded": True, "lasts": context.follower.in_force.lasting(names.model)}
    )


async def swap(request: web.Request) -> web.Response:
    """Replace the version behind a served name; responds when the swap has succeeded or failed."""
    context, names = await _order(request)
    if not names.new:
        raise Refused("admin request: new is required", code="invalid_value", param="new")
    orders = context.follower.orders
    finished = await orders.swap(names.model, names.new)
    if finished.outcome != "flipped":
        return json_response(msgspec.to_builtins(finished), status=409)
    return json_response({**msgspec.to_builtins(finished), "lasts": context.follower.in_force.lasting(names.model)})


async def pin(request: web.Request) -> web.Response:
    """Pin a model in memory until an operator unloads it, or unpin it."""
    context, names = await _order(request)
    orders, pinned = context.follower.orders, names.pinned == "yes"
    await orders.pin(names.model, pinned=pinned)
    return json_response(
        {"model": names.model, "pinned": pinned, "lasts": context.follower.in_force.lasting(names.model)}
    )


async def orders(request: web.Request) -> web.Response:
    """The orders that stand on this node, and what the file of them has to say."""
    require_admin(request)
    follower = request.app[CONTEXT].follower
    return json_response({"orders": follower.in_force.listed(), "warnings": follower.in_force.warnings()})


async def clear_orders(request: web.Request) -> web.Response:
    """End orders, and do what holds without them; responds when that is done or has failed."""
    require_admin(request)
    context = request.app[CONTEXT]
    try:
        wanted = msgspec.json.decode(await body_of(request, context.config.limits.body_s), type=_Clearing)
    except msgspec.DecodeError as error:
        raise Refused(f"admin request: {error}", code="invalid_json") from None
    if wanted.unreadable == "yes":
        await context.follower.orders.forget_unreadable()
        return json_response({"ended": [], "warnings": context.follower.in_force.warnings()})
    ended = await context.follower.orders.clear(wanted.model, later=wanted.later == "yes")
    return json_response({"ended": ended, "warnings": context.follower.in_force.warnings()})


async def probes(request: web.Request) -> web.Response:
    """Run a model's probes now; responds with its answers, as a probes file."""
    context, names = await _order(request)
    found = await context.pool.orders.record_probes(names.model)
    return web.Response(body=render(found), content_type="application/json")


async def seal(request: web.Request) -> web.Response:
    """Close the current window now and try to push; for tests, demos and before planned work on a node."""
    require_admin(request)
    return json_response(await request.app[CONTEXT].seal())


async def reload(request: web.Request) -> web.Response:
    """Read the configuration again and put it in force, all or nothing; responds with what has changed."""
    require_admin(request)
    return json_response(await request.app[CONTEXT].reloader.reload())


async def taint(request: web.Request) -> web.Response:
    """What is remembered of SENSITIVE requests: how many messages, and whether that is all."""
    require_admin(request)
    return json_response(_taints(request).view())


async def clear_taint(request: web.Request) -> web.Response:
    """Forget all of it, on every node; responds when that is done."""
    require_admin(request)
    return json_response({"cleared": await _taints(request).clear()})


def _taints(request: web.Request) -> Taints:
    if (held := request.app.get(TAINTS)) is None:
        raise Refused("this node remembers nothing of SENSITIVE requests", code="not_found")
    return held
