"""``python -P -m agent``: the same as ``mlxrack-agent``."""

import sys

from agent.cli import main

sys.exit(main())
