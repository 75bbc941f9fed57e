"""Beside Captum: where it sees the ReLUs both agree, where it does not the rule still holds."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from explain_nets import Residual, heat, with_statistics
from torch import Tensor, nn

from ffr_ext.explain import backward_rule


def test_captums_guided_backprop_agrees_where_it_sees_the_relus() -> None:
    attr = pytest.importorskip("captum.attr")
    net = with_statistics(Residual(nn.ReLU()))
    net.relu1, net.relu2, net.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    class Apart(nn.Module):  # Captum refuses a ReLU module that is used twice
        def __init__(self) -> None:
            super().__init__()
            self.net, self.a, self.b, self.c = net, nn.ReLU(), nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(net.stem(x))
            return net.head(self.c(net.conv2(self.b(net.norm1(net.conv1(x)))) + x).mean((2, 3)))

    x = torch.randn(2, 3, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captum = attr.GuidedBackprop(Apart().eval()).attribute(x.clone().requires_grad_(), target=1)
    torch.testing.assert_close(heat(net, x)[1], captum.detach())


def test_captums_saliency_is_guided_under_the_rule_for_functional_relus() -> None:
    attr = pytest.importorskip("captum.attr")
    net = with_statistics(Residual(F.relu))
    x = torch.randn(2, 3, 7, 7)
    with backward_rule():
        saliency = attr.Saliency(net).attribute(x.clone().requires_grad_(), target=1, abs=False)
    torch.testing.assert_close(saliency, heat(net, x)[1])


def test_captum_does_not_see_functional_relus_which_is_why_this_exists() -> None:
    attr = pytest.importorskip("captum.attr")
    net = with_statistics(Residual(F.relu))
    x = torch.randn(2, 3, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captum = attr.GuidedBackprop(net).attribute(x.clone().requires_grad_(), target=1).detach()
        plain = heat(net, x, "gradient")[1]
    torch.testing.assert_close(captum, plain)
    assert float((captum - heat(net, x)[1]).abs().max()) > 1e-3
