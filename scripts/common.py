"""Shared by the scripts: command lines, child processes, configuration files, requests and result lines."""

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line that is described by its module's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def script(name: str) -> str:
    """Path of a console script in this virtual environment."""
    return str(Path(sys.executable).with_name(name))


def warn_if_busy() -> None:
    """Warn when other processes load this machine."""
    if os.getloadavg()[0] > 0.7:
        print("warning: this machine is busy; the figures will not be representative", file=sys.stderr)


# ---- child processes ----


@contextlib.contextmanager
def running(command: list[str], log: Path, environ: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child process until the block ends. ``environ`` is added to this process's environment."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env={**os.environ, **(environ or {})}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_started(probe: Callable[[], object], process: subprocess.Popen[bytes], log: Path, limit_s: float) -> None:
    """Poll until ``probe`` succeeds. Raises SystemExit with the end of the log."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            probe()
            return
        except (OSError, SystemExit):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-800:]
                raise SystemExit(f"bench: {process.args!r} did not start: {tail}") from None
            time.sleep(0.2)


# ---- configuration files ----


def agent_toml(folder: Path, node: str, rack: str, rest: str, *, port: int = 0, store: str = "") -> Path:
    """Write agent.toml with its state and, unless ``store`` is another table, its bucket in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    state, bucket = (json.dumps(str((folder / name).resolve())) for name in ("state", "bucket"))
    listen = f"\n[listen]\nport = {port}\n" if port else ""
    store = store or f'[store]\nkind = "directory"\npath = {bucket}\n'
    path = folder / "agent.toml"
    path.write_text(f'[node]\nid = "{node}"\nrack = "{rack}"\n{listen}\n[paths]\nstate = {state}\n\n{store}\n{rest}')
    return path


def s3_table(endpoint: str, bucket: str, access_key: str, secret_key: str) -> str:
    """The [store] table of an S3 bucket; the keys are references."""
    return (
        f'[store]\nkind = "s3"\nendpoint = "{endpoint}"\nbucket = "{bucket}"\n'
        f"access_key = {json.dumps(access_key)}\nsecret_key = {json.dumps(secret_key)}\n"
    )


def secret_file(path: Path, secret: str) -> str:
    """Write a secret that only this user can read; returns its reference."""
    path.write_text(secret)
    path.chmod(0o600)
    return f"file:{path.resolve()}"


# ---- load and results ----


def chat(model: str, content: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """The body of a chat completion with one user message."""
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, **more}


def at_once(work: Sequence[Callable[[], T]]) -> list[T]:
    """Results of functions that run concurrently, each in a thread."""
    with concurrent.futures.ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


def arrivals(rng: random.Random, per_s: float, begin_s: float = 0.0) -> Iterator[float]:
    """Times of a Poisson process, without end."""
    while True:
        begin_s += rng.expovariate(per_s)
        yield begin_s


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which ``share`` of them lie; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def report_bounds(lines: Iterable[tuple[bool, str]]) -> bool:
    """Print each bound and whether it was met; whether all were."""
    lines = list(lines)
    for ok, line in lines:
        print(f"{'ok  ' if ok else 'MISS'} {line}")
    return all(ok for ok, _ in lines)
