"""Test-only tools shared by the four services: simulation, process clusters, history checkers.

Nothing here is imported at run time; import-linter holds that. README.md shows each room's API.
"""
