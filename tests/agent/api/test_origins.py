"""Which Host names, origins and content types are served."""

from types import SimpleNamespace

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from agent.api.context import CONTEXT, PROVED, Unauthorized, require_reader
from agent.api.origins import allowed_origin, check_content_type, check_host, preflight
from agent.config import AgentConfig, Api, Key, Listen, Node
from agent.config_checks import check
from shared.errors import Refused
from shared.hosts import is_loopback

PAGE = "https://chat.example.com"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.9.8.7",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "::1",
        "0:0:0:0:0:0:0:1",
        "::ffff:127.0.0.1",
        "::1%lo",
    ],
)
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        *("", "0", "0.0.0.0", "::", "::ffff:0.0.0.0", "::ffff:10.0.0.1", "10.0.0.1", "fe80::1", "128.0.0.1"),
        *("localhost.evil.example", "127.evil.com", "127.0.0.1.evil.com", "evil-localhost", "xlocalhost", "::1.evil"),
        *("2130706433", "0x7f000001", "0x7f.1", "017700000001", "127.1", "127.0.0.1.", "localhost..", " localhost"),
        *("127.0.0.1:80", "[::1]", "localhost:80", "127.0.0.01", "ｌocalhost", "localhost\x00", "127.0.0.1/8"),
    ],
)
def test_everything_else_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)
    exposed = AgentConfig(node=Node(id="n", rack="r"), listen=Listen(host=host))
    assert any(one.startswith("listen.host") for one in check(exposed)), "it needs keys"


@given(st.text(max_size=40))
def test_no_name_that_begins_or_ends_like_loopback_is(text: str) -> None:
    for host in (f"localhost.{text}", f"127.{text}", f"{text}.localhost", f"::1{text}"):
        if is_loopback(host):
            assert host.lower() in ("localhost.",) or set(host.partition("%")[0]) <= set("0123456789.:"), host


@pytest.mark.parametrize(
    ("hosts", "served"),
    [
        (["localhost"], True),
        (["localhost:8470"], True),
        (["LocalHost.:8470"], True),
        (["127.0.0.1:8470"], True),
        (["[::1]:8470"], True),
        (["[::ffff:127.0.0.1]"], True),
        ([], True),
        (["rack.example.com"], True),
        (["Rack.Example.Com.:443"], True),
        (["evil.example"], False),
        (["localhost", "evil.example"], False),
        (["evil.example", "localhost"], False),
        (["0.0.0.0:8470"], False),
        (["2130706433"], False),
        (["localhost.evil.example"], False),
        (["x.rack.example.com"], False),
        (["localhost@evil.example"], False),
        (["evil.example#localhost"], False),
        (["localhost:8470:9"], False),
        (["localhost, evil.example"], False),
        (["[::1"], False),
        ([""], False),
    ],
)
def test_hosts(hosts: list[str], served: bool) -> None:
    if served:
        check_host(hosts, ("rack.example.com",))
    else:
        with pytest.raises(Refused) as refused:
            check_host(hosts, ("rack.example.com",))
        assert refused.value.code == "wrong_host"
        assert "evil" not in refused.value.message


@pytest.mark.parametrize(
    ("headers", "is_api", "expected"),
    [
        ({}, True, None),
        ({"Sec-Fetch-Site": "none"}, True, None),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:8470"}, True, None),
        ({"Origin": "http://localhost:8470"}, False, None),
        ({"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}, True, PAGE),
        ({"Origin": PAGE}, False, "refused"),
        ({"Origin": PAGE + ".evil.example"}, True, "refused"),
        ({"Origin": PAGE.upper()}, True, "refused"),
        ({"Origin": "null"}, True, "refused"),
        ({"Origin": ""}, True, "refused"),
        ({"Origin": "http://localhost:3000"}, True, "refused"),
        ({"Origin": "https://evil.example"}, True, "refused"),
        ({"Origin": "http://evil.example/localhost:8470"}, True, "refused"),
        ({"Sec-Fetch-Site": "cross-site"}, True, "refused"),
        ({"Sec-Fetch-Site": "same-site"}, False, "refused"),
        ({"Sec-Fetch-Site": " Cross-Site "}, True, "refused"),
        ({"Origin": "http://localhost:8470", "Sec-Fetch-Site": "cross-site"}, True, "refused"),
    ],
)
def test_pages(headers: dict[str, str], is_api: bool, expected: str | None) -> None:
    if expected != "refused":
        assert allowed_origin(headers, ["localhost:8470"], (PAGE,), is_api=is_api) == expected
        return
    with pytest.raises(Refused) as refused:
        allowed_origin(headers, ["localhost:8470"], (PAGE,), is_api=is_api)
    assert refused.value.code == "cross_site"


@pytest.mark.parametrize("kind", ["", "text/plain", "text/plain; application/json", "application/jsonx", "a/json"])
def test_a_page_must_say_that_it_sends_json(kind: str) -> None:
    check_content_type({}, kind)
    with pytest.raises(Refused):
        check_content_type({"Origin": PAGE}, kind)
    check_content_type({"Origin": PAGE}, "application/json; charset=utf-8")


def test_a_preflight_allows_the_headers_that_were_asked_for_if_they_are_names() -> None:
    asked = "authorization,content-type, x-stainless-os"
    assert preflight({"Access-Control-Request-Headers": asked})["Access-Control-Allow-Headers"] == asked
    odd = preflight(
        {"Access-Control-Request-Headers": "a b\t<script>", "Access-Control-Request-Private-Network": "true"}
    )
    assert odd["Access-Control-Allow-Headers"] == "authorization, content-type"
    assert odd["Access-Control-Allow-Private-Network"] == "true"


@pytest.mark.parametrize(
    "origin", ["*", "null", "https://a.example/", "https://A.example", "a.example", "https://*.a", ""]
)
def test_origins_are_exact(origin: str) -> None:
    config = AgentConfig(node=Node(id="n", rack="r"), api=Api(cors_origins=(PAGE, origin)))
    (found,) = (one for one in check(config) if "cors" in one)
    assert found.startswith("api.cors_origins[1]: ")
    assert (
        check(
            AgentConfig(node=Node(id="n", rack="r"), api=Api(cors_origins=("app://obsidian.md", "http://[::1]:3000")))
        )
        == []
    )
    named = AgentConfig(node=Node(id="n", rack="r"), listen=Listen(names=("rack.example.com", "rack:443")))
    assert [one[:15] for one in check(named)] == ["listen.names[1]"]


@pytest.mark.parametrize("token", ["m" * 64, "a" * 64])
def test_who_shows_the_metrics_token_is_known(token: str) -> None:
    """A monitoring system keeps its connection when others want its place."""
    config = AgentConfig(node=Node(id="n", rack="r"), keys=(Key(id="k", sha256="0" * 64),))
    context = SimpleNamespace(config=config, metrics_token="m" * 64, admin_token="a" * 64)
    headers = {"Authorization": f"Bearer {token}"}
    request = make_mocked_request("GET", "/metrics", headers=headers, app={CONTEXT: context})
    require_reader(request)
    assert request[PROVED]
    request = make_mocked_request("GET", "/metrics", app={CONTEXT: context})
    with pytest.raises(Unauthorized):
        require_reader(request)
    assert PROVED not in request
