"""A secure key-value store on two nodes: TLS, roles, an audit log nobody can quietly change."""

__version__ = "0.1.0"
