"""Decides. Pure: time comes in as an argument, everything that must happen goes out in a `Step`."""
