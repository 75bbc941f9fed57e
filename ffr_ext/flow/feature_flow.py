"""FeatureFlow: feature flow regularization of a model you do not want to rewrite."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import checks
from ..backends import BACKENDS
from ..functional import FlowTerms, StatsMaker, flow_terms, penalty
from ..models import as_call, evaluating
from ..stages import has_term
from .calls import watch_calls
from .capture import BeginHook, EndHook, LayerHook, OutputSelector, Recorder, output_selector
from .describe import Description, describe
from .layers import LayerSpec, select_layers
from .paths import Path
from .taps import Slot, collect

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self needs Python 3.11


class FeatureFlow:
    """Capture the outputs of a model's layers and penalise the length and curvature of their trajectory.

    ::

        flow = FeatureFlow(model)                     # which layers? print(flow.layers)
        with flow:                                    # or flow.attach() ... flow.detach()
            for x, y in loader:
                loss = criterion(model(x), y) + flow.loss()
                loss.backward()

    ``flow.loss()`` equals ``ffr_loss(features, ...)`` on the captured outputs, in the order in which the
    layers were called. A layer called twice in one forward gives two features. The gradient of each
    feature is made right before its layer's own backward, so that they never exist all at once: for l1 the
    pass adds an eighth of the features' bytes (fp32) and one gradient, where one node for all adds them all.

    Args:
        model: the module whose call is one forward pass. Give it the module that you call, or that a
            wrapper such as DistributedDataParallel calls.
        layers: ``"auto"`` (repeated blocks of one class under one parent, such as residual blocks and
            transformer layers; else activation modules), names, modules, or a predicate ``(name, module)
            -> bool``.
        output: which part of a layer's output is its feature, if that is not a tensor: an index, a key, or
            a function of the output. Default: the first floating-point tensor.
        capture_eval: also record passes in eval mode or without autograd, to measure; by default they
        leave no trace. gradient, curvature, norm, curvature_kind, reduction, transition, backend: see
        :func:`ffr_loss`.

    Which forward counts: the last training forward that began before ``loss()``. Each forward starts
    afresh, and ``loss()`` can be built once from it. Forwards in eval mode or under ``no_grad`` in between
    change nothing, and so does recomputation by non-reentrant activation checkpointing. For steps that are
    more or less than one call of the model see :meth:`begin_pass`.

    Raises:
        TypeError: ``model`` is no module. ValueError: ``model`` is ``nn.DataParallel``, or ``layers``
        selects nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec = "auto",
        *,
        gradient: float | Sequence[float] | Tensor = 1.0,
        curvature: float | Sequence[float] | Tensor = 1.0,
        norm: str = "l1",
        curvature_kind: str = "difference",
        reduction: str = "mean",
        transition: str = "break",
        backend: str = "auto",
        output: OutputSelector | None = None,
        capture_eval: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model: nn.DataParallel runs replicas in threads and cannot be captured; use "
                "DistributedDataParallel"
            )
        checks.check_options(norm, curvature_kind, reduction, transition)
        checks.check_choice("backend", backend, ("auto", *BACKENDS))
        for name, weight in (("gradient", gradient), ("curvature", curvature)):
            checks.term_weights(
                name, weight, len(weight) if hasattr(weight, "__len__") and _rank(weight) else 0
            )
        if not isinstance(capture_eval, bool):
            raise TypeError(f"capture_eval: expected True or False, got {capture_eval!r}")
        self.model = model
        self.gradient = gradient
        self.curvature = curvature
        self.options: dict[str, Any] = {
            "norm": norm,
            "curvature_kind": curvature_kind,
            "reduction": reduction,
            "transition": transition,
            "backend": backend,
        }
        self._modules = select_layers(model, layers)
        # The reference backend is plain torch, which autograd differentiates by itself.
        self._recorder = Recorder(output_selector(output), capture_eval, tapping=backend != "reference")
        self._handles: list[RemovableHandle] = []
        self._watches_calls = False
        self._last_terms: Callable[[], FlowTerms] | None = None

    @property
    def layers(self) -> list[str]:
        """Qualified names of the captured layers, in the order of ``model.named_modules()``."""
        return list(self._modules)

    @property
    def output(self) -> OutputSelector | None:
        """Which part of a layer's output is its feature."""
        return self._recorder.output

    @property
    def enabled(self) -> bool:
        """Whether forward passes are recorded. While it is False the hooks cost nothing and ``loss()``
        raises."""
        return self._recorder.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not value:
            self._recorder.clear()
        self._recorder.enabled = bool(value)

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> Self:
        """Put the hooks on the model; no effect if they are there. Compile the model after this, not
        before."""
        if not self._handles:
            self._recorder.clear()
            handles = [self.model.register_forward_pre_hook(BeginHook(self._recorder))]
            last = self.layers[-1]
            for name, module in self._modules.items():
                handles.append(module.register_forward_hook(LayerHook(self._recorder, name, name == last)))
            handles.append(self.model.register_forward_hook(EndHook(self._recorder)))
            self._handles = handles
            self._watches_calls = False
            self._finalizer = weakref.finalize(self, _remove, handles)
        return self

    def detach(self) -> None:
        """Take the hooks off the model and let go of all features."""
        if self._handles:
            self._finalizer()
            self._handles = []
        self._recorder.clear()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def begin_pass(self, *, within_forward: bool = False) -> None:
        """Record from here to :meth:`end_pass` as one pass, for steps that are more or less than one call of
        ``model``. Trainers use it.

        Each call in the pass is a path of its own, and :meth:`loss` is the sum of their penalties. A call is
        that of the outermost running module that contains all captured layers: of ``model``, or of a module
        in it such as the stack of blocks. Calls in eval mode or without autograd leave no trace unless
        ``capture_eval``, and neither does a call that raised. What layers compute outside any such call, in
        a step that calls the blocks one by one, makes one more path, in call order and in whatever mode;
        :meth:`end_pass` warns where that looks like several calls.

        Args:
            within_forward: the whole pass is to run inside one call of ``model``, as the step of a
                LightningModule does inside DistributedDataParallel. That call is not one of those above.
        """
        if self._handles and not self._watches_calls:
            # From the first pass by hand on: others need no such hooks. They stay, because a compiled graph
            # would not find them again.
            self._handles += watch_calls(self._recorder, self.model, self._modules.values())
            self._watches_calls = True
        self._recorder.begin_by_hand(within_forward)

    def end_pass(self) -> None:
        """End what :meth:`begin_pass` began."""
        self._recorder.end_by_hand()

    @property
    def in_pass(self) -> bool:
        """Whether a pass begun with :meth:`begin_pass` is open."""
        return self._recorder.by_hand

    def captured(self) -> list[tuple[str, Tensor]]:
        """Names and features of the last recorded pass, in call order, until its ``loss()`` is built.

        Of a pass by hand: call after call, behind what was called outside any call.
        """
        return [pair for path in self._paths() for pair in zip(path.names, path.features, strict=True)]

    def describe(self, example_inputs: Any) -> Description:
        """Print the layers, shapes, stages and terms the loss will use for such inputs, and return them.

        ``example_inputs``: a tensor, a tuple of positional or a dict of keyword inputs of ``model``, which
        is run once in eval mode and without autograd; nothing of it stays behind.
        """
        args, kwargs = as_call(example_inputs)
        probe = FeatureFlow(
            self.model, self.layers, output=self.output, capture_eval=True, backend="reference"
        )
        enabled, self.enabled = self.enabled, False
        try:
            with probe, evaluating(self.model):
                self.model(*args, **kwargs)
                captured = probe.captured()
        finally:
            self.enabled = enabled
        names, features = [name for name, _ in captured], [feature for _, feature in captured]
        settings = {"gradient": self.gradient, "curvature": self.curvature, **self.options}
        description = describe(names, features, self.options["transition"], settings)
        print(description)
        return description

    def loss(self) -> Tensor:
        """The penalty of the last recorded forward, a 0-dim tensor: ``ffr_loss(features, ...)``. Once per
        forward.

        Of a pass by hand it is the sum of the penalties of its calls, each with the same weights. A call
        without any term adds nothing to those that have some.

        Raises:
            RuntimeError: nothing was captured, the forward did not finish, a layer was not called, ran
                without autograd (reentrant checkpointing), or its output was overwritten in place; the
                message names the layer.
            ValueError: the features make no term, or the keywords do not fit (see :func:`ffr_loss`).
        """
        paths = self._paths()
        self._recorder.clear("taken")
        total: Tensor | None = None
        terms: list[Callable[[], FlowTerms]] = []
        for path in paths if len(paths) == 1 else self._with_terms(paths):
            try:
                loss, terms_of_path = penalty(
                    path.features,
                    gradient=self.gradient,
                    curvature=self.curvature,
                    **self.options,
                    make_stats=_just_in_time(path),
                )
            except (TypeError, ValueError) as error:
                if not str(error).startswith("features"):
                    raise
                raise type(error)(
                    f"{error}\nFeatureFlow captured {path.outputs()}; layers= chooses others"
                ) from error
            terms.append(terms_of_path)
            total = loss if total is None else total + loss.to(total.device)
        self._last_terms = terms[0] if len(terms) == 1 else partial(_one_after_another, terms)
        assert total is not None
        return total

    def terms(self) -> FlowTerms:
        """Length and curvature per term, detached and without weights: ``flow_terms(features, ...)``, to log.

        Belongs to the last recorded forward, whether its ``loss()`` was built or not. Of a pass by hand: the
        terms of its calls, one call after another.
        """
        if self._recorder.state == "taken" and self._last_terms is not None:
            gradient, curvature = self._last_terms()
            return FlowTerms(gradient.detach(), curvature.detach())
        terms = []
        for path in self._with_terms(self._paths()):
            detached = [feature.detach() for feature in path.features]
            terms.append(partial(flow_terms, detached, **self.options))
        return _one_after_another(terms)

    def _paths(self) -> list[Path]:
        if not self._handles:
            raise RuntimeError(
                "FeatureFlow is not attached: use `with flow:` or flow.attach() before the forward"
            )
        recorder = self._recorder
        recorder.check_features(self.layers)
        if not recorder.capture_eval and not recorder.requires_grad():
            raise RuntimeError(
                f"FeatureFlow: none of the {len(recorder.features)} captured features requires grad, so the "
                f"penalty "
                "would change nothing: the layers before them are frozen or detached"
            )
        return recorder.paths

    def _with_terms(self, paths: list[Path]) -> list[Path]:
        """Those that make a term. If none does, the first, for ``ffr_loss`` to say why."""
        transition = self.options["transition"]
        return [path for path in paths if has_term(path.features, transition)] or paths[:1]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        recorder = self._recorder
        state.update(
            _handles=[],
            _last_terms=None,
            _recorder=Recorder(recorder.output, recorder.capture_eval, recorder.tapping),
        )
        state.pop("_finalizer", None)
        return state


def _just_in_time(path: Path) -> StatsMaker | None:
    """How the sums of a path are made if each feature gets its gradient by itself; None for one node for all
    features, as in ``ffr_loss``."""
    slots: list[Slot | None] = []
    tokens: list[Tensor] = []
    for feature, tap in zip(path.features, path.taps, strict=True):
        if tap is None:
            if feature.requires_grad:
                return None
            slots.append(None)
        else:
            slots.append(tap[0])
            tokens.append(tap[1])
    return partial(collect, slots, tokens)


def _one_after_another(terms: Sequence[Callable[[], FlowTerms]]) -> FlowTerms:
    made = [make() for make in terms]
    if len(made) == 1:
        return made[0]
    device = made[0].gradient.device
    return FlowTerms(
        torch.cat([each.gradient.to(device) for each in made]),
        torch.cat([each.curvature.to(device) for each in made]),
    )


def _rank(weight: Any) -> int:
    return weight.dim() if isinstance(weight, Tensor) else 1


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
