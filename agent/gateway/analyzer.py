"""``python -P -m agent.gateway.analyzer --fd N``: the detectors in a process of their own, started by the daemon.

It reads frames from the socket that it inherits and answers each. Once it has loaded what it needs it gives up the
right to open anything: no file, and no socket, whatever a library might try.
"""

import argparse
import os
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from importlib import import_module

import msgspec

from agent.policy.redaction.detectors import Detectors, Found, Scan
from agent.policy.rules import Rules
from shared.errors import RackError, Refused

HEAD = struct.Struct(">I")
"""The length of a frame in bytes, before it."""
NAMES_HINT = (
    "redaction.names is on and no model that finds names is installed: install spacy and one of its pipelines, like "
    "de_core_news_sm, into the agent's environment, or set names = false"
)


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The policy from now on; Prepared follows."""

    rules: Rules


class Find(msgspec.Struct, frozen=True, tag=True):
    """Find everything in these texts; Findings follow."""

    texts: tuple[str, ...]
    joins: tuple[tuple[int, ...], ...]


class Sense(msgspec.Struct, frozen=True, tag=True):
    """Find what makes these texts SENSITIVE; Sensed follows."""

    texts: tuple[str, ...]


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The detectors of the policy are there; or ``problem`` says what an operator has to do."""

    problem: str = ""


class Findings(msgspec.Struct, frozen=True, tag=True):
    """What was found, and in how many texts it was looked for."""

    found: tuple[Found, ...]
    texts: int


class Sensed(msgspec.Struct, frozen=True, tag=True):
    """What was found, by its name in the policy file."""

    names: tuple[str, ...]
    texts: int


class Unfinished(msgspec.Struct, frozen=True, tag=True):
    """The analysis failed; ``why`` holds nothing of a text."""

    why: str


Question = Setup | Find | Sense
Answer = Prepared | Findings | Sensed | Unfinished
decode_answer = msgspec.msgpack.Decoder(Answer).decode
_decode_question = msgspec.msgpack.Decoder(Question).decode


def framed(frame: Question | Answer) -> bytes:
    """A frame with its length."""
    body = msgspec.msgpack.encode(frame)
    return HEAD.pack(len(body)) + body


def secret_scan() -> Scan:
    """The rules of kingfisher, compiled: takes seconds. It writes no cache. What it can do over a network (validating
    and revoking what it finds) is banned by ruff (TID251) and by the descriptors that this process gives up."""
    from kingfisher_sdk import Rules as Forms
    from kingfisher_sdk import Scanner

    scanner = Scanner(Forms(cache=False), base64=False)

    def scan(text: str) -> Iterator[tuple[int, int]]:
        data = text.encode()
        for one in scanner.scan(data):
            start, end = one.location["start_offset"], one.location["end_offset"]
            if len(data) == len(text):
                yield start, end
            else:
                begin = len(data[:start].decode(errors="ignore"))
                yield begin, begin + len(data[start:end].decode(errors="ignore"))

    return scan


def names_scan() -> Scan:
    """The people that an installed model of spaCy finds. Raises Refused where none is installed."""
    try:
        spacy = import_module("spacy")
        installed = sorted(spacy.util.get_installed_models())
    except ImportError:
        installed = []
    if not installed:
        raise Refused(NAMES_HINT)
    models = [spacy.load(one) for one in installed]

    def scan(text: str) -> Iterator[tuple[int, int]]:
        for model in models:
            yield from ((one.start_char, one.end_char) for one in model(text).ents if one.label_ in ("PER", "PERSON"))

    return scan


class _Analyzer:
    """What answers; the policy may change between two questions."""

    def __init__(self) -> None:
        self._scan: Scan | None = None
        self._names: Scan | None = None
        self._detectors: Detectors | None = None

    def answer(self, question: Question) -> Answer:
        """The answer to one question. Raises RackError."""
        if isinstance(question, Setup):
            return self._prepare(question.rules)
        if self._detectors is None:
            raise Refused("the policy file's detectors are not there")
        if isinstance(question, Find):
            return Findings(self._detectors.find(question.texts, question.joins), len(question.texts))
        return Sensed(self._detectors.sensitive(question.texts), len(question.texts))

    def _prepare(self, rules: Rules) -> Prepared:
        self._detectors = None
        try:
            if rules.redaction.names and self._names is None:
                self._names = names_scan()
            self._scan = self._scan or secret_scan()
            detectors = Detectors(rules, scan=self._scan, names=self._names if rules.redaction.names else None)
            detectors.find(["warm-up: 4111 1111 1111 1111, ops@example.com, +81 3-1234-5678, AKIAIOSFODNN7EXAMPLE"])
        except RackError as error:
            return Prepared(error.message)
        self._detectors = detectors
        return Prepared()


def open_nothing_more() -> None:
    """From now on no descriptor can be opened: each number below the limit is taken."""
    most = max(map(int, os.listdir("/dev/fd")))
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= most:
        pass
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd, fd))


def main() -> int:
    """Answer until the daemon is gone."""
    parser = argparse.ArgumentParser(prog="agent.gateway.analyzer")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the connected Unix socket")
    sock = socket.socket(fileno=parser.parse_args().fd)
    # a core file would contain prompts
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    analyzer, closed = _Analyzer(), False
    stream = sock.makefile("rb")
    while len(head := stream.read(HEAD.size)) == HEAD.size:
        question = _decode_question(stream.read(HEAD.unpack(head)[0]))
        try:
            answer = analyzer.answer(question)
        except RackError as error:
            answer = Unfinished(error.message)
        if not closed:
            open_nothing_more()
            closed = True
        sock.sendall(framed(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
