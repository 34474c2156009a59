"""The page at /, what it tells to whom, and the host that it names."""

import ast
import re
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api import origins
from agent.api.front_page import HEADERS, Front, Served, as_json, as_page, curl, python, served, wants_json
from agent.views import ModelView, NodeView

OPEN = Front("http://127.0.0.1:8470/v1", False, "mini-1", (Served("m", ("mini-1", "mini-2")), Served("z", ("mini-2",))))
STRANGER = Front("https://mini-1.local:8470/v1", True, None, None)
NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=1>', "it's", "&amp;", "a\\'b$(x)`y`", "ü 模型", "</pre>"]


class Seen(HTMLParser):
    """Tags and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_models_are_those_that_answer_and_where() -> None:
    def node(name: str, *models: ModelView, state: str = "up") -> NodeView:
        return NodeView(node=name, state=state, models=models)

    ready, cold = (ModelView(name=name, version="v", ready=name != "cold") for name in ("m", "cold"))
    only = ModelView(name="z", version="v", ready=True)
    found = served([node("n1", ready, cold), node("n2", only, ready), node("n3", only, state="down")])
    assert found == (Served("m", ("n1", "n2")), Served("z", ("n2",)))


@pytest.mark.parametrize(
    ("accept", "json"),
    [
        ([], False),
        (["*/*"], False),
        (["application/json"], True),
        (["application/json, text/plain, */*"], True),
        (["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], False),
        (["text/html;q=0.1, application/json;q=0.9"], True),
        (["text/html, application/json"], False),
        (["application/json;q=0"], False),
        (["Application/JSON ; Q=0.5"], True),
        (["text/html", "application/json"], False),
        (["text/plain", "application/json"], True),
        (["application/json;q=x"], False),
        ([";;,,=;q=,application/json;q=9"], False),
    ],
)
def test_json_is_for_those_who_ask_for_it(accept: list[str], json: bool) -> None:
    assert wants_json(accept) == json


@given(st.lists(st.text(max_size=40), max_size=3))
def test_any_accept_header_is_read(accept: list[str]) -> None:
    wants_json(accept)


def test_a_page_needs_nothing_from_elsewhere_and_its_style_is_the_one_it_allows() -> None:
    import base64
    import hashlib

    page = as_page(OPEN)
    assert [tag for tag, _ in Seen(page).tags if tag in ("script", "img", "iframe", "form", "object", "base")] == []
    assert {attributes.get("href") for _, attributes in Seen(page).tags} <= {None, "data:,", "/openapi.json"}
    assert "style=" not in page
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = HEADERS["Content-Security-Policy"]
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "prefers-color-scheme: dark" in style


@pytest.mark.parametrize("name", NASTY)
def test_names_are_escaped_and_the_examples_work(name: str) -> None:
    front = Front(f"http://{name}/v1", True, name, (Served(name, (name,)), Served("other", (name, "mini-2"))))
    clean = Front("http://h/v1", True, "n", (Served("m", ("n",)), Served("other", ("n", "mini-2"))))
    assert [tag for tag, _ in Seen(as_page(front)).tags] == [tag for tag, _ in Seen(as_page(clean)).tags]
    assert name in unescape(as_page(front))
    shown = Front("http://h/v1", False, "n", (Served(name, ("n",)),))
    said = subprocess.run(
        ["/bin/sh", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}\n{curl(shown)}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[0] == "http://h/v1/chat/completions"
    assert ast.literal_eval(said[-1])["model"] == name
    values = [node.value for node in ast.walk(ast.parse(python(shown))) if isinstance(node, ast.Constant)]
    assert name in values


def test_a_stranger_learns_what_it_is_and_no_name() -> None:
    page, told = as_page(STRANGER), as_json(STRANGER)
    assert set(told) == {"name", "description", "base_url", "openapi", "help", "api_key_required"}
    for text in ("API key", "Authorization: Bearer $API_KEY", "mlxrack-agent help", "/openapi.json", "--cacert ca.pem"):
        assert text in unescape(page)
    assert "This is node" not in page
    assert as_json(OPEN)["models"][0] == {"id": "m", "nodes": ["mini-1", "mini-2"]}
    assert "here and mini-2" in as_page(OPEN)
    assert "None yet" in as_page(OPEN._replace(models=()))
    assert "Bearer" not in as_page(OPEN)


@pytest.mark.parametrize(
    ("hosts", "reached"),
    [
        (["localhost:9000"], "localhost:9000"),
        (["LOCALHOST"], "localhost"),
        (["127.0.0.1:8470"], "127.0.0.1:8470"),
        (["[::1]:8470"], "[::1]:8470"),
        (["llm.example.com"], "llm.example.com"),
        (["LLM.example.com.:443"], "llm.example.com.:443"),
        (["10.0.0.7:1"], "10.0.0.7:1"),
        *(
            ([host], "10.0.0.7:8470")
            for host in (
                "evil.example",
                "10.0.0.8",
                "localhost:0",
                "localhost:99999",
                "",
                "a b",
                "<script>",
                "localhost@x",
            )
        ),
        ([], "10.0.0.7:8470"),
        (["localhost", "localhost"], "10.0.0.7:8470"),
    ],
)
def test_only_a_host_of_ours_is_named(hosts: list[str], reached: str) -> None:
    assert origins.reached_host(hosts, {"llm.example.com"}, "10.0.0.7", 8470) == reached


def test_an_address_of_ipv6_is_bracketed() -> None:
    assert origins.reached_host(["evil"], (), "fd00::7", 8470) == "[fd00::7]:8470"
    assert origins.reached_host(["[fd00::7]:80"], (), "fd00::7", 8470) == "[fd00::7]:80"


@given(st.text(max_size=60))
def test_whatever_host_is_sent_nothing_strange_is_named(host: str) -> None:
    assert re.fullmatch(r"[a-z0-9.\[\]:-]+", origins.reached_host([host], {"x"}, "10.0.0.7", 8470))


@pytest.mark.parametrize(
    ("method", "path", "headers", "is_visit"),
    [
        ("GET", "/", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, True),
        ("GET", "/", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, False),
        ("GET", "/", {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, False),
        ("GET", "/", {}, False),
        ("POST", "/", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, False),
        ("GET", "/v1/models", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, False),
        ("GET", "/", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Origin": "https://x"}, False),
    ],
)
def test_a_link_may_lead_to_the_page_and_nowhere_else(
    method: str, path: str, headers: dict[str, str], is_visit: bool
) -> None:
    assert origins.is_visit(method, path, headers) == is_visit
