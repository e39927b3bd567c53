"What must hold for every layer: properties, checked by hypothesis on random ones; and a soak."
import copy, gc
import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import nn
from flexconv import CKConv1d, CKConv2d, CKConv3d, FlexConv1d, FlexConv2d, FlexConv3d, GaussianMask, position_grid
from flexconv.baselines import NJetConv2d
from flexconv.export import bake
from flexconv.flexnet import FlexNet, FlexTCN
from flexconv.resolution import set_resolution

quick = settings(max_examples=25, deadline=None, derandomize=True)

@st.composite
def layers(draw, causal=True, strides=True):
    "A random layer of 1 to 3 dimensions, in float64, in eval mode, with an input."
    torch.manual_seed(draw(st.integers(0, 999)))
    ndim = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2]))
    in_channels, out_channels = groups*draw(st.integers(1, 3)), groups*draw(st.integers(1, 3))
    size = draw(st.sampled_from([1, 3, 7] if ndim == 3 else [1, 5, 11, 17]))
    kwargs = dict(groups=groups, bias=draw(st.booleans()),
                  kernel=draw(st.sampled_from(['magnet', 'siren', 'gabor', 'mlp'])),
                  conv_method=draw(st.sampled_from(['auto', 'direct', 'fft'])), dtype=torch.float64)
    if strides: kwargs |= dict(stride=draw(st.integers(1, 3)), dilation=draw(st.integers(1, 2)))
    if causal and ndim == 1: kwargs['causal'] = draw(st.booleans())
    masked = draw(st.booleans())
    if masked: kwargs['sigma'] = draw(st.floats(0.7, 1.5))
    classes = [FlexConv1d, FlexConv2d, FlexConv3d] if masked else [CKConv1d, CKConv2d, CKConv3d]
    layer = classes[ndim-1](in_channels, out_channels, size, **kwargs)
    if layer.bias is not None: nn.init.normal_(layer.bias)
    return layer.eval(), torch.randn(2, in_channels, *[draw(st.integers(7, 12)) for _ in range(ndim)],
                                     dtype=torch.float64)


def near(a, b, eps=1e-9):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= eps*max(1, b.abs().max()), (a - b).abs().max()


@quick
@given(layers(), st.floats(-3, 3))
def test_linear(case, a):
    "f(x + a z) - f(0) is linear."
    layer, x = case
    z, zero = torch.randn_like(x), layer(torch.zeros_like(x))
    near(layer(x + a*z) - zero, (layer(x) - zero) + a*(layer(z) - zero), 1e-8)


@quick
@given(layers(strides=False), st.integers(1, 3))
def test_equivariant_to_translation(case, shift):
    "A shifted input gives the shifted output, away from the borders that the kernel reaches."
    layer, x = case
    with torch.no_grad():
        reach = layer.size[-1]
        wide = nn.functional.pad(x, (reach + 4, reach + 4))
        moved = torch.roll(wide, shift, -1)                          # zeros come round
        near(layer(moved)[..., shift:], layer(wide)[..., :-shift], 1e-8)


@quick
@given(layers())
def test_baked_is_the_same(case):
    layer, x = case
    near(bake(layer)(x), layer(x).detach(), 1e-8)


@quick
@given(layers())
def test_state_dict_there_and_back(case):
    layer, x = case
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for p in other.parameters(): p.normal_()
    assert not other.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}).missing_keys
    assert torch.equal(other(x), layer(x))


@quick
@given(layers(), st.sampled_from([0.5, 0.75, 1.3, 2., 3.]))
def test_resolution_there_and_back(case, scale):
    "Another resolution and the old one again: bit for bit what it was, weights untouched."
    layer, x = case
    before, weights = layer(x).detach(), {k: v.clone() for k, v in layer.state_dict().items()}
    set_resolution(layer, scale)(x)
    assert torch.equal(set_resolution(layer, 1)(x), before)
    assert all(torch.equal(v, weights[k]) for k, v in layer.state_dict().items())


@quick
@given(st.integers(1, 3), st.floats(0.05, 3), st.integers(1, 8), st.floats(0.01, 0.9))
def test_mask_is_symmetric(ndim, sigma, half, threshold):
    "Around its mean, on every axis; 1 there; and the same for -sigma."
    mask = GaussianMask(ndim, sigma, threshold=threshold).double()
    m = mask(position_grid(2*half + 1, ndim, dtype=torch.float64)).detach()
    for axis in range(ndim): assert torch.allclose(m, m.flip(axis), rtol=1e-12)
    assert m[(half,)*ndim] == 1 and (m >= 0).all() and m.max() == 1
    flipped = GaussianMask(ndim, -sigma, threshold=threshold).double()
    assert torch.equal(flipped(position_grid(2*half + 1, ndim, dtype=torch.float64)), m)


@st.composite
def models(draw):
    "A random network with an input."
    torch.manual_seed(draw(st.integers(0, 999)))
    if draw(st.booleans()):
        net = FlexNet(draw(st.integers(1, 3)), draw(st.integers(2, 5)),
                      tuple(draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))), draw(st.integers(2, 5)),
                      kernel_size=draw(st.sampled_from([9, 17])),
                      sigma=draw(st.floats(0.2, 1.)), conv=draw(st.sampled_from([FlexConv2d])))
        x = torch.randn(3, net.stem.in_channels, 9, draw(st.integers(7, 11)))
    else:
        net = FlexTCN(draw(st.integers(1, 3)), 3, draw(st.integers(1, 2)), draw(st.integers(2, 5)),
                      kernel_size=draw(st.integers(10, 40)), sigma=draw(st.floats(0.2, 1.)))
        x = torch.randn(3, net.blocks[0].conv1.in_channels, 30)
    net.train()(x)                   # statistics of batch normalisation that are not 0 and 1
    return net.eval(), x


@settings(max_examples=15, deadline=None, derandomize=True)
@given(models())
def test_baked_networks_are_the_same(case):
    net, x = case
    want = net(x).detach()
    near(bake(net)(x), want, 1e-4)
    other = copy.deepcopy(net)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), want)


def live_tensors(): return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))


def test_soak():
    "500 steps on random shapes and dtypes, in training and in between in eval: memory stays flat, everything finite."
    rng = torch.Generator().manual_seed(0)
    pick = lambda *options: options[torch.randint(len(options), (), generator=rng)]
    torch.manual_seed(0)
    nets = [nn.Sequential(FlexConv2d(2, 4, 17, sigma=0.3), nn.ReLU(),
                          FlexConv2d(4, 2, (9, 13), sigma=0.5, conv_method='fft'), NJetConv2d(2, 2, 9),
                          FlexConv2d(2, 2, 17, sigma=0.8, conv_method='lowrank')).to(dtype)
            for dtype in (torch.float32, torch.float64)]
    opts = [torch.optim.Adam(net.parameters(), 1e-3) for net in nets]
    counts = []
    for step in range(500):
        which = pick(0, 1)
        net, opt = nets[which], opts[which]
        x = torch.randn(pick(1, 2, 3), 2, pick(5, 8, 11, 16), pick(6, 9, 13),
                        dtype=[torch.float32, torch.float64][which])
        with torch.autocast('cpu', torch.bfloat16, enabled=which == 0 and pick(True, False)):
            loss = net.train()(x).square().mean()
        assert loss.isfinite(), step
        opt.zero_grad(); loss.backward(); opt.step()
        if step % 5 == 0:
            with torch.no_grad(): net.eval()(x)
        if step % 50 == 49:
            net.train(); gc.collect()
            counts.append(live_tensors())
    assert all(p.isfinite().all() for net in nets for p in net.parameters())
    assert max(counts[2:]) <= counts[1] + 20, counts
