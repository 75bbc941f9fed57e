"""`backward_rule`: what it sees, what it changes, and what it leaves as it is."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from explain_nets import SPELLINGS, Residual, conv_net, heat, with_statistics
from torch import Tensor, nn

from ffr_ext.explain import backward_rule


def by_hand(net: Residual, x: Tensor, rule: str) -> Tensor:
    """The gradient of output 1 under a rule, written out layer by layer."""
    with torch.no_grad():
        a = net.stem(x)
        b = net.norm1(net.conv1(a.relu()))
        c = net.conv2(b.relu()) + a.relu()

        def back(signal: Tensor, before: Tensor) -> Tensor:
            if rule != "gradient":
                signal = signal.clamp(min=0)
            return signal if rule == "deconv" else signal * (before > 0)

        scale = net.norm1.weight / (net.norm1.running_var + net.norm1.eps).sqrt()
        g = (net.head.weight[1] / c[0, 0].numel())[None, :, None, None].expand_as(c)
        g = back(g, c)
        inner = back(F.conv_transpose2d(g, net.conv2.weight, padding=1), b) * scale[:, None, None]
        g = back(g + F.conv_transpose2d(inner, net.conv1.weight, padding=1), a)
        return F.conv_transpose2d(g, net.stem.weight, padding=1)


@pytest.mark.parametrize("rule", ["guided", "deconv", "gradient"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_relu_has_the_gradient_written_by_hand(spelling: str, rule: str) -> None:
    net = with_statistics(Residual(SPELLINGS[spelling])).double()
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    plain = net(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # relu="gradient" changes nothing here and says so
        y, g = heat(net, x, rule)
    assert torch.equal(y, plain)
    torch.testing.assert_close(g, by_hand(net, x, rule), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["guided", "deconv"])
def test_units_in_place_are_seen_by_those_who_ignore_the_return_value(rule: str) -> None:
    x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    with backward_rule(rule):
        y = x * 1
        y.relu_()
        z = (y * torch.tensor([1.0, -1.0, 1.0])).sum()
    (g,) = torch.autograd.grad(z, x)
    assert y.tolist() == [0, 2, 3]
    assert g.tolist() == ([0, 0, 1] if rule == "guided" else [1, 0, 1])


@pytest.mark.parametrize(
    "unit",
    [
        nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6, nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, inplace=True),
        nn.PReLU(), nn.ELU(), nn.ELU(inplace=True), nn.CELU(), nn.SELU(), nn.SiLU(), nn.SiLU(inplace=True),
        nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Hardswish(),
    ],
    ids=str,
)  # fmt: skip
def test_other_units_take_the_positive_part_and_then_their_own_slope(unit: nn.Module) -> None:
    start = torch.linspace(-4, 8, 33, dtype=torch.float64)
    signal = torch.randn(33, dtype=torch.float64)
    if isinstance(unit, nn.Module):
        unit = unit.double()
    results = {}
    for rule in ("guided", "deconv", "gradient"):
        x = start.clone().requires_grad_()
        with backward_rule(rule, strides="transpose"):
            y = unit(x * 1)
        (results[rule],) = torch.autograd.grad(y, x, signal)
        assert torch.equal(y.detach(), unit(start.clone()))
    slope = results["gradient"] / signal
    torch.testing.assert_close(results["guided"], signal.clamp(min=0) * slope)
    torch.testing.assert_close(results["deconv"], signal.clamp(min=0))


def test_a_clamp_that_is_no_relu_keeps_its_gradient() -> None:
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="met no ReLU"), backward_rule():
        y = x.clamp(-1, 1) + F.hardtanh(x) + F.threshold(x, 0.5, 0.0)
    (g,) = torch.autograd.grad(-y.sum(), x)
    assert float(g.min()) < 0


def test_gradients_of_nets_without_strides_are_those_of_autograd_to_the_bit() -> None:
    net = with_statistics(Residual(nn.ReLU()))
    x = torch.randn(3, 3, 9, 9)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    with pytest.warns(RuntimeWarning, match="no convolution with a stride"):
        _, g = heat(net, x, relu="gradient")
    assert torch.equal(g, expected)


# --- strides ----------------------------------------------------------------------------------------


def signal_through(conv: nn.Module, x: Tensor, strides: str, align: str = "exact") -> Tensor:
    """What a signal of ones at the output becomes at the input."""
    x = x.clone().requires_grad_()
    with backward_rule("gradient", strides, align=align):
        y = conv(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def grid(phases: Tensor) -> float:
    return float(phases.std(unbiased=False) / phases.mean())


@pytest.mark.parametrize(("k", "s"), [(3, 2), (5, 2), (1, 2), (11, 4), (4, 2), (2, 2)])
def test_the_grid_is_the_closed_form_and_the_fix_removes_it(k: int, s: int) -> None:
    overlaps = torch.tensor(
        [float(sum((r - t) % s == 0 for t in range(k))) for r in range(s)], dtype=torch.float64
    )
    expected = grid(torch.outer(overlaps, overlaps))
    known = {(3, 2): 0.4843, (5, 2): 0.2857, (1, 2): 1.7321, (11, 4): 0.2241, (4, 2): 0, (2, 2): 0}
    assert expected == pytest.approx(known[k, s], abs=5e-5)
    conv = nn.Conv2d(1, 1, k, s, padding=k // 2, bias=False).double()
    nn.init.constant_(conv.weight, 1 / k**2)
    x = torch.zeros(1, 1, 16 * s, 16 * s, dtype=torch.float64)
    inside = slice(4 * s, 12 * s)
    plain = signal_through(conv, x, "transpose")[0, 0, inside, inside]
    phases = plain.unfold(0, s, s).unfold(1, s, s).mean((0, 1))
    assert grid(phases) == pytest.approx(expected, abs=1e-12)
    for align in ("exact", "floor"):
        fixed = signal_through(conv, x, "resize", align)[0, 0, inside, inside]
        assert float(fixed.max()) == float(fixed.min())
        assert float(fixed[0, 0]) == pytest.approx(1 / s**2, rel=1e-12)


def test_a_strided_path_is_as_strong_as_a_pooled_one_beside_it() -> None:
    conv = nn.Conv2d(1, 1, 1, 2, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.rand(1, 1, 16, 16)
    pool = signal_through(nn.MaxPool2d(2), x, "transpose")
    assert float(signal_through(conv, x, "resize").sum()) == float(pool.sum()) == 64


@pytest.mark.parametrize("s", [3, 5])
def test_one_unit_comes_back_as_a_block_centred_on_its_pixel(s: int) -> None:
    conv = nn.Conv2d(1, 1, 1, s, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.zeros(1, 1, 5 * s, 5 * s, requires_grad=True)
    with backward_rule("gradient"):
        y = conv(x)
    (g,) = torch.autograd.grad(y[0, 0, 2, 2], x)
    places = g[0, 0].nonzero()
    assert places.min(0).values.tolist() == [2 * s - s // 2] * 2
    assert places.max(0).values.tolist() == [2 * s + s // 2] * 2


@pytest.mark.parametrize("align", ["exact", "floor"])
@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (1, dict(kernel_size=3, stride=2)),
        (1, dict(kernel_size=4, stride=3, padding=2, dilation=2)),
        (2, dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2))),
        (2, dict(kernel_size=3, stride=2, groups=2)),
        (2, dict(kernel_size=3, stride=3, padding="valid")),
        (2, dict(kernel_size=3, stride=2, padding=1, padding_mode="reflect")),
        (3, dict(kernel_size=3, stride=(1, 2, 3), padding=1)),
    ],
)
def test_a_resized_signal_goes_through_the_same_weights_at_stride_one(
    rank: int, options: dict[str, object], align: str
) -> None:
    conv_class, back = {
        1: (nn.Conv1d, F.conv_transpose1d), 2: (nn.Conv2d, F.conv_transpose2d), 3: (nn.Conv3d, F.conv_transpose3d),
    }[rank]  # fmt: skip
    conv = conv_class(4, 6, **options).double()
    for sizes in itertools.islice(itertools.product((9, 10, 11), repeat=rank), 9):
        x = torch.randn(2, 4, *sizes, dtype=torch.float64, requires_grad=True)
        plain = conv(x)
        with backward_rule("gradient", align=align):
            y = conv(x)
        assert torch.equal(y, plain)
        signal = torch.randn_like(y)
        (g,) = torch.autograd.grad(y, x, signal)
        if conv.padding_mode != "zeros":
            assert g.shape == x.shape  # the padding is an op of its own, with autograd's gradient
            continue
        padding = (0,) * rank if isinstance(conv.padding, str) else conv.padding
        ones = nn.functional
        stride_one = {1: ones.conv1d, 2: ones.conv2d, 3: ones.conv3d}[rank](
            x.detach(), conv.weight, None, 1, padding, conv.dilation, conv.groups
        )
        larger = signal
        for axis, s in enumerate(conv.stride):
            full, small = stride_one.shape[2 + axis], signal.shape[2 + axis]
            index = [
                min((j + s // 2) // s, small - 1) if align == "exact" else j * small // full
                for j in range(full)
            ]
            larger = larger.index_select(2 + axis, torch.tensor(index))
        expected = back(
            larger / torch.tensor(conv.stride).prod(),
            conv.weight,
            None,
            1,
            padding,
            0,
            conv.groups,
            conv.dilation,
        )
        torch.testing.assert_close(g, expected.detach(), rtol=1e-12, atol=1e-13)


def test_an_unbatched_image_is_taken_too() -> None:
    conv = nn.Conv2d(3, 4, 3, 2)
    x = torch.randn(3, 9, 9)
    one = signal_through(conv, x, "resize")
    torch.testing.assert_close(one, signal_through(conv, x[None], "resize")[0])


def test_weights_of_resized_convolutions_say_that_they_have_no_gradient() -> None:
    net = conv_net()
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    with backward_rule():
        y = net(x).sum()
    with pytest.raises(RuntimeError, match=r"no gradient for the weights.*torch\.autograd\.grad"):
        y.backward()
    assert net[0].weight.grad is None


def test_autocast_casts_as_it_does_without_the_rule() -> None:
    net = with_statistics(conv_net())
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(x)
        with backward_rule():
            y = net(x)
    assert y.dtype == plain.dtype
    assert torch.equal(y, plain)
    (g,) = torch.autograd.grad(y[:, 0].sum().float(), x)
    with backward_rule():
        full = net(x)
    (expected,) = torch.autograd.grad(full[:, 0].sum(), x)
    assert g.dtype == torch.float32
    assert float((g - expected).norm() / expected.norm()) < 0.05


# --- what is counted, and refused -------------------------------------------------------------------


def test_it_counts_what_it_met() -> None:
    with backward_rule() as rule:
        conv_net()(torch.randn(1, 3, 12, 12, requires_grad=True))
    assert (rule.seen.relus, rule.seen.strided) == (2, 2)


def test_a_rule_that_met_nothing_warns() -> None:
    with pytest.warns(RuntimeWarning, match="guided.*met no ReLU"), backward_rule():
        nn.Linear(3, 3)(torch.randn(1, 3))


def test_scripted_and_compiled_models_are_refused_by_name() -> None:
    x = torch.randn(1, 3, 12, 12, requires_grad=True)
    net = conv_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(net)
    with pytest.raises(ValueError, match="ScriptModule"), backward_rule():
        scripted(x)
    compiled = torch.compile(net, backend="eager")
    with pytest.raises(ValueError, match=r"OptimizedModule.*_orig_mod"), backward_rule():
        compiled(x)
    with pytest.raises(ValueError, match=r"DataParallel.*model\.module"), backward_rule():
        nn.DataParallel(net)(x)


def test_a_function_compiled_before_runs_eagerly_under_the_rule() -> None:
    function = torch.compile(lambda x: F.relu(x), backend="eager")
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    function(x)
    with backward_rule():
        y = function(x)
    assert torch.autograd.grad(-y.sum(), x)[0].tolist() == [0, 0]


def test_batch_norm_in_training_mode_is_refused_before_it_counts() -> None:
    net = conv_net().train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"BatchNorm2d uses the statistics.*model\.eval"), backward_rule():
        net(torch.randn(2, 3, 12, 12, requires_grad=True))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="statistics of the batch"), backward_rule():
        F.batch_norm(torch.randn(4, 3, requires_grad=True), None, None, training=True)


def test_a_model_that_switches_autograd_off_is_refused() -> None:
    x = torch.randn(1, 3, 12, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="without autograd"), backward_rule(), torch.no_grad():
        conv_net()(x)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="relu: expected one of 'guided', 'deconv', 'gradient'"):
        backward_rule("Guided")
    with pytest.raises(ValueError, match="strides"):
        backward_rule(strides="fix")
    with pytest.raises(ValueError, match="align"):
        backward_rule(align="ceil")


def test_nothing_is_left_behind_after_the_context_or_an_exception() -> None:
    net = conv_net()
    x = torch.randn(1, 3, 12, 12, requires_grad=True)
    (plain,) = torch.autograd.grad(net(x).sum(), x)
    broken = nn.Sequential(net, nn.Linear(7, 7))
    with pytest.raises(RuntimeError, match="shapes"), backward_rule():
        broken(x)
    conv_net().train()(x)  # no longer refused
    assert torch.equal(torch.autograd.grad(net(x).sum(), x)[0], plain)


def test_it_composes_with_hooks_of_feature_flow() -> None:
    from ffr_ext import FeatureFlow

    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(3)))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with backward_rule():
        (expected,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    with FeatureFlow(net, backend="reference") as flow, backward_rule():
        y = net(x)
        assert torch.isfinite(flow.loss())
    assert torch.equal(torch.autograd.grad(y[:, 0].sum(), x)[0], expected)


def test_per_sample_gradients_of_functorch_follow_the_rule() -> None:
    net = with_statistics(Residual(F.relu))
    x = torch.randn(3, 3, 7, 7)

    def score(image: Tensor) -> Tensor:
        with backward_rule(strides="transpose"):
            return net(image[None])[0, 1]

    _, expected = heat(net, x)
    torch.testing.assert_close(torch.stack([torch.func.grad(score)(image) for image in x]), expected)
