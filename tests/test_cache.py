"""What a layer remembers: sizes that are not read at every step, kernels and spectra in use.

None of it may be seen in a value."""
import copy, math, pickle, random
from concurrent.futures import ThreadPoolExecutor
import accelerate, numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from flexconv import layers
from flexconv.crop import crop_bounds, crop_starts, crop_mask, spacing
from flexconv.layers import FlexConv1d, FlexConv2d, FlexConv3d, conv_layers, refresh_sizes
from flexconv.mask import GaussianMask, cutoff_in_sigmas
from flexconv.registry import create_model
from helpers import gradients, relative_gap


LAYERS = [(FlexConv1d, (2, 3, 20), dict(kernel_size=15)), (FlexConv1d, (2, 3, 20), dict(kernel_size=14, causal=True)),
          (FlexConv2d, (2, 3, 12, 9), dict(kernel_size=13)), (FlexConv3d, (1, 3, 6, 5, 6), dict(kernel_size=5))]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.data())
def test_cropping_on_the_device_is_cropping(ndim, data):
    causal = data.draw(st.booleans()) if ndim == 1 else False
    size = tuple(data.draw(st.integers(1, 12))*(1 if causal else 2) + (0 if causal else 1) for _ in range(ndim))
    value = st.floats(-2, 2, width=32) | st.sampled_from([0., math.nan, math.inf, 1e30])
    mask = GaussianMask(ndim)
    with torch.no_grad():
        mask.sigma.copy_(torch.tensor([data.draw(value) for _ in range(ndim)]))
        mask.mean.copy_(torch.tensor([data.draw(value) for _ in range(ndim)]))
    # the edge of such a mask, outside by its own reach, is a difference of numbers without a fraction
    huge = (mask.sigma.abs() > 1e6) & ~(mask.mean.abs() <= 1)
    assume(not huge.any())
    want = torch.zeros(size, dtype=torch.bool)
    want[tuple(slice(*b) for b in crop_bounds(mask, size, causal))] = True
    starts, _ = crop_starts(*mask.effective(spacing(size)), size, cutoff_in_sigmas(0.1), causal)
    assert torch.equal(crop_mask(starts, size, tuple((0, n) for n in size), causal), want)


@pytest.mark.parametrize('cls,shape,kw', LAYERS)
@pytest.mark.parametrize('sigma', [0.01, 0.2, 0.7])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.filterwarnings('ignore:a kernel of')
def test_a_layer_that_does_not_ask_computes_the_same(cls, shape, kw, sigma, training, monkeypatch):
    "As on a GPU: values and gradients are those of a layer that asks at every step, while sigma moves."
    torch.manual_seed(0)
    asks, x = cls(3, 4, sigma=sigma, **kw).train(training), torch.randn(shape)
    lazy = copy.deepcopy(asks)
    for step in range(12):
        with monkeypatch.context() as m:
            m.setattr(layers, 'read_blocks', lambda device: True)
            y = lazy(x)
            lazy_gradients = gradients(y, lazy)
        want = asks(x)
        assert relative_gap([y], [want]) < 1e-5
        assert relative_gap(lazy_gradients, gradients(want, asks)) < 2e-4
        with torch.no_grad():
            for layer in (asks, lazy): layer.mask.sigma += 0.002; layer.mask.mean -= 0.001


def test_it_asks_seldom_while_training_and_always_when_it_must(monkeypatch):
    monkeypatch.setattr(layers, 'read_blocks', lambda device: True)
    asked = []
    original = layers.refresh_sizes
    monkeypatch.setattr(layers, 'refresh_sizes', lambda m: (asked.append(1), original(m)))
    layer, x = FlexConv2d(2, 2, 33), torch.randn(1, 2, 32, 32)
    opt = torch.optim.Adam(layer.parameters(), 0.001)
    for _ in range(60):
        opt.zero_grad(); layer(x).square().sum().backward(); opt.step()
    assert 2 <= len(asked) <= 10
    for change, why in ((lambda: layer.eval(), 'eval after training'),
                        (lambda: layer.mask.sigma.data.copy_(torch.tensor([0.3, 0.3])), None),
                        (lambda: layer.load_state_dict({k: 1.1*v for k, v in layer.state_dict().items()}),
                         'load_state_dict'),
                        (lambda: layer.double(), 'moved')):
        n = len(asked)
        change()
        with torch.no_grad(): y = layer(x.to(layer.bias.dtype))
        assert torch.allclose(y, layer.to_conv()(x.to(layer.bias.dtype)), rtol=1e-4, atol=1e-5), why
        assert len(asked) == n                                       # in eval mode the cache compares values


def test_refresh_sizes_reads_a_whole_model_in_one_transfer(monkeypatch):
    net = create_model('flexnet3')
    n, original = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda t: (n.append(t.shape), original(t))[1])
    refresh_sizes(net)
    assert n == [(4*7,)]
    for layer in conv_layers(net).values(): assert layer.window.bounds == tuple((a-1, b+1) for a, b in layer.bounds())
    refresh_sizes(net, margin=2)
    for layer in conv_layers(net).values(): assert layer.window.bounds == tuple((a-2, b+2) for a, b in layer.bounds())
    refresh_sizes(nn.Linear(2, 2))                                   # nothing to do
    with pytest.raises(ValueError, match='margin'): refresh_sizes(net, -1)


@pytest.mark.parametrize('method', ['direct', 'fft', 'lowrank'])
def test_the_kernel_is_remembered_until_something_changes(method, monkeypatch):
    torch.manual_seed(0)
    layer, x = FlexConv2d(3, 4, 17, sigma=0.3, conv_method=method).eval(), torch.randn(2, 3, 16, 16)
    sampled = []
    sample = layers.sample
    monkeypatch.setattr(layers, 'sample', lambda *args, **kwargs: (sampled.append(1), sample(*args, **kwargs))[1])
    def run(t=x):
        with torch.no_grad(): return layer(t.to(layer.first_parameter().dtype))
    first = run()
    for _ in range(3): assert torch.equal(run(), first)
    run(torch.randn(1, 3, 9, 30))                                    # another size, the same kernel
    assert len(sampled) == 1
    changes = [lambda: layer.mask.sigma.data.mul_(1.5), lambda: layer.kernel_network.filters[0].mu.data.add_(0.1),
               lambda: setattr(layer, 'scale', 2.),
               lambda: layer.double(), lambda: layer.load_state_dict({k: v*1.1 for k, v in layer.state_dict().items()}),
               lambda: layer.eval(),
               lambda: setattr(layer.kernel_network.filters[0], 'linear', layer.kernel_network.filters[1].linear)]
    for i, change in enumerate(changes):
        change()
        y = run()
        assert len(sampled) == i + 2
        assert relative_gap([y], [layer.to_conv()(x.to(y.dtype))]) < 1e-5
        sampled.pop()                                                # that of to_conv
    assert torch.equal(run(), pickle.loads(pickle.dumps(layer))(x.to(y.dtype)).detach())
    assert copy.deepcopy(layer).kernel_cache.entry is None
    layer.train()
    assert layer.kernel_cache.entry is None


def test_gradients_in_eval_mode_are_not_forgotten():
    layer, x = FlexConv2d(2, 2, 9, sigma=0.4).eval(), torch.randn(1, 2, 9, 9)
    with torch.no_grad(): layer(x)
    assert all(g.abs().max() > 0 for g in gradients(layer(x), layer))


def test_inference_mode():
    layer, x = FlexConv2d(2, 2, 9, sigma=0.4).eval(), torch.randn(1, 2, 9, 9)
    with torch.inference_mode(): y = layer(x); z = layer(x)
    assert torch.equal(y, z) and torch.allclose(layer(x), y.clone(), atol=1e-5)
    layer.train()(x).sum().backward()


def test_parameters_borrowed_for_one_call_are_seen(monkeypatch):
    "torch.func.functional_call in eval mode, with what was remembered of other parameters, and on a 'GPU'."
    torch.manual_seed(0)
    layer, x = FlexConv2d(2, 2, 17, sigma=0.2).eval(), torch.randn(1, 2, 16, 16)
    other = FlexConv2d(2, 2, 17, sigma=0.5).eval()
    for lazy in (False, True):
        if lazy: monkeypatch.setattr(layers, 'read_blocks', lambda device: True)
        with torch.no_grad():
            layer(x)
            assert torch.allclose(torch.func.functional_call(layer, other.state_dict(), (x,)), other(x), atol=1e-5)
            assert torch.allclose(layer(x), layer.to_conv()(x), atol=1e-4)


def test_what_is_remembered_stays_small(monkeypatch):
    "One spectrum, of one resolution, and none of a kernel so large that it must not exist at once."
    layer = FlexConv2d(2, 2, 17, sigma=0.5, conv_method='lowrank').eval()
    with torch.no_grad():
        for size in (9, 16, 40): layer(torch.randn(1, 2, size, size))
        assert len(layer.kernel_cache.entry[-1][-1]) == 1
        from flexconv import correlate
        monkeypatch.setattr(correlate, 'max_cached_numbers', 10)
        x = torch.randn(1, 2, 30, 30)
        y = layer(x)
        assert torch.allclose(y, layer.to_conv()(x), atol=1e-5)
        assert all(key[1] == (48, 48) for key in layer.kernel_cache.entry[-1][-1])      # still that of 40 pixels


@pytest.mark.parametrize('method', ['fft', 'lowrank', 'matmul', 'direct'])
def test_autocast_leaves_nothing_behind(method):
    "A kernel rounded for autocast is not used again without it."
    layer, x = FlexConv2d(2, 2, 17, sigma=0.5, conv_method=method).eval(), torch.randn(1, 2, 16, 16)
    want = layer(x).detach()
    with torch.no_grad():
        with torch.autocast('cpu', dtype=torch.bfloat16): layer(x)
        assert torch.allclose(layer(x), want, atol=1e-6*want.abs().max().item())
        layer.mask.threshold = 0.5
        assert not torch.allclose(layer(x), want, atol=1e-3*want.abs().max().item())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_threads_share_a_network_in_half_precision(dtype):
    "With gradients on, no kernel is kept: every call puts float32 copies of the parameters into the kernel networks."
    torch.manual_seed(0)
    net = nn.Sequential(FlexConv2d(3, 4, 9), FlexConv2d(4, 4, 9)).to(dtype).eval()
    x = torch.randn(2, 3, 12, 12).to(dtype)
    want = net(x).detach()
    def run(_): return all(torch.equal(net(x).detach(), want) for _ in range(20))
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(run, range(4)))
    assert {p.dtype for p in net.parameters()} == {dtype}


class Noisy(nn.Module):
    "A kernel network that draws from a generator."
    def __init__(self, ndim, out_channels, draw):
        super().__init__()
        self.out_channels, self.draw = out_channels, draw
        self.scale = nn.Parameter(torch.ones(()))
    def forward(self, positions): return self.scale*self.draw()*torch.ones(self.out_channels, *positions.shape[1:])


@pytest.mark.parametrize('draw', [lambda: torch.rand(()).item(), lambda: float(np.random.rand()), random.random])
def test_kernels_that_are_drawn_are_not_kept(draw):
    layer, x = FlexConv2d(1, 1, 9, kernel=lambda ndim, out: Noisy(ndim, out, draw)).eval(), torch.randn(1, 1, 8, 8)
    with torch.no_grad(): assert not torch.equal(layer(x), layer(x))


def test_sizes_of_an_offloaded_network_are_refused():
    "accelerate brings parameters to each module's own forward pass; the size of a kernel is read outside the mask's."
    net, x = nn.Sequential(FlexConv2d(2, 3, 9)).eval(), torch.randn(1, 2, 8, 8)
    with torch.no_grad(): want = net(x)
    whole, parts = copy.deepcopy(net), copy.deepcopy(net)
    accelerate.cpu_offload(whole, torch.device('cpu'), preload_module_classes=['FlexConv2d'])
    accelerate.cpu_offload(parts, torch.device('cpu'))
    with torch.no_grad():
        assert torch.allclose(whole(x), want, atol=1e-6)
        with pytest.raises(ValueError, match="give preload_module_classes=.'FlexConv2d'."): parts(x)
    assert net.to('meta')(x.to('meta')).shape == want.shape
