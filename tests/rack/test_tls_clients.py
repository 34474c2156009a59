"""docs/tls.md and docs/proxies.md as they are written: clients that trust the rack's CA, and reverse proxies."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.config import hash_key
from scripts.seaweed import free_port
from tests.rack.harness import Agent, model, rack, until
from tests.rack.tls_rack import Authority, tls_rack

DOCS = Path(__file__).parents[2] / "docs"
KEYS = f'[[keys]]\nid = "k"\nsha256 = "{hash_key("client-key")}"\n'
ELSEWHERE = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
SITE = "llm.example.com"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SSL_", "REQUESTS_", "NODE_"))}
    return subprocess.run(command, env={**kept, **environ}, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Authority, Agent]]:
    with tls_rack(tmp_path_factory.mktemp("tls"), [model()], extra=KEYS) as (authority, (agent,)):
        yield authority, agent


def filled(text: str, authority: Authority, agent: Agent) -> str:
    """A documented example with this rack's address, CA, key and model."""
    words = {
        "mini-1.local:8470": f"localhost:{agent.port}",
        "/etc/mlxrack/ca.pem": str(authority.ca),
        "$MLXRACK_KEY": "client-key",
        "qwen3-8b": "m",
    }
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def test_curl(secured: tuple[Authority, Agent]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (example,) = [block for block in blocks("tls.md", "sh") if "curl" in block]
    command = filled(example, *secured)
    done = run(["sh", "-c", command], {})
    assert json.loads(done.stdout)["choices"][0]["message"]["content"], done.stderr
    without = run(["sh", "-c", re.sub(r"--cacert \S+", "", command)], {})
    assert without.returncode == 60, "not trusted by default"


@pytest.mark.parametrize("client", ["openai", "langchain"])
def test_python(secured: tuple[Authority, Agent], client: str, tmp_path: Path) -> None:
    examples = [block for block in blocks("tls.md", "python") if ("langchain" in block) == (client == "langchain")]
    assert len(examples) == (2 if client == "openai" else 1)
    for n, example in enumerate(examples):
        script = tmp_path / f"{n}.py"
        script.write_text(filled(example, *secured))
        environ = {"MLXRACK_KEY": "client-key"}
        if "verify=" not in example:
            failed = run([sys.executable, str(script)], environ)
            assert failed.returncode != 0, "not trusted by default"
            assert "CERTIFICATE_VERIFY_FAILED" in failed.stderr
            environ["SSL_CERT_FILE"] = str(secured[0].ca)
        done = run([sys.executable, str(script)], environ)
        assert done.stdout.strip(), done.stderr


def test_node(secured: tuple[Authority, Agent], tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (example,) = blocks("tls.md", "js")
    script = tmp_path / "one.mjs"
    script.write_text(filled(example, *secured))
    environ = {"MLXRACK_KEY": "client-key"}
    assert run(["node", str(script)], environ).returncode != 0, "not trusted by default"
    done = run(["node", str(script)], {**environ, "NODE_EXTRA_CA_CERTS": str(secured[0].ca)})
    assert done.stdout.strip(), done.stderr


# ---- reverse proxies ----


def nginx_config(folder: Path, authority: Authority, agent: Agent, port: int) -> Path:
    """The documented server block, with this machine's paths and ports, in a file of its own."""
    (server,) = blocks("proxies.md", "nginx")
    own = authority.issue("proxy", host=SITE)
    server = server.replace("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
    server = server.replace("/etc/nginx/llm.pem", own.certificate).replace("/etc/nginx/llm.key", own.key)
    server = server.replace("127.0.0.1:8470", f"127.0.0.1:{agent.port}")
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = (
        f"{'user root; ' if os.getuid() == 0 else ''}daemon off; worker_processes 1; pid {folder}/nginx.pid;\n"
        f"error_log {folder}/error.log;\n"
        f"events {{ worker_connections 256; }}\nhttp {{\naccess_log off;\n{temporary}{server}}}\n"
    )
    path = folder / "nginx.conf"
    path.write_text(whole)
    return path


def caddy_config(folder: Path, authority: Authority, agent: Agent, port: int) -> Path:
    """The documented site, likewise."""
    (site,) = blocks("proxies.md", "caddy")
    own = authority.issue("proxy", host=SITE)
    site = site.replace(f"{SITE} {{", f"https://{SITE}:{port} {{\n\ttls {own.certificate} {own.key}")
    path = folder / "Caddyfile"
    path.write_text(f"{{\n\tadmin off\n}}\n{site.replace('127.0.0.1:8470', f'127.0.0.1:{agent.port}')}")
    return path


class Site(httpx.HTTPTransport):
    """Calls the documented site, whose name leads to this machine."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["Host"] = request.extensions["sni_hostname"] = SITE
        return super().handle_request(request)


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_behind_a_reverse_proxy(tmp_path: Path, proxy: str) -> None:
    """Streams arrive piece by piece, large bodies pass, clients are told apart, and metrics are not open."""
    program = shutil.which(proxy) or shutil.which(proxy, path="/usr/sbin:/usr/local/bin")
    if program is None:
        pytest.skip(f"{proxy} is not installed")
    authority, port = Authority(tmp_path / "tls"), free_port()
    documented = blocks("proxies.md", "toml")[0]
    with rack(tmp_path, [model(fake_step_s=0.05)], start=False) as (agent,):
        text = agent.config.read_text().replace(f"[listen]\nport = {agent.port}\n", "")
        agent.config.write_text(f"{text}\n{documented}port = {agent.port}\n{KEYS}")
        agent.start().ready()
        make = nginx_config if proxy == "nginx" else caddy_config
        config = make(tmp_path, authority, agent, port)
        command = [program, "-c", str(config)] if proxy == "nginx" else [program, "run", "--config", str(config)]
        with (tmp_path / "proxy.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HOME": str(tmp_path)})
        try:
            base = f"https://127.0.0.1:{port}"
            # not the proxy's own address, which is trusted to name another
            come = Site(verify=authority.clients(), local_address=ELSEWHERE)
            with httpx.Client(transport=come, timeout=60) as http:
                until(lambda: process.poll() is None and _answers(http, base), f"{proxy} answers")
                _check_proxied(http, base, agent)
        finally:
            process.terminate()
            process.wait(30)


def _answers(http: httpx.Client, base: str) -> bool:
    try:
        return http.get(f"{base}/health").status_code == 200
    except httpx.TransportError:
        return False


def _check_proxied(http: httpx.Client, base: str, agent: Agent) -> None:
    key = {"Authorization": "Bearer client-key"}
    assert http.post(f"{base}/v1/chat/completions", json=BODY).status_code == 401
    assert http.get(f"{base}/metrics", headers=key).status_code in (401, 403, 404), "not open to whoever comes by proxy"
    with http.stream(
        "POST", f"{base}/v1/chat/completions", json={**BODY, "max_tokens": 40, "stream": True}, headers=key
    ) as answer:
        pieces = [piece for piece in answer.iter_raw() if b"data: " in piece]
    assert len(pieces) > 10, "a stream is not collected by the proxy"
    large = {**BODY, "messages": [{"role": "user", "content": "x" * (9 << 20)}]}
    assert http.post(f"{base}/v1/chat/completions", json=large, headers=key).status_code in (200, 400), "not 413"
    lines = [json.loads(line) for line in (agent.state / "logs/agent.jsonl").read_text().splitlines()]
    proxied = [line for line in lines if line["event"] == "request" and line["path"].startswith("/v1/")]
    assert {(line["client"], line["scheme"]) for line in proxied} == {(ELSEWHERE, "https")}
    if ELSEWHERE == "127.0.0.1":
        return
    forged: Any = {**key, "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "http"}
    http.get(f"{base}/v1/models", headers=forged)
    assert "6.6.6.6" not in (agent.state / "logs/agent.jsonl").read_text(), "a client cannot choose its address"
