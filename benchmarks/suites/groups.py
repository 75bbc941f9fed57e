"""The gradient of a penalty on the groups of ResNet-50's weights, added to the gradients that are there.

"group lasso": lambda sqrt(n) ||W[o]|| over all rows; "out-in": lambda (||W[o]|| + ||W[:, i]||) over rows and
columns (the separated form of OICSR). Fused: the norms of a list of tensors in one launch, arithmetic on
vectors, and `add_scaled_`. Beside it: `torch._foreach_add_(grads, weights, alpha=a)`, which any such gradient
has to be compared with (it reads and writes the same memory and knows one factor for all); the penalty as a
loss, through autograd; the formula layer by layer without autograd; and `GroupNormPruner.regularize` of
Torch-Pruning, which groups what its graph says belongs together. Bytes: 12 an element, those of the first.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ffr_ext import backends, filter_norms
from ffr_ext.regularizers.fused import add_scaled_, row_column_norms

from ..harness import networks
from ..harness.measure import Effort, Options, Row, Subject, measure, relative_error

STRENGTH = 1e-4
EFFORT = Effort(rounds=15, seconds=1.0, most_seconds=30.0)


def main(options: Options) -> list[Row]:
    """One row per provider for "group lasso" and for "out-in"."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = (networks.cifar_resnet(20) if options.tiny else networks.resnet50()).to(device)
    weights = [p for p in model.parameters() if p.dim() > 1]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    moved = 12 * sum(w.numel() for w in weights)
    rows: list[Row] = []
    for mode in ("group lasso", "out-in"):
        if not options.wants("modes", mode):
            continue
        build = {
            name: make
            for name, make in _providers(model, weights, mode, device).items()
            if options.wants("providers", name)
        }
        got = measure(
            "groups",
            "resnet50",
            mode,
            build,
            device=device,
            moved_bytes=moved,
            input_bytes=moved,
            config={"dtype": "float32", "tensors": len(weights)},
            effort=options.effort or EFFORT,
            with_copy=False,
        )
        options.report(got)
        rows += got
    return rows


def _providers(
    model: nn.Module, weights: list[nn.Parameter], mode: str, device: torch.device
) -> dict[str, Callable[[int], Subject]]:
    lasso = mode == "group lasso"
    fused = _fused_lasso if lasso else _fused_out_in
    truth = _truth(weights, lasso)
    grads = [w.grad for w in weights if w.grad is not None]

    def checked(run: Callable[[], None]) -> Subject:
        def error() -> float:
            torch._foreach_zero_(grads)
            run()
            return relative_error(grads, truth)

        return Subject(run, error=error)

    runs: dict[str, Callable[[], None]] = {"autograd": lambda: _loss(weights, lasso).backward()}
    if lasso:
        runs["eager"] = lambda: _eager_lasso(weights)
    for name in {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ()):
        if backends.available()[name].available:
            runs[name] = lambda name=name: fused(weights, name)
    providers: dict[str, Callable[[int], Subject]] = {
        name: lambda i, run=run: checked(run) for name, run in runs.items()
    }
    plain = [w.detach() for w in weights]
    providers["foreach_add"] = lambda i: Subject(lambda: torch._foreach_add_(grads, plain, alpha=STRENGTH))
    if lasso and importlib.util.find_spec("torch_pruning"):
        providers["torch-pruning"] = lambda i: Subject(_torch_pruning(model, device))
    return providers


def _loss(weights: list[nn.Parameter], lasso: bool) -> Tensor:
    """The penalty as everybody writes it."""
    total = weights[0].new_zeros(())
    for w in weights:
        if lasso:
            total = total + math.sqrt(w[0].numel()) * w.flatten(1).norm(dim=1).sum()
        else:
            total = total + w.flatten(1).norm(dim=1).sum() + w.transpose(0, 1).flatten(1).norm(dim=1).sum()
    return STRENGTH * total


def _truth(weights: list[nn.Parameter], lasso: bool) -> list[Tensor]:
    double = [nn.Parameter(w.detach().double()) for w in weights]
    return list(torch.autograd.grad(_loss(double, lasso), double))


@torch.no_grad()
def _eager_lasso(weights: list[nn.Parameter]) -> None:
    for w in weights:
        norms = w.flatten(1).norm(dim=1)
        scale = torch.where(norms > 0, STRENGTH * math.sqrt(w[0].numel()) / norms, 0)
        w.grad.add_(w * scale.view(-1, *[1] * (w.dim() - 1)))  # type: ignore[union-attr]


def _scales(norms: list[Tensor], strengths: list[float]) -> list[Tensor]:
    """strength / norm, 0 where the norm is 0: for all tensors at once."""
    sizes = [n.numel() for n in norms]
    each = torch.tensor(strengths).repeat_interleave(torch.tensor(sizes)).to(norms[0].device)
    flat = torch.cat(norms)
    return list(torch.where(flat > 0, each / flat, 0).split(sizes))


def _fused_lasso(weights: list[nn.Parameter], backend: str) -> None:
    norms = filter_norms(weights, backend=backend)
    scales = _scales(norms, [STRENGTH * math.sqrt(w[0].numel()) for w in weights])
    add_scaled_([w.grad for w in weights], weights, scales, backend=backend)  # type: ignore[misc]


def _fused_out_in(weights: list[nn.Parameter], backend: str) -> None:
    rows, columns = zip(*row_column_norms(weights, backend=backend), strict=True)
    scales = _scales([*rows, *columns], [STRENGTH] * 2 * len(weights))
    count = len(weights)
    add_scaled_([w.grad for w in weights], weights, scales[:count], scales[count:], backend=backend)  # type: ignore[misc]


def _torch_pruning(model: nn.Module, device: torch.device) -> Callable[[], None]:
    import torch_pruning as tp

    image = torch.randn(1, 3, 64, 64, device=device)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.GroupNormPruner(model, image, importance=importance, reg=STRENGTH)
    for parameter in model.parameters():  # it passes over layers without
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    pruner.update_regularizer()
    return lambda: pruner.regularize(model)
