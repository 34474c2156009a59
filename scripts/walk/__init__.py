"""``make walk``: the commands of README.md and docs/operating.md, run as a newcomer would, on one machine."""
