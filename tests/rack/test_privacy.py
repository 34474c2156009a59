"""No private data leaks: marker strings go in everywhere a client can put them and appear nowhere."""

import itertools
import json
import os
import secrets
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zstandard

from scripts.seaweed import SeaweedFS
from shared.store import list_all
from tests.rack.harness import model, rack, until


def marked() -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """Markers, and requests (gateway's model, body) that carry each of them somewhere."""
    fresh = (f"MARKER{secrets.token_hex(8)}" for _ in itertools.count())
    markers: list[str] = []

    def mark() -> str:
        markers.append(next(fresh))
        return markers[-1]

    def body(**more: Any) -> dict[str, Any]:
        return {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, **more}

    def said(role: str) -> dict[str, Any]:
        return body(messages=[{"role": role, "content": mark()}, {"role": "user", "content": mark()}])

    tool = {"type": "function", "function": {"name": mark(), "description": mark(), "parameters": {mark(): mark()}}}
    requests = [
        ("message", said("user")),
        ("system", said("system")),
        ("assistant", said("assistant")),
        ("streamed", {**said("user"), "stream": True}),
        ("name", body(messages=[{"role": "user", "content": "x", "name": mark()}])),
        ("user field", body(user=mark(), metadata={mark(): mark()}, safety_identifier=mark())),
        ("stop", body(stop=[mark()])),
        ("tool", body(tools=[tool])),
        ("called tool", body(tools=[tool], tool_choice="required")),
        ("custom tool", body(tools=[{"type": "custom", "custom": {"name": mark()}}])),
        ("no such tool", body(tools=[tool], tool_choice={"type": "function", "function": {"name": mark()}})),
        (
            "tool result",
            body(
                messages=[
                    {"role": "user", "content": mark()},
                    {
                        "role": "assistant",
                        "reasoning_content": mark(),
                        "tool_calls": [{"id": mark(), "function": {"name": mark(), "arguments": mark()}}],
                    },
                    {"role": "tool", "tool_call_id": mark(), "content": mark()},
                ]
            ),
        ),
        ("template", body(chat_template_kwargs={mark(): mark()})),
        ("effort", body(reasoning_effort=mark())),
        ("unknown field", body(**{mark(): mark()})),
        ("unknown model", body(model=mark())),
        ("bad role", body(messages=[{"role": mark(), "content": mark()}])),
        ("bad type", body(temperature=mark(), messages=[{"role": "user", "content": mark()}])),
        ("too long", body(max_tokens=10**6, messages=[{"role": "user", "content": mark()}])),
        ("no schema", body(response_format={"type": "json_schema", "json_schema": {"name": mark()}})),
        (
            "schema",
            body(response_format={"type": "json_schema", "json_schema": {"name": mark(), "schema": {"type": mark()}}}),
        ),
        (
            "enum",
            body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [mark()]}}}),
        ),
        ("image", body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": mark()}}]}])),
        ("loader crash", body(model="crashy", messages=[{"role": "user", "content": f"!crash {mark()}"}])),
    ]
    return markers, requests


def test_no_marker_leaks(tmp_path: Path, seaweed: SeaweedFS, tiny_model: Path) -> None:
    real = {"name": "m", "path": str(tiny_model), "need_bytes": 10}
    bucket = seaweed.store("privacy")
    bucket.create_bucket()
    for name, value in zip(("access", "secret"), seaweed.ADMIN, strict=True):
        (tmp_path / name).write_text(value)
        (tmp_path / name).chmod(0o600)
    store = (
        f'[store]\nkind = "s3"\nendpoint = "{seaweed.endpoint}"\nbucket = "privacy"\n'
        f'access_key = "file:{tmp_path}/access"\nsecret_key = "file:{tmp_path}/secret"\n'
    )
    markers, requests = marked()
    headers = {"X-Custom": markers[0], "User-Agent": markers[0], "Authorization": f"Bearer {markers[0]}"}
    with rack(tmp_path, [real, model("crashy")], [model("far")], start=False) as agents:
        for agent in agents:
            text = agent.config.read_text()
            before, after = text[: text.index("[store]")], text[text.index("[telemetry]") :]
            agent.config.write_text(f'log_level = "debug"\n{before}{store}{after}')
            agent.start()
        for agent in agents:
            agent.ready()
        until(lambda: all(p["state"] == "up" for a in agents for p in a.status()["peers"]), "peers are up")
        answered = set()
        for door in agents:
            for kind, body in requests:
                payload = json.dumps(body).encode()
                answer = door.request("POST", f"/v1/chat/completions?q={markers[1]}", payload, headers)
                answered.add((kind, answer.status))
            raw = f'{{"model": "m", "messages": [{{"role": "user", "content": "{markers[2]}"'.encode()
            assert door.request("POST", "/v1/chat/completions", raw).status == 400
            assert door.request("GET", f"/v1/models/{markers[3]}").status == 404
            assert door.request("GET", f"/{markers[4]}").status == 404
            assert door.get("/peer/v1/link", Authorization=f"Mlxrack {markers[5]}").status == 403
            vectors = json.dumps({"model": "m", "input": [markers[6], markers[7]]}).encode()
            answered.add(("embeddings", door.request("POST", "/v1/embeddings", vectors, headers).status))
            wrong = json.dumps({"model": "m", "input": {markers[8]: markers[9]}}).encode()
            assert door.request("POST", "/v1/embeddings", wrong, headers).status == 400
        assert ("message", 200) in answered
        assert ("streamed", 200) in answered
        assert {("tool", 200), ("called tool", 200), ("tool result", 200), ("embeddings", 200)} <= answered
        assert {("custom tool", 400), ("no such tool", 400), ("effort", 400)} <= answered
        assert ("unknown model", 404) in answered
        for agent in agents:
            assert b"seq" in agent.admin("POST", "seal").body
            metrics = agent.get("/metrics").body.decode()
            status = json.dumps(agent.status())
            assert not [m for m in markers if m in metrics or m in status]
        for agent in agents:
            assert agent.stop() == 0
    _run_reports(tmp_path, store)
    found = [
        (marker, where)
        for where, content in _everything(tmp_path, bucket)
        for marker in markers
        if marker.encode() in content
    ]
    assert found == []


def _run_reports(folder: Path, store: str) -> None:
    config = folder / "aggregator.toml"
    config.write_text(f'rack = "r"\n{store}')
    program = Path(sys.executable).parent / "mlxrack-aggregator"
    now = datetime.now(UTC)
    year, number, _ = now.isocalendar()
    month = now.strftime("%Y-%m")
    for words in (["rollup"], ["weekly", "--week", f"{year}-W{number:02d}"], ["monthly", "--month", month], ["alert"]):
        log = str(folder / "aggregator.log")
        subprocess.run(
            [program, *words, "--config", config, "--verbose", "--log", log], check=True, capture_output=True
        )


def _everything(folder: Path, bucket: Any) -> list[tuple[str, bytes]]:
    """Every object in the bucket (also unpacked) and every file that any program wrote."""
    found = []
    for listed in list_all(bucket, ""):
        body = bucket.get(listed.key, 1 << 30).body
        found.append((listed.key, listed.key.encode() + body))
        if listed.key.endswith(".mpz"):
            found.append((f"{listed.key} unpacked", zstandard.ZstdDecompressor().stream_reader(body).read()))
    assert len(found) > 20
    files = [Path(where, name) for where, _, names in os.walk(folder) for name in names]
    found += [(str(path), path.read_bytes()) for path in files]
    assert any(path.name == "agent.jsonl" for path in files)
    return found
