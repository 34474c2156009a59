"""What a Mac's settings say to a machine that has to serve day and night: read, judged, never changed."""
