"""Model files on disk: the content of a model folder, how it is pulled, and its probes."""
