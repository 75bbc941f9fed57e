"""Receptive fields, average pictures, and the pages they are drawn on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from explain_nets import conv_net, loader, with_statistics
from torch import Tensor, nn

from ffr_ext.explain import (
    Selection,
    average_visualizations,
    draw_averages,
    draw_explanation,
    explain,
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
