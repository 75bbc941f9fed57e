"""The models of torchvision and timm: which layers "auto" takes, and that `compact` keeps the outputs. `make test`
installs both for the torch that is pinned; with another one these tests are skipped where it has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.networks.libraries import library
from ffr_ext import FeatureFlow, compact

from pruning_zoo import kill, largest_difference, outputs, randomize  # isort: skip

# library/model -> (size of the images, layers of "auto", share of the parameters left at most)
MODELS = {
    "torchvision/resnet18": (96, 8, 0.70),
    "torchvision/densenet121": (96, 58, 0.45),
    "torchvision/googlenet": (96, 9, 0.75),
    "torchvision/mobilenet_v3_small": (96, 11, 0.45),
    "torchvision/shufflenet_v2_x0_5": (96, 16, 0.55),
    "torchvision/regnet_x_400mf": (96, 22, 0.85),
    "torchvision/swin_t": (96, 15, 0.75),
    "timm/test_vit": (160, 6, 0.80),
    "timm/test_convnext": (160, 9, 0.70),
    "timm/test_mambaout": (160, 6, 0.99),
    "timm/regnetx_002": (96, 13, 0.95),
    "timm/fasternet_t0": (96, 13, 0.60),
    "timm/cs3darknet_focus_s": (96, 9, 0.75),
    "timm/ghostnet_050": (96, 16, 0.50),
    "timm/pit_ti_224": (224, 12, 0.85),
    "timm/hgnetv2_b0": (96, 5, 0.40),
}


def make(name: str) -> nn.Module:
    origin, model = name.split("/")
    try:
        module = library(origin)
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    if origin == "torchvision":
        return module.models.get_model(model, num_classes=10)
    return module.create_model(model, num_classes=10)


def with_layer_scales(model: nn.Module) -> nn.Module:
    """Layer scales of 1e-6 hide what the layers give."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() <= 1e-3:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_auto_takes_the_blocks(name: str) -> None:
    size, layers, _ = MODELS[name]
    model = randomize(make(name)).train()  # many begin as the identity, where every difference is 0
    flow = FeatureFlow(model)
    assert len(flow.layers) == layers
    with flow:
        model(torch.randn(2, 3, size, size))
        loss = flow.loss()
        assert loss > 0
        loss.backward()
    trained = [p for p in model.parameters() if p.grad is not None and bool(p.grad.any())]
    assert len(trained) > layers


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_and_the_model_shrinks(name: str) -> None:
    size, _, left = MODELS[name]
    model = kill(randomize(with_layer_scales(make(name))))
    x: Callable[[], Tensor] = lambda: torch.randn(2, 3, size, size)  # noqa: E731
    result = compact(model, x(), measure=False)
    images = x()
    largest = float(outputs(model, images)[0].abs().max())
    assert largest_difference(model, result.model, images) <= 1e-5 * largest
    before, after = result.report.parameters
    assert after < left * before
    result.model.train()(x())
