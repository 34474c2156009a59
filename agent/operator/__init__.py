"""What the command line is made of: status, logs, doctor, installation, model files."""
