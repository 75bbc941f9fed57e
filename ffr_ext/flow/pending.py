"""A gradient that is not written until autograd adds it to the gradient that is already there.

Autograd adds what a tap returns to the gradient that came from the layers above: it reads both and writes the
sum, after the tap's kernel has written its own part, four passes over the feature. A kernel that adds to what
is there makes two. So a tap returns a `PendingGradient`, which has a shape and a dtype and no memory;
autograd's addition arrives in its ``__torch_dispatch__``, and there the kernel accumulates in place. Whatever
else happens to it (it was the only gradient, a hook looks at it, somebody asked for it) makes an ordinary
tensor of it first.

In place means in memory that autograd is about to drop, which holds if nobody else holds the incoming
gradient. Autograd asks the reference counts of tensor and storage before it adds in place, and so does
`Ownership`; it learns what the counts of a gradient that nobody else holds are by looking at one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..stages import Layout

# Below this a dispatch through Python (10 us) costs what the passes it saves are worth. What the penalty adds
# to the backward pass per feature on one CPU thread, added apart and in place: 8 KiB 49 and 58 us, 1 MiB 296
# and 146 us.
MIN_BYTES = 1 << 20

Counts = tuple[int, int, int]


class PendingGradient(Tensor):
    """The gradient that ``write(tensor, accumulate)`` makes, in a given layout."""

    write: Callable[[Tensor, bool], None]
    owned: Counts | None
    made: Tensor | None

    @staticmethod
    def __new__(  # noqa: PYI034  typing.Self needs Python 3.11
        cls,
        layout: Layout,
        device: torch.device,
        write: Callable[[Tensor, bool], None],
        owned: Counts | None,
    ) -> PendingGradient:
        pending: PendingGradient = torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, strides=layout.strides, dtype=layout.dtype, device=device
        )
        pending.write, pending.owned, pending.made = write, owned, None
        return pending

    def __init__(self, *_args: Any) -> None:
        pass

    def dense(self) -> Tensor:
        """The gradient as an ordinary tensor, written once."""
        if self.made is None:
            grad = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
            self.write(grad, False)
            self.made = grad
        return self.made

    def data_ptr(self) -> int:
        return self.dense().data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.dense().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.add.Tensor and not kwargs and len(args) == 2 and type(args[0]) is Tensor:
            counts = _counts(args[0])
            incoming, pending = args
            if counts == pending.owned and pending.made is None and _same_layout(incoming, pending):
                pending.write(incoming, True)
                return incoming
        return func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs or {}))


def as_dense(grad: Tensor | None) -> Tensor | None:
    """Tensor hook: a layer gets an ordinary gradient, with memory that its kernels can read."""
    return grad.dense() if type(grad) is PendingGradient else None


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def _counts(tensor: Tensor) -> Counts:
    """References to the Python object, to the tensor and to its memory."""
    storage = tensor.untyped_storage()._cdata
    return sys.getrefcount(tensor), tensor._use_count(), torch._C._storage_Use_Count(storage)  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    """Adds a pending gradient to its input's gradient, and reports the counts of what it is added to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Counts]) -> Tensor:
        ctx.layout, ctx.seen = Layout.of(x), seen
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        pending = PendingGradient(ctx.layout, grad.device, _write_zeros, None)
        pending.owned = _Notes(ctx.seen)  # type: ignore[assignment]
        return pending, None


def _write_zeros(grad: Tensor, accumulate: bool) -> None:
    if not accumulate:
        grad.zero_()


class _Notes:
    """Equal to nothing; remembers what it was compared with."""

    def __init__(self, seen: list[Counts]) -> None:
        self.seen = seen

    def __eq__(self, counts: object) -> bool:
        self.seen.append(counts)  # type: ignore[arg-type]
        return False

    __hash__ = None  # type: ignore[assignment]


@lru_cache(maxsize=8)
def counts_when_owned(device: torch.device) -> Counts | None:
    """Counts of an incoming gradient that nobody else holds; None if those of a held one are no different.

    Each way in which a gradient can be held must raise the counts: by a second edge of the graph, by Python
    code that a hook gave it to, by a view of its memory.
    """
    if not hasattr(Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    owned = _observed(device, "")
    held = [_observed(device, way) for way in HOLDERS]
    return owned if owned is not None and None not in held and owned not in held else None


# Who can hold an incoming gradient.
HOLDERS = ("python", "view", "edge")


def _observed(device: torch.device, holder: str) -> Counts | None:
    """The counts of a gradient, held in this way, at the moment a pending one is added to it."""
    seen: list[Counts] = []
    kept: list[Any] = []
    with torch.enable_grad(), torch.inference_mode(False):
        leaf = torch.ones(2, device=device, requires_grad=True)
        x = leaf * 2
        token = _Probe.apply(x, seen)
        y = x * 3
        if holder in ("python", "view"):
            assert y.grad_fn is not None
            y.grad_fn.register_hook(
                lambda grads, _outputs: kept.append(grads[0] if holder == "python" else grads[0].view(-1))
            )
        if holder == "edge":  # the sum hands one gradient to both, and x runs first
            y = x + leaf.view(2)
        ((y * 5).sum() + token).backward()
    return seen[0] if len(seen) == 1 else None
