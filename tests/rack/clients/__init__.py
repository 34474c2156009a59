"""Scripted sessions of other people's clients; each runs as a program of its own and prints what it got as JSON."""
