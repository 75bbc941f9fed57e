"""What the benchmarks of the loss compare: a case (shapes, dtype, layout, norm), and its providers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffr_ext import backends, ffr_loss, ops, reference

from .shapes import Setting, make_features

Loss = Callable[[Sequence[Tensor]], Tensor]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """One line of the table, for all providers."""

    setting: Setting
    batch: int
    dtype: str = "float32"
    layout: str = "contiguous"
    norm: str = "l1"
    curvature_kind: str = "difference"

    @property
    def name(self) -> str:
        """Setting and batch, and what is not the default."""
        kind = "" if self.curvature_kind == "difference" else self.curvature_kind
        special = [
            self.dtype.replace("float", "f") if self.dtype != "float32" else "",
            self.layout if self.layout != "contiguous" else "",
            self.norm if self.norm != "l1" else "",
            kind,
        ]
        return "/".join([f"{self.setting.name}x{self.batch}", *(s for s in special if s)])

    @property
    def options(self) -> dict[str, Any]:
        return {"norm": self.norm, "curvature_kind": self.curvature_kind}

    def features(self, device: torch.device | str, seed: int = 0) -> list[Tensor]:
        return make_features(
            self.setting.shapes(self.batch),
            dtype=DTYPES[self.dtype],
            layout=self.layout,
            device=device,
            seed=seed,
        )

    @property
    def feature_bytes(self) -> int:
        return self.setting.elements(self.batch) * DTYPES[self.dtype].itemsize

    def moved_bytes(self, mode: str) -> int:
        """What has to be read and written: each feature once, each gradient once, and for l1 the packed
        signs twice.

        Without saved signs the backward pass reads the features a second time.
        """
        if self.norm == "l1" and self.curvature_kind == "difference":
            saved = sum(
                ops.sign_bytes(count, self.batch * Setting("", ((1, shape),), 1, 1, "").elements(1))
                for count, shape in self.setting.runs
            )
            parts = {"forward": self.feature_bytes + saved, "backward": saved + self.feature_bytes}
        else:
            parts = {"forward": self.feature_bytes, "backward": 2 * self.feature_bytes}
        return sum(parts.values()) if mode == "both" else parts[mode]

    def config(self) -> dict[str, Any]:
        """What the row says about the case."""
        return {
            "setting": self.setting.name,
            "batch": self.batch,
            "features": len(self.setting.shapes(self.batch)),
            "elements": self.setting.elements(self.batch),
            "feature_bytes": self.feature_bytes,
            "dtype": self.dtype,
            "layout": self.layout,
            "norm": self.norm,
            "curvature_kind": self.curvature_kind,
        }


# --------------------------------------------------------------------------------------------------
# Providers: a function of the features
# --------------------------------------------------------------------------------------------------


def eager(case: Case) -> Loss:
    """The plain torch expression, op by op."""
    return lambda features: reference.ffr_loss(features, **case.options)


def compiled(case: Case) -> Loss:
    """The same expression, compiled for exactly these shapes."""
    return torch.compile(eager(case), dynamic=False, fullgraph=True)


def ours(backend: str) -> Callable[[Case], Loss]:
    """`ffr_loss` on one backend."""
    return lambda case: lambda features: ffr_loss(features, backend=backend, **case.options)


PROVIDERS: dict[str, Callable[[Case], Loss]] = {
    "eager": eager,
    "compile": compiled,
    "cpu": ours("cpu"),
    "triton": ours("triton"),
    "cuda": ours("cuda"),
}


def providers_here(device: torch.device | str) -> list[str]:
    """The providers that take tensors of this device; Triton's interpreter is no thing to time."""
    kind = torch.device(device).type
    fused = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[kind]
    status = backends.available()
    return ["eager", "compile", *(name for name in fused if status[name].available)]
