"""``python -P -m agent``: equivalent to ``mlxrack-agent``."""

import sys

from agent.cli import main

sys.exit(main())
