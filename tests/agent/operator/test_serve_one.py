"""How `serve` chooses: settings that fit, names, what a model can be asked; and what it says."""

import argparse
import json
import os
import shlex
import socket
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AgentConfig, Listen, Model, Node
from agent.files.model_pull import _make_folder
from agent.files.modelstore import ModelSpec
from agent.operator import obtain, serve_one
from agent.operator.serve_one import SETTINGS, Options, Serving
from shared.errors import Halt
from shared.ids import Version
from shared.keys import check_name
from shared.memory_plan import MemoryPlan
from shared.model_shape import ModelShape
from shared.transport import Tls

SHAPE = ModelShape(
    full=32,
    token_bytes=4096,
    heads=32,
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    context_tok=131072,
    act_bytes=2,
)
NEED = serve_one.need_of(SHAPE, 4_500_000_000, Model(name="m"), fused=True)


@given(st.integers(0, 100 << 30), st.none() | st.integers(1, 64), st.none() | st.integers(1, 1 << 17))
def test_the_first_setting_that_fits_is_chosen(budget: int, rows: int | None, tok: int | None) -> None:
    options = Options(rows=rows, context_tok=tok)
    tried = [(rows or one, tok or other) for one, other in SETTINGS]
    found = serve_one.settle(NEED, budget, options)
    fitting = [NEED(*one) <= budget for one in tried]
    assert found == (tried[fitting.index(True)] if any(fitting) else None)


def test_a_model_that_does_not_fit_names_the_shortfall_and_what_fits() -> None:
    error = serve_one.does_not_fit("org/large", 40_000_000_000, 11_500_000_000)
    assert error.code == "no_memory"
    assert "needs 40.0 GB and this machine has 11.5 GB for models, 28.5 GB too little" in error.message
    assert "what fits: mlx-community/" in error.message
    assert "use a smaller one" in serve_one.does_not_fit("x", 2, 1).message


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("qwen3-8b-4bit", "qwen3-8b-4bit"),
        ("models--mlx-community--Qwen3-8B-4bit", "Qwen3-8B-4bit"),
        ("my model (1)", "my-model-1-"),
        ("...", "model"),
        ("ü" * 100, "model"),
        ("x" * 100, "x" * 63),
    ],
)
def test_a_folder_s_name_becomes_a_served_name(folder: str, name: str) -> None:
    assert serve_one.served_name(folder) == check_name(name, "model")


@given(st.text(max_size=90))
def test_every_folder_s_name_becomes_a_valid_name(folder: str) -> None:
    check_name(serve_one.served_name(folder), "model")


@pytest.mark.parametrize(
    ("shape", "template", "kind"),
    [
        (SHAPE, True, "chat"),
        (SHAPE, False, "completions"),
        (None, True, "chat"),
        (msgspec.structs.replace(SHAPE, token_bytes=0), True, "embeddings"),
        (msgspec.structs.replace(SHAPE, token_bytes=0, state_bytes=9), False, "completions"),
    ],
)
def test_what_a_model_can_be_asked(shape: ModelShape | None, template: bool, kind: str) -> None:
    assert serve_one.kind_of(shape, template=template) == kind


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("kind", ["chat", "completions", "embeddings"])
def test_the_curl_line_is_one_command_with_a_json_body(kind: serve_one.Kind, keys: bool) -> None:
    words = shlex.split(serve_one.curl_line(kind, "m", "http://127.0.0.1:8470/v1", keys=keys))
    assert words[:2] == ["curl", f"http://127.0.0.1:8470/v1/{'chat/completions' if kind == 'chat' else kind}"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "m"
    assert ("Authorization: Bearer $MLXRACK_KEY" in words) is keys


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"tokenizer_config.json": "{}"}, False),
        ({"tokenizer_config.json": "["}, False),
        ({"tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, True),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "x"}]}'}, True),
        ({"chat_template.jinja": "{{ x }}"}, True),
        ({"chat_template.json": "{}"}, True),
    ],
)
def test_a_chat_template_is_found(tmp_path: Path, files: dict[str, str], expected: bool) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert serve_one.has_template(tmp_path) is expected


def test_one_node_serves_one_model_to_this_machine_alone() -> None:
    tree = {
        "node": {"id": "n", "rack": "r"},
        "listen": {"host": "0.0.0.0", "port": 9000},
        "peers": {"secret": "env:X", "nodes": [{"id": "o", "url": "http://o"}]},
        "models": [{"name": "a", "engine": "fake"}, {"name": "b", "engine": "fake"}],
    }
    config = msgspec.convert(tree, AgentConfig)
    alone = serve_one.one_node(config, config.models[1], None)
    assert (alone.listen.host, alone.listen.port) == ("127.0.0.1", 9000)
    assert ([m.name for m in alone.models], alone.peers.nodes) == (["b"], ())
    assert serve_one.one_node(config, config.models[1], 0).listen.port == 0


def test_what_is_configured_about_the_listener_stays() -> None:
    listen = Listen(host="0.0.0.0", port=9, names=("llm.example.com",), insecure_http=True, trusted_proxies=("::1",))
    config = AgentConfig(node=Node(id="n", rack="r"), listen=listen)
    alone = serve_one.one_node(config, Model(name="m"), 7).listen
    assert alone == msgspec.structs.replace(listen, host="127.0.0.1", port=7)


def test_who_pulls_before_the_first_start_makes_a_state_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obtain, "pull", lambda _, store, name, **__: _make_folder(store.folder / name))
    before = os.umask(0o022)
    try:
        config, state = AgentConfig(node=Node(id="n", rack="r")), tmp_path / "new" / "state"
        given = argparse.Namespace(json=True, token="", offline=True)
        access = obtain.access_of(config, state, {}, given)
        assert not state.exists()
        obtain.fetched(None, access, "m")  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert [one.stat().st_mode & 0o777 for one in (state, access.store.folder)] == [0o700, 0o755]


def test_models_may_lie_on_a_disk_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chmod(*_: object) -> None:
        raise PermissionError(1, "x")

    monkeypatch.setattr(Path, "chmod", chmod)
    _make_folder(tmp_path / "disk" / "m")
    assert (tmp_path / "disk" / "m").is_dir()


def test_a_port_in_use_is_found_before_anything_else() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Halt, match="choose another with --port") as caught:
            serve_one.check_port(taken.getsockname()[1])
    assert caught.value.code == "port_in_use"


def test_a_model_without_a_template_says_so() -> None:
    plan = MemoryPlan(weights_bytes=1, kv_bytes=0, workspace_bytes=0)
    model = Model(name="m", engine="fake", rows=2, plan_context_tok=100)
    spec = ModelSpec(model=model, path="p", version=Version("v"), need_bytes=5_000_000, plan=plan)
    config = msgspec.convert({"node": {"id": "n", "rack": "r"}}, AgentConfig)
    lines = serve_one.ready_lines(Serving(config, spec, "completions"), 8470, 1.25)
    assert lines[0] == "m is ready after 1.2 s: 5 MB planned, up to 2 requests at the same time, 200 tokens together"
    assert "no chat template" in lines[1]
    assert lines[2] == "URL: http://127.0.0.1:8470/v1"
    for tls, trusted in (
        (Tls(certificate="/a c.pem", key="/k"), "/a c.pem"),
        (Tls(certificate="/c", key="/k", ca="/ca.pem"), "/ca.pem"),
        (Tls(certificate="/public", key="/k", ca="/ca.pem", node_certificate="/n", node_key="/nk"), "/public"),
    ):
        secured = msgspec.structs.replace(config, tls=tls)
        *_, url, curl, _ = serve_one.ready_lines(Serving(secured, spec, "chat"), 8470, 1)
        assert url == "URL: https://127.0.0.1:8470/v1"
        assert shlex.split(curl)[:4] == ["curl", "--cacert", trusted, "https://127.0.0.1:8470/v1/chat/completions"]
    assert "no chat template" not in "".join(serve_one.ready_lines(Serving(config, spec, "chat"), 8470, 1))
