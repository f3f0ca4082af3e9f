"""The requester's side: this node's lines, and what it asks the homes for."""
