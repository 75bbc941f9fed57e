"""The loss itself: every provider, forward, backward, both and first call, over shapes, dtypes, layouts,
norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..harness.loss_cases import PROVIDERS, Case, Loss, providers_here
from ..harness.measure import Effort, Options, Row, Subject, measure
from ..harness.shapes import SETTINGS, shrink
from ..harness.truth import Truth
from .first_call import first_call_rows

MODES = ("forward", "backward", "both")


def subject(run: Loss, features: list[Tensor], mode: str, truth: Truth) -> Subject:
    """One provider in one mode, with the comparison of exactly what was timed."""

    def both() -> tuple[Tensor, Sequence[Tensor]]:
        loss = run(features)
        return loss, torch.autograd.grad(loss, features)

    def error() -> float:
        loss, grads = both()
        return truth.error(loss, grads if mode != "forward" else None)

    if mode == "forward":
        return Subject(lambda: run(features), error=error)
    if mode == "both":
        return Subject(both, error=error)
    graph: list[Tensor] = []

    def prepare() -> None:
        graph[:] = [run(features)]

    return Subject(lambda: torch.autograd.grad(graph.pop(), features), prepare, error)


def run_case(
    case: Case,
    providers: Sequence[str],
    modes: Sequence[str],
    device: torch.device | str,
    effort: Effort | None = None,
    bench: str = "loss",
) -> list[Row]:
    """All rows of one case."""
    torch.compiler.reset()
    by_copy: dict[int, list[Tensor]] = {}

    def inputs(copy: int) -> list[Tensor]:
        if copy not in by_copy:
            by_copy[copy] = case.features(device, seed=copy)
        return by_copy[copy]

    truth = Truth(inputs(0), case.options)

    def make(run: Loss, mode: str, copy: int) -> Subject:
        return subject(run, inputs(copy), mode, truth)

    functions = {name: PROVIDERS[name](case) for name in providers}

    def copy_to_new(copy: int) -> Subject:
        sources = [f.detach() for f in inputs(copy)]
        return Subject(lambda: [f.clone() for f in sources])

    rows = []
    for mode in modes:
        # The gradients are new tensors, and on a CPU new memory costs more than the bytes written to it (a
        # page fault for every 4 KB of a large tensor): the roof of a backward pass is a copy to new
        # tensors.
        new = mode != "forward"
        build = {name: partial(make, run, mode) for name, run in functions.items()}
        rows += measure(
            bench,
            case.name,
            mode,
            build,
            device=device,
            moved_bytes=case.moved_bytes(mode),
            input_bytes=case.feature_bytes,
            config=case.config(),
            effort=effort,
            copy=copy_to_new if new else None,
            copy_bytes=2 * case.feature_bytes,
        )
    return rows


# --------------------------------------------------------------------------------------------------
# Which cases
# --------------------------------------------------------------------------------------------------


def cases(device: torch.device | str, options: Options) -> Iterator[Case]:
    """Every setting in its usual form, then ResNet-56 in every dtype, layout and norm ("variants").

    The usual form is fp32 contiguous on a CPU; on a GPU bf16 channels_last is measured as well.
    """
    gpu = torch.device(device).type == "cuda"
    change = shrink if options.tiny else lambda setting: setting
    for setting in map(change, SETTINGS.values()):
        if not options.wants("only", setting.name) or (setting.gpu_only and not gpu):
            continue
        batch = setting.batch_on(device)
        if not setting.gpu_only:
            yield Case(setting, batch)
        if gpu:
            yield Case(setting, batch, dtype="bfloat16", layout="channels_last")
    if not options.wants("only", "variants"):
        return
    network = change(SETTINGS["resnet56"])
    plain = Case(network, network.batch_on(device))
    for dtype in ("bfloat16", "float16", "float64"):
        yield replace(plain, dtype=dtype)
    yield replace(plain, layout="channels_last")
    for norm in ("l2_squared", "l2"):
        yield replace(plain, norm=norm)
    yield replace(plain, norm="l2", curvature_kind="angle")
    form: dict[str, Any] = {"dtype": "bfloat16", "layout": "channels_last"} if gpu else {}
    for batch in (1, 4, 16, 64, 256):  # speed-up by size
        yield replace(plain, batch=batch, **form)


# torch.compile's time grows faster than the number of features: 55 of them took it 78 s on two shared cores.
MOST_TO_COMPILE = 100
FIRST_CALLS = ("tiny9", "resnet56")


def main(options: Options) -> list[Row]:
    """Measure, reporting each case as it is done."""
    chosen = [p for p in providers_here(options.device) if options.wants("providers", p)]
    modes = [m for m in MODES if options.wants("modes", m)]
    rows: list[Row] = []
    for case in cases(options.device, options) if modes else ():
        able = [p for p in chosen if p != "compile" or len(case.setting.shapes(1)) <= MOST_TO_COMPILE]
        got = run_case(case, able, modes, options.device, options.effort)
        options.report(got)
        rows += got
    for name in FIRST_CALLS if options.wants("modes", "first") else ():
        if options.wants("only", name):
            got = first_call_rows(name, chosen, options.device)
            options.report(got)
            rows += got
    return rows
