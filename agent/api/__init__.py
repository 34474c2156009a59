"""The HTTP edge: bytes in, decisions asked for, bytes out."""
