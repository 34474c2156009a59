"""Probes that a standby must answer before it takes over."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.files import probes
from agent.files.probes import Heard, Probe
from shared.errors import Refused

PARIS = Probe(prompt="Capital?", answer="Paris")


@pytest.mark.parametrize(
    ("probe", "heard", "why"),
    [
        (PARIS, Heard(text="Paris", tokens=1, logprobs=(-0.1,)), ""),
        (PARIS, Heard(text="paris", tokens=1), "differs from the recorded one"),
        (Probe(prompt="?", answer="paris", match="contains"), Heard(text="It is Paris.", tokens=4), ""),
        (
            Probe(prompt="?", answer="Rome", match="contains"),
            Heard(text="It is Paris.", tokens=4),
            "does not contain the recorded text",
        ),
        (Probe(prompt="?"), Heard(text="whatever", tokens=2), ""),
        (Probe(prompt="?"), Heard(text="", tokens=0), "empty"),
        (Probe(prompt="?"), Heard(text="x", tokens=1, logprobs=(math.nan,)), "produced NaN or infinity"),
        (Probe(prompt="?"), Heard(text="x", tokens=1, logprobs=(-1.0, math.inf)), "produced NaN or infinity"),
    ],
)
def test_a_probe_compares_one_answer(probe: Probe, heard: Heard, why: str) -> None:
    reason = probes.fault(probe, heard)
    assert why in reason
    assert bool(reason) == bool(why)
    assert heard.text == "" or len(heard.text) < 3 or heard.text not in reason, "an answer is never quoted"


@pytest.mark.parametrize(
    ("texts", "faulty"), [(["aaaa"] * 5, True), (["aaaa"] * 4 + ["b"], False), (["a"] * 2, False), ([], False)]
)
def test_identical_answers_to_all_probes_fail(texts: list[str], faulty: bool) -> None:
    assert bool(probes.alike([Heard(text=t, tokens=8) for t in texts])) == faulty
    assert not probes.alike([Heard(text="yes", tokens=1)] * 5), "short answers may well agree"


@given(st.lists(st.builds(Probe, prompt=st.text(min_size=1), answer=st.text() | st.none()), min_size=1, max_size=5))
def test_a_probe_file_round_trips(made: list[Probe]) -> None:
    assert probes.parse(probes.render(made), "x") == tuple(made)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"probes": []}',
        b'{"probes": [{"prompt": ""}]}',
        b'{"probes": [{"prompt": "x", "max_tokens": 0}]}',
        b'{"probes": [{"prompt": "x", "match": "regex"}]}',
        b'{"probes": [{"prompt": "x", "expect": "y"}]}',
    ],
)
def test_an_invalid_probe_file_is_rejected(raw: bytes) -> None:
    with pytest.raises(Refused, match="probes"):
        probes.parse(raw, "file of probes")
