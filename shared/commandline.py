"""An argparse parser for both command lines: wrong usage exits with os.EX_USAGE."""

import argparse
import os
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, but usage errors exit 64, so that scripts can tell them from other failures."""

    def error(self, message: str) -> NoReturn:
        self.print_usage()
        self.exit(os.EX_USAGE, f"{self.prog}: {message}; see --help\n")
