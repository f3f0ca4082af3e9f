"""The home's side: main memory's truth about each key, one transaction at a time."""
