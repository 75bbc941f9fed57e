"""`explain`, `localization`, receptive fields and average pictures."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from explain_nets import conv_net, loader, with_statistics
from torch import Tensor, nn

from ffr_ext.explain import (
    Selection,
    average_visualizations,
    backward_rule,
    draw_averages,
    draw_explanation,
    explain,
    explain_func,
    feature_vectors,
    localization,
    receptive_fields,
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


# --- receptive fields and averages ------------------------------------------------------------------


def field(net: nn.Module, size: int = 64, **options: object) -> dict[str, tuple[int, int, int, bool]]:
    found = receptive_fields(net.eval(), torch.zeros(1, 3, size, size), **options)
    return {name: (f.size[0], f.stride[0], f.start[0], f.whole) for name, f in found.items()}


def test_fields_of_strided_convolutions_are_those_worked_out_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
    )  # fmt: skip
    expected = {"1": (5, 2, -2, False), "3": (9, 4, -4, False), "6": (17, 8, -8, False)}
    assert field(net) == expected
    assert field(net, size=20) == expected  # larger than the image


def test_fields_of_vgg_like_stacks() -> None:
    def block() -> list[nn.Module]:
        return [
            nn.Conv2d(3, 3, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    net = nn.Sequential(*block(), *block())
    found = field(net, layers=["3", "4", "8", "9"])
    assert found == {
        "3": (5, 1, -2, False),
        "4": (6, 2, -2, False),
        "8": (14, 2, -6, False),
        "9": (16, 4, -6, False),
    }


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", [63, 64])
def test_fields_of_dilation_even_kernels_and_odd_pools(ceil_mode: bool, size: int) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3, dilation=3, padding=3), nn.ReLU(), nn.Conv2d(2, 2, 4), nn.GELU(),
        nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=ceil_mode), nn.Identity(),
    )  # fmt: skip
    assert net(torch.zeros(1, 3, size, size)).shape[2] > 20
    found = field(net, size, layers=["1", "3", "5"])
    assert found == {"1": (7, 1, -3, False), "3": (10, 1, -3, False), "5": (14, 2, -4, False)}


def test_fields_of_residual_nets_take_the_longest_path_and_global_paths_see_everything() -> None:
    class Block(nn.Module):
        def __init__(self, squeeze: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, padding=1)
            self.short, self.gate, self.squeeze = nn.Conv2d(3, 3, 1, 2), nn.Linear(3, 3), squeeze

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.relu(self.a(x)))
            if self.squeeze:
                y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
            return F.relu(y + self.short(x))

    assert field(nn.Sequential(Block(False), nn.Identity()), layers=["0"]) == {"0": (7, 2, -3, False)}
    assert field(nn.Sequential(Block(True), nn.Identity()), layers=["0"]) == {"0": (64, 0, 0, True)}


def test_layers_without_places_see_the_whole_image_and_flat_heads_do_not_disturb() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 14 * 14, 5), nn.ReLU())
    assert field(net, 16) == {"1": (3, 1, 0, False), "4": (16, 0, 0, True)}


def test_maps_with_their_channels_last_have_the_fields_of_their_places() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2))

    assert field(Last(), layers=["act"], channel_dim=-1) == {"act": (3, 2, -1, False)}
    selection = select_features(Last().eval(), loader(), classes=5, channel_dim=-1)
    assert selection.layers == {"act": 5}
    averages = average_visualizations(Last().eval(), loader(), selection, images=3)
    assert all(average.picture.shape == (3, 3, 3) for average in averages)


def test_an_average_is_the_mean_of_the_patches_around_the_strongest_responses() -> None:
    """A blob at a random place of each image of its class: the average of its channel is the blob."""
    images, size = 30, 20
    labels = torch.arange(images) % 2
    x = torch.zeros(images, 3, size, size)
    blob = torch.tensor([[0.2, 0.5, 0.2], [0.5, 1.0, 0.5], [0.2, 0.5, 0.2]])
    generator = torch.Generator().manual_seed(0)
    for image, label in zip(x, labels.tolist(), strict=True):
        i, j = torch.randint(0, size - 2, (2,), generator=generator).tolist()
        image[label, i : i + 3, j : j + 3] = blob
    conv = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0] = conv.weight[1, 1] = blob
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(x[i : i + 8], labels[i : i + 8]) for i in range(0, images, 8)]
    selection = select_features(net, data, layers=["1"], classes=["red", "green"])
    averages = average_visualizations(net, data, selection, images=15)
    assert [(a.class_name, a.channel, a.images, a.share) for a in averages] == [
        ("red", 0, 15, 1.0),
        ("green", 1, 15, 1.0),
    ]
    for colour, average in enumerate(averages):
        inside = torch.zeros(3, 3, 3, dtype=torch.float64)
        inside[colour] = blob.double()
        # At the border a repeated edge may add a row, in a few of the 15.
        torch.testing.assert_close(average.picture, inside, atol=0.1, rtol=0)
    every = average_visualizations(net, data, selection, images=1000)
    assert [a.images for a in every] == [30, 30]
    assert every[0].share == 0.5
    unlabelled = average_visualizations(net, [batch for batch, _ in data], selection, images=15)
    assert [a.share for a in unlabelled] == [1.0, 1.0]


def test_averages_do_not_depend_on_how_images_are_batched(net: nn.Sequential, selection: Selection) -> None:
    data = loader()
    other = [(x, y) for images, labels in data for x, y in zip(images.split(7), labels.split(7), strict=True)]
    for a, b in zip(
        *(average_visualizations(net, d, selection, images=9) for d in (data, other)), strict=True
    ):
        torch.testing.assert_close(a.picture, b.picture)


def test_a_loader_that_changes_between_the_passes_is_refused(
    net: nn.Sequential, selection: Selection
) -> None:
    data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*loader(), strict=True)))
    shuffled = torch.utils.data.DataLoader(data, 20, shuffle=True)
    with pytest.raises(ValueError, match="another one in the second pass"):
        average_visualizations(net, shuffled, selection)
    in_order = torch.utils.data.DataLoader(data, 20)
    assert len(average_visualizations(net, in_order, selection)) == len(selection.entries)
    with pytest.raises(ValueError, match="read only once"):
        average_visualizations(net, iter(loader()), selection)


def test_pictures_are_drawn(net: nn.Sequential, selection: Selection, x: Tensor, tmp_path: object) -> None:
    pytest.importorskip("matplotlib")
    masks = torch.zeros(6, 12, 12, dtype=torch.bool)
    masks[:, 3:6, 3:6] = True
    page = draw_explanation(x, explain(net, x, selection, target=0), masks=masks, classes=["a", "b", "c"])
    page.savefig(f"{tmp_path}/heat.png")
    assert len(page.axes) == 6 * 5
    averages = average_visualizations(net, loader(), selection, images=5)
    page = draw_averages(averages, per_class=3)
    page.savefig(f"{tmp_path}/averages.png")
    assert len(page.axes) == 3 * 3
