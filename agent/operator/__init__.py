"""Parts of the command line: status, logs, doctor, installation, model files."""
