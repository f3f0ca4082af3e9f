"""Ownership of partitions and their replicated record sets: who may write, and what is stored."""
