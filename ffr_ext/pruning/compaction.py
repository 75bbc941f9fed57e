"""`compact`: dead channels leave a model, and it computes the same function. START HERE for the pruning side.

graph/: trace -> analysis (rules/: what each op does to channels and constants) -> solver (which may leave) ->
surgery/: make_plan -> apply (cuts the tensors) -> verify (against the source) -> the same again, where the cut may have
made more possible (search, compose) -> report.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..models import as_call, deep_copy
from .graph.solver import Options
from .measure import count_bytes, count_flops, count_parameters, measure_latency
from .ranks import check_same_on_all_ranks
from .report import CompactionReport, channel_sets, experts_that_stay
from .surgery import optimizer as optimizer_state
from .surgery.plan import CompactionPlan, check_plain_module
from .surgery.search import Search
from .verify import Check


@dataclass(frozen=True)
class Compaction:
    """The result of `compact`: the smaller ``model``, the ``plan`` to make another one so, the ``report``."""

    model: nn.Module
    plan: CompactionPlan
    report: CompactionReport


def compact(
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    strict: bool = True,
    inplace: bool = False,
    measure: bool = True,
) -> Compaction:
    """Take the dead channels out of a model, exactly or not at all.

    The model is traced with ``torch.export`` in eval mode. A channel leaves if it is the constant 0, or a constant
    that all its readers absorb in their biases, or merge into the weights of another constant channel that stays,
    or if nobody reads it, together with all channels coupled to it (residual additions, depthwise convolutions,
    groups). Everything else stays, and the report says why. The result is run against ``model`` before it is
    returned; what does not hold is not removed. Where eval mode leaves parameters unread (auxiliary classifiers),
    it also has to run in training mode.

    Args:
        model: Any module that ``torch.export`` can trace. It is not changed, unless ``inplace``.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs; their shapes are what is
            traced.
        optimizer: The optimizer that trains ``model``. Its parameters and their state (of any optimizer whose
            state has its parameter's shape: SGD, Adam, AdamW, ...) are exchanged in place: it goes on with
            the result.
        round_to: Channel counts that change become multiples of it, by keeping the strongest dead channels.
        min_channels: What a layer whose channels are all dead keeps.
        strict: False also removes a constant that its reader cannot absorb exactly (other than 0, in front of
            a zero-padded convolution). It goes into the bias at the value it has away from the border, and
            ``report.max_error`` says what that did to the outputs.
        inplace: Cut ``model`` itself. Otherwise the result is a deep copy, without the source's hooks.
        measure: Measure the latency of both models for the report.

    Returns:
        `Compaction` (model, plan, report). The model consists of the user's own modules with smaller
        parameters; devices, dtypes, memory formats, ``requires_grad``, training mode, tied parameters and
        buffers are as they were.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model fails on the example inputs, cannot be traced, is wrapped (DDP, FSDP,
            ``torch.compile``), an argument is out of range, or the optimizer keeps a state that cannot be cut.
            Nothing is changed then.
        RuntimeError: under ``torch.distributed``, the ranks would remove different channels.
    """
    check_plain_module(model, "compact")
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    optimizer_state.check_optimizer(optimizer)
    with check_same_on_all_ranks() as agree:
        args, kwargs = as_call(example_inputs)
        check = Check(model, args, kwargs)
        found = Search(model, args, kwargs, check, Options(int(round_to), int(min_channels))).run(strict)
        agree(found.plan.digest())

    before = (count_parameters(model), count_flops(model, args, kwargs), count_bytes(model))
    source = model
    result = found.candidate
    if inplace:
        source = deep_copy(model) if measure else model
        found.plan.apply(model, optimizer)
        result = model
    elif optimizer is not None:
        try:
            optimizer_state.carry_over(optimizer, model, result, found.plan)
        except optimizer_state.OptimizerError as error:
            raise ValueError(str(error)) from error
    after = (count_parameters(result), count_flops(result, args, kwargs), count_bytes(result))
    remark = check.remark(found.error)
    notes = [*found.notes, *experts_that_stay(found.solver), *([remark] if remark else [])]
    report = CompactionReport(
        parameters=(before[0], after[0]),
        flops=(before[1], after[1]),
        bytes=(before[2], after[2]),
        latency=measure_latency((source, result), args, kwargs) if measure else None,
        max_error=found.error,
        max_output=check.max_output,
        sets=channel_sets(found.solver, found.removed),
        replaced=dict(found.plan.replaced),
        unknown_ops=dict(found.solver.analysis.unknown),
        notes=notes,
    )
    return Compaction(result, found.plan, report)
