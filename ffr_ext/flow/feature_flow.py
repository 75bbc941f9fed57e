"""FeatureFlow: feature flow regularization of a model you do not want to rewrite."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import checks
from ..functional import FlowTerms
from ..models import as_call, evaluating
from ..options import FlowOptions
from ..regularizers.base import BaseRegularizer
from ..stages import has_term
from .describe import Description, describe
from .hooks import watch_calls, watch_layers
from .layers import LayerSpec, select_streams
from .masks import MaskSelector, mask_selectors
from .outputs import OutputSelector, output_selector
from .paths import Path, reached
from .penalties import (
    Weight,
    continuous,
    penalty_of,
    per_term,
    sums_while_traced,
    terms_of,
    times,
    total_of,
)
from .recorder import Recorder, State

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self needs Python 3.11

MISSING = ("raise", "skip")


class FeatureFlow(BaseRegularizer):
    """Capture the outputs of a model's layers and penalise the length and curvature of their trajectory.

    ::

        flow = FeatureFlow(model)                     # which layers? print(flow.layers)
        with flow:                                    # or flow.attach() ... flow.detach()
            for x, y in loader:
                loss = criterion(model(x), y) + flow.loss()
                loss.backward()

    ``flow.loss()`` equals ``ffr_loss(features, ...)`` on the captured outputs, in the order in which the
    layers were called; where the layers make several paths (``flow.paths``), the sum over them. A layer called twice
    in one forward gives two features. The gradient of each
    feature is made right before its layer's own backward, so that they never exist all at once: for l1 the
    pass adds an eighth of the features' bytes (fp32) and one gradient, where one node for all adds them all.

    Args:
        model: the module whose call is one forward pass. Give it the module that you call, or that a
            wrapper such as DistributedDataParallel calls.
        layers: ``"auto"`` (repeated blocks of one class under one parent, such as residual blocks and
            transformer layers; else activation modules), names, modules, or a predicate ``(name, module)
            -> bool``. ``"auto"`` gives blocks of different parents paths of their own: encoder and decoder, two
            towers, the way down and the way up of a U-net. ``[[...], [...]]`` lists the layers of each path by hand;
            any other choice is one path.
        output: which part of a layer's output is its feature, if that is not a tensor: an index, a key, or
            a function of the output. Default: the first floating-point tensor.
        capture_eval: also record passes in eval mode or without autograd, to measure; by default they
            leave no trace.
        missing: what to do about a layer that a forward did not call: ``"raise"``, or ``"skip"`` for layers that are
            skipped at random or on purpose (LayerDrop, stochastic depth, early exit): differences are then taken
            between those that ran, and a forward in which fewer than two did adds 0.
        mask: which positions are real where sequences are padded: the name of an argument of the call (such as
            ``"attention_mask"``), or a function of the call's arguments that gives the mask (such as ``lambda x,
            lengths: ...``); see ``mask`` of :func:`ffr_loss` for what it means. A list has one for each path. Of a pass
            by hand the call is that of the outermost module that contains all layers of the path.
        gradient, curvature, norm, curvature_kind, reduction, transition, backend: see :func:`ffr_loss`. With
            ``transition="pool"``, ``"auto"`` keeps the stages of a network in one path. One weight per term: those of
            all paths of a call, one path after another.

    Which forward counts: the last training forward that began before ``loss()``. Each forward starts
    afresh, and ``loss()`` can be built once from it. Forwards in eval mode or under ``no_grad`` in between
    change nothing, and so does recomputation by non-reentrant activation checkpointing. For steps that are
    more or less than one call of the model see :meth:`begin_pass`.

    Where one call of the model calls a module with all layers of a path twice, on inputs that do not depend on each
    other (a siamese network), these are two paths; a recurrent module, whose second call reads what the first one made,
    is one. Autograd's graph tells them apart, so under torch.compile or without gradients both are one.

    Attributes:
        gradient, curvature: the weights, which can be changed between steps.
        scale: a float that multiplies both, for schedules (:class:`ffr_ext.schedules.WeightSchedule`).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is ``nn.DataParallel``, or ``layers`` selects nothing.
    """

    joins_loss: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec = "auto",
        *,
        gradient: Weight = 1.0,
        curvature: Weight = 1.0,
        norm: str = "l1",
        curvature_kind: str = "difference",
        reduction: str = "mean",
        transition: str = "break",
        backend: str = "auto",
        output: OutputSelector | None = None,
        capture_eval: bool = False,
        missing: str = "raise",
        mask: MaskSelector | Sequence[MaskSelector | None] | None = None,
    ) -> None:
        super().__init__(model)
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model: nn.DataParallel runs replicas in threads and cannot be captured; use "
                "DistributedDataParallel"
            )
        self.options = FlowOptions(norm, curvature_kind, reduction, transition, backend)
        checks.check_choice("missing", missing, MISSING)
        for name, weight in (("gradient", gradient), ("curvature", curvature)):
            checks.term_weights(name, weight, len(weight) if per_term(weight) else 0)  # type: ignore[arg-type]
        if not isinstance(capture_eval, bool):
            raise TypeError(f"capture_eval: expected True or False, got {capture_eval!r}")
        self.gradient = gradient
        self.curvature = curvature
        self.missing = missing
        self._streams = select_streams(model, layers, join_stages=transition == "pool")
        chosen = {name for stream in self._streams for name in stream}
        self._layers = [name for name, _ in model.named_modules() if name in chosen]
        # The reference backend is plain torch, which autograd differentiates by itself.
        self._recorder = Recorder(
            output_selector(output),
            capture_eval,
            tapping=backend != "reference",
            streams=len(self._streams),
            masks=mask_selectors(mask, len(self._streams)),
            summing=sums_while_traced(self.options),
        )
        self._handles: list[RemovableHandle] = []
        self._watches_inner_calls = False
        self._ends_with_loss = False  # the pass that is open, since it was begun by `before_forward`
        self._last_terms: Callable[[], FlowTerms] | None = None

    @property
    def layers(self) -> list[str]:
        """Qualified names of the captured layers, in the order of ``model.named_modules()``."""
        return list(self._layers)

    @property
    def paths(self) -> list[list[str]]:
        """The same, path by path: no term compares layers of two of them."""
        return [list(stream) for stream in self._streams]

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
            self._handles = watch_layers(self._recorder, self._streams)
            self._handles += watch_calls(self._recorder, self.model, self._streams, inner=False)
            self._watches_inner_calls = False
            self._finalizer = weakref.finalize(self, _remove, self._handles)
        return self

    def detach(self) -> None:
        """Take the hooks off the model and let go of all features."""
        if self._handles:
            self._finalizer()
            self._handles = []
        self._recorder.clear()

    def begin_pass(self, *, within_forward: bool = False) -> None:
        """Record from here to :meth:`end_pass` as one pass, for steps that are more or less than one call of
        ``model``. Trainers use it.

        Each call in the pass is a path of its own, and :meth:`loss` is the sum of their penalties. A call is
        that of the outermost running module that contains all captured layers of a path: of ``model``, or of a module
        in it such as the stack of blocks. Calls in eval mode or without autograd leave no trace unless
        ``capture_eval``, and neither does a call that raised. What layers compute outside any such call, in
        a step that calls the blocks one by one, makes one more path, in call order and in whatever mode;
        :meth:`end_pass` warns where that looks like several calls.

        Args:
            within_forward: the whole pass is to run inside one call of ``model``, as the step of a
                LightningModule does inside DistributedDataParallel. That call is not one of those above.
        """
        if self._handles and not self._watches_inner_calls:
            # From the first pass by hand on: others need no such hooks. They stay, because a compiled graph
            # would not find them again.
            self._handles += watch_calls(self._recorder, self.model, self._streams, inner=True)
            self._watches_inner_calls = True
        self._recorder.begin_by_hand(within_forward)

    def end_pass(self) -> None:
        """End what :meth:`begin_pass` began."""
        self._recorder.end_by_hand()

    @property
    def in_pass(self) -> bool:
        """Whether a pass begun with :meth:`begin_pass` is open."""
        return self._recorder.by_hand

    def before_forward(self) -> None:
        """:meth:`begin_pass`; the pass ends with :meth:`loss`, or in :meth:`after_backward`."""
        self.begin_pass()
        self._ends_with_loss = True

    def after_backward(self) -> None:
        """End the pass and let go of what no loss was built from."""
        if self.in_pass:
            self.end_pass()
        self._ends_with_loss = False
        self._recorder.clear()

    def _end_with_loss(self) -> None:
        if self._ends_with_loss and self.in_pass:
            self.end_pass()
        self._ends_with_loss = False

    def passed_by(self) -> bool:
        """Whether a backward pass has gone through a call of the pass by hand of which no penalty was built."""
        return any(path.passed.noted and path.penalty is None for path in self._recorder.paths)

    def captured(self) -> list[tuple[str, Tensor]]:
        """Names and features of the last recorded pass, in call order, until its ``loss()`` is built.

        Of a pass by hand: call after call, behind what was called outside any call. Of several paths: path after path,
        in the order of their first features.
        """
        return [pair for path in self._checked() for pair in zip(path.names, path.features, strict=True)]

    def describe(self, example_inputs: Any) -> Description:
        """Print the layers, shapes, stages and terms the loss will use for such inputs, and return them.

        ``example_inputs``: a tensor, a tuple of positional or a dict of keyword inputs of ``model``, which
        is run once in eval mode and without autograd; nothing of it stays behind.
        """
        args, kwargs = as_call(example_inputs)
        probe = FeatureFlow(
            self.model,
            self.paths,
            output=self.output,
            capture_eval=True,
            missing=self.missing,
            mask=self._recorder.masks or None,
            transition=self.options.transition,
            backend="reference",
        )
        enabled, self.enabled = self.enabled, False
        try:
            with probe, evaluating(self.model):
                self.model(*args, **kwargs)
                paths = probe._joined(probe._checked())
        finally:
            self.enabled = enabled
        settings = {"gradient": self.gradient, "curvature": self.curvature, **asdict(self.options)}
        captured = [(path.names, path.features) for path in paths]
        description = describe(captured, self.options.transition, settings)
        print(description)
        return description

    # --- the penalty ------------------------------------------------------------------------------

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
        self._end_with_loss()
        paths = self._joined(self._checked())
        self._recorder.clear(State.TAKEN)
        return self._build(paths)

    def loss_for(self, loss: Tensor, *, required: bool = True) -> Tensor | None:
        """The penalty of those calls that `loss` depends on, to be added to it right before its backward pass.

        For trainers, in a pass by hand that may have several backward passes: the penalty of a call belongs to the
        backward pass of that call's graph. None if this is not the backward pass of any. A graph that is differentiated
        twice (``retain_graph=True``) gets its penalty once for each time that gradients start from zero.

        Args:
            loss: what is about to be differentiated.
            required: whether it is an error if the loss depends on none of the calls.

        Raises:
            RuntimeError, ValueError: as :meth:`loss` does, of the calls that matter.
        """
        if not self.enabled:
            return None
        paths = self._recorder.paths
        hits = reached(loss, [path.nodes() for path in paths])
        hit = [path for path, is_hit in zip(paths, hits, strict=True) if is_hit]
        if not hit:
            if required and not (self.missing == "skip" and self._recorder.called):
                self._check_attached()
                if not paths:
                    self._recorder.check_complete()
                self._check(paths, self._layers)
                raise RuntimeError(
                    "FeatureFlow: the loss depends on none of the recorded forward passes, so the penalty would change "
                    "nothing: their outputs were detached or not used"
                )
            return None
        total: Tensor | None = None
        again = {id(path.penalty): path.penalty for path in hit if path.penalty is not None}
        if again and not self._has_gradients(hit):
            total = total_of(again.values())
        fresh = [path for path in hit if path.penalty is None]
        if fresh:
            self._check(
                fresh, self.layers if required else [n for p in fresh for n in self._streams[p.stream]]
            )
            self._recorder.warn_if_several_calls(stacklevel=3)
            self._recorder.take(fresh)
            built = self._build(self._joined(fresh))
            for path in fresh:
                path.penalty = built
                path.release()
            total = built if total is None else total + built.to(total.device)
        return total

    def terms(self) -> FlowTerms:  # type: ignore[override]
        """Length and curvature per term, detached and without weights: ``flow_terms(features, ...)``, to log.

        Belongs to the last recorded forward, whether its ``loss()`` was built or not. Of a pass by hand: the
        terms of its calls, one call after another. While the flow is disabled: those of the last forward before, or
        none.
        """
        if self._recorder.state is not State.COMPLETE and not self.in_pass:
            if self._last_terms is not None and self._recorder.state in (State.TAKEN, State.EMPTY):
                return FlowTerms(*(values.detach() for values in self._last_terms()))
            if not self.enabled:
                return FlowTerms(torch.zeros(0), torch.zeros(0))
        return terms_of(self._with_terms(self._joined(self._checked())), self.options)

    def add_gradients_(self) -> None:
        """Refused: the penalty is made of a forward pass, and has to be part of a loss."""
        raise RuntimeError(
            "FeatureFlow: add loss() to the loss before its backward pass; add_gradients_ is for penalties of weights"
        )

    def _build(self, paths: list[Path]) -> Tensor:
        """The sum of the penalties of paths that are joined where they can be."""
        weights = times(self.gradient, self.scale), times(self.curvature, self.scale)
        loss, self._last_terms = penalty_of(self._with_terms(paths), self.options, *weights)
        return loss

    def _joined(self, paths: list[Path]) -> list[Path]:
        return continuous(paths, self.options.transition)

    def _with_terms(self, paths: list[Path]) -> list[Path]:
        """Those that make a term. If none does, the first, for ``ffr_loss`` to say why; none where layers may miss."""
        with_terms = [path for path in paths if has_term(path.features, self.options.transition)]
        return with_terms or ([] if self.missing == "skip" else paths[:1])

    def _checked(self) -> list[Path]:
        """All paths of the pass; raises if they cannot make a loss."""
        self._check_attached()
        self._recorder.check_complete()
        paths = self._recorder.paths
        self._check(paths, self._layers)
        return paths

    def _check_attached(self) -> None:
        if not self._handles:
            raise RuntimeError(
                "FeatureFlow is not attached: use `with flow:` or flow.attach() before the forward"
            )

    def _check(self, paths: list[Path], layers: Iterable[str]) -> None:
        recorder = self._recorder
        recorder.check_features(paths, layers, may_miss=self.missing == "skip")
        frozen = not any(path.requires_grad() for path in paths)
        if frozen and not recorder.capture_eval and paths:
            raise RuntimeError(
                f"FeatureFlow: none of the {sum(len(path.features) for path in paths)} captured features requires "
                "grad, so the penalty would change nothing: the layers before them are frozen or detached"
            )

    def _has_gradients(self, paths: list[Path]) -> bool:
        """Whether the layers of these paths hold gradients of an earlier backward pass, the penalty's among them."""
        modules = [module for path in paths for module in self._streams[path.stream].values()]
        gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        return any(bool(gradient.any()) for gradient in gradients)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        old = self._recorder
        recorder = Recorder(
            old.output, old.capture_eval, old.tapping, len(old.streams), old.masks, old.summing
        )
        state.update(_handles=[], _last_terms=None, _recorder=recorder)
        state.pop("_finalizer", None)
        return state


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
