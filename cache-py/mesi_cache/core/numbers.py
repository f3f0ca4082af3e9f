"""The order that every protocol message carries.

A *number* packs (home epoch, transaction counter) into one integer, so that `<` is the order of the
home's decisions, also across its restarts. Numbers of different homes are never compared: a key has
one home.
"""

EPOCH_SHIFT = 40


def first_number(epoch: int) -> int:
    """The number below every transaction of `epoch`."""
    return epoch << EPOCH_SHIFT


def epoch_of(number: int) -> int:
    """The home's epoch (its durable start counter) in which `number` was given out."""
    return number >> EPOCH_SHIFT


def counter_of(number: int) -> int:
    """The transaction's place within its epoch."""
    return number & ((1 << EPOCH_SHIFT) - 1)
