"""What was decided on each request, in files that show when they were changed. Never any text of a request."""
