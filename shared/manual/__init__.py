"""The documentation on the command line: what `help` knows, and the verb itself."""
