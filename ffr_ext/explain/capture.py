"""What can be explained, and the outputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import Self

_WRAPPERS = {
    "ScriptModule": "explain the module it was scripted from",
    "OptimizedModule": "pass model._orig_mod",
    "DistributedDataParallel": "pass model.module",
    "DataParallel": "pass model.module",
    "FullyShardedDataParallel": "explain the model before it is sharded",
    "FSDPModule": "explain the model before it is sharded",
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_TIME_SERIES = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d)


def chosen_layers(model: nn.Module, layers: Any) -> dict[str, nn.Module]:
    """Names and modules; the one place that knows where layers are chosen."""
    from ffr_ext.flow.layers import select_layers

    return select_layers(model, layers)


def check_module(module: nn.Module, caller: str, name: str = "") -> None:
    """ValueError for one module that hides its inside from autograd, or lets images of a batch mix."""
    at = f" at {name!r}" if name else ""
    for base in type(module).__mro__:
        if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
            raise ValueError(f"{caller}: {base.__name__}{at} cannot be explained; {_WRAPPERS[base.__name__]}")
    if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
        raise ValueError(
            f"{caller}: {type(module).__name__}{at} uses the statistics of the batch, so images of a batch would "
            "explain each other; call model.eval() first"
        )


def check_model(model: Any, caller: str) -> None:
    """TypeError or ValueError for a model that cannot be explained as it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model: expected an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        check_module(module, caller, name)
        if isinstance(module, _DROPOUTS) and module.training and module.p:
            raise ValueError(
                f"{caller}: {type(module).__name__} at {name!r} is random in training mode; call model.eval() first"
            )


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's tensors are; None without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of an output, depth first."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    items: Iterable[Any] = output.values() if isinstance(output, Mapping) else ()
    if isinstance(output, (tuple, list)):
        items = output
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def channel_dim_of(model: nn.Module, feature: Tensor, channel_dim: int | None) -> int:
    """The dimension that holds the channels: the given one, else 1; of three, the last one unless the model has
    convolutions or batch norms over sequences, whose layout is (B, C, T)."""
    if channel_dim is not None:
        if not -feature.dim() < channel_dim < feature.dim() or channel_dim == 0:
            raise ValueError(f"channel_dim: {channel_dim} is no channel of shape {tuple(feature.shape)}")
        return channel_dim % feature.dim()
    if feature.dim() == 3 and not any(isinstance(module, _TIME_SERIES) for module in model.modules()):
        return 2
    return 1


Take = Callable[[str, nn.Module, Tensor], "Tensor | None"]


class Layers:
    """While it is entered, ``take(name, module, output)`` gets every output of the layers; a tensor that it returns
    takes the place of the output. The second call of a layer in one pass is called ``name:2``."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], take: Take) -> None:
        self.model, self.layers, self.take = model, layers, take
        self.calls: dict[str, int] = {}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self.layers.items():
            self.handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def __call__(self, x: Tensor) -> Any:
        """Run the model once."""
        self.calls.clear()
        return self.model(x)

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            feature = first_tensor(output)
            if feature is None or feature.dim() < 2:
                got = "no floating-point tensor" if feature is None else f"shape {tuple(feature.shape)}"
                raise ValueError(
                    f"layers: {name!r} ({type(module).__name__}) gave {got}; expected (images, channels, ...)"
                )
            number = self.calls[name] = self.calls.get(name, 0) + 1
            replaced = self.take(name if number == 1 else f"{name}:{number}", module, feature)
            return replaced if replaced is not None and feature is output else None

        return hook


class Producers:
    """Which weight ran last in front of a layer: that of the layer's channels, if it has as many."""

    def __init__(self, model: nn.Module) -> None:
        self.last: tuple[str, int, int] | None = (
            None  # name of the weight, its dimension of outputs, their number
        )
        self.handles = [
            module.register_forward_hook(self._hook(name, module))
            for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
            and not isinstance(module, (nn.PReLU, nn.Embedding))
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def of(self, channels: int) -> tuple[str, int] | None:
        if self.last is None or self.last[2] != channels:
            return None
        return self.last[:2]

    def _hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        dim = 1 if transposed else 0

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            width = weight.shape[dim] * (int(getattr(module, "groups", 1)) if transposed else 1)
            self.last = (f"{name}.weight" if name else "weight", dim, width)

        return hook


def batches(loader: Any, model: nn.Module, caller: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images, on the model's device, and labels of a loader; labels are None where it yields images alone."""
    device = device_of(model)
    empty = True
    for number, batch in enumerate(loader):
        items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        if not items or not all(isinstance(item, Tensor) for item in items[:2]):
            raise TypeError(
                f"{caller}: loader: batch {number}: expected (images, labels), got {type(batch).__name__}"
            )
        images, labels = items[0], items[1] if len(items) > 1 else None
        if images.dim() < 2 or not images.is_floating_point():
            raise ValueError(
                f"{caller}: loader: batch {number}: expected floating-point images (B, ...), got {images.dtype} "
                f"of shape {tuple(images.shape)}"
            )
        if not bool(images.isfinite().all()):
            raise ValueError(f"{caller}: loader: batch {number} has NaN or infinite pixels")
        if labels is not None and labels.shape[:1] != images.shape[:1]:
            raise ValueError(
                f"{caller}: loader: batch {number} has {len(images)} images and labels of shape {tuple(labels.shape)}"
            )
        if len(images):
            empty = False
            yield images if device is None else images.to(device), labels
    if empty:
        raise ValueError(f"{caller}: loader: expected at least one image, got none")


def check_can_repeat(loader: Any, caller: str) -> None:
    """ValueError for what can be read only once."""
    if iter(loader) is loader:
        raise ValueError(
            f"{caller}: loader: it is read twice, got {type(loader).__name__}, which can be read only once; pass a "
            "DataLoader or a list"
        )
