"""A Mac that is none: the compiled stand-in for its libraries, programs on PATH that print what a Mac's do, and a
sitecustomize that tells every Python process started there which machine it is on."""

import os
import plistlib
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SITE = """
import os, sys
from pathlib import Path
from agent.operator import install
from agent.operator.first_node import machine
machine.PLATFORM = "darwin"
machine.LIBRARY = machine.IOKIT = os.environ["FAKE_MAC_LIBRARY"]
machine.ENERGY_S, machine.SAMPLED_S = 0.6, 0.1
install.DAEMON_PLIST = Path(os.environ["FAKE_MAC_PLIST"])
if "--first-node" in sys.orig_argv and "FAKE_STALLED" in os.environ:
    from agent.operator.first_node import steps
    every = steps.steps
    steps.steps = lambda *all: [one for one in every(*all) if one.name not in ("answers", "device", "doctor", "plan")]
"""
ZEUS = """
import os, time
class _Metrics:
    def __init__(self, s):
        self.cpu_total_mj = 5000.0 if os.environ.get("FAKE_STALLED") else 5000.0 + 4000.0 * s
        self.gpu_mj, self.ane_mj = 700.0 + 500.0 * s, 0.0
class AppleEnergyMonitor:
    def get_cumulative_energy(self):
        return _Metrics(time.monotonic())
"""
PLANTED = {
    "serial": "H2WXK4Q7TR",
    "uuid": "8F2C9A41-77AB-5C3D-9E10-0A1B2C3D4E5F",
    "udid": "00008132-001A2B3C4D5E6F70",
    "mac": "a4:83:e7:1b:0c:9d",
    "address": "192.168.77.42",
    "address6": "fe80::a483:e7ff:fe1b:c9d",
    "host": "berts-mini.local",
    "user": "/Users/bertram",
    "mail": "bertram@example.org",
    "hub": "hf_QwErTyUiOpAsDfGhJkLz12",
    "key": "sk-proj-4f9a8b7c6d5e4f3a2b1c",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "password": "PASSWORD=correct-horse",
}
"""One of each kind that no archive may hold; every program prints all of them."""
EXIT = "#!/bin/sh\n{}\n"
PAGE = 16384
PROGRAMS = {
    "sw_vers": "ProductName:\t\tmacOS\nProductVersion:\t\t27.0\nBuildVersion:\t\t26A428\n",
    "system_profiler": "Hardware:\n\n    Hardware Overview:\n\n      Model Name: Mac mini\n"
    "      Model Identifier: Mac16,10\n"
    "      Chip: Apple M4\n      Memory: 24 GB\n      Serial Number (system): H2WXK4Q7TR\n",
    "sysctl": "vm.swapusage: total = 4096.00M  used = 2744.00M  free = 1352.00M  (encrypted)\n"
    "kern.memorystatus_vm_pressure_level: 1\niogpu.wired_limit_mb: 0\n",
    "vm_stat": f"Mach Virtual Memory Statistics: (page size of {PAGE} bytes)\n"
    "Anonymous pages:                          400000.\nPages purgeable:                           50000.\n"
    "Pages wired down:                         100000.\nPages occupied by compressor:              25000.\n"
    "Swapins:                                      20.\nSwapouts:                                     30.\n",
    "memory_pressure": "The system has 25769803776 (1572864 pages with a page size of 16384).\n"
    "System-wide memory free percentage: 62%\n",
    "notifyutil": "com.apple.system.thermalpressurelevel 0\n",
    "powermetrics": '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" '
    '"http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n<plist version="1.0"><dict><key>elapsed_ns</key>'
    "<integer>1000000000</integer><key>processor</key><dict><key>cpu_power</key><real>2500</real>"
    "<key>gpu_power</key><real>300</real><key>ane_power</key><real>0</real>"
    "<key>combined_power</key><real>2800</real></dict>"
    "</dict></plist>\n",
    "macmon": '{"temp":{"cpu_temp_avg":51.5,"gpu_temp_avg":44.0},"sys_power":12.5,"all_power":3.1,"cpu_power":2.5}\n',
    "ioreg": '+-o AGXAcceleratorG16G  <class AGXAcceleratorG16G>\n    {\n      "IOClass" = "AGXAcceleratorG16G"\n'
    '      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Alloc system memory"=9000000000,'
    '"Device Utilization %"=37,"In use system memory"=2500000000}\n    }\n',
    "launchctl": "system/dev.mlxrack.agent = {\n\tstate = running\n\tpath = /Library/LaunchDaemons/x.plist\n"
    "\truns = 3\n"
    "\tlast exit code = 0\n\texit timeout = 90\n\tenvironment = {\n"
    "\t\tOP_SERVICE_ACCOUNT_TOKEN => ops_abcdefgh12345678\n"
    "\t}\n}\n",
    "pmset": "System-wide power settings:\nCurrently in use:\n sleep                0\n autorestart          1\n",
    "fdesetup": "FileVault is Off.\n",
    "socketfilterfw": "Firewall is disabled. (State = 0)\n",
    "scutil": "Bertrams Mac\n",
}
ASSERTIONS = """Assertion status system-wide:
   PreventSystemSleep             1
   PreventUserIdleSystemSleep     1
Listed by owning process:
   pid 4711(caffeinate): [0x0001] 00:00:12 PreventUserIdleSystemSleep named: "berts-mini.local"
"""


def build(folder: Path, *, broken: bool = False) -> dict[str, str]:
    """The environment of a process on it. ``broken``: no SMC, a kernel and a swap that answer wrongly, counters that
    stand still, a launchd that knows no such service; what does not depend on that is not asked again."""
    programs, site = folder / "bin", folder / "site"
    programs.mkdir()
    site.mkdir()
    library = folder / "libfake.so"
    sources = (HERE.parent / "telemetry/fake_mac.c", HERE / "fake_mac_settings.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, *sources], check=True, timeout=120)
    (site / "sitecustomize.py").write_text(SITE)
    (site / "zeus_apple_silicon.py").write_text(ZEUS)
    planted = "".join(f"planted {text}\n" for text in PLANTED.values())
    for name, said in PROGRAMS.items():
        (folder / f"{name}.txt").write_text(said + planted)
        line = f"cat '{folder}/{name}.txt'"
        if name == "pmset":
            (folder / "assertions").write_text(ASSERTIONS + planted)
            line = f"case $2 in assertions) cat '{folder}/assertions';; *) {line};; esac"
        if broken and name == "launchctl":
            line = f"echo 'Could not find service on {PLANTED['host']}' >&2; exit 113"
        (programs / name).write_text(EXIT.format(line))
        (programs / name).chmod(0o755)
    plist = folder / "agent.plist"
    plist.write_bytes(plistlib.dumps({"Label": "x", "ExitTimeOut": 90, "EnvironmentVariables": {"T": "tok-planted"}}))
    settings = (
        "fake_has_smc=0 fake_vm_status=-307 fake_swap_broken=1 fake_notify_status=5" if broken else "fake_level=0"
    )
    return {
        **os.environ,
        **({"FAKE_STALLED": "1"} if broken else {}),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{site}:{HERE.parents[2]}",
        "FAKE_MAC": settings,
        "FAKE_MAC_LIBRARY": str(library),
        "FAKE_MAC_PLIST": str(plist),
        "HOME": str(folder),
        "XDG_STATE_HOME": str(folder / "state"),
    }
