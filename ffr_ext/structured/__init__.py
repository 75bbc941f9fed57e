"""Structured outputs: regularise the ends of a network with auto-encoders of its inputs and outputs that share
its layers (Belharbi, Herault, Chatelain, Adam; arXiv 1504.07550).

>>> from ffr_ext.structured import StructuredOutput
>>> tasks = StructuredOutput(model, last=model[5:])                  # the output task: D(mirror_D(y)) against y
>>> loss = F.mse_loss(model(x), y) + tasks.loss(y=y_all)             # y_all: with labels that have no input
"""

from .landmarks import Cumulative, cumulative, landmark_errors
from .rows import Split, split
from .schedule import HoldThenFall
from .tasks import StructuredOutput

__all__ = [
    "Cumulative",
    "HoldThenFall",
    "Split",
    "StructuredOutput",
    "cumulative",
    "landmark_errors",
    "split",
]
