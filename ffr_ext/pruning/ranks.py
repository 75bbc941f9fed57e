"""Every rank removes the same channels, or every rank raises: ranks of different shapes would hang or train
apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def check_same_on_all_ranks() -> Iterator[Callable[[str], None]]:
    """`agree(digest)` inside the block compares the digests of all ranks.

    RuntimeError on all of them where they differ, or where one rank failed before it got that far: a rank
    that raises alone would leave the others waiting.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield lambda digest: None
        return
    agreed = False

    def agree(digest: str) -> None:
        nonlocal agreed
        agreed = True
        _compare(f"plan {digest[:16]}")

    try:
        yield agree
    except Exception as error:
        if not agreed:
            _compare(f"{type(error).__name__}: {error}", failed=True)
        raise


def _compare(mine: str, failed: bool = False) -> None:
    everyone: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    if not failed and len(set(everyone)) > 1:
        listed = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(everyone))
        raise RuntimeError(
            f"compact: the ranks do not agree on what to remove ({listed}). Their weights or example "
            "inputs' shapes differ: "
            "compact on one rank and give its CompactionPlan to the others, or synchronise the weights first"
        )
