"""``python -m tests.rack.limited_agent``: mlxrack-agent, whose minutes are as long as the environment says."""

import os
import sys
from functools import partial
from typing import Any

from agent import boundary, cli
from agent.gateway.allowances import Allowances

WINDOW_S = "MLXRACK_TEST_WINDOW_S"

if __name__ == "__main__":
    shorter: Any = partial(Allowances, window_s=float(os.environ[WINDOW_S]))
    vars(boundary)["Allowances"] = shorter
    sys.exit(cli.main())
