"""Decisions whose effects wait until the log holds them as the flags demand, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mesi_cache.core.step import Answer, Found, Missing, Step, Unavailable

MOST = 20_000
PATIENCE_MS = 800  # the core gives a call 4 s; a client must have heard after 5
WHY = "Main memory does not answer"


class Ripening:
    """A bounded queue of steps. What does not get through in time is answered all the same."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float, Step]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def last(self) -> int:
        """The log position that the newest step waits for; 0 if none waits."""
        return self._steps[-1][0] if self._steps else 0

    def add(self, position: int, step: Step) -> bool:
        """Keep `step` until the log has reached `position`. False: there is no room for what is
        not logged (which is as if the network had lost it; the caller answers its clients)."""
        if len(self._steps) >= MOST and not step.log:
            return False
        self._steps.append((position, step.now_ms, step))
        return True

    def ripe(self, position: int) -> Iterator[Step]:
        """Those that need wait no longer, oldest first."""
        while self._steps and self._steps[0][0] <= position:
            yield self._steps.popleft()[2]

    def overdue(self, now_ms: float) -> list[tuple[int, Unavailable]]:
        """Answers to calls that cannot wait for theirs any longer; each is given once."""
        late: list[tuple[int, Unavailable]] = []
        for _, at_ms, step in self._steps:
            if at_ms > now_ms - PATIENCE_MS:
                break
            late.extend(instead(step))
        return late


def tellable(step: Step) -> list[tuple[int, Answer]]:
    """Answers that say nothing of what is being logged, taken out of `step`."""
    tellable = [each for each in step.answers if isinstance(each[1], Unavailable)]
    if tellable:
        step.answers = [each for each in step.answers if not isinstance(each[1], Unavailable)]
    return tellable


def instead(step: Step) -> list[tuple[int, Unavailable]]:
    """What to tell clients whose answers stand in `step` and must not be told; they are taken out
    of it. A read did nothing; a change may come to be after all."""
    answers, step.answers = step.answers, []
    return [
        (token, Unavailable(isinstance(answer, Found | Missing), WHY)) for token, answer in answers
    ]
