"""How a model converses: what its chat template accepts, how it writes calls and reasoning. Pure."""
