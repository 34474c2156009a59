"""What a bundle says, in words: each judge takes what steps printed and returns a verdict. The same for a machine that
was just looked at and for an archive that is replayed, so a corrected parser changes the verdict of an old archive."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from agent.operator import checks, mac_checks
from agent.operator.checks import Finding, Verdict
from agent.operator.first_node.bundle import Bundle, Taken
from agent.operator.first_node.judging import answers, energy, gpu, host_statistics, launchd
from agent.operator.mac import power
from agent.operator.mac.settings import QUESTIONS, judge
from agent.telemetry.sensors import macmon, powermetrics, smc, sysctl, vm
from agent.telemetry.sensors.chip import of_smc
from agent.telemetry.sensors.thermal import level_of_state, parse_notifyutil
from agent.telemetry.sensors.throttle import LEVELS
from shared.records import Hardware

Said = tuple[Verdict, str]
OLDEST = 14
"""macOS, of the wheels that this program is pinned to."""
SLOW_S = 1.0
"""A collector that takes this long every two seconds costs the agent more than it should."""
AGREE = 0.1
"""Two readings of memory a second apart differ by less than this share."""


class Judge(NamedTuple):
    """``needs`` are steps; where the first cannot be had, that is the verdict."""

    what: str
    needs: tuple[str, ...]
    judge: Callable[[Mapping[str, str]], Said]


def verdicts(bundle: Bundle) -> list[Finding]:
    """Every verdict, in the order of the steps. What an archive says is for terminals that obey escape sequences, too:
    none is in a verdict."""
    found = [
        _platform(bundle),
        *(found for one in JUDGES if (found := _judged(one, bundle.taken)) is not None),
        *_settings(bundle.taken),
        _steps(bundle),
    ]
    return [one._replace(seen=printable(one.seen)) for one in found]


def printable(text: str) -> str:
    """On one line, without control characters."""
    return "".join(one if one.isprintable() else " " if one in "\n\t" else "?" for one in text)


def _judged(one: Judge, taken: Mapping[str, Taken]) -> Finding | None:
    """None where the step was not to be taken on this machine."""
    first = taken.get(one.needs[0], Taken(skipped="not in this bundle"))
    if first.skipped:
        return None
    if first.error:
        return Finding(one.what, "warning", first.error)
    try:
        said = one.judge({name: taken[name].text for name in one.needs if name in taken})
    except Exception as error:  # noqa: BLE001  # what a machine printed, or somebody wrote into an archive
        said = ("warning", f"{one.needs[0]}: unexpected output ({type(error).__name__})")
    return Finding(one.what, *said)


def _platform(bundle: Bundle) -> Finding:
    skipped = [name for name, one in bundle.taken.items() if one.skipped == "this is not a Mac"]
    if not skipped:
        others = [f"{name} ({one.skipped})" for name, one in bundle.taken.items() if one.skipped]
        return Finding("platform", "ok", f"a Mac, mlxrack {bundle.version}; skipped: {', '.join(others) or 'nothing'}")
    seen = f"not a Mac ({bundle.platform}): {len(skipped)} steps were skipped: {', '.join(skipped)}"
    return Finding("platform", "warning", seen)


def _steps(bundle: Bundle) -> Finding:
    cut = [name for name, one in bundle.taken.items() if "was ended" in one.error]
    slowest = max(bundle.taken.items(), key=lambda item: item[1].seconds, default=("none", Taken()))
    whole = sum(one.seconds for one in bundle.taken.values())
    seen = f"{len(bundle.taken)} in {whole:.0f} s, the slowest {slowest[0]} ({slowest[1].seconds:.1f} s)"
    return Finding("steps", "warning" if cut else "ok", f"{seen}; cut: {', '.join(cut)}" if cut else seen)


def _settings(taken: Mapping[str, Taken]) -> Iterator[Finding]:
    """As `doctor` judges them. A program that fails says nothing, to both."""
    said = {name: taken[name].text for name in QUESTIONS if name in taken and not taken[name].skipped}
    try:
        programs = [str(one) for one in json.loads(taken["versions"].text)["programs"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        programs = []
    yield from judge(said, programs)
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):
        yield from mac_checks.awake(json.loads(taken["status"].text))


# ---- one judge each ----


def _versions(texts: Mapping[str, str]) -> Said:
    told = json.loads(texts["versions"])
    packages: Mapping[str, str | None] = told["packages"]
    missing = [name for name in ("mlx", "mlx-lm", "psutil") if not packages[name]]
    there = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    seen = f"mlxrack {told['mlxrack']}, Python {told['python']} for {told['machine']}, {there}"
    if told["system"] == "Darwin" and told["machine"] != "arm64":
        return "problem", f"{seen}; MLX needs a Python for arm64, and this one runs under Rosetta"
    return ("problem" if missing else "ok"), seen + (f"; missing: {', '.join(missing)}" if missing else "")


def _system(texts: Mapping[str, str]) -> Said:
    found = re.search(r"ProductVersion:[ \t]*(\d{1,3})(\.[\d.]*)?", texts["sw-vers"])
    if found is None:
        return "warning", "sw_vers does not say which macOS this is"
    seen, kernel = found[1] + (found[2] or ""), _values(texts)[0]
    if int(found[1]) < OLDEST:
        return "problem", f"macOS {seen}; MLX's wheels need macOS {OLDEST} or newer"
    agree = kernel in ("", seen)
    return ("ok" if agree else "warning"), f"macOS {seen}" + ("" if agree else f"; the kernel says {kernel}")


def _profile(texts: Mapping[str, str]) -> Said:
    """What system_profiler shows beside what the kernel says."""
    told = dict(re.findall(r"^[ \t]{0,40}(Model Identifier|Chip):[ \t]*(\S.*)$", texts["hardware"], re.MULTILINE))
    if not told:
        return "warning", "system_profiler shows neither a model nor a chip (in another language?)"
    _, model, chip, _ = _values(texts)
    differ = [
        f"{name} is {told[name].strip()}, the kernel says {other}"
        for name, other in (("Model Identifier", model), ("Chip", chip))
        if name in told and other and told[name].strip() != other
    ]
    return ("warning" if differ else "ok"), "; ".join(differ) or ", ".join(one.strip() for one in told.values())


def _values(texts: Mapping[str, str]) -> tuple[str, str, str, int]:
    """Of the kernel's values: version of macOS, model, chip, bytes of memory; "" and 0 where there is none."""
    try:
        tree = json.loads(texts.get("sysctls", ""))
    except ValueError:
        return "", "", "", 0
    raw = {name: bytes(one) for name, one in tree.items() if isinstance(one, list)}
    names = ("kern.osproductversion", "hw.model", "machdep.cpu.brand_string")
    system, model, chip = (_text(raw.get(name, b"")) for name in names)
    return system, model, chip, int.from_bytes(raw.get("hw.memsize", b""), "little")


def _chip(texts: Mapping[str, str]) -> Said:
    """What the chip table expects, in the words of `doctor`."""
    system, model, chip, memory = _values(texts)
    found = checks.chip(Hardware(model=model, chip=chip, memory_bytes=memory, cores=(), system=system), on_a_mac=True)
    return found.verdict, found.seen


def _assertions(texts: Mapping[str, str]) -> Said:
    awake: object = None
    if texts.get("status"):
        awake = (json.loads(texts["status"]).get("awake") or {}).get("pid")
    found = power.awake(texts["pmset-assertions"], awake if isinstance(awake, int) else None)
    return found.verdict, found.seen


def _machine(texts: Mapping[str, str]) -> Said:
    system, model, chip, memory = _values(texts)
    missing = [name for name, raw in json.loads(texts["sysctls"]).items() if isinstance(raw, str)]
    seen = f"{model or 'unknown model'}, {chip or 'unknown chip'}, {memory >> 30} GB, macOS {system or 'unknown'}"
    return ("ok" if model and memory else "warning"), f"{seen}; not readable: {', '.join(missing)}" if missing else seen


def _swap(texts: Mapping[str, str]) -> Said:
    raw = json.loads(texts["sysctls"])["vm.swapusage"]
    by_text = sysctl.parse_swapusage(texts.get("sysctl-text", "").encode())
    if isinstance(raw, str):
        return "warning", f"vm.swapusage cannot be read ({raw})"
    by_call = sysctl.swap_of(bytes(raw))
    if by_call is None:
        return "warning", "vm.swapusage has inconsistent values"
    if by_text is None:
        return "warning", f"{by_call[1] / 1e9:.1f} GB of swap used; the sysctl command says nothing to compare"
    agree = abs(by_call[1] - by_text[1]) <= AGREE * max(by_call[1], 1 << 28)
    return (
        "ok" if agree else "warning"
    ), f"{by_call[1] / 1e9:.1f} GB of swap used by sysctlbyname, {by_text[1] / 1e9:.1f} GB by sysctl"


def _pressure(texts: Mapping[str, str]) -> Said:
    raw = json.loads(texts["sysctls"])["kern.memorystatus_vm_pressure_level"]
    name = sysctl.pressure_name(int.from_bytes(bytes(raw), "little")) if isinstance(raw, list) else "unknown"
    free = vm.parse_memory_pressure(texts.get("memory-pressure", "").encode())
    seen = f"the kernel's memory pressure is {name}" + (
        f"; {free} % free by memory_pressure" if free is not None else ""
    )
    return ("warning" if name == "unknown" else "ok"), seen


def _memory(texts: Mapping[str, str]) -> Said:
    by_call, words, why = host_statistics(json.loads(texts["host-statistics"]))
    by_text = vm.parse_vm_stat(texts.get("vm-stat", "").encode())
    if by_call is None:
        other = (
            f"; vm_stat says {by_text.used_bytes / 1e9:.1f} GB used" if by_text else "; nor does vm_stat say anything"
        )
        return "warning", why + other
    if by_text is None:
        return "warning", f"{words}: {by_call.used_bytes / 1e9:.1f} GB used; vm_stat says nothing to compare"
    agree = abs(by_call.used_bytes - by_text.used_bytes) <= AGREE * max(by_call.used_bytes, 1)
    seen = f"{words}: {by_call.used_bytes / 1e9:.1f} GB used, vm_stat: {by_text.used_bytes / 1e9:.1f} GB"
    return ("ok" if agree else "warning"), seen if agree else f"they differ: {seen}"


def _level(texts: Mapping[str, str]) -> Said:
    level, other = (
        level_of_state(json.loads(texts["notify"])["state"]),
        parse_notifyutil(texts.get("notifyutil", "").encode()),
    )
    if level is None:
        return "warning", "notify(3) publishes a level that is not known"
    seen = f"notify(3) says {LEVELS[level]}, notifyutil {LEVELS[other] if other is not None else 'nothing'}"
    return ("ok" if other in (None, level) else "warning"), seen


def _smc(texts: Mapping[str, str]) -> Said:
    told = json.loads(texts["smc"])
    keys = [(str(key), str(kind), str(raw)) for key, kind, raw in told["keys"]]
    names = set(smc.wanted(key for key, _, _ in keys))
    values = {
        key: value
        for key, kind, raw in keys
        if key in names and not raw.startswith("!") and (value := smc.decode(kind, bytes.fromhex(raw))) is not None
    }
    found = of_smc(values)
    degrees = {"package": found.package_c, "P-cores": found.pcore_c, "GPU": found.gpu_c}
    heat = ", ".join(f"{name} {c:.1f} °C" for name, c in degrees.items() if c is not None)
    asleep = " (asleep)" if found.pcore_asleep else ""
    fans = ", ".join(f"{rpm} rpm" for rpm in found.fans_rpm) or "no fan"
    power = f"{found.system_w:.1f} W" if found.system_w is not None else "no system power (PSTR)"
    seen = f"{len(keys)} keys, {len(values)} used: {heat or 'no valid temperature'}{asleep}; {fans}; {power}"
    return ("ok" if heat and found.system_w is not None else "warning"), seen


def _powermetrics(texts: Mapping[str, str]) -> Said:
    found = powermetrics.Documents().feed(texts["powermetrics"].encode())
    if not found:
        return "warning", "no property list that can be read"
    last = found[-1]
    if last.soc_mw is None:
        return "warning", f"{len(found)} samples; no power of the chip: CPU {last.cpu_mw} mW, GPU {last.gpu_mw} mW"
    return "ok", f"{len(found)} samples; the chip draws {last.soc_mw / 1000:.2f} W"


def _macmon(texts: Mapping[str, str]) -> Said:
    found = [one for line in texts["macmon"].splitlines() if (one := macmon.parse_macmon(line.encode())) is not None]
    if not found:
        return "warning", "no line that can be read"
    last = found[-1]
    return "ok", f"{len(found)} lines; CPU {last.cpu_mean_c} °C, system {last.system_w} W, chip {last.soc_w} W"


def _sensors(texts: Mapping[str, str]) -> Said:
    """The collectors as the agent runs them: fields, failures and how long each took."""
    told = json.loads(texts["sensors"])
    fields = sum(len(one["fields"]) for one in told.values())
    slow = [f"{name} takes {one['seconds']:.1f} s" for name, one in told.items() if one["seconds"] > SLOW_S]
    failed = [f"{name}: {why}" for one in told.values() for name, why in one["failed"].items()]
    seen = f"{fields} fields are read" + "".join(f"; {one}" for one in (*slow, *failed))
    return ("warning" if slow or failed or not fields else "ok"), seen


def _device(texts: Mapping[str, str]) -> Said:
    told = json.loads(texts["device"])
    good, seen = mac_checks.gpu(told["recommended_bytes"])
    return ("ok" if good else "warning"), f"MLX runs on {told['device'] or 'an unnamed device'}; {seen}"


def _plan(texts: Mapping[str, str]) -> Said:
    found = mac_checks.plans(json.loads(next(iter(texts.values())))["models"])
    if found is None:
        return "warning", "no model has been loaded yet, so no plan is tested"
    return ("ok" if found[0] else "warning"), found[1]


def _doctor(texts: Mapping[str, str]) -> Said:
    told = json.loads(texts["doctor"])
    by = {kind: [one["what"] for one in told if one["verdict"] == kind] for kind in ("problem", "warning")}
    words = "; ".join(f"{len(found)} {kind}s: {', '.join(found)}" for kind, found in by.items() if found)
    return ("problem" if by["problem"] else "ok"), words or f"{len(told)} checks, all ok"


def _service(texts: Mapping[str, str]) -> Said:
    """What `doctor` says of the service, by the same judge."""
    told = json.loads(texts["service"])
    facts = mac_checks.MacFacts({}, None, told["drain_s"], told["plist"], None, told["renames"])
    good, seen = mac_checks.service(facts) or (False, "none is installed")
    return ("ok" if good else "warning"), seen


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", "replace")


JUDGES: tuple[Judge, ...] = (
    Judge("versions", ("versions",), _versions),
    Judge("macOS", ("sw-vers", "sysctls"), _system),
    Judge("hardware", ("hardware", "sysctls"), _profile),
    Judge("machine", ("sysctls",), _machine),
    Judge("chip", ("sysctls",), _chip),
    Judge("memory", ("host-statistics", "vm-stat"), _memory),
    Judge("memory pressure", ("sysctls", "memory-pressure"), _pressure),
    Judge("swap", ("sysctls", "sysctl-text"), _swap),
    Judge("thermal pressure", ("notify", "notifyutil"), _level),
    Judge("SMC", ("smc",), _smc),
    Judge("energy counters", ("energy",), lambda texts: energy(json.loads(texts["energy"])["samples"])),
    Judge("powermetrics", ("powermetrics",), _powermetrics),
    Judge("macmon", ("macmon",), _macmon),
    Judge("GPU statistics", ("ioreg",), lambda texts: gpu(texts["ioreg"])),
    Judge("sensors", ("sensors",), _sensors),
    Judge("service", ("service",), _service),
    Judge("launchd", ("launchd",), lambda texts: launchd(texts["launchd"])),
    Judge("power assertions", ("pmset-assertions", "status"), _assertions),
    Judge("GPU memory", ("device",), _device),
    Judge("answers", ("answers",), lambda texts: answers(json.loads(texts["answers"]))),
    Judge("memory plan", ("status",), _plan),
    Judge("memory plan (loaded here)", ("plan",), _plan),
    Judge("doctor", ("doctor",), _doctor),
)
