"""One request from admission to its last token: which node serves it, what is retried, what fails over."""
