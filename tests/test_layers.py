"Layers: the contract of `test_conv_layer` over options, masks that went astray, and wrong arguments."
import math, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from flexconv.crop import crop_bounds
from flexconv.kernels import KernelNetwork, PointwiseLinear, kernel_networks
from flexconv.layers import CKConv1d, CKConv2d, CKConv3d, FlexConv1d, FlexConv2d, FlexConv3d, refresh_sizes
from flexconv.magnet import MAGNet
from flexconv.testing import test_conv_layer as check_layer
from flexconv.mask import GaussianMask
from flexconv.plot import kernel_frame
from torch.utils._python_dispatch import TorchDispatchMode

INPUTS = {1: (2, 4, 19), 2: (2, 4, 11, 12), 3: (2, 4, 7, 6, 8)}
LAYERS = {1: (CKConv1d, FlexConv1d), 2: (CKConv2d, FlexConv2d), 3: (CKConv3d, FlexConv3d)}


def make(cls, *args, **kwargs):
    return cls(*args, **(dict(sigma=0.35) | kwargs if 'FlexConv' in cls.__name__ else kwargs))


@pytest.mark.parametrize('options', [{},
                                     dict(stride=2),
                                     dict(padding='valid'),
                                     dict(padding=1),
                                     dict(dilation=2),
                                     dict(groups=2),
                                     dict(groups=4),
                                     dict(bias=False),
                                     dict(padding_mode='circular'),
                                     dict(padding_mode='reflect'),
                                     dict(padding_mode='replicate'),
                                     dict(init='fan_in'),
                                     dict(conv_method='fft'),
                                     dict(conv_method='direct'),
                                     dict(stride=3, padding=2, groups=2, bias=False)], ids=str)
@pytest.mark.parametrize('flex', [False, True], ids=['ckconv', 'flexconv'])
@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_contract(ndim, flex, options):
    torch.manual_seed(0)
    size = 5
    check_layer(make(LAYERS[ndim][flex], 4, 8, size, **options), torch.randn(INPUTS[ndim]))


@pytest.mark.parametrize('options', [dict(padding='valid'),
                                     dict(padding=0),
                                     dict(padding=1),
                                     dict(padding=3),
                                     dict(padding=(1, 5)),
                                     dict(padding='same'),
                                     dict(padding=2, dilation=2),
                                     dict(padding='valid', stride=2),
                                     dict(padding=4, padding_mode='circular'),
                                     dict(padding=4, padding_mode='reflect')], ids=str)
@pytest.mark.parametrize('sigma', [(0.1, 0.2), (0.3, 0.5), (5., 5.)])
def test_padding_is_that_of_the_whole_frame(sigma, options):
    """Against torch with the kernel on its whole frame, zeros where it was cropped: independent of how the layer crops
    its padding."""
    torch.manual_seed(0)
    layer, x = FlexConv2d(3, 4, (9, 7), sigma=sigma, **options), torch.randn(2, 3, 20, 17)
    padding = options['padding']
    torch_padding = {'valid': 0, 'same': (4, 3)}.get(padding, padding)
    conv = nn.Conv2d(3, 4, (9, 7), layer.stride, torch_padding, layer.dilation, padding_mode=layer.padding_mode)
    with torch.no_grad(): conv.weight.copy_(kernel_frame(layer)); conv.bias.copy_(layer.bias)
    for method in ('direct', 'fft'):
        layer.conv_method = method
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('taps', [1, 2, 8, 19, 50])
@pytest.mark.parametrize('options', [{},
                                     dict(stride=2),
                                     dict(dilation=2),
                                     dict(groups=2),
                                     dict(bias=False),
                                     dict(conv_method='fft')], ids=str)
def test_contract_causal(taps, options):
    torch.manual_seed(0)
    layer = FlexConv1d(4, 8, taps, causal=True, sigma=0.5 if taps > 2 else 2., **options)
    if taps == 1:                                     # one position: nothing for a mask to learn
        for p in layer.mask.parameters(): p.requires_grad_(False)
        x = torch.randn(INPUTS[1])
        return torch.testing.assert_close(layer(x), layer.to_conv()(x))
    check_layer(layer, torch.randn(INPUTS[1]))


@pytest.mark.parametrize('kernel', sorted(kernel_networks))
@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_contract_for_every_kernel_network(kernel, ndim):
    torch.manual_seed(1)
    # points wide enough for a frame of 5 positions
    options = dict(smp=dict(radius=0.8, spread=0.3), smp_separate=dict(sets=6, radius=0.8, spread=0.3)).get(kernel)
    check_layer(make(LAYERS[ndim][1], 4, 6, 5, kernel=kernel, kernel_options=options), torch.randn(INPUTS[ndim]))


@pytest.mark.parametrize('size', [(3, 9), (9, 3), (1, 5)])
def test_contract_for_non_square_kernels(size):
    torch.manual_seed(0)
    layer = FlexConv2d(4, 6, size, sigma=0.4)
    if 1 in size: layer.mask.requires_grad_(False)
    for method in ('direct', 'fft'):
        layer.conv_method = method
        x = torch.randn(INPUTS[2])
        torch.testing.assert_close(layer(x), layer.to_conv()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    layer, x = FlexConv2d(4, 6, 9, sigma=0.4), torch.randn(INPUTS[2])
    want = layer(x)
    layer = layer.to(dtype)
    for method in ('direct', 'fft'):
        layer.conv_method = method
        y = layer(x.to(dtype))
        assert y.dtype == layer.kernel().dtype == dtype and (y.float() - want).abs().max() < 0.15*want.abs().max()
        y.float().square().mean().backward()
        for name, p in layer.named_parameters(): assert p.grad.isfinite().all(), name


# Masks that went astray -----------------------------------------------------------------------------------------------

ASTRAY = {'sigma 0': (0., 0.), 'sigma negative': (-0.2, 0.), 'sigma tiny': (1e-30, 0.), 'sigma huge': (1e30, 0.),
          'sigma inf': (math.inf, 0.),
          'mean outside': (0.1, 3.), 'mean far outside': (0.1, -1e6), 'mean between positions': (1e-4, 0.11),
          'both': (0., 1e9)}


@pytest.mark.parametrize('case', ASTRAY)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('cls,size', [(FlexConv1d, 17), (FlexConv2d, 17), (FlexConv3d, 5), ('causal', 16)])
def test_masks_astray_neither_crash_nor_vanish(cls, size, training, case):
    torch.manual_seed(0)
    layer = FlexConv1d(2, 3, size, causal=True, sigma=0.5) if cls == 'causal' else cls(2, 3, size, sigma=0.5)
    sigma, mean = ASTRAY[case]
    with torch.no_grad(): layer.mask.sigma.fill_(sigma); layer.mask.mean.fill_(mean)
    layer.train(training)
    x = torch.randn(1, 2, *[20 if cls == 'causal' else 9]*layer.ndim)
    y = layer(x)
    assert y.shape == (1, 3, *x.shape[2:]) and y.isfinite().all()
    assert layer.kernel().abs().max() > 1e-6 and y.abs().max() > 1e-6, 'the kernel vanished'
    assert all(1 <= s <= size for s in layer.size)
    y.square().sum().backward()
    for name, p in layer.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize('which', ['sigma', 'mean'])
def test_nan_is_not_hidden(which):
    layer = FlexConv2d(2, 3, 9, sigma=0.5)
    with torch.no_grad(): getattr(layer.mask, which).fill_(math.nan)
    assert layer.size == (9, 9) and layer(torch.randn(1, 2, 9, 9)).isnan().any()


def test_one_pixel_kernels_can_grow_again():
    "From sigma 0, a layer that needs a wide kernel grows one; the same layer in eval has one pixel."
    torch.manual_seed(0)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); layer = FlexConv1d(1, 1, 33, sigma=0.)
    target = torch.ones(1, 1, 9)
    opt = torch.optim.Adam(layer.parameters(), lr=0.005)
    assert layer.size == (1,)
    for _ in range(100):
        x = torch.randn(8, 1, 64)
        loss = nn.functional.mse_loss(layer(x), nn.functional.conv1d(x, target, padding=4))
        opt.zero_grad(); loss.backward(); opt.step()
    assert layer.size[0] >= 5


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.floats(-2, 2), st.floats(-3, 3), st.floats(0.01, 0.9), st.booleans())
def test_crop_keeps_what_the_mask_keeps(half, sigma, mean, threshold, causal):
    "Against the definition: no position outside the crop reaches the threshold, and at least one inside does."
    n = 2*half + 1
    mask = GaussianMask(1, sigma, mean, threshold).double()
    (start, stop), = crop_bounds(mask, (n,), causal)
    assert 0 <= start < stop <= n and (stop == n if causal else start == n - stop)
    x = torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    values = mask(x[None], 2/max(1, n-1)).detach()
    outside = torch.cat([values[:start], values[stop:]])
    assert not len(outside) or outside.max() < threshold*(1 + 1e-4)
    if n > 1 and not (causal and mean < -1): assert values[start:stop].max() >= threshold*(1 - 1e-4)


# Wrong arguments ------------------------------------------------------------------------------------------------------

WRONG = [(dict(in_channels=0), 'in_channels'),
         (dict(in_channels=2.5), 'in_channels'),
         (dict(out_channels=-1), 'out_channels'),
         (dict(kernel_size=4), 'kernel_size'),
         (dict(kernel_size=0), 'kernel_size'),
         (dict(kernel_size=(3, 3, 3)), 'kernel_size'),
         (dict(kernel_size='5'), 'kernel_size'),
         (dict(stride=0), 'stride'),
         (dict(stride=(1, 2, 3)), 'stride'),
         (dict(padding=-1), 'padding'),
         (dict(padding='sam'), 'padding'),
         (dict(dilation=0), 'dilation'),
         (dict(groups=3), 'groups'),
         (dict(groups=0), 'groups'),
         (dict(padding_mode='zero'), 'padding_mode'),
         (dict(kernel='magent'), 'kernel'),
         (dict(sigma=math.nan), 'sigma'),
         (dict(sigma=(0.1,)), 'sigma'),
         (dict(sigma='wide'), 'sigma'),
         (dict(threshold=0), 'threshold'),
         (dict(threshold=1.), 'threshold'),
         (dict(causal=True), 'causal'),
         (dict(conv_method='fourier'), 'conv_method'),
         (dict(init='kaiming'), 'init'),
         (dict(kernel_options=dict(hidden=0)), 'hidden'),
         (dict(kernel_options='hidden'), 'kernel_options'),
         (dict(kernel_options=dict(device='cpu')), 'kernel_options'),
         (dict(kernel_options=dict(input_scale=0)), 'input_scale')]


@pytest.mark.parametrize('wrong,name', WRONG, ids=lambda v: str(v))
def test_wrong_arguments_are_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        FlexConv2d(**(dict(in_channels=2, out_channels=4, kernel_size=5, sigma=0.4) | wrong))


def test_kernel_option_of_another_network():
    with pytest.raises(TypeError, match='omega_0'): FlexConv2d(2, 4, 5, sigma=0.4, kernel_options=dict(omega_0=3))


def test_a_start_at_one_pixel_is_said():
    with pytest.warns(UserWarning, match='single pixel'): FlexConv2d(2, 4, 5, sigma=0.075)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for n in (1, 3, 5, 9, 33): assert FlexConv2d(2, 4, n).size == (min(n, 5),)*2


@pytest.mark.parametrize('mode', ['reflect', 'circular'])
def test_padding_beyond_the_input_fails_at_once(mode):
    "Not when the kernel has grown, but at the first call."
    for sigma in (0.1, 2.):
        with pytest.raises(ValueError, match='padding_mode'):
            FlexConv2d(2, 2, 33, padding_mode=mode, sigma=sigma)(torch.randn(1, 2, 12, 12))
    FlexConv2d(2, 2, 33, padding_mode=mode)(torch.randn(1, 2, 17, 17))


def test_kernel_networks_need_not_know_of_devices():
    from flexconv.magnet import MAGNet
    layer = FlexConv2d(2, 4, 9, sigma=0.4, kernel=lambda ndim, out: MAGNet(ndim, out), dtype=torch.float64)
    assert layer(torch.randn(1, 2, 9, 9, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match='kernel must give 8 values'):
        FlexConv2d(2, 4, 9, sigma=0.4, kernel=lambda ndim, out: MAGNet(ndim, out+1)).kernel()


def test_input_is_checked():
    layer = FlexConv2d(2, 4, 5, sigma=0.4)
    with pytest.raises(ValueError, match='x must have shape'): layer(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match='x must have shape'): layer(torch.randn(8, 8))
    with pytest.raises(TypeError, match='float64'): layer(torch.randn(1, 2, 8, 8).double())


def test_custom_kernel_network_without_output_linear():
    "A callable that makes any module of the right shapes will do; only init='fan_in' needs an output_linear."
    class Constant(nn.Module):
        def __init__(self, ndim, out_channels, *, device=None, dtype=None):
            super().__init__()
            self.value = nn.Parameter(torch.ones(out_channels))
        def forward(self, positions):
            return self.value.view(-1, *[1]*(positions.ndim-1)).expand(-1, *positions.shape[1:])
    layer = FlexConv2d(4, 6, 9, sigma=0.5, kernel=Constant)
    m = layer.mask(layer.positions())
    torch.testing.assert_close(layer.kernel(), m.expand(6, 4, -1, -1))
    with pytest.raises(ValueError, match='output_linear'):
        FlexConv2d(4, 6, 9, sigma=0.5, kernel=Constant, init='fan_in')


# -- how many operations a layer takes

class Operations(TorchDispatchMode):
    "Counts the operations that compute; views, and tensors that are only allocated, are free."
    free = {'view', '_unsafe_view', 't', 'transpose', 'permute', 'expand', 'unsqueeze', 'squeeze', 'slice', 'select',
            'detach', 'alias',
            'unbind', 'as_strided', 'empty', 'new_empty', 'new_empty_strided', 'empty_strided'}
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).split('.')[1] not in self.free
        return func(*args, **(kwargs or {}))


def test_a_layer_takes_few_operations():
    "Forward and backward of one FlexConv2d: sizes, mask, kernel network and convolution together."
    layer, x = FlexConv2d(24, 24, 33, conv_method='direct'), torch.randn(4, 24, 32, 32, requires_grad=True)
    layer(x)                                                   # positions are made once
    with Operations() as operations: layer(x).sum().backward()
    assert operations.count <= 100, operations.count           # 145 before masks and filters had a closed form


def test_values_and_gradients_are_those_of_the_single_steps():
    """The closed forms of mask and filters against what autograd makes of the plain formulas (which torch.func takes),
    in float64."""
    torch.manual_seed(0)
    for sigma in (0.1, 0.2, (0.5, 0.15)):
        layer, x = FlexConv2d(2, 3, 9, sigma=sigma).double(), torch.randn(1, 2, 8, 8, dtype=torch.float64)
        layer.eval()
        params = dict(layer.named_parameters())
        loss = lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()
        plain = torch.func.grad(loss)({k: v.detach() for k, v in params.items()})
        fast = dict(zip(params, torch.autograd.grad(layer(x).square().sum(), list(params.values()))))
        for name in params: assert torch.allclose(fast[name], plain[name], rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul', 'lowrank', 'auto'])
def test_vmap_over_an_ensemble_of_masks(method, train):
    "Layers of different sizes in one call: outputs and gradients are those of each alone."
    torch.manual_seed(0)
    members = [FlexConv2d(2, 3, 9, sigma=s, conv_method=method).train(train) for s in (0.15, 0.3, 0.6)]
    x, (stack, _) = torch.randn(4, 2, 12, 12), torch.func.stack_module_state(members)
    def loss(params): return torch.func.functional_call(members[0], params, (x,)).square().sum()
    losses = torch.func.vmap(loss)(stack)
    grads = torch.func.vmap(torch.func.grad(loss))(stack)
    for i, member in enumerate(members):
        want = member(x).square().sum()
        assert torch.allclose(losses[i], want, rtol=1e-4)
        sigma, = torch.autograd.grad(want, member.mask.sigma)
        assert torch.allclose(grads['mask.sigma'][i], sigma, rtol=1e-3, atol=1e-4*sigma.abs().max())


# What is shared, kept or recomputed ----------------------------------------------------------------------------------

def test_training_after_a_first_call_in_inference_mode():
    "Positions are kept for all layers of a size: 43 positions occur in no other test."
    layer, x = FlexConv2d(2, 3, 43), torch.randn(1, 2, 19, 19)
    with torch.inference_mode(): want = layer.eval()(x)
    layer.train()
    for method in 'direct', 'fft', 'matmul', 'lowrank':
        layer.conv_method = method
        y = layer(x)
        y.sum().backward()
        assert torch.allclose(y, want, atol=1e-5) and layer.mask.sigma.grad.abs().min() > 0


def test_a_kernel_network_may_write_to_its_positions():
    class Scales(MAGNet):
        def features(self, points): return super().features(points.mul_(3))
    layer, x = FlexConv2d(2, 3, 45, kernel=Scales), torch.randn(1, 2, 19, 19)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert FlexConv2d(2, 3, 45).positions().abs().max() <= 1


def test_dropout_in_a_kernel_network_is_drawn_for_every_call():
    class Drops(MAGNet):
        def features(self, points): return nn.functional.dropout(super().features(points), 0.5, self.training)
    layer, x = FlexConv2d(2, 3, 33, kernel=Drops), torch.randn(1, 2, 19, 19)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x)) and layer.kernel_cache.entry is not None


def test_a_changed_class_is_seen():
    class Waves(KernelNetwork):
        frequency = 5.
        def __init__(self, ndim, out_channels):
            super().__init__(ndim, out_channels, 8, 1)
            self.linear, self.output_linear = PointwiseLinear(ndim, 8), PointwiseLinear(8, out_channels)
        @property
        def speed(self): return self.frequency                      # a property does not keep it from being remembered
        def features(self, points): return torch.sin(self.speed*self.linear(points))
    layer, x = FlexConv2d(2, 3, 33, kernel=Waves).eval(), torch.randn(1, 2, 19, 19)
    with torch.no_grad():
        first = layer(x)
        assert layer(x) is not first and layer.kernel_cache.entry is not None
        Waves.frequency = 1.
        second = layer(x)
        assert torch.allclose(second, layer.to_conv()(x), atol=1e-5) and not torch.allclose(second, first)
        Waves.features = lambda self, points: torch.cos(self.linear(points))
        assert torch.allclose(layer(x), layer.to_conv()(x), atol=1e-5) and not torch.allclose(second, layer(x))


def test_a_spectral_norm_estimates_on_in_half_precision():
    moved = {}
    for dtype in torch.float32, torch.bfloat16:
        torch.manual_seed(0)
        layer = FlexConv2d(2, 3, 33, kernel='siren')
        nn.utils.parametrizations.spectral_norm(layer.kernel_network.linear[1])
        layer.to(dtype)
        u = layer.kernel_network.linear[1].parametrizations.weight[0]._u
        before = u.clone()
        for _ in range(20): layer(torch.randn(1, 2, 9, 9, dtype=dtype))
        moved[dtype] = (u - before).float()
    assert torch.allclose(moved[torch.bfloat16], moved[torch.float32], atol=0.02)
    assert moved[torch.float32].abs().max() > 0.01


@pytest.mark.parametrize('frozen', ['mean', 'sigma'])
def test_second_derivatives_with_a_part_of_the_mask_frozen(frozen):
    torch.manual_seed(0)
    layer, x = FlexConv2d(2, 2, 9, sigma=0.4).double(), torch.randn(1, 2, 9, 9, dtype=torch.float64)
    getattr(layer.mask, frozen).requires_grad_(False)
    free = layer.mask.sigma if frozen == 'mean' else layer.mask.mean
    def slope(): return torch.autograd.grad(layer(x).square().sum(), free, create_graph=True)[0]
    second, = torch.autograd.grad(slope().sum(), free)
    h = 1e-5
    with torch.no_grad(): free += h
    up = slope().detach().sum()
    with torch.no_grad(): free -= 2*h
    assert torch.allclose(second.sum(), (up - slope().detach().sum())/(2*h), rtol=1e-4)


def test_a_mask_has_a_gradient_for_positions():
    mask, points = GaussianMask(2, 0.3), torch.rand(2, 5, requires_grad=True)
    torch.autograd.gradcheck(mask.double(), points.detach().double().requires_grad_())
    assert torch.autograd.grad(mask.float()(points).sum(), points)[0].abs().max() > 0


@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul', 'lowrank', 'auto'])
def test_forward_derivatives(method):
    layer = FlexConv2d(2, 3, 33, sigma=0.3, conv_method=method).double()
    x, tangent = torch.randn(2, 1, 2, 40, 40, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    conv = layer.to_conv()
    assert torch.allclose(got, conv(tangent) - conv(torch.zeros_like(tangent)), atol=1e-10)


@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul', 'lowrank'])
def test_second_derivatives_inside_autocast(method):
    layer, x = FlexConv2d(2, 3, 33, conv_method=method), torch.randn(1, 2, 19, 19, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        g, = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
        g.square().sum().backward()
    assert layer.mask.sigma.grad.isfinite().all() and layer.mask.sigma.grad.abs().min() > 0


@pytest.mark.parametrize('name', ['sigma', 'mean'])
def test_an_ensemble_of_masks_in_one_call(name):
    "Also after sizes were read: they are those of the layer's own mask."
    layer, x = FlexConv2d(2, 3, 33), torch.randn(1, 2, 19, 19)
    refresh_sizes(layer)
    own = {k: v.detach().clone() for k, v in layer.named_parameters()}
    several = torch.tensor([[0.07, 0.07], [0.3, 0.2]])
    call = lambda values: torch.func.functional_call(layer, own | {f'mask.{name}': values}, (x,))
    y = torch.func.vmap(call)(several)
    for got, values in zip(y, several):
        with torch.no_grad(): getattr(layer.mask, name).copy_(values)
        assert torch.allclose(got, layer.to_conv()(x), atol=1e-5)


@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul', 'lowrank'])
def test_volumes_keep_channels_last(method):
    layer, x = FlexConv3d(2, 4, 9, sigma=0.4, conv_method=method), torch.randn(2, 2, 8, 9, 10)
    want, got = layer(x), layer(x.contiguous(memory_format=torch.channels_last_3d))
    assert got.is_contiguous(memory_format=torch.channels_last_3d) and want.is_contiguous()
    assert torch.allclose(got, want, atol=1e-5)
