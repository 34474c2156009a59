"""GET / of real agents: the page, JSON, and what a client without a key learns."""

import json
import subprocess
from html import unescape
from pathlib import Path

import openai
import pytest

from tests.rack.harness import Agent, model, rack, until
from tests.rack.test_strangers import BEARER, KEYS

JSON = {"Accept": "application/json"}


def told(agent: Agent, **headers: str) -> dict[str, object]:
    answer = agent.get("/", **JSON, **headers)
    assert (answer.status, answer.headers["Content-Type"].partition(";")[0]) == (200, "application/json")
    found: dict[str, object] = answer.json
    return found


def test_the_page_tells_models_here_and_on_peers_and_its_examples_work(tmp_path: Path) -> None:
    with rack(tmp_path, [model("m")], [model("only-there")]) as (here, _):
        until(lambda: b"only-there" in here.get("/").body, "the peer has told its model")
        page = here.get("/")
        text = unescape(page.body.decode())
        base = f"http://127.0.0.1:{here.port}/v1"
        assert page.status == 200
        assert page.headers["Content-Type"].startswith("text/html")
        assert page.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        for words in (base, "only-there", ">n2<", "mlxrack-agent help", "/openapi.json"):
            assert words in text
        facts = told(here)
        assert facts["models"] == [{"id": "m", "nodes": ["n1"]}, {"id": "only-there", "nodes": ["n2"]}]
        line = text.partition("<pre>")[2].partition("</pre>")[0]
        asked = subprocess.run(["/bin/sh", "-c", f"{line} -s"], capture_output=True, text=True, timeout=120, check=True)
        assert json.loads(asked.stdout)["choices"][0]["message"]["content"]
        code = text.partition("</pre>\n<pre>")[2].partition("</pre>")[0]
        exec(compile(code, "<the page's example>", "exec"), {})
        head = here.request("HEAD", "/")
        assert (head.status, head.body) == (200, b"")
        # by another name of this machine, through a tunnel; never by one that is not
        assert told(here, Host="localhost:9000")["base_url"] == "http://localhost:9000/v1"
        assert here.get("/", Host="evil.example").status == 421
        visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert here.get("/", **visit).status == 200, "a link on another site"
        assert here.get("/", **{**visit, "Sec-Fetch-Dest": "iframe"}).status == 403
        # what a wrong base URL leads to
        for path in ("", "/chat", "/v1/v1"):
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{here.port}{path}", api_key="none", max_retries=0)
            with pytest.raises(openai.NotFoundError, match="did you mean /v1/chat/completions"):
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])


def test_where_keys_are_configured_a_stranger_learns_no_name(tmp_path: Path) -> None:
    with rack(tmp_path, [model("secret-project")], extra=KEYS) as (agent,):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            answer = agent.get("/", **headers)
            assert answer.status == 200
            assert b"secret-project" not in answer.body
            assert b"n1" not in answer.body
            assert "Authorization: Bearer $API_KEY" in unescape(answer.body.decode())
            assert not {"models", "node"} & set(told(agent, **headers))
        assert told(agent, **BEARER)["models"] == [{"id": "secret-project", "nodes": ["n1"]}]
