"""One verb each: load, decide, publish."""
