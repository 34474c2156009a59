"""``python -P -m aggregator``: the same as ``mlxrack-aggregator``."""

import sys

from aggregator.cli import main

sys.exit(main())
