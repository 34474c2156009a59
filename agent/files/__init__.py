"""Model files on disk: what a folder holds, how it gets there, and the probes that belong to it."""
