"""What the penalty adds to a compiled step on a CPU, counted in the code that Inductor generates.

`python -m benchmarks.compiled_budgets` prints what is counted beside `compiled_budgets.json`, `--write` takes it over.
Kernels: calls of generated loops and of this package's ops, forward and backward. Saved bytes: what the forward pass
keeps for the backward pass. Transposed: buffers of a feature's size that are contiguous where convolutions want
channels_last.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from .harness import networks
from .suites.step import PLAIN, StepCase
from .suites.step_compiled import CompiledStep

FILE = Path(__file__).resolve().parent / "compiled_budgets.json"
PENALISED = ("ffr_loss", "FeatureFlow")


def small_resnet() -> networks.ResNet:
    """One stage of three blocks: what repeats in a deep one, and half a minute of compiling."""
    stem = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
    return networks.ResNet(stem, 16, [(3, 16, 16, 1)], 10, stem_is_feature=True)


def small_vit() -> networks.ViT:
    """Four blocks of width 32 on 16 tokens."""
    return networks.ViT(16, 4, 32, 4, 2, 10)


CASES = (StepCase("resnet", 4, 16, small_resnet, 10), StepCase("vit", 4, 16, small_vit, 10))
Counts = dict[str, int]

# How many kernels another version of torch may need more: it fuses by rules of its own.
OTHER_KERNELS = 4


def count(case: StepCase, provider: str) -> Counts:
    """Of one step. The compiler's cache is left aside, since what comes from it shows no code."""
    torch.compiler.reset()
    step = CompiledStep(case, provider, "cpu")
    with config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(step.run)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.run()
    code = "\n".join(codes)
    return {
        "kernels": len(
            re.findall(r"^\s+cpp_fused_\w+\(|torch\.ops\.ffr_ext\.\w+\.\w+\(", code, re.MULTILINE)
        ),
        "saved_bytes": sum(kept.values()),
        "transposed": _contiguous_images(code),
    }


def _contiguous_images(code: str) -> int:
    """Buffers of images of more than a few channels that are allocated contiguous."""
    found = 0
    for match in re.finditer(
        r"empty_strided_cpu\(\((\d+), (\d+), (\d+), (\d+)\), \(\d+, (\d+), \d+, 1\)", code
    ):
        batch, channels, height, width, stride = map(int, match.groups())
        found += batch > 1 and channels > 3 and height > 3 and stride == height * width
    return found


def added(case: StepCase) -> dict[str, Counts]:
    """What each way to the penalty adds to the plain step."""
    plain = count(case, PLAIN)
    return {
        f"{case.network}/{provider}": {key: got - plain[key] for key, got in count(case, provider).items()}
        for provider in PENALISED
    }


def problems(name: str, counted: Counts, content: dict[str, Any]) -> list[str]:
    """A sentence for every count above its budget."""
    slack = 0 if torch.__version__.startswith(content["torch"]) else OTHER_KERNELS
    found = []
    for key, limit in content["budgets"][name].items():
        more = slack if key == "kernels" else max(abs(limit) // 50, 256) if key == "saved_bytes" else 0
        if counted[key] > limit + more:
            found.append(f"{name}: {counted[key]} {key} more than the plain step, the budget is {limit}")
    return found


def load() -> dict[str, Any]:
    """The committed budgets, and the version of torch that they were counted with."""
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def main(arguments: list[str] | None = None) -> int:
    """Print counts and budgets; write them if asked to."""
    parser = argparse.ArgumentParser("python -m benchmarks.compiled_budgets", description=__doc__)
    parser.add_argument("--write", action="store_true", help="take over what is counted")
    options = parser.parse_args(arguments)
    counted: dict[str, Counts] = {}
    for case in CASES:
        counted.update(added(case))
    known = load()["budgets"] if FILE.exists() else {}
    for name, counts in counted.items():
        print(f"{name:24s} {counts}  budget {known.get(name)}")
    if options.write:
        content = {"torch": ".".join(torch.__version__.split(".")[:2]), "budgets": counted}
        FILE.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
