"""Decisions only. Nothing in here reads a clock, a file, a socket or a random number."""
