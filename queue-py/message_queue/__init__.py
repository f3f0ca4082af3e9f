"""A replicated, durable, at-least-once message queue placed by consistent hashing."""

__version__ = "0.1.0"
