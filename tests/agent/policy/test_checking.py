"""A policy file: every problem is told with its key, in one message; what is probably not meant is a warning."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy.checking import check
from agent.policy.doubts import Known, doubts
from agent.policy.explaining import explain
from agent.policy.patterns import backtracks, compiled, problem
from agent.policy.rules import (
    DEFAULT,
    KeyPolicy,
    ModelPolicy,
    Money,
    Provider,
    Route,
    Rules,
    Sensitive,
    differing,
    digest,
    dollars,
    is_cloud_name,
    is_day,
)
from scripts.document_config import document
from shared.config import parse
from shared.errors import Refused
from tests.agent.policy.made import PROVIDERS, any_rules, facts, permission, problems

PAGE = (Path(__file__).parents[3] / "docs/policy.md").read_text(encoding="utf-8")
CLOUD = '[[providers]]\nname = "p"\nkind = "openai"\nsecret = "env:K"\n'
LOCAL = '[[providers]]\nname = "p"\nkind = "local"\nurl = "{}"\n'
LIKE = '[[providers]]\nname = "p"\nkind = "compatible"\nsecret = "env:K"\nurl = "{}"\n'
ALLOW = '[[allow]]\nprovider = "p"\nuse = "m"\nkeys = ["a"]\nclasses = ["ROUTINE"]\nmodels = ["x"]\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('versoin = "1"', "versoin: unknown key; did you mean 'version'?"),
        ('version = " "', "version: must be a name"),
        ('version = "a\\nb"', "version: must be a name"),
        (f'version = "{"v" * 300}"', "version: must be a name"),
        ("[[keys]]", "keys[0].id: is required"),
        ('[[keys]]\nid = "a b"', "keys[0].id: 'a b': use 1 to 63 letters"),
        ('[[keys]]\nid = "a*"', "keys[0].id: 'a*': use 1 to 63 letters"),
        ('[[keys]]\nid = "a"\n[[keys]]\nid = "a"', "keys: duplicate id 'a'"),
        ('[[keys]]\nid = "*"\n[[keys]]\nid = "*"', "keys: duplicate id '*'"),
        ('[[keys]]\nid = "a"\nclasses = ["routine"]', "keys[0].classes[0]: "),
        ('[[keys]]\nid = "a"\nclasses = ["SENSITIVE"]', "keys[0].classes[0]: "),
        ('[[keys]]\nid = "a"\nclasses = []', "keys[0].classes: is empty"),
        ('[[keys]]\nid = "a"\nmodels = []', "keys[0].models: is empty"),
        ('[[keys]]\nid = "a"\nmodels = ["*", "m"]', "keys[0].models: * is all of them"),
        ('[[keys]]\nid = "a"\nmodels = ["qwen*"]', "keys[0].models[0]: 'qwen*': * stands for all"),
        ('[[keys]]\nid = "a"\nmodels = ["m", "m"]', "keys[0].models: 'm' is listed twice"),
        ('[[keys]]\nid = "a"\nmodels = ["auto"]', "keys[0].models[0]: 'auto' is not a served name"),
        ('[[keys]]\nid = "a"\nmodels = [" m"]', "keys[0].models[0]: must be a name"),
        ('[[keys]]\nid = "a"\nclasses = ["ROUTINE"]\ntask_class = "REASONING"', "keys[0].task_class: REASONING is not"),
        ('[[keys]]\nid = "a"\nrequests_per_minute = -1', "keys[0].requests_per_minute: "),
        *(
            (f'[[keys]]\nid = "a"\nexpires = "{day}"', "keys[0].expires: must be a day")
            for day in ("2026-02-30", "2026-1-1", "2026-W01-1", "01.02.2027", "20270101", "never", "2026-01-01T00:00")
        ),
        ('[[keys]]\nid = "a"\nexpires = 2027-01-01', "keys[0].expires: expected str"),
        *(
            (f'[[keys]]\nid = "a"\n[keys.day]\nusd = "{usd}"', "keys[0].day.usd: ")
            for usd in (
                "-1",
                "1e3",
                "ten",
                "1,50",
                "NaN",
                "Infinity",
                " 5",
                "1_000",
                "٣",
                "0.0000001",
                "$5",
                "0",
                "0.00",
            )
        ),
        ('[[keys]]\nid = "a"\n[keys.year]\nusd = "1"', "keys[0].year: unknown key"),
        ('[[models]]\nname = "auto"', "models[0].name: 'auto' leaves the choice"),
        ('[[models]]\nname = "m"\n[[models]]\nname = "m"', "models: duplicate name 'm'"),
        ('[[routes]]\ntask_class = "ROUTINE"\nmodel = "*"', "routes[0].model: must be a served name"),
        ('[[routes]]\ntask_class = "ROUTINE"\nmodel = "class:routine"', "routes[0].model: must be a served name"),
        (2 * '[[routes]]\ntask_class = "ROUTINE"\nmodel = "m"\n', "routes[1]: is the same as routes[0]"),
        # providers
        ('[[providers]]\nname = "p"\nkind = "azure"', "providers[0].kind: "),
        ('[[providers]]\nname = "p"\nkind = "openai"', "providers[0].secret: is required"),
        ('[[providers]]\nname = "p"\nkind = "openai"\nsecret = "sk-live"', "providers[0].secret: is a literal value"),
        (f"{CLOUD}sensitive = true", "providers[0].sensitive: SENSITIVE requests never leave"),
        (f'{CLOUD}usd_per_mtok_in = "1"', "providers[0].usd_per_mtok_in: and usd_per_mtok_out need each other"),
        (f'{CLOUD}usd_per_day = "five"', "providers[0].usd_per_day: 'five' is not an amount"),
        (f"{CLOUD}first_token_s = 400\nrequest_s = 300", "providers[0].first_token_s: is more than request_s"),
        ('[[providers]]\nname = "p"\nkind = "local"', "providers[0].url: is required"),
        *(
            (LIKE.format(url), "providers[0].url: must")
            for url in (
                *("http://api.example.com/v1", "ftp://x", "https://", "https:///v1", "https://user:pw@x.com/v1"),
                *(
                    "https://user@x.com",
                    "https://x.com/v1?key=1",
                    "https://x.com/v1#a",
                    "https://x.com:0",
                    "https://x y",
                ),
                *("https://x.com:99999", "https://exämple.com", "https://x.com\\\\@y.com", "https://[::1", "x.com"),
                *("https://x%2ecom/v1", "https://x.com/v1?", "https://x.com/#", "javascript:alert(1)"),
            )
        ),
        (LIKE.format("https://x.com/v1/chat/completions"), "providers[0].url: is the address of one function"),
        *(
            (LOCAL.format(url), "providers[0].url: ")
            for url in ("http://8.8.8.8/v1", "http://[2001:4860:4860::8888]/v1", "http://0.0.0.0:11434", "unix:///x")
        ),
        # allow
        (ALLOW, "allow[0].provider: no [[providers]] has the name 'p'"),
        (f"{CLOUD}{ALLOW}{ALLOW}", "allow[1]: is the same as allow[0]"),
        *(
            (CLOUD + ALLOW.replace(*change), expected)
            for change, expected in (
                (('"m"', '" "'), "allow[0].use: is required"),
                (('"m"', '"*"'), "allow[0].use: is required"),
                (('"m"', '"auto"'), "allow[0].use: is required"),
                (('"m"', '"m\\n"'), "allow[0].use: must be a model's name"),
                (('["a"]', "[]"), "allow[0].keys: is empty"),
                (('["ROUTINE"]', "[]"), "allow[0].classes: is empty"),
                (('["x"]', "[]"), "allow[0].models: is empty"),
                (('["ROUTINE"]', '["*"]'), "allow[0].classes[0]: "),
                (('["ROUTINE"]', '["ROUTINE", "ROUTINE"]'), "allow[0].classes: 'ROUTINE' is listed twice"),
                (('["a"]', '["a", "*"]'), "allow[0].keys: * is all of them"),
                (('["a"]', '[""]'), "allow[0].keys[0]: must be a name"),
                (('["x"]', '["gpt-*"]'), "allow[0].models[0]: 'gpt-*': * stands for all"),
                (('["x"]', '["class:rutine"]'), "allow[0].models[0]: model: "),
                (('["x"]', '["class:reasoning"]'), "allow[0].models[0]: REASONING is not in its classes"),
                (('["x"]', '["Class: ROUTINE"]'), "allow[0].models[0]: is written class:routine"),
                (('["x"]', '["x"]\nwhen = "always"\nwait_s = 3'), "allow[0].wait_s: is for when"),
                (('["x"]', '["x"]\nwait_s = -1'), "allow[0].wait_s: "),
            )
        ),
        *(
            (LOCAL.format("http://10.0.0.9/v1") + ALLOW.replace('"m"', f'"{name}"'), "vendor's cloud")
            for name in (
                *(
                    "gpt-oss:120b-cloud",
                    "qwen3-coder:480b-CLOUD",
                    "m:cloud",
                    "user/m-cloud:latest",
                    "m-cloud",
                    "cloud/m",
                ),
            )
        ),
        # detection
        ('[sensitive]\nkinds = ["name"]', "sensitive.kinds: names are found only with redaction.names"),
        ('[sensitive]\nkinds = ["phone"]\n[redaction]\nregions = []', "redaction.regions: is empty"),
        ('[redaction]\nregions = ["Germany"]', "redaction.regions[0]: "),
        ('[redaction]\nregions = ["DE", "DE"]', "redaction.regions: 'DE' is listed twice"),
        ('[sensitive]\nwords = [" "]', "sensitive.words[0]: must be a word"),
        ('[sensitive]\nwords = ["---"]', "sensitive.words[0]: must be a word"),
        ('[sensitive]\nwords = ["a", "a"]', "sensitive.words: 'a' is listed twice"),
        ('[content]\npatterns = ["a", "a"]', "content.patterns: 'a' is listed twice"),
        ('[redaction]\npatterns = ["x", "(a"]', "redaction.patterns[1]: is not a regular expression"),
        (f"[sensitive]\npatterns = {[f'a{n}' for n in range(201)]}", "sensitive.patterns: 201 entries; at most 200"),
        (f"[sensitive]\nwords = {[f'a{n}' for n in range(2001)]}", "sensitive.words: 2,001 entries; at most 2,000"),
        ("".join(f'[[keys]]\nid = "k{n}"\n' for n in range(10_001)), "keys: 10,001 entries; at most 10,000"),
        ("[admission]\nreserved_reasoning = -1", "admission.reserved_reasoning: "),
        ("[redaction]\ntime_out_s = 0", "redaction.time_out_s: "),
    ],
)
def test_a_problem_is_told_with_its_key(text: str, expected: str) -> None:
    found = problems(text)
    assert any(expected in one for one in found), found
    assert len(found) == 1, "and nothing else is wrong"


@given(
    st.text(st.sampled_from("ahtps:/.@?#[]%*0129-\\ \n\0é\u202e"), max_size=24),
    st.sampled_from(("local", "compatible")),
)
def test_any_text_is_judged_wherever_it_stands(text: str, kind: Any) -> None:
    """The checks and the doubts raise nothing, whatever a file says."""
    rules = Rules(
        version=text,
        sensitive=Sensitive(words=(text,), patterns=(text,)),
        keys=(KeyPolicy(id=text, models=(text,), expires=text, day=Money(usd=text)),),
        models=(ModelPolicy(name=text),),
        routes=(Route(task_class="ROUTINE", model=text),),
        providers=(
            Provider(name=text, kind=kind, url=f"https://{text}", secret=text),
            Provider(name="b", kind=kind, url=text),
        ),
        allow=(permission(provider=text, use=text, keys=(text,), models=(text,)),),
    )
    if all(one.provider in rules.by_provider for one in rules.allow) and not check(rules):
        doubts(rules, Known((text,), {text: 8}))


def test_every_problem_is_in_one_message() -> None:
    found = problems('version = ""\n[[keys]]\nid = "a"\nexpires = "x"\n[[keys]]\nid = "a"\n' + ALLOW)
    assert {one.split(":")[0] for one in found} == {"version", "keys", "keys[0].expires", "allow[0].provider"}


def test_a_literal_secret_is_never_quoted() -> None:
    assert "sk-live-1234" not in str(problems(CLOUD.replace("env:K", "sk-live-1234")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[[keys]]\nid = "*"\nexpires = "2028-02-29"\n[keys.day]\nusd = "0.01"\nrequests = 5',
        CLOUD + ALLOW.replace('["x"]', '["class:routine", "auto"]'),
        LIKE.format("https://api.example.com:8443/openai/v1/"),
        *(
            LOCAL.format(url)
            for url in ("http://127.0.0.1:11434/v1", "https://studio.local:1234/v1", "http://[::1]:1/v1")
        ),
        *(LOCAL.format(url) for url in ("http://192.168.1.4/v1", "http://[fd00::4]:11434/v1")),
        LOCAL.format("http://10.0.0.9/v1") + ALLOW.replace('"m"', '"cloudy:7b"'),
        f'{CLOUD}usd_per_mtok_in = "0"\nusd_per_mtok_out = "0"',
    ],
)
def test_a_valid_file_has_no_problem(text: str) -> None:
    assert problems(text) == []


@given(any_rules)
def test_policies_of_the_other_tests_are_valid(rules: Rules) -> None:
    """Else their properties would be about files that no node takes. (A choice left open by class needs that class.)"""
    assert [one for one in check(rules) if "not in its classes" not in one] == []
    assert digest(rules) == digest(parse("", Rules, lambda _: (), source="")) or rules != DEFAULT


def test_a_digest_names_the_content() -> None:
    one, other = Rules(keys=(KeyPolicy(id="a"),)), Rules(keys=(KeyPolicy(id="a", sensitive=True),))
    assert digest(one) == digest(Rules(keys=(KeyPolicy(id="a"),)))
    assert len({digest(one), digest(other), digest(DEFAULT), digest(Rules(version="2"))}) == 4
    stated = parse('version = "default"\n[admission]\nstarve_s = 30.0', Rules, check, source="")
    assert digest(stated) == digest(DEFAULT), "what is as its default says nothing, and a later version may have more"


@given(any_rules, any_rules)
def test_two_policies_have_one_digest_only_if_they_are_equal(one: Rules, other: Rules) -> None:
    assert (digest(one) == digest(other)) == (one == other)


# ---- patterns ----


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        *(
            (one, "is not a regular expression")
            for one in ("(a", "a**", "[z-a]", r"\p{Foo}", "(?P<a>x)(?P<a", "\\", "a{5,2}")
        ),
        *((one, "matches an empty text") for one in ("", "a*", "a?", "(|b)", r"\b", "(?=a)", "^", "(?<=a)", "x{0}")),
        *(
            (one, "repeats up to")
            for one in ("(a{1000}){1000}", "((a{100}){100}){100}", "a{10001}", "(?:(b|a{500})c){500}")
        ),
        *((one, "approximate") for one in ("(?:abc){e<=1}", "(abc){i}", "(?R)", "(a(?1)?b)", "(?P<x>a(?&x)?)")),
        ("(" * 60 + "a" + ")" * 60, "nests groups"),
        ("a" * 1001, "has 1,001 characters"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str, expected: str) -> None:
    assert expected in problem(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[A-Z]{2}\d{6}",
        r"\bPRJ-\d{4,}\b",
        r"(?i)blackbird",
        r"(?:\d{3} ){3}\d",
        r"a{2,3}?",
        r"\d++x",
        r"\{id\}",
        r"[{(*]x",
        "ä+",
    ],
)
def test_a_pattern_that_can_be_used_is_not(pattern: str) -> None:
    assert problem(pattern) == ""
    assert not backtracks(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a*)*b", r"(\d+|x)*y", "(a+){20,}b", "((a+)b?)+c", r"([a-z]+\s?)+!"])
def test_a_repetition_of_a_repetition_is_a_warning(pattern: str) -> None:
    assert problem(pattern) == ""
    assert backtracks(pattern)
    assert (
        "redaction.patterns[0]" in doubts(parse(f"[redaction]\npatterns = ['{pattern}']", Rules, check, source=""))[0]
    )


@given(st.text(st.sampled_from("ab()[]{}*+?|\\^$.,0129:=<>!Rei-"), max_size=14))
def test_any_text_is_judged_and_what_passes_compiles(pattern: str) -> None:
    if not problem(pattern):
        assert not any(not one.group() for one in compiled(pattern).finditer("ab 0\n", timeout=5))
    backtracks(pattern)


# ---- amounts, days, names ----


@pytest.mark.parametrize(("text", "good"), [("25.00", True), ("0.000001", True), ("1000000000", False), (".5", False)])
def test_amounts(text: str, good: bool) -> None:
    if good:
        assert str(dollars(text)) == text
        return
    with pytest.raises(Refused):
        dollars(text)


def test_days_and_cloud_names() -> None:
    assert [is_day(one) for one in ("2026-11-27", "2026-W48-5", "2026-13-01", "")] == [True, False, False, False]
    assert [is_cloud_name(one) for one in ("m:cloud ", "M-Cloud", "cloud9:7b", "icloudy")] == [True, True, False, False]


# ---- doubts ----


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(providers=PROVIDERS[:1]), "providers[0]: no [[allow]] permits cloud"),
        (Rules(providers=PROVIDERS, allow=(permission(),)), "providers[0]: usd_per_day and usd_per_month limit"),
        (
            Rules(providers=PROVIDERS, allow=(permission(provider="studio"),)),
            "providers[1].url: prompts go to 10.0.0.9",
        ),
        (Rules(keys=(KeyPolicy(id="web"), KeyPolicy(id="gone"))), "keys[1].id: agent.toml has no [[keys]]"),
        (Rules(keys=(KeyPolicy(id="web"),)), "keys: no entry for batch"),
        (Rules(providers=PROVIDERS, allow=(permission(keys=("gone",)),)), "allow[0].keys: agent.toml has no [[keys]]"),
        (
            Rules(providers=PROVIDERS, allow=(permission(),), keys=(KeyPolicy(id="*", outside=False),)),
            "allow[0]: never matches: nothing of its keys may leave",
        ),
        (
            Rules(providers=PROVIDERS, allow=(permission(keys=("web",)),), keys=(KeyPolicy(id="web", sensitive=True),)),
            "allow[0]: never matches: all requests of its keys are SENSITIVE",
        ),
        (
            Rules(
                providers=PROVIDERS,
                allow=(permission(keys=("web",), classes=("REASONING",)),),
                keys=(KeyPolicy(id="web", classes=("ROUTINE",)),),
            ),
            "allow[0]: never matches: its keys may use none of its classes",
        ),
        (
            Rules(
                providers=PROVIDERS,
                allow=(permission(keys=("web",), models=("x",)),),
                keys=(KeyPolicy(id="web", models=("small",)),),
            ),
            "allow[0]: never matches: its keys may use none of its models",
        ),
        (parse('[[models]]\nname = "x"\nsensitive = true\n' + CLOUD + ALLOW, Rules, check, source=""), "SENSITIVE"),
        (parse('[[routes]]\ntask_class = "ROUTINE"\nmodel = "x"', Rules, check, source=""), "serves 'x'"),
        (parse('[[keys]]\nid = "*"\nmodels = ["x"]', Rules, check, source=""), "keys[0].models: no node that answers"),
        (parse("[admission]\nreserved_orchestration = 8", Rules, check, source=""), "leave none for ROUTINE"),
    ],
)
def test_what_is_probably_not_meant_is_told(rules: Rules, expected: str) -> None:
    found = doubts(rules, Known(keys=("web", "batch"), models={"small": 8, "large": 8}))
    assert any(expected in one for one in found), found
    assert check(rules) == []


def test_a_node_that_serves_a_model_named_auto_is_told() -> None:
    assert "'auto' is served by a node" in doubts(DEFAULT, Known(models={"auto": 8}))[0]


def test_nothing_is_said_of_what_is_not_known() -> None:
    rules = parse('[[routes]]\ntask_class = "ROUTINE"\nmodel = "x"\n[[keys]]\nid = "gone"', Rules, check, source="")
    assert doubts(rules) == doubts(rules, Known()) == doubts(DEFAULT, Known(("a",), {"m": 8})) == []


def test_nodes_that_decide_differently_are_named() -> None:
    mine, plain = digest(Rules(version="2")), digest(DEFAULT)
    assert differing(mine, {"n2": mine, "n3": mine}) == ""
    assert "n3 (aa)" in differing(mine, {"n2": mine, "n3": "aa"})
    assert "n2 (none)" in differing(mine, {"n2": ""})  # an earlier version
    assert differing(plain, {"n2": "", "n3": plain}) == ""


# ---- docs/policy.md ----


def example() -> Rules:
    (text,) = [one for one in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "[[providers]]" in one]
    return parse(text, Rules, check, source="docs/policy.md")


def test_the_documented_example_is_valid_and_means_what_it_says() -> None:
    rules = example()
    assert doubts(rules, Known(("web", "batch", "personnel"), {"qwen3-8b": 8, "qwen3-32b": 8})) == []
    batch = explain(facts(key_id="batch", model="qwen3-32b", class_from="key"), rules)
    assert (batch.decision, batch.limits) == ("redact", ("50.00 USD a month", "last day 2027-06-30"))
    assert (
        "openai (outside): gpt-5-mini, when none before it takes the request, or has not begun after 20 s"
        in batch.places
    )
    assert explain(facts(key_id="web", model="qwen3-32b"), rules).decision == "allow"
    personnel = explain(facts(key_id="personnel", model="qwen3-8b", class_from="guess"), rules)
    assert personnel.decision == "allow"
    assert [one.split(":")[0] for one in personnel.places] == ["the rack", "studio (premises)"]


def test_the_reference_is_that_of_the_code() -> None:
    begin, end = "<!-- policy: generated -->\n", "\n<!-- policy: end -->"
    assert PAGE.split(begin)[1].split(end)[0] == document(Rules)


def test_a_provider_has_one_category() -> None:
    assert {one.category for one in PROVIDERS} == {"outside", "premises"}
    assert Provider(name="o", kind="openrouter").base_url == "https://openrouter.ai/api/v1"
