"""Majorities. An empty set of voters has none: nothing is ever agreed in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def majority(voters: int) -> int:
    """How many of so many voters are more than half."""
    return voters // 2 + 1


def agreed(values: Iterable[int]) -> int:
    """The largest value that a majority has reached, given one value per voter; 0 without voters.

    With match indices it is the index that may be committed, with acknowledged rounds the last
    confirmed one, with times of contact the moment since when a majority is connected.
    """
    ordered = sorted(values, reverse=True)
    return ordered[len(ordered) // 2] if ordered else 0


def wins(votes: Mapping[int, bool], voters: frozenset[int]) -> bool:
    """Whether a majority of `voters` granted; votes of others do not count."""
    granted = sum(1 for voter in voters if votes.get(voter, False))
    return bool(voters) and granted >= majority(len(voters))
