"""Decides. Pure and deterministic: no I/O, no clock, no chance, no log call in this package."""
