"""``python -P -m agent``: the same as ``mlxrack-agent``, which starts here, too."""

import sys
from collections.abc import Sequence

from shared.commandline import until_the_reader_leaves
from shared.missing import guarded


@guarded("mlxrack-agent", "agent")
@until_the_reader_leaves
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. The command line is imported inside the guard: it needs packages, too."""
    from agent import cli

    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
