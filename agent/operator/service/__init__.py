"""The macOS service: what installing and removing it takes (plan, removal), and how it is done (run)."""
