"""Imported first of all by the command line: a SIGHUP that comes while the other modules are imported is noted, and
does not end a daemon that is starting. ``agent.operator.hangups`` takes over."""

import signal
import sys

heard = list[int]()
"""Signals that nobody has taken yet."""

if sys.argv[1:2] in (["run"], ["serve"]) and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
    signal.signal(signal.SIGHUP, lambda number, frame: heard.append(number))
