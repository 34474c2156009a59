"""The one habit of both command lines that argparse does not have: wrong usage exits os.EX_USAGE."""

import argparse
import os
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """As argparse's, but wrong words exit 64, so that a script can tell them from other failures."""

    def error(self, message: str) -> NoReturn:
        self.print_usage()
        self.exit(os.EX_USAGE, f"{self.prog}: {message}; --help explains\n")
