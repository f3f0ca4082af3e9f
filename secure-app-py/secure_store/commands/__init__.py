"""The operator's commands: `main.py cert | key | token | policy | audit | backup | restore | …`."""
