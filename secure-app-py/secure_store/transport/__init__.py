"""Talks to the other node, over mutually authenticated TLS."""
