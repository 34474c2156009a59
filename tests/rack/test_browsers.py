"""Requests that a web page can make a browser send, to a node without keys and to one with keys."""

import json
from pathlib import Path

import pytest

from tests.rack.harness import Agent, Answer, model, rack
from tests.rack.test_strangers import BEARER, KEYS

PAGE, EVIL = "https://chat.example.com", "https://evil.example"
CORS = f'[api]\ncors_origins = ["{PAGE}"]\n'
PATHS = ("/v1/models", "/metrics", "/debug/rack", "/health", "/admin/v1/status", "/peer/v1/beat", "/peer/v1/link", "/x")
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}).encode()


def post(agent: Agent, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return agent.request("POST", "/v1/chat/completions", BODY, named)


def error(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["error"]["code"]


@pytest.mark.parametrize("extra", ["", KEYS], ids=["without keys", "with keys"])
def test_a_page_whose_name_leads_here_reads_nothing(tmp_path: Path, extra: str) -> None:
    with rack(tmp_path, [model()], extra=extra) as (agent,):
        token = (agent.state / "admin.token").read_text().strip()
        for path in PATHS:
            answer = agent.get(path, Host="evil.example", **BEARER)
            assert error(answer) == (421, "wrong_host"), path
            assert error(agent.get(path, Host="evil.example", Authorization=f"Bearer {token}")) == (421, "wrong_host")
        assert error(agent.request("GET", "http://evil.example/v1/models")) == (421, "wrong_host")
        assert error(agent.request("GET", "http://[2001:db8::1]:8470/v1/models")) == (421, "wrong_host")
        for own in ("http://[::1]:8470", "http://[::1]", "http://127.0.0.1:8470", "http://localhost:8470"):
            assert agent.request("GET", f"{own}/health").status == 200, own
        assert agent.get("/health", Host="127.0.0.1").status == 200
        assert agent.get("/health", Host="[::1]:1").status == 200


def test_pages_of_other_sites_do_nothing_and_programs_work(tmp_path: Path) -> None:
    with rack(tmp_path, [model()]) as (agent,):
        for path in PATHS:
            assert error(agent.get(path, Origin=EVIL)) == (403, "cross_site"), path
            assert error(agent.get(path, **{"Sec-Fetch-Site": "cross-site"})) == (403, "cross_site")
        assert error(post(agent, Origin=EVIL, Content_Type="text/plain")) == (403, "cross_site")
        assert error(post(agent, Sec_Fetch_Site="same-site")) == (403, "cross_site")
        assert error(post(agent, Origin=PAGE)) == (403, "cross_site"), "nothing is allowed by default"
        preflight = agent.request("OPTIONS", "/v1/models", None, {"Origin": EVIL})
        assert error(preflight) == (403, "cross_site")
        assert "Access-Control-Allow-Origin" not in preflight.headers
        own = f"http://localhost:{agent.port}"
        assert error(post(agent, Host=own[7:], Origin=own)) == (415, "unsupported_media_type")
        assert post(agent, Host=own[7:], Origin=own, Content_Type="application/json").status == 200
        assert post(agent, Content_Type="application/x-www-form-urlencoded").status == 200, "as curl -d sends it"
        assert post(agent).status == 200
        assert (agent.status()["in_flight"], agent.status()["log"]) == (0, {"lost_lines": 0, "problem": ""})


def test_a_page_on_the_allow_list_uses_the_api_and_nothing_else(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], extra=KEYS + CORS + "[limits]\nidle_s = 30\n") as (agent,):
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        preflight = agent.request("OPTIONS", "/v1/chat/completions", None, {"Origin": PAGE, **asked})
        assert (preflight.status, preflight.body) == (204, b"")
        assert preflight.headers["Access-Control-Allow-Origin"] == PAGE
        assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        for headers, status in ((BEARER, 200), ({}, 401)):
            answer = post(agent, Origin=PAGE, Content_Type="application/json", **headers)
            assert answer.status == status
            assert answer.headers["Access-Control-Allow-Origin"] == PAGE, "it may read errors, too"
            assert answer.headers["Vary"] == "Origin"
            assert "Access-Control-Allow-Credentials" not in answer.headers
        for path in ("/metrics", "/debug/rack", "/admin/v1/status", "/peer/v1/link", "/health"):
            assert error(agent.get(path, Origin=PAGE)) == (403, "cross_site")
        for origin in (EVIL, "null", PAGE + ".evil.example", PAGE + ":8443", "http" + PAGE[5:]):
            answer = post(agent, Origin=origin, Content_Type="application/json", **BEARER)
            assert error(answer) == (403, "cross_site"), origin
            assert "Access-Control-Allow-Origin" not in answer.headers
        assert agent.request("OPTIONS", "/v1/models").status == 405, "no browser asks"


def test_names_of_a_proxy_are_served(tmp_path: Path) -> None:
    with rack(tmp_path, [model()], start=False) as (agent,):
        config = agent.config.read_text()
        agent.config.write_text(config.replace("[listen]", '[listen]\nnames = ["rack.example.com"]'))
        agent.start().ready()
        assert agent.get("/v1/models", Host="Rack.example.com").status == 200
        assert error(agent.get("/v1/models", Host="example.com")) == (421, "wrong_host")


@pytest.mark.parametrize(
    ("host", "words"), [("203.0.113.9", "no interface of this machine"), ("no.such.host.invalid", "cannot be resolved")]
)
def test_an_address_that_cannot_be_bound_gets_its_own_advice(tmp_path: Path, host: str, words: str) -> None:
    with rack(tmp_path, [model()], extra=KEYS, start=False) as (agent,):
        listen = f'[listen]\ninsecure_http = true\nhost = "{host}"'
        agent.config.write_text(agent.config.read_text().replace("[listen]", listen))
        agent.start(wait=False)
        assert agent.process is not None
        assert agent.process.wait(timeout=60) == 69
        output = agent.output()
        assert words in output
        assert "correct listen.host" in output
        assert "stop the other program" not in output
