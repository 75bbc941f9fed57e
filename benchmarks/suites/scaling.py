"""How time and memory grow with depth L, elements N and dtype: the data of the scaling law that `report`
fits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..harness.loss_cases import Case, providers_here
from ..harness.measure import Effort, Options, Row
from ..harness.shapes import Setting
from .loss import run_case


def cases(device: torch.device | str) -> Iterator[Case]:
    """One stage of L features of N elements: L at a fixed N, N at a fixed L, and both again in bf16."""
    gpu = torch.device(device).type == "cuda"
    depths = (2, 4, 8, 16, 32, 64, 128, 256)
    sizes = tuple(1 << p for p in (range(12, 29, 2) if gpu else range(8, 24, 2)))
    fixed = 1 << 22 if gpu else 1 << 16
    for dtype in ("float32", "bfloat16"):
        for depth in depths:
            yield Case(Setting(f"L{depth}", ((depth, (fixed // 4,)),), 4, 4, "depth"), 4, dtype)
        for size in sizes:
            yield Case(Setting(f"N{size}", ((8, (size // 4,)),), 4, 4, "elements"), 4, dtype)


def main(options: Options) -> list[Row]:
    """Measure forward and backward together, of eager and ours; torch.compile would compile for each size."""
    chosen = [p for p in providers_here(options.device) if p != "compile" and options.wants("providers", p)]
    rows: list[Row] = []
    for case in cases(options.device):
        if not options.wants("only", case.setting.name) or (
            options.tiny and case.setting.elements(4) > 1 << 15
        ):
            continue
        effort = options.effort or Effort(seconds=0.2)
        got = run_case(case, chosen, ["both"], options.device, effort, bench="scaling")
        options.report(got)
        rows += got
    return rows
