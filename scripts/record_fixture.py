"""Records fixtures on a Mac: runs every command and reader whose output the agent parses, and writes their output to
a folder, with serial numbers, UUIDs, addresses and names of people and machines masked.

    python scripts/record_fixture.py OUT_FOLDER [--seconds 10] [--root]

With ``--root`` it also runs powermetrics, with sudo. Nothing is sent anywhere; review the folder before you share it.
It needs only the standard library, so that it runs on a Mac without mlxrack.
"""

import argparse
import getpass
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

THERMAL_KEY = "com.apple.system.thermalpressurelevel"


class Capture(NamedTuple):
    """A command and the file for its output."""

    file: str
    argv: Sequence[str]
    root: bool = False


CAPTURES = (
    Capture("vm_stat/vm_stat.txt", ("/usr/bin/vm_stat",)),
    Capture("sysctl/swapusage.txt", ("/usr/sbin/sysctl", "vm.swapusage")),
    Capture("sysctl/hw.txt", ("/usr/sbin/sysctl", "hw", "machdep.cpu.brand_string", "kern.osproductversion")),
    Capture(
        "sysctl/memory.txt",
        ("/usr/sbin/sysctl", "-i", "kern.memorystatus_vm_pressure_level", "kern.memorystatus_level", "iogpu"),
    ),
    Capture("notifyutil/level.txt", ("/usr/bin/notifyutil", "-g", THERMAL_KEY)),
    Capture("pmset/therm.txt", ("/usr/bin/pmset", "-g", "therm")),
    Capture("system_profiler/hardware.json", ("/usr/sbin/system_profiler", "-json", "SPHardwareDataType")),
    Capture("ioreg/accelerator.txt", ("/usr/sbin/ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator")),
    Capture("ioreg/smc.txt", ("/usr/sbin/ioreg", "-r", "-c", "AppleSMCKeysEndpoint")),
    Capture("macmon/pipe.json", ("macmon", "pipe", "-s", "3", "-i", "1000")),
    Capture("agent/sample.json", ("mlxrack-agent", "sample")),
    Capture(
        "powermetrics/samples.plist",
        ("/usr/bin/powermetrics", "-f", "plist", "-n", "3", "-i", "2000", "--samplers", "cpu_power,gpu_power,thermal"),
        root=True,
    ),
    Capture(
        "powermetrics/thermal.txt",
        ("/usr/bin/powermetrics", "-n", "1", "-i", "100", "--samplers", "thermal"),
        root=True,
    ),
)
_MASKS = (
    (re.compile(r'((?:serial|provisioning_UDID)[^:=\n]*[:=]\s*["<]?)[^",>\n]+', re.I), r"\1MASKED"),
    (
        re.compile(r"\b[0-9A-F]{8}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{4}-[0-9A-F]{12}\b", re.I),
        "00000000-0000-0000-0000-000000000000",
    ),
    (re.compile(r"\b(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}\b", re.I), "00:00:00:00:00:00"),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b(?!\.\d)"), "0.0.0.0"),
    (re.compile(r"/Users/[^/\s\"]+"), "/Users/MASKED"),
)


def masked(text: str, names: Sequence[str] = ()) -> str:
    """The text without identifiers of machines and people."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    for name in names:
        if len(name) > 2:
            text = re.sub(rf"\b{re.escape(name)}\b", "MASKED", text)
    return text


def record(capture: Capture, folder: Path, seconds: float, names: Sequence[str]) -> str:
    """Run one command and write its output; returns a line for display."""
    argv = ("sudo", *capture.argv) if capture.root else capture.argv
    try:
        run = subprocess.run(argv, capture_output=True, timeout=seconds + 20, check=False)
    except FileNotFoundError:
        return f"{capture.file}: {argv[0]} not found"
    except subprocess.TimeoutExpired:
        return f"{capture.file}: timed out after {seconds + 20:.0f} s"
    path = folder / capture.file
    path.parent.mkdir(parents=True, exist_ok=True)
    # NULs between documents are kept: parsers must handle them
    path.write_bytes(masked(run.stdout.decode("utf-8", "surrogateescape"), names).encode("utf-8", "surrogateescape"))
    return f"{capture.file}: {len(run.stdout)} bytes, exit {run.returncode}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--root", action="store_true", help="also run commands that need sudo")
    args = parser.parse_args()
    if sys.platform != "darwin":
        print("record_fixture: macOS only; run it on a Mac", file=sys.stderr)
        return 2
    names = (getpass.getuser(), socket.gethostname().partition(".")[0], platform.node().partition(".")[0])
    for capture in CAPTURES:
        if args.root or not capture.root:
            print(record(capture, args.folder, args.seconds, names))
    print(f"review {args.folder} before you share it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
