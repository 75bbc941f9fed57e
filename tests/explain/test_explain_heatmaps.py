"""`explain` and `localization`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from explain_nets import conv_net, loader, with_statistics
from torch import Tensor, nn

from ffr_ext.explain import (
    Selection,
    average_visualizations,
    backward_rule,
    explain,
    explain_func,
    feature_vectors,
    localization,
    select_features,
)


@pytest.fixture
def net() -> nn.Sequential:
    return with_statistics(conv_net())


@pytest.fixture
def selection(net: nn.Sequential) -> Selection:
    return select_features(net, loader(), mu=2.0)


@pytest.fixture
def x() -> Tensor:
    return loader()[0][0][:6]


def test_the_first_part_is_the_rule_applied_to_the_channels_own_map(
    net: nn.Sequential, selection: Selection, x: Tensor
) -> None:
    target = torch.arange(6) % 3
    result = explain(net, x, selection, target=target)
    v = feature_vectors(net, x, selection)
    for image in range(6):
        w = selection.weights[:, target[image]]
        r = v[image] / v[image].norm() * w / w.sum()
        row = int(r.argmax())
        layer, channel = [("2", c) for c in range(6)][row] if row < 6 else ("5", row - 6)
        found = result.features[image][0]
        assert found is not None
        assert (found.layer, found.channel) == (layer, channel)
        assert found.response == pytest.approx(float(r.max()))
        leaf = x[image : image + 1].clone().requires_grad_()
        with backward_rule():
            maps = net[: int(layer) + 1](leaf)
        start = torch.zeros_like(maps)
        start[0, channel] = maps[0, channel].detach()
        (g,) = torch.autograd.grad(maps, leaf, start)
        heat = g.abs().amax(1)[0]
        torch.testing.assert_close(result.parts[image, 0], heat / heat.max())


def test_a_batch_is_its_images_one_by_one(net: nn.Sequential, selection: Selection, x: Tensor) -> None:
    together = explain(net, x, selection, target=1)
    for image in range(len(x)):
        alone = explain(net, x[image : image + 1], selection, target=1)
        torch.testing.assert_close(alone.parts[0], together.parts[image], atol=1e-6, rtol=0)
        assert [f and f[:2] for f in alone.features[0]] == [f and f[:2] for f in together.features[image]]


def test_ranks_fall_heat_is_their_maximum_and_lies_between_zero_and_one(
    net: nn.Sequential, selection: Selection, x: Tensor
) -> None:
    result = explain(net, x, selection, top=4, target=0)
    assert result.parts.shape == (6, 4, 12, 12)
    assert torch.equal(result.heat, result.parts.amax(1))
    assert float(result.parts.min()) >= 0
    for image, ranks in enumerate(result.features):
        responses = [feature.response if feature else 0.0 for feature in ranks]
        assert responses == sorted(responses, reverse=True)
        for rank, feature in enumerate(ranks):
            assert float(result.parts[image, rank].max()) == (1.0 if feature else 0.0)
    fewer = explain(net, x, selection, top=2, target=0)
    assert torch.equal(fewer.parts, result.parts[:, :2])


def test_parts_without_a_feature_are_zeros_and_named_none(
    net: nn.Sequential, selection: Selection, x: Tensor
) -> None:
    result = explain(net, x, selection, top=30, target=2)
    assert result.features[0][-1] is None
    assert float(result.parts[:, -1].abs().max()) == 0
    nobody = copy.copy(selection)
    object.__setattr__(nobody, "weights", torch.zeros_like(selection.weights))
    with pytest.warns(RuntimeWarning, match=r"no relevant feature responds to images \[0, 1"):
        assert float(explain(net, x, nobody, target=0).heat.max()) == 0


def test_the_class_is_what_the_model_says_unless_it_is_told(
    net: nn.Sequential, selection: Selection, x: Tensor
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(explain(net, x, selection).target, net(x).argmax(1))
    assert explain(net, x, selection, target=2).target.tolist() == [2] * 6


def test_an_output_that_is_overwritten_in_place_keeps_its_own_map(net: nn.Sequential, x: Tensor) -> None:
    apart = copy.deepcopy(net)
    apart[2], apart[5] = nn.ReLU(), nn.ReLU()
    before_relu = ["1", "4"]  # the in-place ReLUs overwrite these
    a, b = (select_features(model, loader(), layers=before_relu) for model in (net, apart))
    assert torch.equal(a.weights, b.weights)
    torch.testing.assert_close(explain(net, x, a, target=1).parts, explain(apart, x, b, target=1).parts)


def test_autocast_and_half_precision_inputs_give_nearly_the_same_heat(
    net: nn.Sequential, selection: Selection, x: Tensor
) -> None:
    full = explain(net, x, selection, target=1)
    with torch.autocast("cpu", torch.bfloat16):
        half = explain(net, x, selection, target=1)
    assert half.heat.dtype == torch.float32
    assert float((half.heat - full.heat).abs().mean()) < 0.02


def state(model: nn.Module) -> list[object]:
    return [
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [t.clone().tolist() for t in model.state_dict().values()],
    ]


def test_the_model_is_as_it_was_whatever_happens(net: nn.Sequential, selection: Selection, x: Tensor) -> None:
    net[0].weight.requires_grad_(False)
    before = state(net)
    explain(net, x, selection, target=0)
    average_visualizations(net, loader(), selection, images=5)
    assert state(net) == before
    assert not x.requires_grad
    handle = net[7].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(net, x, selection)
    with pytest.raises(ZeroDivisionError):
        select_features(net, loader())
    handle.remove()
    assert state(net) == before


def test_what_cannot_be_explained_is_refused_by_name(
    net: nn.Sequential, selection: Selection, x: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"BatchNorm2d at '1'.*eval"):
        explain(copy.deepcopy(net).train(), x, selection)
    with pytest.raises(ValueError, match="OptimizedModule"):
        explain(torch.compile(net), x, selection)
    with pytest.raises(ValueError, match="NaN"):
        explain(net, x * float("nan"), selection)
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        explain(net, x, selection, target=3)
    with pytest.raises(ValueError, match="target: expected a class or 6"):
        explain(net, x, selection, target=torch.zeros(5).long())
    with pytest.raises(ValueError, match="top"):
        explain(net, x, selection, top=0)
    with pytest.raises(ValueError, match="rule: expected one of"):
        explain(net, x, selection, rule="lrp")
    with pytest.raises(TypeError, match="floating-point"):
        explain(net, (x * 255).to(torch.uint8), selection)
    wider = conv_net()
    wider[3], wider[4], wider[8] = nn.Conv2d(6, 9, 3), nn.BatchNorm2d(9).eval(), nn.Linear(9, 3)
    with pytest.raises(ValueError, match="made with layers and channels"):
        explain(wider, x, selection)
    with pytest.raises(ValueError, match="no module named"):
        explain(nn.Sequential(nn.ReLU()), x, selection)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        explain(net, x, selection)

    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.act = net, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.act(net[0](x)).mean((2, 3))[:, :3]

    frozen = NoGrad()
    chosen = select_features(frozen, loader(), layers=["act"])
    with pytest.raises(RuntimeError, match="without autograd"):
        explain(frozen, x, chosen)


def test_arrays_for_quantus_have_the_shapes_it_expects(
    net: nn.Sequential, selection: Selection, x: Tensor
) -> None:
    masks = torch.zeros(6, 12, 12, dtype=torch.bool)
    masks[:, 3:6, 3:6] = True
    arrays = explain(net, x, selection, target=1).for_quantus(masks)
    assert arrays["a_batch"].shape == arrays["s_batch"].shape == (6, 1, 12, 12)
    assert arrays["y_batch"].tolist() == [1] * 6
    again = explain_func(selection)(net, x.double().numpy(), torch.ones(6).long().numpy(), device="cpu")
    assert again.shape == (6, 1, 12, 12)
    assert abs(again - arrays["a_batch"]).max() < 1e-5
    with pytest.raises(ValueError, match="masks"):
        explain(net, x, selection, target=1).for_quantus(masks[:, :5])


def test_quantus_takes_them(net: nn.Sequential, selection: Selection, x: Tensor) -> None:
    quantus = pytest.importorskip("quantus")
    masks = torch.zeros(6, 12, 12, dtype=torch.bool)
    masks[:, 3:6, 3:6] = True
    arrays = explain(net, x, selection, target=1).for_quantus(masks)
    scores = quantus.PointingGame(disable_warnings=True)(model=net, x_batch=x.numpy(), **arrays)
    assert len(scores) == 6


# --- scores -----------------------------------------------------------------------------------------


def test_iou_and_its_area_of_maps_made_by_hand() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = True  # 8 of 16 pixels
    heat = torch.zeros(2, 4, 4)
    heat[0, :2] = 3.0  # exactly the mask, at every threshold, whatever its scale
    heat[1, 0] = 1.0  # half of the mask above 0.5, and the other half with as much beside it below
    heat[1, 1:3] = 0.5
    score = localization(heat, mask)
    low = score.thresholds <= 0.5
    assert int(low.sum()) == 20
    expected = torch.where(low, 8 / 12, 4 / 8).double()
    torch.testing.assert_close(score.curves[0], torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(score.curves[1], expected)
    assert score.iou == pytest.approx((1 + 8 / 12) / 2)
    assert score.threshold <= 0.5
    assert score.auc == pytest.approx((1 + (8 / 12 + 0.5) / 2) / 2)
    assert score.iou_best == pytest.approx((1 + 8 / 12) / 2)
    assert localization(torch.zeros(1, 4, 4), mask[:1]).iou == 0


def test_scores_refuse_what_has_no_answer() -> None:
    heat, mask = torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match=r"images \[1\] are empty"):
        localization(heat, mask)
    with pytest.raises(ValueError, match="same shape"):
        localization(heat, mask[:1])
    with pytest.raises(ValueError, match="finite"):
        localization(-heat, ~mask)
    with pytest.raises(ValueError, match="finite"):
        localization(heat * float("nan"), mask)
    with pytest.raises(ValueError, match="0 and 1"):
        localization(heat, heat)
