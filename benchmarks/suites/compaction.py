"""Compaction of ResNet-50 (from transformers): the gather and the norms alone, and the whole of it.

Kernels: every weight, bias and buffer of the network, half of the filters kept; `compact_filters` in one call
("gather") beside `torch.index_select` per tensor, `filter_norms` beside `torch.linalg.vector_norm` per
tensor. Whole: `compact`, which finds the dead channels itself and checks the result, beside Torch-Pruning,
which is told the same channels and checks nothing. The error is that of the outputs against the model with
its dead filters still in. In "zeros" every dead channel is 0 behind its activation; in "constants" half of
them are not, and somebody has to take the constants up.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ffr_ext import backends, compact, compact_filters, filter_norms

from ..harness import networks
from ..harness.measure import Effort, Options, Row, Subject, measure

DEAD = 0.5  # share of the filters of the two inner convolutions of every bottleneck
WHOLE = Effort(warmup=1, rounds=5, seconds=0.0, most_seconds=60.0, memory=True)


def network(tiny: bool, seed: int = 0) -> nn.Module:
    """ResNet-50 of transformers with random weights and statistics, in eval mode."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    small = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 5}
    model = ResNetForImageClassification(ResNetConfig(**(small if tiny else {})))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model.eval()


def kill(model: nn.Module, constants: bool) -> dict[str, list[int]]:
    """Zero filters inside the bottlenecks, with gamma, and with beta below 0 unless they are to be constants.
    Returns the dead filters of each convolution."""
    dead: dict[str, list[int]] = {}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            inner = (
                name.rpartition(".")[2] in ("0", "1")
                and ".layer." in name
                and hasattr(module, "normalization")
            )
            if not inner:
                continue
            layer: Any = module
            count = layer.convolution.out_channels
            chosen = torch.randperm(count, generator=generator)[: int(DEAD * count)]
            layer.convolution.weight[chosen] = 0
            layer.normalization.weight[chosen] = 0
            layer.normalization.bias[chosen] = -0.1
            # The convolution behind the second one is 1x1 and has no padding: its constants can be absorbed.
            if constants and name.endswith(".1"):
                layer.normalization.bias[chosen[::2]] = 0.1
            dead[f"{name}.convolution"] = sorted(chosen.tolist())
    return dead


# --------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------


def kernel_rows(options: Options) -> list[Row]:
    device = torch.device(options.device)
    # Without transformers (a GPU machine may lack it) our own ResNet-50: kernels see shapes alone.
    model = network(options.tiny) if _has("transformers") else networks.resnet50()
    state = model.to(device).state_dict().values()
    tensors = [t.detach() for t in state if t.is_floating_point() and t.dim() > 0]
    generator = torch.Generator().manual_seed(2)
    keep = [
        torch.randperm(t.shape[0], generator=generator)[: -(-t.shape[0] // 2)].sort().values for t in tensors
    ]
    on_device = [k.to(device) for k in keep]
    kept_bytes = sum(
        t.numel() // t.shape[0] * k.numel() * t.element_size() for t, k in zip(tensors, keep, strict=True)
    )
    all_bytes = sum(t.numel() * t.element_size() for t in tensors)
    expected = [t.index_select(0, k) for t, k in zip(tensors, on_device, strict=True)]
    norms = [t.double().flatten(1).norm(dim=1) if t.dim() > 1 else t.double().abs() for t in tensors]

    def gather(run: Callable[[], list[Tensor]]) -> Subject:
        return Subject(run, error=lambda: float(not all(map(torch.equal, run(), expected))))

    def reduce(run: Callable[[], list[Tensor]]) -> Subject:
        return Subject(
            run,
            error=lambda: max(
                float((a.double() - b).norm() / b.norm()) for a, b in zip(run(), norms, strict=True)
            ),
        )

    def eager_norms() -> list[Tensor]:
        return [
            torch.linalg.vector_norm(t, 2, dim=list(range(1, t.dim()))) if t.dim() > 1 else t.abs()
            for t in tensors
        ]

    gathers: dict[str, Callable[[int], Subject]] = {
        "index_select": lambda i: gather(
            lambda: [t.index_select(0, k) for t, k in zip(tensors, on_device, strict=True)]
        )
    }
    reductions: dict[str, Callable[[int], Subject]] = {"vector_norm": lambda i: reduce(eager_norms)}
    for name in _backends(device):
        gathers[name] = lambda i, name=name: gather(lambda: compact_filters(tensors, keep, backend=name))
        reductions[name] = lambda i, name=name: reduce(lambda: filter_norms(tensors, backend=name))
    rows = []
    for mode, build, moved in (
        ("gather", gathers, 2 * kept_bytes),
        ("norms", reductions, all_bytes),
    ):
        if options.wants("modes", mode):
            got = measure(
                "compaction",
                "resnet50",
                mode,
                {k: b for k, b in build.items() if options.wants("providers", k)},
                device=device,
                moved_bytes=moved,
                input_bytes=all_bytes,
                config={"dtype": "float32", "tensors": len(tensors)},
                effort=options.effort,
            )
            options.report(got)
            rows += got
    return rows


def _backends(device: torch.device) -> list[str]:
    usable = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ())
    return [name for name in usable if backends.available()[name].available]


# --------------------------------------------------------------------------------------------------
# The whole of it
# --------------------------------------------------------------------------------------------------


def whole_rows(options: Options) -> list[Row]:
    device = torch.device(options.device)
    rows: list[Row] = []
    if not _has("transformers"):
        print("compact: not measured, transformers is not installed")
        return rows
    for case in ("zeros", "constants"):
        if not options.wants("only", case) or not options.wants("modes", "compact"):
            continue
        model = network(options.tiny)
        dead = kill(model, constants=case == "constants")
        model = model.to(device)
        size = 32 if options.tiny else 224
        image = torch.randn(1, 3, size, size, device=device)
        with torch.no_grad():
            expected = model(image).logits.double()

        build: dict[str, Callable[[int], Subject]] = {
            "compact": lambda i, args=(model, image, expected): _ours(*args),
        }
        if _has("torch_pruning"):
            build["torch-pruning"] = lambda i, args=(model, dead, image, expected): _theirs(*args)
        got = measure(
            "compaction",
            f"resnet50/{case}",
            "compact",
            {k: b for k, b in build.items() if options.wants("providers", k)},
            device=device,
            moved_bytes=2 * sum(p.numel() * p.element_size() for p in model.parameters()),
            input_bytes=1 << 40,  # one set: nothing here is about a cache
            config={"dtype": "float32", "dead": sum(map(len, dead.values()))},
            effort=options.effort or WHOLE,
            with_copy=False,
        )
        options.report(got)
        rows += got
    return rows


def _error(model: nn.Module, image: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((model(image).logits.double() - expected).norm() / expected.norm())


def _ours(model: nn.Module, image: Tensor, expected: Tensor) -> Subject:
    return Subject(
        lambda: compact(model, image, measure=False),
        error=lambda: _error(compact(model, image, measure=False).model, image, expected),
    )


def _theirs(model: nn.Module, dead: dict[str, list[int]], image: Tensor, expected: Tensor) -> Subject:
    """It cuts in place, so it gets a copy, which is not timed."""
    import torch_pruning as tp

    ready: list[nn.Module] = []

    def prepare() -> None:
        ready[:] = [copy.deepcopy(model)]

    def run() -> nn.Module:
        (subject,) = ready
        graph = tp.DependencyGraph().build_dependency(subject, example_inputs=image)
        for name, filters in dead.items():
            graph.get_pruning_group(
                subject.get_submodule(name), tp.prune_conv_out_channels, idxs=filters
            ).prune()
        return subject

    def error() -> float:
        prepare()
        return _error(run(), image, expected)

    return Subject(run, prepare, error)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def main(options: Options) -> list[Row]:
    """All of it; rows as in the other benchmarks."""
    return [*kernel_rows(options), *whole_rows(options)]
