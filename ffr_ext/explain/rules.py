"""`backward_rule`: another backward pass through ReLUs and strided convolutions, for any eager model.

A ``TorchFunctionMode`` sees the calls themselves, so it does not matter whether a ReLU is a module, a function or a
method, and the model is not touched. The forward pass stays what it is, to the last bit.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ffr_ext.checks import check_choice

from .capture import check_module
from .strides import CONVOLUTIONS, is_strided, resized

if TYPE_CHECKING:
    from typing_extensions import Self

RELU_RULES = ("guided", "deconv", "gradient")
STRIDE_RULES = ("resize", "transpose")
ALIGNMENTS = ("exact", "floor")


@dataclass
class Seen:
    """What one forward pass (or several) under the rule met."""

    relus: int = 0
    strided: int = 0


class backward_rule(TorchFunctionMode):
    """Context manager around a forward pass: its gradients pass ReLUs and strided convolutions by another rule.

    ::

        x.requires_grad_()
        with backward_rule(relu="guided", strides="resize"):
            y = model(x)
        heat, = torch.autograd.grad(y[:, target].sum(), x)

    ========== =============================== ==========================================
    ``relu``   incoming signal g becomes       source
    ========== =============================== ==========================================
    gradient   g [x > 0]                       plain autograd
    deconv     max(g, 0)                       Zeiler and Fergus 2014
    guided     max(g, 0) [x > 0]               Springenberg et al. 2015
    ========== =============================== ==========================================

    Every spelling counts: ``nn.ReLU``, ``F.relu``, ``torch.relu``, ``x.relu()``, in place or not, ``relu6``, and a
    clamp, hardtanh or threshold at 0. Our extension to leaky, smooth and other units (``leaky_relu``, ``prelu``,
    ``elu``, ``celu``, ``selu``, ``silu``, ``gelu``, ``mish``, ``hardswish``): guided max(g, 0) act'(x), deconv
    max(g, 0).

    ``strides="resize"``: in the backward pass of a convolution with a stride, the signal is resized by nearest
    neighbour to the size that stride 1 would have given, divided by the product of the strides, and sent through the
    transposed convolution of stride 1 with the same weights. This removes the grid that "transpose" (plain autograd)
    draws (Oramas et al. 2019; the division is ours: it keeps a strided path as strong as a pooled one beside it).
    Such convolutions have no gradient for their weights then: ask ``torch.autograd.grad`` for the input's.

    Not touched: pooling, transposed convolutions, slices with a step, attention. Not seen: ReLUs inside C++ or CUDA
    ops of other packages. ``seen.relus`` and ``seen.strided`` count what was; a rule that met nothing warns.

    Args:
        relu: ``"guided"``, ``"deconv"`` or ``"gradient"``.
        strides: ``"resize"`` or ``"transpose"``.
        align: Where a resized signal lands: ``"exact"`` centres it for odd strides; ``"floor"`` as MATLAB-like code.

    Raises (when the model runs inside):
        ValueError: a scripted, compiled or wrapped module, or batch norm that uses the statistics of the batch.
        RuntimeError: a ReLU or a convolution that runs without autograd.
    """

    def __init__(self, relu: str = "guided", strides: str = "resize", *, align: str = "exact") -> None:
        check_choice("relu", relu, RELU_RULES)
        check_choice("strides", strides, STRIDE_RULES)
        check_choice("align", align, ALIGNMENTS)
        super().__init__()
        self.relu, self.strides, self.align = relu, strides, align
        self.seen = Seen()

    def __enter__(self) -> Self:
        self.seen = Seen()
        self._thread = threading.get_ident()
        # Before a module runs, because batch norm counts its batches before it calls anything that a mode can see.
        self._hook = register_module_forward_pre_hook(self._check)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        super().__exit__(kind, value, trace)
        if kind is None:
            self._warn_if_idle()

    def _check(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread:
            check_module(module, "backward_rule")

    def _warn_if_idle(self) -> None:
        if self.relu != "gradient":
            idle = self.seen.relus == 0
            what = f"relu={self.relu!r} met no ReLU"
        else:
            idle = self.strides == "resize" and self.seen.strided == 0
            what = "strides='resize' met no convolution with a stride"
        if idle:
            warnings.warn(
                f"backward_rule: {what}: the gradient is the plain one", RuntimeWarning, stacklevel=3
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        if func in _ACTIVATIONS and _ACTIVATIONS[func](args, kwargs):
            return self._activation(func, args, kwargs)
        if func is F.batch_norm and _argument(args, kwargs, 5, "training", False):
            raise ValueError(
                "backward_rule: batch norm uses the statistics of the batch; call model.eval() first"
            )
        return func(*args, **kwargs)

    def _activation(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen.relus += 1
        if self.relu == "gradient":
            return func(*args, **kwargs)
        _check_autograd(func)
        x = args[0] if args else kwargs["input"]
        if not x.requires_grad:
            return func(*args, **kwargs)
        if self.relu == "guided":
            y = func(*args, **kwargs)
            y.register_hook(
                _positive_part
            )  # before the unit's own backward, which supplies [x > 0] or act'(x)
            return y
        names = {name: value for name, value in kwargs.items() if name != "input"}
        y = _Deconv.apply(x, func, args[1:], names)
        return x.copy_(y) if _is_in_place(func, args, kwargs) else y

    def _convolution(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_strided(args, kwargs):
            return func(*args, **kwargs)
        self.seen.strided += 1
        if self.strides == "transpose":
            return func(*args, **kwargs)
        _check_autograd(func)
        return resized(func, args, kwargs, self.align)


def _check_autograd(func: Callable[..., Any]) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("backward_rule: torch.compile was called on this model; use the eager model")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"backward_rule: {func.__name__} ran without autograd (torch.no_grad, inference_mode, reentrant "
            "checkpointing, or a model that switches it off), so nothing would pass back"
        )


def _positive_part(signal: Tensor) -> Tensor:
    return signal.clamp(min=0)


class _Deconv(torch.autograd.Function):
    """The unit forward, max(g, 0) back, whatever the unit did. In place or not, the input stays as it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return func(x.clone(), *args, **kwargs)

    @staticmethod
    def backward(ctx: Any, *signals: Any) -> Any:
        return _positive_part(signals[0]), None, None, None


# --- which calls are units --------------------------------------------------------------------------

_Test = Callable[[tuple[Any, ...], dict[str, Any]], bool]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _always(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return True


def _zero_at(position: int, name: str, default: Any) -> _Test:
    """A call whose argument is the number 0."""

    def test(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        value = _argument(args, kwargs, position, name, default)
        return isinstance(value, (int, float)) and value == 0

    return test


def _threshold_at_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return _zero_at(1, "threshold", None)(args, kwargs) and _zero_at(2, "value", None)(args, kwargs)


_HOMES = (torch, F, Tensor, torch.ops.aten)
_ALWAYS = (
    "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "silu", "gelu", "mish", "hardswish",
)  # fmt: skip
_UNITS: dict[str, _Test] = {
    **dict.fromkeys(_ALWAYS, _always),
    "clamp": _zero_at(1, "min", None),
    "clip": _zero_at(1, "min", None),
    "clamp_min": _zero_at(1, "min", None),
    "hardtanh": _zero_at(1, "min_val", -1.0),
    "threshold": _threshold_at_zero,
}


def _spellings(name: str) -> list[Any]:
    """Every public callable of that name, in place or not; an op of aten with its default overload."""
    found = [getattr(home, spelled, None) for home in _HOMES for spelled in (name, f"{name}_")]
    overloads = [getattr(packet, "default", None) for packet in found]
    return [callable_ for callable_ in (*found, *overloads) if callable_ is not None]


_ACTIVATIONS: dict[Any, _Test] = {
    spelling: test for name, test in _UNITS.items() for spelling in _spellings(name)
}


def _position_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # made in C: these have no such argument
        return None
    return names.index("inplace") if "inplace" in names else None


_INPLACE_AT = {function: _position_of_inplace(function) for function in _ACTIVATIONS}


def _is_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    position = _INPLACE_AT[func]
    if position is not None and _argument(args, kwargs, position, "inplace", False):
        return True
    return str(func.__name__).split(".")[0].endswith("_")
