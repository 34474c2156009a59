"""What is read through system libraries rather than printed by a program, as JSON:
`python -m agent.operator.first_node.readers NAME`. Each runs in a process of its own, because a system call that hangs
cannot be cut otherwise."""

import asyncio
import ctypes
import json
import os
import platform
import plistlib
import sys
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_uint, c_uint32, c_void_p
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from agent.config import AgentConfig, Live
from agent.files.modelstore import ModelStore, model_folder
from agent.models.loaders import Loaders
from agent.operator import install
from agent.operator.first_node import machine
from agent.operator.mac import readings
from agent.telemetry.sensors import smc, sysctl, vm
from agent.telemetry.sensors.chip import Chip
from agent.telemetry.sensors.host import HostCollector
from agent.telemetry.sensors.mach import MIG_ARRAY_TOO_LARGE, MOST_WORDS
from agent.telemetry.sensors.memory import MacMemory, MemoryCollector
from agent.telemetry.sensors.notify import Notify
from agent.telemetry.sensors.power import PowerCollector
from agent.telemetry.sensors.reading import Collector, Failure
from agent.telemetry.sensors.system_library import functions
from agent.telemetry.sensors.thermal import NOTIFY_KEY, ThermalCollector
from shared import __version__
from shared import config as shared_config

SYSCTLS = (
    *("hw.memsize", "hw.model", "machdep.cpu.brand_string", "kern.osproductversion", "kern.osversion", "vm.swapusage"),
    *("kern.memorystatus_vm_pressure_level", "iogpu.wired_limit_mb", "hw.pagesize", "kern.hv_vmm_present"),
    *(
        "hw.nperflevels",
        "hw.perflevel0.logicalcpu",
        "hw.perflevel0.name",
        "hw.perflevel1.logicalcpu",
        "hw.perflevel1.name",
    ),
)
ENERGY_EVERY_S = 0.25


def versions() -> dict[str, Any]:
    """Programs and packages that matter."""
    packages = ("mlx", "mlx-metal", "mlx-lm", "psutil", "zeus-apple-silicon", "llguidance", "transformers")
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    system = {"system": platform.system(), "release": platform.release(), "machine": platform.machine()}
    return {
        "mlxrack": __version__,
        "python": platform.python_version(),
        **system,
        "packages": found,
        "root": os.geteuid() == 0,
        "programs": readings.programs(),
    }


def sysctls() -> dict[str, Any]:
    """The bytes of each value; a string is why there is none."""
    library = sysctl.Sysctl(machine.LIBRARY)
    return {name: _or_why(lambda name=name: list(library.raw(name))) for name in SYSCTLS}  # type: ignore[misc]


def host_statistics() -> dict[str, Any]:
    """Words of host_statistics64, asked as the agent asks: a small count first, then the one that came back."""
    lib = functions(
        machine.LIBRARY,
        "host_statistics64: {}",
        mach_host_self=(c_uint32,),
        host_page_size=(c_int, c_uint32, c_void_p),
        host_statistics64=(c_int, c_uint32, c_int, c_void_p, c_void_p),
    )
    host, size = lib.mach_host_self(), ctypes.c_size_t(0)
    status = lib.host_page_size(host, byref(size))
    calls, count = [], vm.COUNT
    for _ in range(3):
        words, came = (c_uint * MOST_WORDS)(), c_uint(count)
        code = lib.host_statistics64(host, vm.HOST_VM_INFO64, byref(words), byref(came))
        kept = list(words[: min(came.value, MOST_WORDS)]) if code == 0 else []
        calls.append({"asked": count, "status": code, "came": came.value, "words": kept})
        if code != MIG_ARRAY_TOO_LARGE or not count < came.value <= MOST_WORDS:
            break
        count = came.value
    return {"page_size": size.value, "page_status": status, "calls": calls}


def notify() -> dict[str, Any]:
    """The published thermal level."""
    opened = Notify(NOTIFY_KEY, machine.LIBRARY)
    try:
        return {"key": NOTIFY_KEY, "state": opened.state(), "descriptor": opened.descriptor >= 0}
    finally:
        opened.close()


def controller() -> dict[str, Any]:
    """Every key of the SMC with its type, and the bytes of those that are numbers of temperatures, fans and power:
    others may hold serial numbers."""
    opened = smc.Smc(machine.IOKIT, machine.LIBRARY)
    try:
        began = time.monotonic()
        wanted = opened.values()
        seconds = time.monotonic() - began
        return {"keys": [list(one) for one in opened.dump()], "wanted": len(wanted), "wanted_s": round(seconds, 4)}
    finally:
        opened.close()


def energy() -> dict[str, Any]:
    """IOReport's counters every quarter of a second while this process keeps a core busy: [seconds, counters]."""
    try:
        import zeus_apple_silicon  # optional, macOS only
    except ImportError:
        raise Failure("ioreport: zeus-apple-silicon is not installed (pip install zeus-apple-silicon)") from None
    monitor, began, samples = zeus_apple_silicon.AppleEnergyMonitor(), time.monotonic(), []
    while (at := time.monotonic() - began) <= machine.ENERGY_S:
        found = monitor.get_cumulative_energy()
        counters = {name: getattr(found, name) for name in dir(found) if name.endswith("_mj")}
        samples.append([round(at, 4), {k: v for k, v in counters.items() if isinstance(v, int | float)}])
        until = began + at + ENERGY_EVERY_S
        while time.monotonic() < until:
            sum(range(1000))
    return {"samples": samples}


def sensors() -> dict[str, Any]:
    """What the agent's own collectors make of this machine, over a few seconds, and how long each takes."""
    chip = Chip(machine.PLATFORM, open_smc=lambda: smc.Smc(machine.IOKIT, machine.LIBRARY))
    thermal = ThermalCollector(chip, machine.PLATFORM, notify=lambda: Notify(NOTIFY_KEY, machine.LIBRARY))
    memory = MemoryCollector(machine.PLATFORM, MacMemory(machine.LIBRARY))
    every: tuple[Collector, ...] = (HostCollector(Path("/")), memory, thermal, PowerCollector(chip, machine.PLATFORM))
    try:
        for collector in every:
            collector.read()
        until = time.monotonic() + machine.SAMPLED_S
        while time.monotonic() < until:
            time.sleep(machine.SAMPLED_S / 5)
            for collector in every:
                collector.poll()
        return {collector.name: _collected(collector) for collector in every}
    finally:
        thermal.close()


def service(drain_s: str) -> dict[str, Any]:
    """Of the installed service's property list what matters; names of variables, not their values."""
    try:
        found = plistlib.loads(install.DAEMON_PLIST.read_bytes())
    except FileNotFoundError:
        raise Failure(f"no service is installed ({install.DAEMON_PLIST.name}); `mlxrack-agent install`") from None
    except (OSError, ValueError, plistlib.InvalidFileException) as error:
        raise Failure(f"{install.DAEMON_PLIST.name} cannot be read ({type(error).__name__})") from None
    plain = ("Label", "ExitTimeOut", "KeepAlive", "RunAtLoad", "ProcessType", "ThrottleInterval")
    told = {name: found[name] for name in plain if name in found}
    return {
        "plist": {**told, "variables": sorted(found.get("EnvironmentVariables", {}))},
        "drain_s": float(drain_s),
        "renames": install.NEWSYSLOG.exists(),
    }


def plan(path: str, state: str) -> dict[str, Any]:
    """The smallest configured model is loaded by itself and its peak compared with its plan."""
    config, folder = shared_config.load(Path(path), AgentConfig, lambda _: ()), Path(state)
    store = ModelStore(folder / "models.json", model_folder(config, folder))
    models = [model for model in config.models if model.engine == "mlx" and model.path]
    if not models:
        raise Failure("no model is configured")
    spec = store.describe(min(models, key=store.outlook))

    async def measured() -> dict[str, Any]:
        loaders = Loaders(Live(config), os.environ, prompts=folder / "prompts", on_report=lambda _, __: None)
        process = await loaders.start(spec)
        try:
            ready = process.ready
            if ready is None or not ready.peak_bytes:
                raise Failure("the loader reports no peak of memory")
            planned = spec.planned_warm_bytes(ready.warm_tok, fused=store.fused)
            if not planned:
                raise Failure("the model has no plan to compare with")
            error = round((ready.peak_bytes - planned) / planned * 1e6)
            one = {"planned_bytes": planned, "peak_bytes": ready.peak_bytes, "plan_error_ppm": error}
            return {"models": [one]}
        finally:
            await process.stop(5.0)

    return asyncio.run(measured())


def main(argv: list[str]) -> int:
    """Print what the named reader reads; exits 1 with one line on standard error when it cannot."""
    try:
        found = READERS[argv[0]](*argv[1:])
    except Exception as error:  # noqa: BLE001  # whatever a system call does, it is said in one line
        print(str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


READERS: dict[str, Callable[..., dict[str, Any]]] = {
    "versions": versions,
    "sysctls": sysctls,
    "host-statistics": host_statistics,
    "notify": notify,
    "smc": controller,
    "energy": energy,
    "sensors": sensors,
    "service": service,
    "plan": plan,
}


def _collected(collector: Collector) -> dict[str, Any]:
    began = time.monotonic()
    reading = collector.read()
    seconds = time.monotonic() - began
    sources = [list(one) for one in collector.sources()]
    return {
        "seconds": round(seconds, 4),
        "fields": msgspec.to_builtins(reading.fields),
        "failed": reading.failed,
        "sources": sources,
    }


def _or_why(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Failure as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
