"""Tokens of an identity provider in place of API keys: real signatures, a real provider on loopback, the real app."""

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, web
from joserfc import jws
from joserfc.jwk import ECKey, OKPKey, RSAKey

from agent.api import jwt, oidc, wire
from agent.api.app import build
from agent.api.context import OIDC, Context
from agent.config import AgentConfig, Live, hash_key
from agent.config_checks import check
from agent.config_oidc import Oidc, OidcClient
from shared.errors import Refused
from tests.agent.api.test_answering import ASKED, CHAT, Client, Worker
from tests.made_wall import made_boundary

NOW = 1_800_000_000
ISSUER = "https://id.example.com/realm"
RSA = RSAKey.generate_key(2048, {"kid": "rsa"}, private=True)
OTHER = RSAKey.generate_key(2048, {"kid": "rsa"}, private=True)
EC = ECKey.generate_key("P-256", {"kid": "ec"}, private=True)
ED = OKPKey.generate_key("Ed25519", {"kid": "ed"}, private=True)
KEY = "mlxr-" + "k" * 43


def claims(**more: Any) -> dict[str, Any]:
    found = {"iss": ISSUER, "aud": "rack", "sub": "ada", "exp": NOW + 600, "iat": NOW - 5, **more}
    return {key: value for key, value in found.items() if value is not None}


def encoded(part: Any) -> str:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def signed(payload: Any, key: Any = RSA, alg: str = "RS256", **header: Any) -> str:
    """A token with any header and any payload, and a right signature."""
    named = {"alg": alg, "typ": "JWT", "kid": key.kid, **header}
    head = {name: value for name, value in named.items() if value is not None}
    return signed_raw(encoded(head), encoded(payload), key, alg)


def signed_raw(head: str, body: str, key: Any, alg: str) -> str:
    """The signature over exactly these two parts."""
    model = jws.JWSRegistry.algorithms[alg]
    return f"{head}.{body}.{encoded(model.sign(f'{head}.{body}'.encode(), key))}"


def jwks(*keys: Any, **more: Any) -> bytes:
    return json.dumps({"keys": [{**key.as_dict(private=False), **more} for key in keys]}).encode()


CONFIG = msgspec.convert(
    {
        "issuer": ISSUER,
        "audience": ["rack", "rack-2"],
        "clients": [{"value": "ada", "id": "web-shop"}],
        "ids": "team-[a-z]+",
        "algorithms": ["RS256", "ES256", "EdDSA", "Ed25519"],
    },
    Oidc,
)


def identified(token: str, config: Oidc = CONFIG, keys: bytes = b"") -> str:
    """The key id by the pure functions, or the reason why not."""
    known = jwt.keys_of(keys or jwks(RSA, EC, ED))
    try:
        header = jwt.header_of(token, config.algorithms)
        if (key := jwt.key_for(header, known)) is None:
            return "no key"
        return jwt.id_of(jwt.claims_of(token, header, key, config, NOW), config, {"team-ops"})
    except jwt.BadToken as error:
        return f"bad: {error}"


# ---- what holds ----


@pytest.mark.parametrize(
    "token",
    [
        signed(claims()),
        signed(claims(), EC, "ES256"),
        signed(claims(), ED, "EdDSA"),
        signed(claims(), ED, "Ed25519"),
        signed(claims(aud=["x", "rack-2"])),
        signed(claims(nbf=NOW + 30, iat=NOW + 30)),
        signed(claims(exp=NOW - 30)),
        signed(claims(exp=NOW + 0.5)),
        signed(claims(), typ="at+JWT"),
        signed(claims(), typ=None),
        signed(claims(), kid=None, key=EC, alg="ES256"),
        signed(claims(), x5t="abc", nonce="of some providers"),
    ],
)
def test_a_token_of_the_provider_is_its_client(token: str) -> None:
    assert identified(token) == "web-shop"


def test_a_client_may_be_named_by_a_pattern_but_never_as_an_api_key_is() -> None:
    assert identified(signed(claims(sub="team-shop"))) == "team-shop"
    for value in (
        "team-ops",
        "team-",
        "team-shop2",
        "Team-shop",
        "team-shop\n",
        "team-shop/../x",
        "xteam-shop",
        "root",
        "a" * 99,
    ):
        assert identified(signed(claims(sub=value))).startswith("bad: is of a client"), value
    given = msgspec.structs.replace(CONFIG, clients=(OidcClient(value="u", id="team-ops"),))
    assert identified(signed(claims(sub="u")), given) == "team-ops", "an operator may say so"
    azp = msgspec.structs.replace(CONFIG, claim="azp")
    assert identified(signed(claims(azp="team-a")), azp) == "team-a"


# ---- what does not ----


def with_public_key_as_secret(head: str) -> str:
    """A token signed by whoever knows the public key, with it as a shared secret."""
    body = encoded(claims())
    return f"{head}.{body}.{encoded(hmac.digest(RSA.as_pem(private=False), f'{head}.{body}'.encode(), 'sha256'))}"


TWICE = json.dumps(claims()).replace('"sub": "ada"', '"sub":"mallory","sub":"ada"')
PLAIN = f"{encoded({'alg': 'none', 'typ': 'JWT'})}.{encoded(claims())}."
HEAD = encoded({"alg": "RS256", "kid": "rsa"})
BAD: dict[str, str] = {
    "alg none": PLAIN,
    "alg None": PLAIN.replace(encoded({"alg": "none", "typ": "JWT"}), encoded({"alg": "None"})),
    "a shared secret": with_public_key_as_secret(encoded({"alg": "HS256", "kid": "rsa"})),
    "HS bytes, RS named": with_public_key_as_secret(HEAD),
    "another's key": signed(claims(), OTHER),
    "key of another family": signed(claims(), EC, "ES256", kid="rsa"),
    "unknown key": signed(claims(), kid="nobody"),
    "no key named, several fit": signed(claims(), kid=None, key=OTHER),
    "alg not configured": signed(claims(), RSA, "PS256"),
    "alg a list": signed_raw(encoded({"alg": ["RS256"], "kid": "rsa"}), encoded(claims()), RSA, "RS256"),
    "no signature": signed(claims()).rpartition(".")[0] + ".",
    "cut signature": signed(claims())[:-6],
    "payload of another": ".".join((HEAD, encoded(claims(sub="ada")), signed(claims(sub="x")).split(".")[2])),
    "issuer": signed(claims(iss=ISSUER + "/")),
    "issuer in a list": signed(claims(iss=[ISSUER])),
    "no issuer": signed(claims(iss=None)),
    "audience": signed(claims(aud="other")),
    "audience like ours": signed(claims(aud="rack-")),
    "no audience": signed(claims(aud=None)),
    "audience no text": signed(claims(aud={"rack": 1})),
    "expired": signed(claims(exp=NOW - 61)),
    "no expiry": signed(claims(exp=None)),
    "expiry a text": signed(claims(exp=str(NOW + 600))),
    "expiry true": signed(claims(exp=True)),
    "expiry NaN": signed_raw(HEAD, encoded(json.dumps(claims(exp=float("nan"))).encode()), RSA, "RS256"),
    "expiry Infinity": signed_raw(HEAD, encoded(json.dumps(claims(exp=float("inf"))).encode()), RSA, "RS256"),
    "expiry 1e999": signed_raw(
        HEAD, encoded(json.dumps(claims()).replace(str(NOW + 600), "1e999").encode()), RSA, "RS256"
    ),
    "not yet": signed(claims(nbf=NOW + 61)),
    "nbf a text": signed(claims(nbf="now")),
    "of the future": signed(claims(iat=NOW + 61)),
    "claim twice": signed_raw(HEAD, encoded(TWICE.encode()), RSA, "RS256"),
    "header twice": signed_raw(encoded(b'{"alg":"none","alg":"RS256","kid":"rsa"}'), encoded(claims()), RSA, "RS256"),
    "nested claim twice": signed_raw(
        HEAD, encoded(TWICE.replace('"sub":"mallory",', '"x":{"a":1,"a":2},').encode()), RSA, "RS256"
    ),
    "crit": signed(claims(), crit=["exp"]),
    "b64": signed(claims(), b64=False, crit=["b64"]),
    "logout token": signed(claims(), typ="logout+jwt"),
    "typ no text": signed(claims(), typ=["JWT"]),
    "kid no text": signed(claims(), kid=["rsa"]),
    "long kid": signed(claims(), kid="r" * 300),
    "no client": signed(claims(sub=None)),
    "client a number": signed(claims(sub=7)),
    "client a list": signed(claims(sub=["ada"])),
    "empty client": signed(claims(sub="")),
    "huge": signed(claims(x="y" * 9000)),
    "claims a list": signed([1]),
    "claims no JSON": signed(b"hello"),
    "deep": signed(b"[" * 5000),
    "no Base64": f"{HEAD}.!!!.x",
    "other Base64": signed(claims(sub="??>>~~")).replace("-", "+").replace("_", "/"),
    "empty parts": "..",
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_hold_is_nobody(name: str) -> None:
    found = identified(BAD[name])
    assert found == "no key" or found.startswith("bad: "), found
    assert ISSUER not in found, "a reason quotes nothing of the token"


def test_the_header_is_not_where_a_key_comes_from() -> None:
    """A key, a certificate or an address in the header is ignored."""
    mine = OTHER.as_dict(private=False)
    for header in ({"jwk": mine}, {"jku": "https://evil.example/jwks"}, {"x5u": "https://evil.example"}):
        assert identified(signed(claims(), OTHER, **header)).startswith("bad: has no valid signature")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys": [7]}',
        b"[" * 100_000,
        jwks(RSA, use="enc"),
        json.dumps({"keys": [{"kty": "oct", "kid": "k", "k": encoded(b"s" * 32)}]}).encode(),
        json.dumps({"keys": [RSA.as_dict(private=True)]}).encode(),
        json.dumps({"keys": [{"kty": "RSA", "kid": "small", "n": encoded(b"\xc1" * 128), "e": "AQAB"}]}).encode(),
        jwks(RSA, kid=[1]),
    ],
)
def test_what_is_no_set_of_public_keys_is_refused(body: bytes) -> None:
    with pytest.raises(Refused):
        jwt.keys_of(body)


def test_two_keys_with_one_id_are_none_unless_one_alone_fits() -> None:
    assert identified(signed(claims()), keys=jwks(RSA, OTHER)) == "no key"
    both = json.dumps({"keys": [{**key.as_dict(private=False), "kid": "k"} for key in (RSA, EC)]}).encode()
    assert identified(signed(claims(), kid="k"), keys=both) == "web-shop"
    assert identified(signed(claims()), keys=jwks(RSA, alg="RS512")) == "no key", "a key for another algorithm"


# ---- the provider, over HTTP ----


class Provider:
    """An identity provider on loopback."""

    def __init__(self) -> None:
        self.keys, self.asked, self.status = jwks(RSA), 0, 200
        self.issuer = ""
        self.document: dict[str, Any] = {}
        self.gate: asyncio.Event | None = None

    async def certificates(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        return web.Response(body=self.keys, status=self.status, headers={"Location": "/elsewhere"})

    async def elsewhere(self, _: web.Request) -> web.Response:
        return web.Response(body=self.keys)

    async def discovery(self, _: web.Request) -> web.Response:
        return web.json_response({"issuer": self.issuer, "jwks_uri": f"{self.issuer}/certs", **self.document})


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    made = Provider()
    app = web.Application()
    app.add_routes(
        [
            web.get("/certs", made.certificates),
            web.get("/elsewhere", made.elsewhere),
            web.get("/.well-known/openid-configuration", made.discovery),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.issuer = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    if made.gate is not None:
        made.gate.set()
    await runner.cleanup()


def configured(provider: Provider, **more: Any) -> AgentConfig:
    tree = {
        "node": {"id": "n1", "rack": "r"},
        "keys": [{"id": "batch", "sha256": hash_key(KEY)}],
        "oidc": {
            "issuer": provider.issuer,
            "audience": ["rack"],
            "clients": [{"value": "ada", "id": "web-shop"}],
            **more,
        },
    }
    config = msgspec.convert(tree, AgentConfig)
    assert check(config) == []
    return config


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Seen(Worker):
    """Which key each call was of."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    @contextlib.contextmanager
    def reading(self, key_id: str) -> Iterator[None]:
        """Admit everything."""
        self.ids.append(key_id)
        yield


class Served:
    """The real application with a provider."""

    def __init__(self, client: Client, verifier: oidc.Verifier, live: Live, worker: Seen, clock: Clock) -> None:
        self.client, self.verifier, self.live, self.worker, self.clock = client, verifier, live, worker, clock

    async def ask(self, token: str) -> int:
        """The status of a chat request."""
        return (await self.client.ask("POST", CHAT, json=ASKED, headers={"Authorization": f"Bearer {token}"})).status


Serving = Callable[..., "contextlib.AbstractAsyncContextManager[Served]"]


@pytest.fixture
def serving(provider: Provider, tmp_path: Path) -> Serving:
    @contextlib.asynccontextmanager
    async def serve(**more: Any) -> AsyncIterator[Served]:
        worker, clock, live = Seen(), Clock(), Live(configured(provider, **more))
        parts: dict[str, Any] = dict.fromkeys(Context.__struct_fields__)
        parts |= {"live": live, "dispatch": worker, "admin_token": "t", "metrics_token": "m"}
        parts["boundary"] = made_boundary(tmp_path)
        app = build(Context(**parts))
        app[OIDC] = verifier = oidc.Verifier(live, clock=clock, wall=lambda: NOW)
        runner = wire.Runner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with ClientSession() as session:
            yield Served(Client(session, runner.addresses[0][1]), verifier, live, worker, clock)
        await runner.cleanup()

    return serve


def token_of(provider: Provider, key: Any = RSA, alg: str = "RS256", kid: str = "", **more: Any) -> str:
    return signed(claims(iss=provider.issuer, **more), key, alg, kid=kid or key.kid)


async def test_a_token_is_served_as_its_key_and_api_keys_are_as_before(provider: Provider, serving: Serving) -> None:
    async with serving() as served:
        assert await served.ask(KEY) == 200
        assert provider.asked == 0, "nothing is fetched before a token comes"
        assert await served.ask(token_of(provider)) == 200
        assert served.worker.ids == ["batch", "web-shop"]
        assert await served.ask(token_of(provider, sub="eve")) == 401
        assert await served.ask(token_of(provider, key=OTHER)) == 401
        assert await served.ask("mlxr-wrong") == 401
        assert await served.ask("") == 401
        assert await served.ask(token_of(provider)) == 200
        assert provider.asked == 1


async def test_requests_wait_for_the_first_keys_and_one_fetch_serves_all(provider: Provider, serving: Serving) -> None:
    provider.gate = asyncio.Event()
    async with serving() as served:
        asked = [asyncio.create_task(served.ask(token_of(provider))) for _ in range(8)]
        while not provider.asked:
            await asyncio.sleep(0.01)
        assert await served.ask(KEY) == 200, "nobody else waits"
        provider.gate.set()
        assert await asyncio.gather(*asked) == [200] * 8
        assert provider.asked == 1


async def test_a_provider_that_hangs_costs_a_bounded_wait(
    provider: Provider, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "WAIT_S", 0.05)
    provider.gate = asyncio.Event()
    async with serving() as served:
        assert await served.ask(token_of(provider)) == 503
        provider.gate.set()
        while served.verifier.waits(token_of(provider)):
            await asyncio.sleep(0.01)
        assert await served.ask(token_of(provider)) == 200


async def test_a_new_key_of_the_provider_is_fetched_at_once_and_made_up_ones_once_a_minute(
    provider: Provider, serving: Serving
) -> None:
    async with serving() as served:
        assert await served.ask(token_of(provider)) == 200
        served.clock.now += oidc.AGAIN_S
        provider.keys = jwks(RSA, EC)
        assert await served.ask(token_of(provider, EC, "ES256")) == 200
        assert provider.asked == 2
        for n in range(30):
            assert await served.ask(token_of(provider, kid=f"made-up-{n}")) == 401
        assert provider.asked == 2
        served.clock.now += oidc.AGAIN_S
        for n in range(30):
            assert await served.ask(token_of(provider, kid=f"made-up-{n}")) == 401
        assert provider.asked == 3
        for name in ("alg none", "a shared secret", "empty parts", "huge"):
            served.clock.now += oidc.AGAIN_S
            assert await served.ask(BAD[name][:8000]) == 401
        assert provider.asked == 3, "what can never hold is not worth a fetch"


async def test_a_key_that_was_withdrawn_ends_also_tokens_that_were_seen(provider: Provider, serving: Serving) -> None:
    async with serving() as served:
        token = token_of(provider)
        assert await served.ask(token) == 200
        provider.keys = jwks(EC)
        served.clock.now += oidc.RENEW_S
        assert await served.ask(token) == 200, "the keys are renewed beside it"
        while (status := await served.ask(token)) == 200:
            await asyncio.sleep(0.01)
        assert status == 401


async def test_the_last_good_keys_count_for_a_day(provider: Provider, serving: Serving) -> None:
    async with serving() as served:
        token = token_of(provider)
        assert await served.ask(token) == 200
        provider.status = 500
        for _ in range(3):
            served.clock.now += oidc.KEEP_S / 4
            assert await served.ask(token) == 200
        served.clock.now += oidc.KEEP_S / 2
        assert await served.ask(token) == 503, "it is the provider's fault, not the client's"
        provider.status = 200
        served.clock.now += oidc.AGAIN_S
        assert await served.ask(token) == 200


@pytest.mark.parametrize(
    ("status", "keys"),
    [(500, None), (302, None), (200, b"{"), (200, b" " * (oidc.MOST_BYTES + 1) + jwks(RSA)), (200, b"[" * 200_000)],
)
async def test_a_provider_that_answers_nonsense_gives_no_keys(
    provider: Provider, serving: Serving, status: int, keys: bytes | None
) -> None:
    provider.status, provider.keys = status, keys or provider.keys
    async with serving() as served:
        assert await served.ask(token_of(provider)) == 503
        assert await served.ask(KEY) == 200


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://another.example"},
        {"jwks_uri": "http://keys.example/certs"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": 7},
    ],
)
async def test_a_document_that_names_another_issuer_or_a_plain_address_is_not_believed(
    provider: Provider, serving: Serving, document: dict[str, Any]
) -> None:
    provider.document = document
    async with serving() as served:
        assert await served.ask(token_of(provider)) == 503
        assert "names another issuer, or keys that are not at an https:// address" in served.verifier._reason
    async with serving(jwks_url=f"{provider.issuer}/certs") as served:
        assert await served.ask(token_of(provider)) == 200, "an address that is configured is"


async def test_a_reload_changes_who_is_believed(provider: Provider, serving: Serving) -> None:
    async with serving() as served:
        token = token_of(provider)
        assert await served.ask(token) == 200
        served.live.replace(configured(provider, clients=[{"value": "ada", "id": "other"}]))
        assert await served.ask(token) == 200
        assert served.worker.ids == ["web-shop", "other"]
        served.live.replace(msgspec.structs.replace(served.live.now, oidc=Oidc()))
        assert await served.ask(token) == 401
        assert await served.ask(KEY) == 200


async def test_metrics_are_closed_where_only_tokens_are_configured(provider: Provider, serving: Serving) -> None:
    async with serving() as served:
        served.live.replace(msgspec.structs.replace(served.live.now, keys=()))
        assert (await served.client.ask("GET", "/metrics")).status == 401
        assert await served.ask("") == 401
        assert await served.ask(token_of(provider)) == 200


async def test_no_token_reaches_a_log(
    provider: Provider, serving: Serving, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    marker = "c4n4ry-" + "m" * 20
    tokens = [
        token_of(provider, sub=marker),
        token_of(provider, iss_=marker, kid=marker),
        token_of(provider, x=marker),
        f"{HEAD}.{encoded({'sub': marker})}.{marker}",
    ]
    with caplog.at_level(logging.DEBUG):
        async with serving() as served:
            for token in tokens:
                answer = await served.client.ask("POST", CHAT, json=ASKED, headers={"Authorization": f"Bearer {token}"})
                body = await answer.text()
                assert marker not in body
                assert token.split(".")[1][:40] not in body
    out, err = capsys.readouterr()
    said = out + err + caplog.text
    for token in tokens:
        assert all(part[:30] not in said for part in token.split(".") if len(part) > 30)
    assert marker not in said


def test_nothing_is_imported_without_a_provider() -> None:
    code = "import sys, agent.api.app; print('joserfc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


# ---- the configuration ----


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"audience": ["a"]}, "oidc.issuer"),
        ({"issuer": "http://id.example.com", "audience": ["a"], "ids": "x+"}, "oidc.issuer"),
        ({"issuer": "https://u:p@id.example.com", "audience": ["a"], "ids": "x+"}, "oidc.issuer"),
        ({"issuer": ISSUER, "jwks_url": "http://id.example.com", "audience": ["a"], "ids": "x+"}, "oidc.jwks_url"),
        ({"issuer": ISSUER, "ids": "x+"}, "oidc.audience"),
        ({"issuer": ISSUER, "ids": "x+", "audience": [""]}, "oidc.audience"),
        ({"issuer": ISSUER, "audience": ["a"]}, "oidc.clients"),
        ({"issuer": ISSUER, "audience": ["a"], "ids": "("}, "oidc.ids"),
        ({"issuer": ISSUER, "audience": ["a"], "ids": ".*"}, "oidc.ids"),
        ({"issuer": ISSUER, "audience": ["a"], "ids": "x+", "claim": ""}, "oidc.claim"),
        ({"issuer": ISSUER, "audience": ["a"], "clients": [{"value": "a", "id": "../x"}]}, "oidc.clients[0].id"),
        ({"issuer": ISSUER, "audience": ["a"], "clients": [{"value": "", "id": "x"}]}, "oidc.clients[0].value"),
        ({"issuer": ISSUER, "audience": ["a"], "clients": [{"value": "a", "id": i} for i in "xy"]}, "oidc.clients"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(table: dict[str, Any], problem: str) -> None:
    config = msgspec.convert({"node": {"id": "n1", "rack": "r"}, "oidc": table}, AgentConfig)
    assert [text for text in check(config) if text.startswith(problem)], check(config)


@pytest.mark.parametrize("alg", ["none", "HS256", "HS512", "RS1", ""])
def test_an_algorithm_with_a_shared_secret_cannot_be_configured(alg: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"algorithms": [alg]}, Oidc)


def test_tokens_alone_open_an_address_to_others() -> None:
    tree = {"node": {"id": "n1", "rack": "r"}, "listen": {"host": "10.0.0.1", "insecure_http": True}}
    table = {"issuer": ISSUER, "audience": ["a"], "ids": "x+"}
    assert any("listen.host" in text for text in check(msgspec.convert(tree, AgentConfig)))
    assert check(msgspec.convert({**tree, "oidc": table}, AgentConfig)) == []
