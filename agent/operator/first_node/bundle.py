"""The archive of a first node: what each step printed, masked, and how long it took. Reading trusts nothing in it."""

import gzip
import io
import json
import math
import os
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shared.durable import write_whole
from shared.errors import Refused
from shared.regular_file import read_file

FORMAT = 1
"""Of the files in the archive and of their names; a new step or a field more does not change it."""
MOST_FILE_BYTES = 4 << 20
MOST_BYTES = 32 << 20
MOST_FILES = 100
MOST_TEXT_BYTES = 768 << 10
"""Of one step, so that all of them together can be read again."""
_TOP = "first-node/"
_MEMBER = re.compile(r"first-node/([a-z0-9-]{1,40})\.(txt|json)")


class Taken(NamedTuple):
    """What came of one step: its masked output, why it failed ("" where it did not), why it was not taken."""

    text: str = ""
    seconds: float = 0.0
    error: str = ""
    skipped: str = ""


class Bundle(NamedTuple):
    """All steps by name. ``made`` is a time in UTC, ``version`` the program's, ``platform`` like "darwin"."""

    made: str
    version: str
    platform: str
    taken: dict[str, Taken]


class _Step(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    file: str = ""
    seconds: float = 0.0
    error: str = ""
    skipped: str = ""


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    made: str
    version: str
    platform: str
    steps: list[_Step]


def packed(bundle: Bundle, verdicts: str) -> bytes:
    """The archive; ``verdicts`` is there to be looked at and is not read again."""
    steps = [
        _Step(
            name=name,
            file=f"{name}.txt" if one.text else "",
            seconds=round(one.seconds, 3),
            error=one.error,
            skipped=one.skipped,
        )
        for name, one in bundle.taken.items()
    ]
    manifest = _Manifest(format=FORMAT, made=bundle.made, version=bundle.version, platform=bundle.platform, steps=steps)
    files = {"manifest.json": json.dumps(msgspec.to_builtins(manifest), indent=1), "verdicts.txt": verdicts}
    files |= {f"{name}.txt": one.text for name, one in bundle.taken.items() if one.text}
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz", format=tarfile.USTAR_FORMAT) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(_TOP + name)
            body = text.encode()
            member.size, member.mode = len(body), 0o600
            archive.addfile(member, io.BytesIO(body))
    return whole.getvalue()


def shortened(text: str) -> str:
    """At most ``MOST_TEXT_BYTES`` of it, in whole lines where it has some: half a word is not masked."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= MOST_TEXT_BYTES:
        return raw.decode()
    kept = raw[:MOST_TEXT_BYTES].decode("utf-8", "ignore")
    return kept[: kept.rfind("\n") + 1] or kept


def write(path: Path, body: bytes) -> None:
    """Whole or not at all, for its owner alone, and never in the place of another file. Raises Refused."""
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}.tmp")
    try:
        write_whole(temporary.with_suffix(".whole"), body)
        if os.path.lexists(path):
            raise Refused(f"{path}: somebody has made it meanwhile; nothing was written")
        os.rename(temporary.with_suffix(".whole"), path)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise Refused(f"{path}: cannot be written ({why}); name a file on another volume, and run it again") from None
    finally:
        for left in (temporary, temporary.with_suffix(".whole")):
            left.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raises Refused where the archive could not be written in the end."""
    if os.path.lexists(path):
        raise Refused(f"{path}: exists already; name another file, or remove it")
    if not path.absolute().parent.is_dir():
        raise Refused(f"{path}: there is no folder {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise Refused(f"{path}: this user cannot write to {path.absolute().parent}; name a file elsewhere")


def read(path: Path) -> Bundle:
    """Raises Refused with a sentence for anything that is not such an archive."""
    try:
        raw = read_file(path, MOST_BYTES)
    except OSError as error:
        why = error.strerror or (error.args[-1] if error.args else type(error).__name__)
        raise Refused(f"{path}: cannot be read: {why}") from None
    try:
        return unpacked(raw)
    except Refused as error:
        raise Refused(f"{path}: {error.message}") from None


def unpacked(raw: bytes) -> Bundle:
    """The bundle in these bytes. Raises Refused."""
    files = _files(raw)
    if "manifest.json" not in files:
        raise Refused("no bundle of `doctor --first-node`: it holds no first-node/manifest.json")
    try:
        tree: Any = json.loads(files["manifest.json"])
    except (ValueError, RecursionError):
        raise Refused("a damaged bundle: its manifest is not JSON") from None
    said = tree.get("format") if isinstance(tree, dict) else None
    if isinstance(said, int) and said != FORMAT:
        remedy = "replay it with the version that made it" if said < FORMAT else "upgrade mlxrack to read it"
        raise Refused(f"its format is {said}, and this version reads format {FORMAT}; {remedy}")
    try:
        manifest = msgspec.convert(tree, _Manifest)
    except (msgspec.ValidationError, OverflowError) as error:
        raise Refused(f"a damaged bundle: its manifest is wrong: {error}") from None
    taken = {
        one.name: Taken(
            files.get(one.file, "") if one.file else "",
            one.seconds if math.isfinite(one.seconds) else 0.0,
            one.error or _missing(one, files),
            one.skipped,
        )
        for one in manifest.steps
    }
    return Bundle(manifest.made, manifest.version, manifest.platform, taken)


def _missing(step: _Step, files: dict[str, str]) -> str:
    return f"the archive holds no {step.file}" if step.file and step.file not in files else ""


def _files(raw: bytes) -> dict[str, str]:
    """Texts by name. Nothing is written to disk, and no more is unpacked than a bundle may have."""
    found: dict[str, str] = {}
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed_file:
            whole = packed_file.read(MOST_BYTES + 1)
        if len(whole) > MOST_BYTES:
            raise Refused(f"no bundle: it unpacks to more than {MOST_BYTES >> 20} MiB")
        with tarfile.open(fileobj=io.BytesIO(whole), mode="r:") as archive:
            while (member := archive.next()) is not None:
                body = _body(archive, member, found)
                found[member.name.removeprefix(_TOP)] = body.decode("utf-8", "replace")
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  # whatever tarfile does about headers that somebody made to do harm
        raise Refused(f"no bundle: not a whole .tar.gz ({type(error).__name__})") from None
    return found


def _body(archive: tarfile.TarFile, member: tarfile.TarInfo, found: dict[str, str]) -> bytes:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise Refused("no bundle: it holds something else than plain files (links, folders or devices)")
    if not _MEMBER.fullmatch(member.name):
        raise Refused("no bundle: it holds a file that no bundle has (its name is not first-node/NAME.txt)")
    if member.name.removeprefix(_TOP) in found:
        raise Refused("no bundle: it holds two files of one name")
    if member.size > MOST_FILE_BYTES or len(found) >= MOST_FILES:
        raise Refused(f"no bundle: a file over {MOST_FILE_BYTES >> 20} MiB, or more than {MOST_FILES} files")
    file = archive.extractfile(member)
    return file.read(MOST_FILE_BYTES) if file is not None else b""
