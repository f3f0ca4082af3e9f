"""Keeps. What is acknowledged is on the disk first; what is on the disk is sealed."""
