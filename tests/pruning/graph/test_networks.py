"""`compact` on models nobody here wrote: the outputs stay, and what can leave leaves."""

from __future__ import annotations

import io

import pytest
import torch

from ffr_ext import compact

pytest.importorskip("transformers")

from pruning_zoo import ZOO, image, kill, largest_difference, outputs, randomize, resnet

# At most this share of the parameters is left with half of all filters dead: what half of the channels inside
# the blocks and no more account for. Transformers keep attention and residual stream, and half of what is
# between.
LEFT = {
    "resnet-basic": 0.65,
    "resnet-bottleneck": 0.60,
    "regnet": 0.70,
    "mobilenet-v2": 0.40,
    "convnext": 0.75,
    "efficientnet": 0.55,
    "vit": 0.90,
    "swin": 0.80,
    "segformer": 0.80,
    "levit": 0.75,
    "bert": 0.90,
    "gpt2": 0.90,
    "llama": 0.72,
    "t5": 0.75,
}


@pytest.mark.parametrize("name", ZOO)
def test_outputs_stay_and_the_model_shrinks(name: str) -> None:
    make, inputs = ZOO[name]
    model = kill(randomize(make()))
    result = compact(model, inputs(), measure=False)
    for _ in range(2):
        assert largest_difference(model, result.model, inputs()) < 1e-5
    before, after = result.report.parameters
    assert before == sum(p.numel() for p in model.parameters())
    assert after == sum(p.numel() for p in result.model.parameters()) < LEFT[name] * before
    assert result.report.flops[1] < result.report.flops[0]
    again = compact(result.model, inputs(), measure=False)
    assert again.plan.is_empty, again.report.explain()


def test_a_model_that_has_run_is_compacted_as_one_that_has_not() -> None:
    """What a forward leaves behind: hooks that collect hidden states, cached tensors with a graph."""
    for name in ("segformer", "levit", "vit"):
        make, inputs = ZOO[name]
        model, x = kill(randomize(make())), inputs()
        fresh = compact(model, x, measure=False)
        model(x)
        model(x, output_hidden_states=True)
        used = compact(model, x, measure=False)
        assert used.plan.digest() == fresh.plan.digest()
        assert largest_difference(model, used.model, x) < 1e-5


@pytest.mark.parametrize("name", ["vit", "segformer", "bert", "gpt2"])
def test_hidden_states_are_collected_as_before(name: str) -> None:
    make, inputs = ZOO[name]
    model, x = kill(randomize(make())), inputs()
    call = {**(x if isinstance(x, dict) else {"pixel_values": x}), "output_hidden_states": True}
    expected = model(**call).hidden_states
    got = compact(model, x, measure=False).model(**call).hidden_states
    assert len(got) == len(expected) > 1
    for state, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(state, wanted)


@pytest.mark.parametrize("name", ["resnet-bottleneck", "mobilenet-v2", "bert"])
def test_the_result_trains_and_exports(name: str) -> None:
    make, inputs = ZOO[name]
    result = compact(kill(randomize(make())), inputs(), measure=False).model.train()
    x = inputs()
    call = x if isinstance(x, dict) else {"pixel_values": x}
    loss = sum(t.square().mean() for t in torch.utils._pytree.tree_leaves(result(**call)) if t.requires_grad)
    loss.backward()
    assert all(p.grad is not None for p in result.parameters())
    exported = torch.export.export(result.eval(), (), call)
    torch.testing.assert_close(outputs(exported.module(), call), outputs(result, call))


def test_onnx_has_the_compact_sizes() -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = kill(randomize(resnet("basic")))
    x = image()
    result = compact(model, x, measure=False).model
    file = io.BytesIO()
    torch.onnx.export(result, (x,), dynamo=True, verbose=False).save(file)
    graph = onnx.load_from_string(file.getvalue()).graph
    sizes = {tuple(i.dims) for i in graph.initializer}
    assert {tuple(m.weight.shape) for m in result.modules() if isinstance(m, torch.nn.Conv2d)} <= sizes
    session = runtime.InferenceSession(file.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), outputs(model, x)[0], rtol=1e-4, atol=1e-4)


def test_shapes_hard_coded_in_the_forward_keep_their_channels() -> None:
    """MobileNet's classifier, BERT's heads and this: a view to a fixed number of channels."""

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 6, 1)
            self.second = torch.nn.Conv2d(6, 8, 1)
            self.head = torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(self.first(x).relu()).relu()
            return self.head(y.mean((2, 3)).view(-1, 8))

    model = Fixed().eval()
    with torch.no_grad():
        model.first.weight[:3] = 0
        model.second.weight[:4] = 0
    result = compact(model, torch.randn(2, 3, 4, 4), measure=False)
    assert (result.model.first.out_channels, result.model.second.out_channels) == (3, 8)
    assert any("second.weight[0]" in note and "forward code" in note for note in result.report.notes)
    assert largest_difference(model, result.model, torch.randn(2, 3, 4, 4)) < 1e-6
