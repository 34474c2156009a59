"""A real agent whose client shows tokens of an identity provider, over TLS with a CA of its own."""

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from joserfc.jwk import ECKey

from shared.batch import unseal
from shared.records import Served
from tests.agent.api.test_oidc import jwks, signed
from tests.rack.harness import model, rack, until
from tests.rack.test_strangers import BEARER, KEYS
from tests.rack.tls_rack import Authority

KEY = ECKey.generate_key("P-256", {"kid": "of-the-provider"}, private=True)
MARKER = "s1gn3dM4rker"


@contextlib.contextmanager
def provider(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Its issuer, the CA, and what it was asked."""
    authority, asked = Authority(folder), list[str]()
    pair = authority.issue("id")

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            document = {"issuer": issuer, "jwks_uri": f"{issuer}/certs"}
            body = jwks(KEY) if self.path == "/certs" else json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    issuer = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield issuer, authority.ca, asked
    finally:
        server.shutdown()
        thread.join(timeout=30)
        server.server_close()


def reported(folder: Path) -> set[str]:
    """Ids of keys in the bucket."""
    batches = [one for path in folder.rglob("raw/**/*.mpz") for one in unseal(path.read_bytes())]
    return {r.key_id for one in batches for r in one.records if isinstance(r, Served)}


def test_a_client_of_the_provider_is_served_and_reported_under_its_id(tmp_path: Path) -> None:
    with provider(tmp_path / "id") as (issuer, ca, asked):
        table = f'[oidc]\nissuer = "{issuer}"\naudience = ["mlxrack"]\nca = {json.dumps(str(ca))}\n'
        table += '[[oidc.clients]]\nvalue = "8a1f"\nid = "web-shop"\n'

        def bearer(**more: Any) -> dict[str, str]:
            claims = {"iss": issuer, "aud": "mlxrack", "sub": "8a1f", "exp": time.time() + 600, "x": MARKER, **more}
            return {"Authorization": f"Bearer {signed(claims, KEY, 'ES256', typ='at+jwt')}"}

        with rack(tmp_path, [model()], extra=KEYS + table) as (agent,):
            assert agent.chat(headers=BEARER).status == 200
            assert asked == [], "no token, no provider"
            token = bearer()
            assert agent.chat(headers=token).status == 200
            assert agent.get("/v1/models", **token).status == 200
            wrong = agent.chat(headers=bearer(aud="another"))
            assert (wrong.status, wrong.json["error"]["code"]) == (401, "invalid_api_key")
            assert wrong.json["error"]["message"] == "the token is for another audience than oidc.audience"
            assert agent.chat(headers=bearer(sub="stranger", name=MARKER)).status == 401
            assert agent.chat(headers=bearer(exp=time.time() - 3600)).status == 401
            assert sorted(asked) == ["/.well-known/openid-configuration", "/certs"]
            until(lambda: "web-shop" in reported(tmp_path / "bucket"), "the window is uploaded")
            agent.stop()
        assert reported(tmp_path / "bucket") == {"office", "web-shop"}
        payload = token["Authorization"].split(".")[1]
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) > 5
        for path in files:
            body = path.read_bytes()
            assert MARKER.encode() not in body, path
            assert payload[:30].encode() not in body, path
