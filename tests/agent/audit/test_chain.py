"""The hash chain: whatever is done to a log, the first line that it was done to is named."""

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.audit.chain import NOTHING, Fault, Tip, compare, file_name, first_seq, link, parse, verify
from agent.audit.entry import Begin, Entry, Pruned, encode

NODE, CHAIN = "n1", "0123456789abcdef"
Log = dict[str, list[bytes]]


def entry(n: int) -> Entry:
    return Entry(kind="ended", t_ms=1_793_000_000_000 + n, request=f"req_{n:024x}", node=NODE, outcome="ok", status=200)


def made(*sizes: int, pruned: int = 0) -> tuple[Log, Tip]:
    """Files of so many lines each, the first line of each its beginning; and the last line."""
    tip, after, files = NOTHING, "", Log()
    for number, size in enumerate(sizes):
        name = file_name(tip.seq + 1)
        begin = Begin(t_ms=1, chain=CHAIN, epoch=1 + number, node=NODE, prev=tip.hash, after=after)
        bodies = [encode(begin), *(encode(entry(tip.seq + n)) for n in range(1, size))]
        if pruned and number == len(sizes) - 1:
            bodies.append(encode(Pruned(t_ms=2, through=pruned)))
        files[name] = []
        for body in bodies:
            line, tip = link(tip, body)
            files[name].append(line)
        after = name
    return files, tip


def fault(files: Log, tip: Tip) -> Fault | None:
    return verify(((name, b"".join(lines)) for name, lines in sorted(files.items())), tip=tip).fault


def test_a_whole_log_is_whole_over_files() -> None:
    files, tip = made(5, 1, 7)
    seen = verify([(name, b"".join(lines)) for name, lines in files.items()], tip=tip)
    assert (seen.fault, seen.files, seen.lines, seen.first, seen.last) == (None, 3, 13, 1, tip)
    assert verify([]).fault is None, "an agent that has not started yet"
    other = tip._replace(hash="0" * 64)
    found = verify([(name, b"".join(lines)) for name, lines in files.items()], tip=other).fault
    assert found == Fault(sorted(files)[-1], 0, "was replaced: another last line had been written")


def test_a_line_is_json_with_its_number_and_hash() -> None:
    files, _ = made(3)
    for number, line in enumerate(next(iter(files.values())), 1):
        tree = json.loads(line)
        assert (tree["seq"], len(tree["hash"])) == (number, 64)
    assert parse(line) is not None
    assert parse(line[:-1]) is None
    assert first_seq("000000000012.jsonl") == 12
    assert first_seq("12.jsonl") is first_seq("tip") is first_seq("000000000012.jsonl.zst") is None


EDITS: dict[str, tuple[Callable[[list[bytes], int, int], object], str]] = {
    "changed": (lambda lines, n, _: lines.__setitem__(n, lines[n].replace(b'"ok"', b'"failed"')), r"changed"),
    "dropped": (lambda lines, n, _: lines.pop(n), r"dropped|missing"),
    "doubled": (lambda lines, n, m: lines.insert(n, lines[m]), r"twice|inserted"),
    "swapped": (lambda lines, n, m: lines.__setitem__(slice(None), swapped(lines, n, m)), r"swapped|changed"),
    "inserted": (
        lambda lines, n, _: lines.insert(n, link(Tip(n, "0" * 64), encode(entry(99)))[0]),
        r"inserted|changed",
    ),
}


def swapped(lines: list[bytes], n: int, m: int) -> list[bytes]:
    found = list(lines)
    found[n], found[m] = found[m], found[n]
    return found


@given(st.sampled_from(sorted(EDITS)), st.integers(0, 2), st.data())
def test_the_first_line_that_something_was_done_to_is_named(kind: str, which: int, data: st.DataObject) -> None:
    files, tip = made(6, 9, 7)
    name = sorted(files)[which]
    lines, change = files[name], EDITS[kind][0]
    n = data.draw(st.integers(1, len(lines) - 1))
    m = data.draw(st.integers(1, len(lines) - 1).filter(lambda m: m != n)) if kind in ("doubled", "swapped") else 0
    before = list(lines)
    change(lines, n, m)
    if lines == before:
        return
    first = next((k for k, (a, b) in enumerate(zip(lines, before, strict=False)) if a != b), None)
    found = fault(files, tip)
    assert found is not None
    assert found.file == name
    if first is not None:
        assert found.line == first + 1
        assert re.search(EDITS[kind][1], found.what), found
    else:
        assert found.line == 0 or found.line > n, "at the end of a file"


@given(st.integers(0, 2), st.integers(min_value=0), st.integers(1, 255))
def test_one_changed_byte_is_named(which: int, place: int, change: int) -> None:
    files, tip = made(4, 6, 5)
    name = sorted(files)[which]
    content = bytearray(b"".join(files[name]))
    place %= len(content)
    content[place] ^= change
    number = bytes(content[:place]).count(b"\n") + 1
    found = verify([(one, bytes(content) if one == name else b"".join(lines)) for one, lines in files.items()], tip=tip)
    assert found.fault is not None
    assert found.fault.file == name or content[place] == 0x0A or number == len(files[name])
    if found.fault.line:
        assert found.fault.line in (number, number + (content[place] == 0x0A))


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_cut_tail_is_found_by_the_tip_and_by_the_next_file(kept: int) -> None:
    files, tip = made(4, 4)
    last = sorted(files)[-1]
    files[last] = files[last][:kept]
    found = fault(files, tip)
    assert found is not None
    assert found.file == last
    files, tip = made(4, 4)
    first = sorted(files)[0]
    files[first] = files[first][:2]
    assert fault(files, tip) == Fault(first, 0, "its end was cut off: the lines 3 to 4 are missing")
    last = sorted(files)[-1]
    files, tip = made(4, 4)
    assert fault({one: lines for one, lines in files.items() if one != last}, tip) is not None


def test_missing_foreign_renamed_and_replaced_files_are_named() -> None:
    files, tip = made(4, 4, 4)
    first, second, third = sorted(files)
    found = fault({first: files[first], third: files[third]}, tip)
    assert found is not None
    assert (found.file, "is missing" in found.what) == (second, True)
    found = fault({second: files[second], third: files[third]}, tip)
    assert found == Fault(second, 0, "the files before it, up to 4, are missing")
    renamed = {first: files[first], second: files[third], third: files[second]}
    found = fault(renamed, tip)
    assert found is not None
    assert (found.file, found.line) == (second, 1)
    other, _ = made(4, 4, 4)
    foreign = [line.replace(CHAIN.encode(), b"fedcba9876543210") for line in other[second]]
    found = fault({**files, second: foreign}, tip)
    assert found is not None
    assert found.file == second
    assert fault({**files, "000000000099.jsonl": [b"hello\n"]}, tip) == Fault(
        "000000000099.jsonl", 1, "was changed: it is not the first line of a file"
    )
    assert fault({**files, "notes.txt": []}, tip) == Fault("notes.txt", 0, "is not a file of this log")


def test_files_before_the_first_one_may_be_missing_only_if_the_log_says_so() -> None:
    files, tip = made(4, 4, 4, pruned=4)
    _, second, third = sorted(files)
    assert fault({second: files[second], third: files[third]}, tip) is None
    assert fault({third: files[third]}, tip) == Fault(third, 0, "the files before it, up to 8, are missing")
    assert fault(files, tip) is None, "the line was written, and the files not deleted yet"


def test_an_unfinished_line_is_accepted_where_the_next_file_counts_it() -> None:
    tip, torn = NOTHING, b'{"seq":3,"line":"en'
    lines = []
    for body in (encode(Begin(t_ms=1, chain=CHAIN, epoch=1, node=NODE, prev="")), encode(entry(1))):
        line, tip = link(tip, body)
        lines.append(line)
    begin = Begin(t_ms=1, chain=CHAIN, epoch=2, node=NODE, prev=tip.hash, after=file_name(1), torn=len(torn))
    after, last = link(tip, encode(begin))
    whole = b"".join(lines)
    assert verify([(file_name(1), whole + torn), (file_name(3), after)], tip=last).fault is None
    for content in (whole, whole + torn[:-1], whole + torn + b"x"):
        found = verify([(file_name(1), content), (file_name(3), after)], tip=last).fault
        assert found is not None
        assert found.file == file_name(1)


def test_a_chain_that_was_computed_anew_differs_from_what_was_shipped() -> None:
    files, tip = made(4, 4)
    shipped = {name: b"".join(lines) for name, lines in files.items()}
    forged, after = {}, NOTHING
    for name, lines in files.items():
        forged[name] = b""
        for line in lines:
            tree = re.sub(rb'^\{"seq":\d+,', b"{", line.rpartition(b',"hash"')[0]) + b"}"
            tree = tree.replace(b'"ok"', b'"failed"')
            tree = re.sub(rb'"prev":"[0-9a-f]+"', b'"prev":"%b"' % after.hash.encode(), tree)
            made_anew, after = link(after, tree)
            forged[name] += made_anew
    assert verify(forged.items(), tip=after).fault is None, "nothing on the disk can tell"
    first = sorted(files)[0]
    assert compare(first, forged[first], shipped[first]) == Fault(
        first, 2, "differs from what was shipped to the bucket"
    )
    assert compare(first, shipped[first], shipped[first]) is None
    short = shipped[first].partition(b"\n")[0] + b"\n"
    for here, there, said in ((short, shipped[first], "not here"), (shipped[first], short, "were added")):
        found = compare(first, here, there)
        assert found is not None
        assert said in found.what
    assert tip != after
