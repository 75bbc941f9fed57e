"""`CompactionPlan`: what to cut from which tensor, as readable JSON that any fresh copy of the model can be
cut by."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...models import (
    all_tensors,
    canonical_names,
    check_dense_weights,
    check_no_fake_quantisation,
    find_wrapper,
)
from ..graph.branches import IDENTITY, ZEROS
from .apply import apply_cuts
from .cuts import Cut, CutError
from .merges import Merge
from .optimizer import OptimizerError, check_optimizer

FORMAT = "ffr_ext.compaction_plan"
# 2 has merges. A plan without any is written as version 1, which every ffr_ext reads.
VERSIONS = (1, 2)


@dataclass(frozen=True)
class CompactionPlan:
    """How to make a model smaller without its example inputs: kept indices per tensor, and what follows from
    them.

    Attributes:
        source: Name of each parameter and buffer of the model the plan is for -> its shape. Tied tensors
            once.
        cuts: Name of a tensor -> its cuts, one for each dimension that gets smaller.
        merges: Name of a weight -> the constant channels whose slices it adds to that of one that stays, before it is
            cut (see `Merge`).
        biases: Name of a bias -> what is added to its kept entries (constants of removed channels that its
            layer absorbs), and whether the bias has to be made first.
        attributes: Path of a module -> the attributes that say its sizes (``out_channels``, ...), and their
            values.
        replaced: Path of a module that is dead as a whole -> ``"Identity"`` or ``"Threshold"`` (gives zeros).
    """

    source: Mapping[str, tuple[int, ...]]
    cuts: Mapping[str, list[Cut]] = field(default_factory=dict)
    biases: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    attributes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)
    merges: Mapping[str, list[Merge]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.source, Mapping):
            raise TypeError(
                f"source: expected a mapping of names to shapes, got {type(self.source).__name__}; "
                "CompactionPlan.load(path) reads a plan from a file"
            )

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """Cut ``model``, in place, and return it; ``optimizer`` then trains what is left of its parameters.

        Use it on a freshly made model before ``load_state_dict(torch.load(path, weights_only=True))``.

        Raises:
            TypeError: ``model`` is no module, or ``optimizer`` no optimizer.
            ValueError: the plan is for another model (other names or shapes), the model is wrapped (DDP,
                FSDP, ``torch.compile``), or the optimizer keeps a state that cannot be cut. Nothing is
                changed then.
        """
        check_plain_module(model, "CompactionPlan.apply", values=False)
        check_optimizer(optimizer)
        self._check_model(model)
        try:
            apply_cuts(model, self, optimizer)
        except (CutError, OptimizerError) as error:
            raise ValueError(str(error)) from error
        return model

    @property
    def is_empty(self) -> bool:
        """The plan changes nothing."""
        return not (self.cuts or self.replaced or self.biases)

    def digest(self) -> str:
        """SHA-256 of the plan's content: equal on all ranks that compute the same plan."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    # ---------------------------------------------------------------------------------------------------
    # JSON
    # ---------------------------------------------------------------------------------------------------

    def save(self, path: str | bytes | os.PathLike[Any]) -> None:
        """Write the plan as JSON. It replaces the file at once, so that a reader never sees half of it."""
        name = os.fsdecode(path)
        version = 2 if self.merges else 1
        temporary = f"{name}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(
                {"format": FORMAT, "version": version, "sha256": self.digest(), **self._content()},
                file,
                indent=1,
            )
            file.write("\n")
        os.replace(temporary, name)

    @classmethod
    def load(cls, path: str | bytes | os.PathLike[Any]) -> CompactionPlan:
        """Read a plan that `save` wrote.

        Raises ValueError for a file that is no plan, is of another version, or does not match its own
        checksum.
        """
        name = os.fsdecode(path)
        with open(name, encoding="utf-8") as file:
            try:
                data = json.load(file)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{name}: not a compaction plan: not JSON ({error})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'{name}: not a compaction plan: expected "format": "{FORMAT}"')
        if data.get("version") not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise ValueError(f"{name}: plan of version {data.get('version')!r}, this ffr_ext reads {known}")
        try:
            plan = cls(
                source={n: tuple(int(s) for s in shape) for n, shape in data["source"].items()},
                cuts={n: [Cut.from_json(c) for c in cuts] for n, cuts in data["cuts"].items()},
                biases=data["biases"],
                attributes=data["attributes"],
                replaced=data["replaced"],
                merges={n: [Merge.from_json(m) for m in ms] for n, ms in data.get("merges", {}).items()},
            )
            digest = plan.digest()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name}: damaged compaction plan: {type(error).__name__}: {error}") from None
        if data.get("sha256") != digest:
            raise ValueError(f"{name}: damaged compaction plan: its content does not match its checksum")
        if not set(plan.replaced.values()) <= {IDENTITY, ZEROS}:
            raise ValueError(f"{name}: unknown replacement among {sorted(set(plan.replaced.values()))}")
        return plan

    def _content(self) -> dict[str, Any]:
        merges = {n: [m.to_json() for m in ms] for n, ms in self.merges.items()}
        return {
            "source": {n: list(s) for n, s in self.source.items()},
            "replaced": dict(self.replaced),
            "attributes": {p: dict(a) for p, a in self.attributes.items()},
            "biases": {n: dict(b) for n, b in self.biases.items()},
            "cuts": {n: [c.to_json() for c in cuts] for n, cuts in self.cuts.items()},
            **({"merges": merges} if merges else {}),
        }

    def _check_model(self, model: nn.Module) -> None:
        shapes = source_shapes(model)
        problems = [f"{n} is missing" for n in self.source if n not in shapes]
        problems += [f"{n} is not in the plan" for n in shapes if n not in self.source]
        problems += [
            f"{n} has shape {shapes[n]}, expected {tuple(s)}"
            for n, s in self.source.items()
            if n in shapes and shapes[n] != tuple(s)
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"this plan is for another model: {'; '.join(problems[:3])}{more}")


def source_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter and buffer, tied ones once."""
    names = canonical_names(model)
    return {n: tuple(t.shape) for n, t in all_tensors(model) if names[n] == n}


_REMEDIES = {
    "DistributedDataParallel": "pass model.module, and wrap the result again",
    "DataParallel": "pass model.module, and wrap the result again",
    "FullyShardedDataParallel": "compact the model before it is sharded, and wrap the result",
    "FSDPModule": "compact the model before fully_shard, and shard the result",
    "OptimizedModule": "pass model._orig_mod, and compile the result again",
    "ScriptModule": "pass the module it was scripted from, and script the result again",
}


def check_plain_module(model: nn.Module, caller: str, *, values: bool = True) -> None:
    """ValueError for a wrapper whose inside must not change its shapes, with what to do instead."""
    wrapper = find_wrapper(model, caller)
    if wrapper is not None:
        name, at = wrapper
        raise ValueError(
            f"{caller}: the model is wrapped in {name}{at}, which keeps references to tensors of the old shapes; "
            f"{_REMEDIES[name]}"
        )
    check_dense_weights(model, caller, values=values)
    check_no_fake_quantisation(model, caller)
