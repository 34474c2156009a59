"""Every figure of a report, worked out a second time from raw segments by docs/figures.md, in plain Python.

Nothing here imports ``aggregator`` or ``shared``: what both say is right only if both came to it by themselves.
"""
