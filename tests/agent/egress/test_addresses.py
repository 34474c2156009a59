"""Which addresses are on the premises, and which are outside."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy.addresses import is_number, unfit, unfit_url
from agent.policy.checking import check
from agent.policy.rules import Provider, Rules, is_cloud_name

PREMISES = (
    *("10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.1.20", "127.0.0.1", "127.8.8.8"),
    *("169.254.10.1", "::1", "fd12:3456::1", "fc00::1", "fe80::1", "fe80::1%en0", "::ffff:192.168.1.1"),
)
OUTSIDE = ("8.8.8.8", "1.1.1.1", "104.18.6.192", "2606:4700::6812:7c0", "::ffff:8.8.8.8", "64:ff9b::808:808")
NOWHERE = (
    *("0.0.0.0", "0.1.2.3", "255.255.255.255", "224.0.0.1", "239.1.1.1", "240.0.0.1", "100.64.0.1", "100.127.255.254"),
    *("192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "169.254.169.254", "fd00:ec2::254"),
    *("::", "ff02::1", "2001:db8::1", "fec0::1", "2002:c0a8:101::1", "2001::1", "::10.0.0.1", "64:ff9b:1::1"),
    *("::ffff:0.0.0.0", "::ffff:100.64.0.1", "::ffff:169.254.169.254", "name", "", "127.1", "1.2.3.4.5"),
)


@pytest.mark.parametrize("address", [*PREMISES, "64:ff9b::a00:1"])
def test_private_addresses_are_the_premises_and_never_outside(address: str) -> None:
    assert unfit(address, "outside")
    assert unfit(address, "premises") == ""


@pytest.mark.parametrize("address", OUTSIDE)
def test_public_addresses_are_outside_and_never_the_premises(address: str) -> None:
    assert unfit(address, "outside") == ""
    assert "not a private address" in unfit(address, "premises")


@pytest.mark.parametrize("address", NOWHERE)
def test_other_addresses_are_neither(address: str) -> None:
    assert unfit(address, "outside")
    assert unfit(address, "premises")


@given(st.ip_addresses())
def test_no_address_is_both(address: object) -> None:
    assert unfit(str(address), "outside") or unfit(str(address), "premises")


@given(st.ip_addresses(v=4))
def test_an_address_of_ipv4_is_judged_alike_when_it_is_written_as_ipv6(address: object) -> None:
    for category in ("outside", "premises"):
        assert unfit(f"::ffff:{address}", category) == unfit(str(address), category)


NUMBERS = ("2130706433", "017700000001", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "127.0.0.1.", "10.0.0.0x1", "0")


@pytest.mark.parametrize("host", [one for one in NUMBERS if one != "127.0.0.1."])
def test_a_number_that_a_resolver_takes_for_an_address_is_refused(host: str) -> None:
    assert is_number(host)
    for url in (f"http://{host}/v1", f"http://{host}:11434/v1"):
        assert unfit_url(url, "premises")
        assert unfit_url(url, "outside")


@pytest.mark.parametrize("host", ["localhost", "mac-1.local", "a1", "ollama", "10.0.0.1", "[::1]", "1.example", "x.0y"])
def test_names_and_addresses_in_their_usual_form_are_taken(host: str) -> None:
    assert unfit_url(f"http://{host}:1/v1", "premises") == ""


@pytest.mark.parametrize(
    "url",
    [
        *("", "http://", "https:///v1", "ftp://x/v1", "http://user@x/v1", "http://user:word@x/v1", "http://x/v1?key=1"),
        *("http://x/v1#a", "http://x:0/v1", "http://x:99999/v1", "http://ex ample/v1", "http://[fe80::1%25en0]/v1"),
        *(
            "http://8.8.8.8/v1",
            "http://[2606:4700::1]/v1",
            "http://100.100.1.1/v1",
            "http://x\\@y/v1",
            "http://ｅ.com/v1",
        ),
    ],
)
def test_a_url_that_cannot_be_on_the_premises(url: str) -> None:
    assert unfit_url(url, "premises")


def test_the_policy_file_is_told_of_it_before_it_is_used() -> None:
    wrong = Provider(name="a", kind="local", url="http://8.8.8.8:11434/v1")
    leads_in = Provider(name="b", kind="compatible", url="https://192.168.1.1/v1", secret="env:X")
    found = list(check(Rules(providers=(wrong, leads_in))))
    assert len(found) == 2
    assert found[0].startswith("providers[0].url: 8.8.8.8 is not a private address")
    assert found[1].startswith("providers[1].url: 192.168.1.1 is not a public address")


@pytest.mark.parametrize(
    "name",
    [
        *("gpt-oss:120b-cloud", "x:cloud", "X:CLOUD", "deepseek-v3.1:671b-cloud ", "mine-cloud", "mine-cloud:latest"),
        *("ollama.com/library/x:cloud", "x-cloud@sha256:00ff"),
    ],
)
def test_names_that_leave_the_building(name: str) -> None:
    assert is_cloud_name(name)


@pytest.mark.parametrize("name", ["llama3", "cloudy", "cloud-llama:8b", "mycloud", "x:cloud9", "qwen3:8b"])
def test_names_that_stay(name: str) -> None:
    assert not is_cloud_name(name)


def test_the_table_is_of_addresses() -> None:
    assert all(ip_address(one.partition("%")[0]) for one in (*PREMISES, *OUTSIDE))
