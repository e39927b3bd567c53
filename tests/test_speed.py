"""What is done for speed and must not be seen in any value: factors, caches, sizes that are not asked for,
compilation, precision, export."""
import copy, io, math, pickle, warnings
from contextlib import redirect_stderr
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from flexconv import layers
from flexconv.bench import broadcast_fft, peak_memory, plain, with_forward
from flexconv.conv import LowRankKernel, conv_nd
from flexconv.costs import estimate_seconds
from flexconv.crop import crop_bounds, crop_starts, crop_mask, spacing
from flexconv.export import bake, export_onnx, export_program
from flexconv.layers import conv_layers
from flexconv.registry import create_model
from flexconv.layers import CKConv2d, FlexConv1d, FlexConv2d, FlexConv3d, refresh_sizes
from flexconv.mask import GaussianMask, cutoff_in_sigmas
from test_conv import CONVS, assert_close, problems, tensors


def gradients(y, model): return torch.autograd.grad(y.square().sum(), [p for p in model.parameters()])


def relative_gap(a, b, together=False):
    """Largest difference of two lists of tensors, relative to the largest value of each, or of all together (where
    some are 0 but for rounding)."""
    scale = [y.double().abs().max().clamp(min=1e-30) for y in b]
    return max(((x.double() - y.double()).abs().max()/(max(scale) if together else c)).item()
               for x, y, c in zip(a, b, scale))


# -- low rank

@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 4), st.sampled_from(['lowrank', 'fft', 'matmul', 'direct', 'auto']))
def test_factors_give_what_their_product_gives(p, rank, method):
    x, w, b = tensors(p)
    g = torch.Generator().manual_seed(p['seed'])
    mix, basis = (torch.randn(*s, generator=g, dtype=p['dtype']).requires_grad_()
                  for s in ((*w.shape[:2], rank), (rank, *w.shape[2:])))
    kernel = LowRankKernel(mix, basis)
    args = [x, mix, basis] + ([b] if b is not None else [])
    ours = conv_nd(x, kernel, b, p['stride'], p['padding'], p['groups'], dilation=p['dilation'], method=method)
    theirs = CONVS[len(p['sizes'])](x, kernel.dense(), b, p['stride'], p['padding'], p['dilation'], p['groups'])
    assert_close(ours, theirs, p['dtype'])
    r = torch.randn(theirs.shape, dtype=p['dtype'], generator=g)
    for a, c in zip(torch.autograd.grad(ours, args, r), torch.autograd.grad(theirs, args, r)):
        assert_close(a, c, p['dtype'])


@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_wanted_gradients_are_computed(wanted):
    tensors = [torch.randn(2, 3, 20), torch.randn(4, 3, 2), torch.randn(2, 9)]
    for i in wanted: tensors[i].requires_grad_()
    y = conv_nd(tensors[0], LowRankKernel(*tensors[1:]), method='lowrank')
    want = F.conv1d(tensors[0], LowRankKernel(*tensors[1:]).dense(), padding=4)
    chosen = [tensors[i] for i in wanted]
    assert relative_gap(torch.autograd.grad(y.square().sum(), chosen),
                        torch.autograd.grad(want.square().sum(), chosen)) < 1e-4


@pytest.mark.parametrize('chunk', [1, 500, 20_000])
def test_chunks_change_nothing(chunk, monkeypatch):
    x, mix, basis = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
                     for s in ((5, 4, 12, 9), (6, 2, 3), (3, 7, 9)))
    run = lambda: torch.autograd.grad(conv_nd(x, LowRankKernel(mix, basis), groups=2, method='lowrank').square().sum(),
                                      (x, mix, basis))
    want = run()
    monkeypatch.setitem(__import__('flexconv.transforms').transforms.chunk_numbers, 'cpu', chunk)
    assert relative_gap(run(), want) < 1e-12


@pytest.mark.parametrize('kernel', ['magnet', 'gabor', 'fourier', 'siren', 'mlp'])
def test_a_layer_computes_the_same_in_every_way(kernel):
    torch.manual_seed(0)
    layer, x = FlexConv2d(4, 6, 17, sigma=(0.2, 0.5), groups=2, kernel=kernel), torch.randn(3, 4, 16, 11)
    with_forward_of = lambda method: (setattr(layer, 'conv_method', method), layer(x))[1]
    def plain(m, t): return F.conv2d(t, m.kernel(), m.bias, padding=[n//2 for n in m.size], groups=2)
    want = with_forward(layer, plain)(x)
    for method in ('direct', 'fft', 'lowrank', 'matmul', 'auto', 'autotune'):
        y = with_forward_of(method)
        assert relative_gap([y], [want]) < 1e-5
        if method == 'direct': reference = gradients(y, layer)
        else: assert relative_gap(gradients(y, layer), reference) < 1e-3


def test_networks_that_are_not_linear_at_the_end_are_sampled_whole():
    class Squared(layers.MAGNet):
        def forward(self, positions): return super().forward(positions)**2
    layer = FlexConv2d(2, 2, 9, sigma=0.4, kernel=Squared)
    assert not layer.can_factor
    bounds = layer.bounds()
    with torch.no_grad():
        want = Squared.forward(layer.kernel_network, layer.positions(bounds))*layer.mask(layer.positions(bounds))
    assert torch.allclose(layer.kernel().flatten(0, 1), want, atol=1e-6)
    hooked = FlexConv2d(2, 2, 9, sigma=0.4)
    hooked.kernel_network.output_linear.register_forward_hook(lambda m, args, y: 2*y)
    assert not hooked.can_factor
    with pytest.raises(ValueError, match="conv_method='lowrank' needs"):
        FlexConv2d(2, 2, 9, kernel=Squared, conv_method='lowrank')


# -- the choice

def test_rates_are_fitted_to_what_was_measured():
    "Times that follow the model exactly give back its rates, and a choice that loses nothing."
    from flexconv.bench import calibration_case, calibration_cases, choice_loss, fit_rates
    from flexconv.costs import count_work, rates
    start = rates['cpu']['float32']['training']
    factors = (3, 0.5, 2, 1, 0.3, 2, 1, 4)
    truth = {unit: rate*factors[i % 8] for i, (unit, rate) in enumerate(start.items())}
    rows, counted = [], set()
    for case in calibration_cases(False):
        work = count_work(*case[:2], rank=33, **calibration_case(*case)[1])
        counted |= {unit for units in work.values() for unit, n in units.items() if n and unit in truth}
        rows += [(*case, method, sum(truth.get(unit, 0.)*n for unit, n in units.items()))
                 for method, units in work.items()]
    fitted = fit_rates(rows)
    assert choice_loss(rows, fitted) < 0.01
    # three that hardly differ in these shapes
    for unit in counted - {'matmul_transform', 'matmul_product', 'matmul_frequencies'}:
        assert fitted[unit] == pytest.approx(truth[unit], rel=0.2), unit


def test_rates_that_were_measured_here_are_used(monkeypatch, tmp_path):
    from flexconv import costs
    from flexconv.bench import keep_rates
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    costs.calibrated_rates.cache_clear()
    case = (1, 2, 9), (2, 2, 3), ((1, 1),)
    builtin = estimate_seconds(*case)
    keep_rates('cpu', dict(float32=dict(training=dict(direct_call=7.))))
    try: assert estimate_seconds(*case)['direct'] == 7 and estimate_seconds(*case, training=False)['direct'] != 7
    finally:
        costs.rates_file().write_text('{damaged')
        costs.calibrated_rates.cache_clear()
    assert estimate_seconds(*case) == builtin
    costs.calibrated_rates.cache_clear()


GPU_CASE = (64, 48, 32, 32), (48, 48)


def chosen_on_a_gpu(n, dtype=torch.float32, training=True, batch=64):
    from flexconv.costs import cheapest
    (_, *rest), channels = GPU_CASE
    return cheapest((batch, *rest), (*channels, n, n), ((n//2, n//2),)*2, (1, 1), (1, 1), device='cuda', rank=33,
                    dtype=dtype, channels_last=dtype != torch.float32, training=training)[0]


@pytest.fixture
def tf32():
    "Sets whether a GPU may round float32: of convolutions, of matrix products."
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    def set_it(convolutions, products):
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision('high' if products else 'highest')
    yield set_it
    set_it(before[0], before[1] != 'highest')


def test_choices_on_a_gpu_are_sane(tf32):
    "Direct for small kernels, the longer the faster the tensor cores are; never FFTs for large ones in half precision."
    tf32(False, False)
    assert [chosen_on_a_gpu(n) for n in (3, 5, 33)] == ['direct', 'fft', 'fft']
    tf32(True, False)                                                # torch's default
    assert [chosen_on_a_gpu(n) for n in (3, 5, 7, 11, 33)] == ['direct']*3 + ['fft']*2
    tf32(True, True)
    assert [chosen_on_a_gpu(n) for n in (3, 5, 7)] == ['direct']*3 and chosen_on_a_gpu(17) != 'direct'
    for half in (torch.bfloat16, torch.float16):
        assert [chosen_on_a_gpu(n, half) for n in (3, 9, 11, 17, 33)] == ['direct']*3 + ['matmul']*2
        assert chosen_on_a_gpu(33, half, batch=512) == 'matmul'
    for batch in (1, 8): assert chosen_on_a_gpu(9, batch=batch) == 'direct'      # calls cost more than work


@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_on_a_gpu_everything_costs_something(ndim):
    "No unit without a rate: a method must not seem to be free."
    from flexconv.costs import count_work, rates
    for groups, last, stride in ((1, False, 1), (1, True, 1), (8, False, 1), (1, False, 2), (8, True, 2)):
        for n in (3, 17):
            shapes = (4, 8, *[32]*ndim), (8, 8//groups, *[n]*ndim), ((n//2, n//2),)*ndim
            work = count_work(*shapes, stride=(stride,)*ndim, rank=33, channels_last=last)
            needed = {unit for units in work.values() for unit, k in units.items() if k} - {'matmul_frequencies'}
            for device in ('cuda', 'h200'):
                for by_mode in rates[device].values():
                    for rate in by_mode.values(): assert all(rate.get(unit, 0) > 0 for unit in needed)


def test_autotune_measures_once_and_remembers(monkeypatch):
    from flexconv import conv
    from flexconv.conv import autotuned
    measured, original = [], conv.run_seconds
    monkeypatch.setattr(conv, 'run_seconds', lambda *args: (measured.append(1), original(*args))[1])
    x, w = torch.randn(2, 3, 50), torch.randn(4, 3, 31)
    autotuned.clear()
    y = conv_nd(x, w, method='autotune')
    assert torch.allclose(y, F.conv1d(x, w, padding=15), atol=1e-4)
    # three methods, twice
    assert list(autotuned.values()) in (['direct'], ['fft'], ['matmul']) and len(measured) == 6
    conv_nd(x, w, method='autotune')
    assert len(measured) == 6
    conv_nd(x, w.requires_grad_(), method='autotune')
    assert len(autotuned) == 2                                       # training is another question than inference
    autotuned.clear()


# -- sizes that are not asked for

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
    want = torch.zeros(size, dtype=torch.bool)
    want[tuple(slice(*b) for b in crop_bounds(mask, size, causal))] = True
    starts, _ = crop_starts(*mask.effective(spacing(size)), size, cutoff_in_sigmas(0.1), causal)
    assert torch.equal(crop_mask(starts, size, tuple((0, n) for n in size), causal), want)


LAYERS = [(FlexConv1d, (2, 3, 20), dict(kernel_size=15)), (FlexConv1d, (2, 3, 20), dict(kernel_size=14, causal=True)),
          (FlexConv2d, (2, 3, 12, 9), dict(kernel_size=13)), (FlexConv3d, (1, 3, 6, 5, 6), dict(kernel_size=5))]


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


# -- what is remembered in eval mode

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


# -- compile, precision, memory

@pytest.mark.parametrize('cls,shape,kw', LAYERS)
def test_compile_has_no_graph_break_on_the_direct_path(cls, shape, kw):
    torch._dynamo.reset()
    layer, x = cls(3, 4, sigma=0.3, conv_method='direct', **kw), torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for refresh in (False, True):                                    # whole kernels, then the sizes that were read
        if refresh: refresh_sizes(layer)
        want, y = layer(x), compiled(x)
        assert relative_gap([y], [want]) < 1e-5 and relative_gap(gradients(y, layer), gradients(want, layer)) < 2e-4


def test_compiled_training_follows_sizes():
    "A compiled step with refresh_sizes every few steps learns what an eager one learns, also when the kernel grows."
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = FlexConv1d(1, 1, 65, sigma=0.04, conv_method='direct')
    other = copy.deepcopy(eager)
    compiled, start = torch.compile(other, fullgraph=True, backend='aot_eager'), eager.size
    opts = [torch.optim.Adam(m.parameters(), 0.003) for m in (eager, other)]
    x = torch.randn(4, 1, 128)
    target = F.conv1d(x, torch.linspace(-1, 1, 25).sign()[None, None], padding=12)
    for step in range(40):
        if step % 5 == 0: refresh_sizes(other, margin=2)             # five steps of 0.003 cross a position
        for f, opt in zip((eager, compiled), opts): opt.zero_grad(); F.mse_loss(f(x), target).backward(); opt.step()
    assert eager.size == other.size != start
    assert relative_gap([other(x)], [eager(x)]) < 1e-2


@pytest.mark.parametrize('method', ['fft', 'lowrank'])
def test_compile_takes_the_transform_as_it_is(method):
    torch._dynamo.reset()
    net = create_model('flexnet3', width=4, kernel_size=9, sigma=0.4, dropout=0., conv_method=method)
    x = torch.randn(2, 3, 9, 9)
    y = torch.compile(net)(x)                                        # inductor
    assert relative_gap([y], [net(x)]) < 1e-3
    assert relative_gap(gradients(y, net), gradients(net(x), net), together=True) < 1e-3


def test_compiled_network_with_inductor():
    torch._dynamo.reset()
    net = create_model('flexnet3', width=4, kernel_size=9, sigma=0.4, dropout=0., conv_method='direct')
    x = torch.randn(2, 3, 9, 9)
    refresh_sizes(net)
    y = torch.compile(net, fullgraph=True)(x)
    assert relative_gap([y], [net(x)]) < 1e-3


@pytest.mark.parametrize('method', ['direct', 'fft', 'lowrank'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(method, dtype):
    "Autocast with a GradScaler: no NaN, and the loss falls about as far as in float32."
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        net = create_model('flexnet3', width=6, kernel_size=9, sigma=0.4, dropout=0., conv_method=method)
        x = torch.randn(32, 3, 9, 9)
        y = torch.randint(0, 10, (32,))
        opt = torch.optim.Adam(net.parameters(), 0.005)
        scaler = torch.amp.GradScaler('cpu', enabled=enabled and dtype == torch.float16, init_scale=2.**10)
        for step in range(25):
            with torch.autocast('cpu', dtype=dtype, enabled=enabled): loss = F.cross_entropy(net(x).float(), y)
            opt.zero_grad(); scaler.scale(loss).backward(); scaler.step(opt); scaler.update()
            assert loss.isfinite()
        assert all(p.isfinite().all() for p in net.parameters())
        losses[enabled] = loss.item()
    assert losses[True] < 1 and abs(losses[True] - losses[False]) < 0.2, losses


def test_kernels_are_sampled_and_transformed_in_float32_under_autocast():
    layer, x = FlexConv2d(3, 4, 17, sigma=0.3, conv_method='lowrank'), torch.randn(2, 3, 16, 16).bfloat16()
    want = layer(x.float())
    with torch.autocast('cpu', dtype=torch.bfloat16): y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, want.bfloat16())
    loss = layer(x.float()).square().sum()
    want = torch.autograd.grad(loss, list(layer.parameters()))
    loss = layer(x.float()).square().sum()
    # a backward pass that was put inside by mistake
    with torch.autocast('cpu', dtype=torch.bfloat16): got = torch.autograd.grad(loss, list(layer.parameters()))
    assert relative_gap(got, want) < 0.05


def test_memory_of_the_transform():
    "At batch 64, 48 channels and 32x32 pixels it stays under twice that of the direct way."
    x, peaks = torch.randn(64, 48, 32, 32, requires_grad=True), {}
    for method in ('direct', 'fft', 'lowrank'):
        layer = FlexConv2d(48, 48, 33, sigma=0.25, conv_method=method)
        peaks[method] = peak_memory(lambda: layer(x).backward(torch.ones_like(x)))
    assert max(peaks['fft'], peaks['lowrank']) < 2*peaks['direct'], peaks


def test_long_sequences_need_memory_in_proportion():
    def peak(n):
        layer, x = FlexConv1d(16, 16, n, sigma=1., causal=True), torch.randn(1, 16, n, requires_grad=True)
        return peak_memory(lambda: layer(x).sum().backward())
    assert peak(2**14) < 4.5*peak(2**12)


# -- competitors and exports

def test_competitors_compute_the_same():
    net, x = create_model('flextcn2', in_channels=1, kernel_size=60, sigma=0.5).eval(), torch.randn(2, 1, 60)
    for forward in (plain, broadcast_fft): assert relative_gap([with_forward(net, forward)(x)], [net(x)]) < 1e-4
    net, x = create_model('flexnet3', width=6, sigma=0.3).eval(), torch.randn(2, 3, 32, 32)
    assert relative_gap([with_forward(net, plain)(x)], [net(x)]) < 1e-4


@pytest.mark.parametrize('name,shape,kw', [('flexnet3', (3, 3, 16, 16), dict(width=6, kernel_size=17, sigma=0.3)),
                                           ('flextcn2', (2, 2, 40), dict(kernel_size=40, sigma=0.3)),
                                           ('ckcnn7_siren', (2, 1, 9, 9), dict(width=4, kernel_size=9))])
def test_exports_run_elsewhere(name, shape, kw, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    torch.manual_seed(0)
    net, x = create_model(name, in_channels=shape[1], **kw), torch.randn(shape)
    for _ in range(2): net(x)
    net.eval()
    export_program(net, x, tmp_path/'net.pt2')
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        export_onnx(net, x[:1], tmp_path/'net.onnx')                 # from an example of one
    program, session = torch.export.load(tmp_path/'net.pt2').module(), onnxruntime.InferenceSession(tmp_path/'net.onnx')
    for batch in (1, 2, 7):
        x = torch.randn(batch, *shape[1:])
        want = net(x).detach()
        for got in (program(x).detach(), torch.from_numpy(session.run(None, dict(x=x.numpy()))[0]),
                    bake(net)(x).detach()):
            assert relative_gap([got], [want]) < 1e-5


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
        monkeypatch.setattr(correlate, 'largest_remembered', 10)
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
