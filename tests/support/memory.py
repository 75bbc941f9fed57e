"""What a piece of code allocates, counted by torch's memory profiler: exact, and the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    result: object  # kept, so that what the code returns counts as alive
    bytes: list[int]  # in order; negative where memory was given back

    @property
    def allocated(self) -> int:
        return sum(n for n in self.bytes if n > 0)

    @property
    def peak(self) -> int:
        return max(accumulate(self.bytes), default=0)


def allocations(code: Callable[[], object]) -> Allocations:
    """Run `code` and list every allocation of torch's CPU allocator during it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = code()
    events = recorded.profiler.kineto_results.events()
    return Allocations(result, [event.nbytes() for event in events if event.name() == "[memory]"])
