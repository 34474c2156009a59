"""Fuzzes every parser of sensor and meter output: a hundred thousand inputs each, mutated from realistic ones by
flipping, truncating, duplicating and splicing. None may raise, and parsed numbers must be physically possible.

    python -m scripts.fuzz_parsers [--inputs 100000] [--seed 1]

With atheris installed, ``--atheris NAME`` runs coverage-guided fuzzing of one parser instead.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from agent.config import SNMP_NUMBERS
from agent.process import machine
from agent.telemetry.meters import home_assistant, http, snmp
from agent.telemetry.meters.answer import known
from agent.telemetry.sensors import chip, cpu, macmon, memory, power, powermetrics, reading, smc, sysctl, thermal, vm
from scripts.common import parser


class Target(NamedTuple):
    """A parser, inputs that it accepts, and whether its result is possible."""

    parse: Callable[[bytes], Any]
    seeds: Sequence[bytes]
    is_possible: Callable[[Any], bool]


def _vm_is_possible(found: vm.Vm) -> bool:
    return 0 <= found.app_bytes < 1 << 45 and 0 <= found.wired_bytes < 1 << 45 and found.compressor_bytes < 1 << 45


def _powers_are_possible(found: powermetrics.Powermetrics) -> bool:
    watts = (found.cpu_mw, found.gpu_mw, found.ane_mw, found.soc_mw, found.elapsed_ns / 1e9)
    return all(w is None or 0 <= w < powermetrics.MOST_MW for w in watts) and found.level in (None, 0, 1, 2, 3, 4)


def _line_is_possible(found: macmon.Macmon) -> bool:
    degrees, watts = (found.cpu_mean_c, found.gpu_mean_c), (found.system_w, found.soc_w)
    whole, parts = (one if one is not None else edge for one, edge in zip(watts, (reading.MOST_W, 0.0), strict=True))
    return (
        all(d is None or 15 < d < 120 for d in degrees)
        and all(0 <= rpm < 20_001 for rpm in found.fans_rpm)
        and all(w is None or 0 < w < reading.MOST_W for w in watts)
        and parts <= reading.MOST_OVER_SYSTEM * whole
    )


def _smc(raw: bytes) -> tuple[smc.Temperatures, float | None]:
    """Interpret bytes as a list of SMC keys: four for the name, four for the value. Returns the hottest one, too."""
    pairs = [(raw[n : n + 4].decode("latin-1"), smc.decode("flt ", raw[n + 4 : n + 8])) for n in range(0, len(raw), 8)]
    values = {key: value for key, value in pairs if value is not None}
    sensors = [values[key] for key in smc.wanted(values) if key.startswith("T")]
    return smc.temperatures(values), max(filter(smc.is_valid, sensors), default=None)


_KINDS = ("flt ", "ioft", "fpe2", "ui8 ", "ui16", "ui32", "ch8*", "flag")
_FANS_AND_WATTS = ("F0Ac", "F1Ac", "PSTR", "Tp01", "F9Mn")
_OUTLETS = tuple(
    snmp.Outlet(
        kind=kind, numbers=(1, 2, 3)[:count], oid="1.3.6.1.4", scale=0.1, status_oid="1.3.6.1.5", status_ok=(1,)
    )
    for kind, count in SNMP_NUMBERS.items()
)


def _smc_values(raw: bytes) -> tuple[tuple[int, ...], float | None]:
    """Interpret bytes as values of every type: key, type, eight bytes of value, cut to any size."""
    values: dict[str, float] = {}
    for n in range(0, len(raw), 10):
        if n + 1 >= len(raw):
            break
        kind, size = _KINDS[raw[n + 1] % len(_KINDS)], 1 + (raw[n + 1] >> 5)
        if (value := smc.decode(kind, raw[n + 2 : n + 2 + size])) is not None:
            values[_FANS_AND_WATTS[raw[n] % len(_FANS_AND_WATTS)]] = value
    return smc.fans_rpm(values), smc.system_power_w(values)


def _fans_and_watts_are_possible(found: tuple[tuple[int, ...], float | None]) -> bool:
    fans, watts = found
    return all(0 <= rpm <= reading.MOST_RPM for rpm in fans) and (watts is None or 0 < watts < reading.MOST_W)


def _outlet(raw: bytes) -> float | None:
    """Interpret bytes as a PDU's SNMP response: one selects the vendor, then one number each; any may be missing."""
    outlet = _OUTLETS[raw[0] % len(_OUTLETS)] if raw else _OUTLETS[0]
    names = snmp.oids(outlet)
    parts = [raw[1 + n * 4 : 5 + n * 4] for n in range(len(names))]
    return snmp.watts(
        outlet,
        {name: int.from_bytes(part, "big", signed=True) for name, part in zip(names, parts, strict=True) if part},
    )


def _temperatures_are_possible(found: tuple[smc.Temperatures, float | None]) -> bool:
    heat, hottest = found
    return all(d is None or 15 < d < 120 for d in (heat.pcore_c, heat.package_c, heat.gpu_c)) and (
        hottest is None or (heat.package_c is not None and heat.package_c >= hottest)
    )


def _bad_number(raw: bytes) -> powermetrics.Powermetrics | None:
    """A property list with any bytes as one of its numbers: only that one may be lost."""
    found = powermetrics.parse_document(_PLIST.replace(b"44.07", raw.replace(b"<", b"")))
    assert found is not None, f"the whole sample was lost by {raw!r}"
    assert found.level == 0, found
    assert found.gpu_mw is not None, found
    return found


def _answered(number: int) -> bytes:
    """What ``_outlet`` takes for an answer with a power."""
    told: dict[str, int] = {}
    for part in snmp.parts(_OUTLETS[number]):
        told |= {part.oid: 71, **dict.fromkeys(part.exponents, 1)}
        told |= {check.oid: min(check.right) for check in part.checks}
    return bytes([number]) + b"".join(told.get(oid, 0).to_bytes(4, "big") for oid in snmp.oids(_OUTLETS[number]))


_PLIST = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0"><dict>'
    b"<key>elapsed_ns</key><integer>5004758375</integer>"
    b"<key>processor</key><dict><key>cpu_power</key><real>44.07</real><key>gpu_energy</key><integer>31</integer>"
    b"<key>combined_power</key><real>59.4</real></dict><key>thermal_pressure</key><string>Nominal</string></dict></plist>"
)
_TEXT = b"""*** Sampled system activity (Mon Oct 23 16:51:12 2023 +0200) (1012.07ms elapsed) ***

CPU Power: 211 mW
GPU Power: 147 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): 359 mW
Current pressure level: Moderate
"""
_VM = b"""Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages wired down:                        100000.
Pages purgeable:                          10000.
Anonymous pages:                         310000.
Pages occupied by compressor:             50000.
Swapins:                                     20.
Swapouts:                                    30.
"""
_NUMBERS = (b"44.07", b"nan(0x8)", b"-nan", b"inf", b"1e999", b"0x10", b"12.", b"1_000", b"")
_MACMON = (
    b'{"temp":{"cpu_temp_avg":51.5,"gpu_temp_avg":47.1},"sys_power":9.5,"all_power":0.55,'
    b'"fans":[{"name":"Fan 0","rpm":1000,"max_rpm":null}]}'
)
_SHELLY = b'{"id":0,"source":"HTTP","output":true,"apower":47.11,"voltage":232.0,"aenergy":{"total":5.1}}'
_EM = b'{"id":0,"a_act_power":100.5,"a_errors":[],"b_act_power":20.0,"c_act_power":0.0,"total_act_power":120.5}'
_STATE = (
    b'{"entity_id":"sensor.plug","state":"0.0615","attributes":{"unit_of_measurement":"kW","device_class":"power"},'
    b'"last_updated":"2026-11-27T00:59:30.1+00:00","last_reported":"2026-11-27T00:59:59+00:00"}'
)
_TASMOTA = b'{"StatusSNS":{"Time":"2020-12-23T08:28:42","ENERGY":{"Total":4.957,"Power":[1,2],"Voltage":253}}}'

TARGETS: dict[str, Target] = {
    "meminfo": Target(
        machine.parse_meminfo,
        [b"MemTotal:       25165824 kB\nMemAvailable:   21000000 kB\nSwapTotal:             0 kB\n"],
        lambda found: all(count >= 0 for count in found.values()),
    ),
    "vmstat": Target(memory.parse_vmstat, [b"pswpin 12\npswpout 34\npgmajfault 5\n"], lambda found: min(found) >= 0),
    "proc_stat": Target(
        cpu.parse_proc_stat,
        [b"cpu  10132153 290696 3084719 46828483 16683 0 25195 0 175628 0\ncpu0 1393280 32966 572056 13343292\n"],
        lambda times: 4 <= len(times) <= 10 and min(times.values()) >= 0,
    ),
    "vm_stat": Target(vm.parse_vm_stat, [_VM], _vm_is_possible),
    "memory_pressure": Target(
        vm.parse_memory_pressure, [b"System-wide memory free percentage: 80%\n"], lambda n: 0 <= n <= 100
    ),
    "swapusage": Target(
        sysctl.parse_swapusage,
        [b"vm.swapusage: total = 4096.00M  used = 2743.50M  free = 1352.50M  (encrypted)\n"],
        lambda found: 0 <= found[1] <= found[0] + (1 << 20),
    ),
    "sysctl": Target(
        sysctl.parse_sysctl,
        [b"hw.memsize: 25769803776\nhw.model: Mac16,11\n"],
        lambda found: all("\n" not in name + value and name == name.strip() for name, value in found.items()),
    ),
    "pmset therm": Target(
        sysctl.parse_pmset_therm,
        [b"\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 92\n"],
        lambda n: 1 <= n <= 100,
    ),
    "system_profiler": Target(
        sysctl.parse_system_profiler,
        [b"    Hardware Overview:\n      Model Identifier: Mac16,11\n      Chip: Apple M4 Pro\n      Memory: 24 GB\n"],
        lambda found: all(value.strip() == value and "\n" not in value for value in found.values()),
    ),
    "smc types": Target(
        _smc_values,
        [b"\0\x60\0\0\x7aD\0\0\0\0\1\x22\x0f\xa0\0\0\0\0\0\0\2\xe1\0\0\x2a\0\0\0\0\0"],
        _fans_and_watts_are_possible,
    ),
    "snmp": Target(_outlet, [_answered(n) for n in range(len(_OUTLETS))], lambda watts: 0 <= watts < snmp.MOST_W),
    "psi": Target(
        memory.parse_psi_total_us, [b"some avg10=0.00 avg60=0.00 avg300=0.00 total=4242\n"], lambda n: n >= 0
    ),
    "notifyutil": Target(
        thermal.parse_notifyutil, [thermal.NOTIFY_KEY.encode() + b" 2\n"], lambda level: level in (0, 1, 2, 3, 4)
    ),
    "zone": Target(chip.parse_millidegrees, [b"61500\n"], lambda degrees: 1 <= degrees < 130),
    "fan": Target(chip.parse_rpm, [b"1200\n"], lambda rpm: 0 <= rpm <= reading.MOST_RPM),
    "rapl": Target(power.parse_energy_uj, [b"123456789\n"], lambda uj: uj >= 0),
    "macmon": Target(
        macmon.parse_macmon,
        [
            _MACMON,
            b'{"temp":{},"all_power":144.0,"sys_power":144.0,"cpu_power":4.0,"gpu_power":140.0,"ane_power":0.0}',
            b'{"temp":{},"all_power":12.0,"sys_power":41.0,"cpu_power":3.0,"ram_power":1.5}',
        ],
        _line_is_possible,
    ),
    "powermetrics number": Target(_bad_number, _NUMBERS, _powers_are_possible),
    "powermetrics plist": Target(powermetrics.parse_document, [_PLIST], _powers_are_possible),
    "powermetrics text": Target(
        powermetrics.parse_text, [_TEXT], lambda found: all(_powers_are_possible(one) for one in found)
    ),
    "powermetrics stream": Target(
        lambda raw: powermetrics.Documents().feed(raw),
        [_PLIST + b"\n\0" + _PLIST],
        lambda found: all(_powers_are_possible(one) for one in found),
    ),
    "smc": Target(
        _smc,
        [
            b"Tp01\0\0\x83BTe05\0\0\x40BTg0G\0\0\x20B",
            b"TCMb\0\0\x76BTp00\0\0\x64BTa00\0\0\x22BTCMz\0\0\x40B",
            b"Tp01\x66\x66\xd6@Tp02\x66\x66\x06ATe05\xcd\xcc\x10BTf04\0\0\x20B",
        ],
        _temperatures_are_possible,
    ),
    "shelly": Target(http.parse_shelly, [_SHELLY], lambda watts: 0 <= watts < http.MOST_W),
    "shelly gen1": Target(
        lambda raw: http.parse_shelly_gen1(raw, 0),
        [b'{"meters":[{"power":33.3,"is_valid":true,"total":1234}]}'],
        lambda watts: 0 <= watts < http.MOST_W,
    ),
    "shelly em": Target(
        lambda raw: known(http.power("shelly_em", raw, 0, ("a", "b"))),
        [_EM],
        lambda watts: 0 <= watts < 2 * http.MOST_W,
    ),
    "shelly gen1 em": Target(
        lambda raw: known(http.power("shelly_gen1_em", raw, 0)),
        [b'{"emeters":[{"power":33.3,"is_valid":true,"total":1234}],"total_power":33.3}'],
        lambda watts: 0 <= watts < http.MOST_W,
    ),
    "home assistant": Target(
        lambda raw: known(home_assistant.power(raw, 1795741200.0, 600.0)),
        [_STATE],
        lambda watts: 0 <= watts < http.MOST_W,
    ),
    "tasmota": Target(lambda raw: http.parse_tasmota(raw, 1), [_TASMOTA], lambda watts: 0 <= watts < http.MOST_W),
}
_ODD = (*b"\0 \xff - . , e9 NaN Infinity".split(b" "), b"9" * 40, *b"\n [ { < \xc3 1e400".split(b" "))


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """Apply one to six mutations."""
    raw = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(6):
            case 0 if raw:
                raw[at % len(raw)] = rng.randrange(256)
            case 1:
                del raw[at : at + rng.randint(1, 20)]
            case 2:
                raw[at:at] = rng.choice(_ODD)
            case 3:
                del raw[at:]
            case 4:
                raw[at:at] = raw[rng.randrange(len(raw) + 1) :][:40]
            case _:
                raw[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(raw)


def check(name: str, raw: bytes) -> bool:
    """Whether anything was parsed. Raises AssertionError for an impossible number, and whatever the parser raises."""
    target = TARGETS[name]
    found = target.parse(raw)
    if found is None or found in ([], {}):
        return False
    assert target.is_possible(found), f"{name}: {found!r} from {raw!r}"
    return True


def fuzz(name: str, inputs: int, seed: int) -> int:
    """Fuzz one parser; returns how many inputs were parsed."""
    rng, target = random.Random(f"{name}{seed}"), TARGETS[name]
    assert all(check(name, one) for one in target.seeds), f"{name}: a seed is not parsed"
    return sum(check(name, mutated(rng.choice(target.seeds), rng)) for _ in range(inputs))


def main() -> int:
    """The command line."""
    words = parser(__doc__)
    words.add_argument("--inputs", type=int, default=100_000, help="for each parser (default: %(default)s)")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--atheris", choices=sorted(TARGETS), help="fuzz this parser with atheris, guided by coverage")
    args, rest = words.parse_known_args()
    if args.atheris:
        import atheris

        atheris.instrument_all()
        atheris.Setup([sys.argv[0], f"-runs={args.inputs}", *rest], lambda raw: check(args.atheris, raw) and None)
        atheris.Fuzz()
        return 0
    for name in TARGETS:
        began = time.monotonic()
        read = fuzz(name, args.inputs, args.seed)
        took_s = time.monotonic() - began
        print(f"{name:<22} {args.inputs} inputs, {read} parsed, none raised, {took_s:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
