"""Hosts, networks and proxies: what is on this machine, what is allowed, whose word counts."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from agent.api.proxies import client_address, client_scheme
from agent.config import AgentConfig, Node
from agent.control.desired_peers import choose
from shared import config as shared_config
from shared import secrets
from shared.config import parse
from shared.desired import DesiredPeer
from shared.hosts import host_of, is_loopback, permitted, within

BASE = '[node]\nid = "n1"\nrack = "r"\n[store]\nkind = "directory"\npath = "/tmp/x"\n'
TLS = '[tls]\ncertificate = "/c"\nkey = "/k"\nca = "/ca"\n'


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("[::1]", False), ("localhost", True)),
        *(("LOCALHOST", True), ("localhost.", True), ("::ffff:127.0.0.1", True)),
        *(("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("127.evil.example", False)),
        *(("", False), ("0.0.0.0", False), ("::", False), ("::10", False), ("10.0.0.1", False), ("mini.local", False)),
    ],
)
def test_loopback_is_an_address_or_one_name(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        *(("http://a.example:1/x", "a.example"), ("https://A.example.", "a.example"), ("http://[::1]:80", "::1")),
        *(("http://good@evil", ""), ("http://a:b@c", ""), ("ftp://a", ""), ("http://", ""), ("//a", "")),
        *(("http://a:99999", ""), ("http://[::1", ""), ("http://a:0", ""), ("a", "")),
        *(("http://[fe80::1%25en0]:1", ""), ("http://[fe80::1%en0]", ""), ("http://evil%2eexample", "")),
    ],
)
def test_the_host_of_a_url(url: str, expected: str) -> None:
    assert host_of(url) == expected


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("n2.rack.example", (".rack.example",), True),
        ("rack.example", (".rack.example",), False),
        ("evilrack.example", (".rack.example",), False),
        ("n2.rack.example.evil.example", (".rack.example",), False),
        ("n2", ("n2",), True),
        ("N2", ("n2",), False),
        ("10.0.0.9", ("10.0.0.0/24",), True),
        ("10.0.1.9", ("10.0.0.0/24",), False),
        ("10.0.0.9.evil.example", ("10.0.0.0/24",), False),
        ("fd00::9", ("fd00::/64",), True),
        ("", ("", "."), False),
        ("a", (".",), False),
        ("", ("0.0.0.0/0",), False),
    ],
)
def test_what_is_allowed(host: str, allowed: tuple[str, ...], expected: bool) -> None:
    assert permitted(host, allowed) is expected


# ---- plain HTTP ----


def problems(text: str) -> str:
    from agent.config_checks import check

    try:
        parse(BASE + text, AgentConfig, check, source="x")
    except shared_config.ConfigError as error:
        return "\n".join(error.problems)
    return ""


KEYS = f'[[keys]]\nid = "k"\nsha256 = "{"0" * 64}"\n'
PEERS = '[peers]\nsecret = "env:X"\nnodes = [{{ id = "n2", url = "{0}" }}]\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[listen]\nhost = "0.0.0.0"\n' + KEYS, "sent in clear; configure [tls]"),
        ('[listen]\nhost = "mini-1.local"\n' + KEYS, "sent in clear; configure [tls]"),
        ('[listen]\nhost = "0.0.0.0"\ninsecure_http = true\n' + KEYS, ""),
        ('[listen]\nhost = "0.0.0.0"\n' + KEYS + TLS, ""),
        (PEERS.format("http://127.0.0.1:2"), ""),
        (PEERS.format("http://localhost:2"), ""),
        (PEERS.format("http://localhost.evil.example:2"), "prompts would be sent in clear"),
        (PEERS.format("http://mini-2.local:2"), "peers.nodes[0].url: prompts would be sent in clear"),
        (PEERS.format("http://mini-2.local:2") + "[listen]\ninsecure_http = true\n", ""),
        (PEERS.format("https://mini-2.local:2"), "needs [tls] with certificate, key and ca"),
        (PEERS.format("https://mini-2.local:2") + TLS, ""),
        (PEERS.format("http://127.0.0.1:2") + TLS, "must begin with https://, because this node has tls.ca"),
        (PEERS.format("http://127.0.0.1:2") + TLS + "[listen]\ninsecure_http = true\n", ""),
        (PEERS.format("https://mini-2.local:2") + '[tls]\ncertificate = "/c"\nkey = "/k"\n', "needs [tls]"),
        ('[tls]\ncertificate = "/c"\n', "tls.key: is required"),
        ('[tls]\nkey = "/c"\n', "tls.certificate: is required"),
        ('[tls]\nca = "/c"\n', "tls.certificate: is required with tls.ca"),
        ('[tls]\ncertificate = "/c"\nkey = "/k"\nnode_certificate = "/n"\nnode_key = "/k"\n', "tls.ca: is required"),
        ('[listen]\ntrusted_proxies = ["10.0.0.0/24", "::1", "10.0.0.5"]\n', ""),
        ('[listen]\ntrusted_proxies = ["proxy.local"]\n', "'proxy.local' is neither an address nor a network"),
    ],
)
def test_plain_http_beyond_this_machine_has_to_be_allowed(text: str, expected: str) -> None:
    found = problems(text)
    assert expected in found
    assert bool(expected) == bool(found), found


# ---- proxies ----


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("9.9.9.9", ["1.1.1.1"], "9.9.9.9"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("127.0.0.1", ["6.6.6.6, 1.1.1.1"], "1.1.1.1"),
        ("127.0.0.1", ["6.6.6.6", "1.1.1.1, 10.0.0.7"], "1.1.1.1"),
        ("127.0.0.1", ["10.0.0.8, 10.0.0.7"], "10.0.0.8"),
        ("127.0.0.1", ["1.1.1.1:5555"], "1.1.1.1"),
        ("127.0.0.1", ["[fd00::1]:5555"], "fd00::1"),
        ("::ffff:127.0.0.1", ["fd00::1"], "fd00::1"),
        ("127.0.0.1", ["1.1.1.1, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["<script>, 10.0.0.7"], "10.0.0.7"),
        ("127.0.0.1", [",,"], "127.0.0.1"),
        ("", ["1.1.1.1"], ""),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_not_a_trusted_proxy(
    peer: str, forwarded: list[str], expected: str
) -> None:
    headers = CIMultiDict([("x-forwarded-for", line) for line in forwarded])
    assert client_address(peer, headers, ("127.0.0.1", "10.0.0.0/24")) == expected
    assert client_address(peer, headers, ()) == peer, "nobody is believed by default"


@given(st.text(max_size=60), st.sampled_from(["127.0.0.1", "8.8.8.8"]))
def test_a_client_cannot_choose_its_address(claim: str, really: str) -> None:
    """Whatever a client sends, a trusted proxy appends where it really came from."""
    headers = {"X-Forwarded-For": f"{claim}, 8.8.4.4"}
    found = client_address(really, headers, ("127.0.0.1",))
    assert found == ("8.8.4.4" if really == "127.0.0.1" else really)


def test_a_proxy_says_how_its_client_came() -> None:
    headers = {"X-Forwarded-Proto": "https"}
    assert client_scheme("127.0.0.1", headers, ("127.0.0.1",), "http") == "https"
    assert client_scheme("9.9.9.9", headers, ("127.0.0.1",), "http") == "http"
    assert client_scheme("127.0.0.1", {"X-Forwarded-Proto": "gopher"}, ("127.0.0.1",), "http") == "http"


def test_networks_may_be_written_with_host_bits() -> None:
    assert within("10.0.0.9", ("10.0.0.5/24",))
    assert not within("not an address", ("0.0.0.0/0",))


# ---- secrets ----


@pytest.mark.parametrize(
    "weak",
    [
        *("", "a", "office", "k3J9-xQ2vB7_mW5tR8yZ1", "x" * 31, "a" * 64, "ab" * 32, "hunter2 " * 8, "abcdefgh" * 5),
        *("0123456789abcdef" * 2 + "0123", "abcdefghijklmnopqrstuvwxyz0123456789", "change-me" * 4),
        *("zyxwvutsrqponmlkjihgfedcba9876543210", "aabbccddeeffgghhiijjkkllmmnnoopp", "password" * 4),
        "1111111122222222333333334444444455555555",
        *(
            "changeme1changeme2changeme3changeme4",
            "test1test2test3test4test5test6te",
            "ACME-2024-acme-2025-Acme-2026-acme",
        ),
        *("qwertyuiopasdfghjklzxcvbnm123456", "1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik,", "1q2w3e4r5t6y7u8i9o0p1q2w3e4r5t6y"),
        *(
            "poiuytrewqlkjhgfdsamnbvcxz098765",
            "REPLACE-ME-WITH-A-LONG-RANDOM-SECRET",
            "acegikmoqsuwybdfhjlnprtvxz024681",
        ),
        *(
            "put-your-secret-here-9f8a7b6c5d4e",
            "replace_with_32_random_characters",
            "P4ssworD-is-my-password-for-racks!",
        ),
        *("an-example-key-of-the-documentation", "adgjmpsvybehknqtwzcfiloruxADGJMP"),
    ],
)
def test_secrets_that_are_easily_guessed(weak: str) -> None:
    assert secrets.weakness(weak), weak


@given(st.binary(min_size=32, max_size=32))
def test_what_new_secret_prints_is_strong(raw: bytes) -> None:
    import base64

    rng = random.Random(raw)
    for text in (
        base64.urlsafe_b64encode(rng.randbytes(32)).decode(),
        rng.randbytes(32).hex(),
        rng.randbytes(16).hex(),
    ):
        assert secrets.weakness(text) == ""


@pytest.mark.parametrize(
    "alphabet",
    ["0123456789abcdef", string.ascii_letters + string.digits, string.ascii_letters + "-_" + string.digits],
    ids=["hex", "base62", "urlsafe"],
)
def test_no_random_secret_is_refused(alphabet: str) -> None:
    rng = random.Random(7)
    assert not [why for _ in range(3000) if (why := secrets.weakness("".join(rng.choices(alphabet, k=32))))]


@pytest.mark.parametrize(
    "strong",
    [
        "correct horse battery staple and more",
        "k3J9-xQ2vB7_mW5tR8yZ1-qwer-77Lp0sXc",
        "0d9f6c1e-8a2b-4c7d-b3e5-91f04a6c2d8e",
    ],
)
def test_a_passphrase_or_a_chance_run_of_keys_is_not_refused(strong: str) -> None:
    assert secrets.weakness(strong) == ""


def test_a_weak_secret_is_named_by_its_reference_and_not_quoted() -> None:
    from shared.errors import Halt

    with pytest.raises(Halt, match=r"peers.secret: env:S has 7 characters.*new-secret") as caught:
        secrets.strong("env:S", "peers.secret", {"S": "hunter2"})
    assert "hunter2" not in caught.value.message
    assert secrets.strong("env:S", "x", {"S": "correct horse battery staple office"})


# ---- peers of the desired state ----


def config(*allowed: str, peers: str = "http://127.0.0.1:1", tls: str = "") -> AgentConfig:
    from agent.config_checks import check

    names = ", ".join(f'"{one}"' for one in allowed)
    text = f'{BASE}[peers]\nsecret = "env:X"\nallowed = [{names}]\nnodes = [{{ id = "n2", url = "{peers}" }}]\n{tls}'
    return parse(text, AgentConfig, check, source="x")


def desired(*urls: str) -> list[DesiredPeer]:
    return [DesiredPeer(id=f"n{n}", url=url) for n, url in enumerate(urls, start=1)]


OWN = ("n2", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("url", "follows"),
    [
        *(("http://127.0.0.1:1", True), ("http://127.0.0.1:1/", True), ("http://127.0.0.1:7", True)),
        *(("http://evil.example", False), ("https://evil.example", False), ("http://127.0.0.1.evil.example:1", False)),
        *(
            ("http://127.0.0.1:1@evil.example", False),
            ("http://evil.example/127.0.0.1", False),
            ("http://127.0.0.2:1", False),
        ),
        *(("http://127.0.0.1:1/deeper", False), ("http://127.0.0.1:x", False), ("http://[::1]:1", False)),
    ],
)
def test_a_desired_peer_stays_at_its_configured_host(url: str, follows: bool) -> None:
    chosen = choose(config(), desired("http://me", url))
    assert chosen.peers == [("n2", url.rstrip("/")) if follows else OWN], "else where it is configured"
    assert bool(chosen.refused) is not follows
    if not follows:
        assert "n2" in chosen.refused[0]
        assert "not followed" in chosen.refused[0]


def test_a_new_peer_is_followed_at_an_allowed_host_only() -> None:
    named = desired("http://me", "http://127.0.0.1:1", "http://127.0.0.1:3", "http://10.0.0.9:1")
    assert choose(config(), named).peers == [OWN], "not even at another node's host"
    assert choose(config("127.0.0.1"), named).peers == [OWN, ("n3", "http://127.0.0.1:3")]
    plain = choose(config("10.0.0.0/24"), named)
    assert plain.peers == [OWN]
    assert "prompts would be sent in clear" in plain.refused[1], "allowed, and no downgrade"
    tls = choose(config("10.0.0.0/24", peers="https://10.0.0.2:1", tls=TLS), desired("x", "x", "https://10.0.0.3:1"))
    assert tls.peers == [("n2", "https://10.0.0.2:1"), ("n3", "https://10.0.0.3:1")]
    assert choose(config(), []).peers == [OWN]


@pytest.mark.parametrize("host", ["10.0.0.2", "10.0.0.3"])
@pytest.mark.parametrize("known", ["https://10.0.0.2:1", "http://10.0.0.2:1"])
def test_nobody_but_the_operator_of_a_node_takes_its_tls_away(known: str, host: str) -> None:
    """Also while insecure_http is set, for a move to TLS: then agent.toml's own http:// URLs are called."""
    moving = f"{TLS}[listen]\ninsecure_http = true\n"
    rack = config("10.0.0.0/24", peers=known, tls=moving)
    new = choose(rack, desired("x", f"http://{host}:7", "http://10.0.0.4:1"))
    assert new.peers == [("n2", known)]
    assert all("must begin with https://" in why for why in new.refused)
    assert len(new.refused) == 2
    assert choose(rack, desired("x", known)) == ([("n2", known)], ())
    assert choose(rack, desired("x", f"https://{host}:7")).peers == [("n2", f"https://{host}:7")], "and it can be given"


def test_a_node_without_peers_has_none_of_the_desired_state() -> None:
    named = desired("http://me", "http://127.0.0.1:1")
    assert choose(AgentConfig(node=Node(id="n1", rack="r")), named).peers == []


def test_what_is_sent_in_clear_is_a_warning_as_long_as_it_is() -> None:
    from agent.config import configured_peers, plain_warnings
    from agent.config_checks import check
    from agent.operator.checks import Budget, Facts, Finding, ListenFact, transport
    from agent.operator.facts import _tls

    def _transport(config: AgentConfig) -> list[Finding]:
        facts = Facts((), (), Budget(1, "", 1), (), ListenFact("", 1), *_tls(config))
        return list(transport(config, facts))

    lan = '[listen]\nhost = "0.0.0.0"\ninsecure_http = true\n' + KEYS + PEERS.format("http://mini-2.local:2")
    found = parse(BASE + lan, AgentConfig, check, source="x")
    first, second = plain_warnings(found, configured_peers(found))
    assert "clients reach 0.0.0.0 by plain HTTP" in first
    assert "requests to n2 use plain HTTP" in second
    assert [(one.what, one.verdict) for one in _transport(found)] == [("plain HTTP", "warning")] * 2
    assert plain_warnings(config(), [OWN]) == []
    assert plain_warnings(found, [("n7", "http://10.0.0.7:1")])[1].startswith("requests to n7 use plain HTTP")
    moving = config(peers="https://mini-2.local:2", tls=f"{TLS}[listen]\ninsecure_http = true\n")
    (left,) = plain_warnings(moving, configured_peers(moving))
    assert "insecure_http is set beside [tls]" in left
    assert [one.verdict for one in _transport(config())] == ["ok"]
    broken = config(peers="https://mini-2.local:2", tls=TLS)
    assert [(one.verdict, "/c: " in one.seen or "/k: " in one.seen) for one in _transport(broken)] == [
        ("problem", True)
    ]
