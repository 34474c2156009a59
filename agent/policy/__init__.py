"""What may be done with a request, and where: task classes, SENSITIVE, what may leave the premises. Pure."""
