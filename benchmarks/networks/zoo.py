"""Which networks, how they are made, and what goes into them. Weights are random, nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import small_transformers
from .libraries import folder_on_path, library

# In this order they stand in the table.
FAMILIES = (
    "plain and dense",
    "residual",
    "depthwise",
    "reparametrised",
    "detectors",
    "attention and ConvNeXt",
    "language",
    "speech, detection and others",
)


@dataclass(frozen=True)
class Network:
    """A network of a library. `make` raises ImportError where that is missing."""

    name: str  # library/name
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]


def _image(size: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: library("torchvision").models.get_model(name, **options)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: library("timm").create_model(name)


def _ultralytics(name: str, kind: str = "DetectionModel") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        os.environ.setdefault("YOLO_OFFLINE", "true")  # it looks for a network when it is imported
        library("torchvision")
        with folder_on_path():  # it asks for the version of torchvision
            tasks = library("ultralytics.nn.tasks")
        model: nn.Module = getattr(tasks, kind)(f"{name}.yaml", ch=3, nc=80, verbose=False)
        return model

    return make


_UNINITIALISED = {"weights": None, "init_weights": False}  # their own takes minutes, and is replaced anyway

# family -> name -> size of the images, and what else `make` takes
_TORCHVISION: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "plain and dense": {
        "vgg11_bn": (224, {}),
        "squeezenet1_1": (96, {}),
        "densenet121": (96, {}),
        "googlenet": (96, _UNINITIALISED),
        "inception_v3": (299, _UNINITIALISED),
    },
    "residual": {
        "resnet18": (96, {}),
        "resnext50_32x4d": (96, {}),
        "regnet_x_400mf": (96, {}),
        "fcn_resnet50": (96, {"weights": None, "weights_backbone": None}),
    },
    "depthwise": {
        "mobilenet_v2": (96, {}),
        "mobilenet_v3_small": (96, {}),
        "efficientnet_b0": (96, {}),
        "shufflenet_v2_x0_5": (96, {}),
    },
    "attention and ConvNeXt": {
        "convnext_tiny": (96, {}),
        "swin_t": (96, {}),
        "swin_v2_t": (96, {}),
    },
}

_TIMM: dict[str, dict[str, int]] = {
    "plain and dense": {"densenet121": 96, "inception_v3": 128},
    "residual": {
        "resnet18": 96,
        "dla34": 96,
        "cs3darknet_s": 96,
        "eca_resnet33ts": 96,
        "res2net50_26w_4s": 96,
        "resnetv2_50": 96,
        "resnest14d": 96,
        "resnext50_32x4d": 96,
        "hrnet_w18_small": 96,
        "regnety_002": 96,
        "skresnet18": 96,
        "dpn48b": 96,
        "nf_resnet26": 96,
    },
    "depthwise": {"efficientnet_b0": 96, "mixnet_s": 96, "rexnet_100": 96, "ghostnet_100": 96},
    "reparametrised": {"repvgg_a0": 96, "mobileone_s0": 96, "fastvit_t8": 128},
    "attention and ConvNeXt": {
        "convnext_atto": 96,
        "edgenext_xx_small": 128,
        "poolformer_s12": 96,
        "efficientformerv2_s0": 224,
        "xcit_nano_12_p8_224": 224,
    },
}

_ULTRALYTICS = {
    **dict.fromkeys(("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n"), "DetectionModel"),
    "yolov8n-seg": "SegmentationModel",
    "rtdetr-l": "RTDETRDetectionModel",
}

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in [
        *(
            Network(f"torchvision/{name}", family, _torchvision(name, **options), _image(size))
            for family, names in _TORCHVISION.items()
            for name, (size, options) in names.items()
        ),
        *(
            Network(f"timm/{name}", family, _timm(name), _image(size))
            for family, names in _TIMM.items()
            for name, size in names.items()
        ),
        *(
            Network(f"ultralytics/{name}", "detectors", _ultralytics(name, kind), _image(256))
            for name, kind in _ULTRALYTICS.items()
        ),
        *(
            Network(f"transformers/{name}", family, make, inputs)
            for name, (family, make, inputs) in small_transformers.MODELS.items()
        ),
    ]
}
