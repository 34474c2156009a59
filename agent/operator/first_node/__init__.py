"""What only a Mac can prove, in one archive: `doctor --first-node` makes it, `doctor --replay` judges it anywhere."""
