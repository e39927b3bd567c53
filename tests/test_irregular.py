"Samples with times of their own: against the grid, against a direct double sum, gradients, and missing samples."
import copy, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from torch import nn
from flexconv.at_times import AtTimes
from flexconv.mask import GaussianMask
from flexconv.layers import CKConv1d, CKConv2d, FlexConv1d, FlexConv2d, FlexConv3d
from flexconv.registry import create_model
from flexconv.stream import Stream
from flexconv.successors import SMPConv1d
from helpers import close

def perceptron(ndim, channels):
    "A kernel network of somebody else's: without two factors."
    return nn.Sequential(nn.Conv1d(ndim, 8, 1), nn.Tanh(), nn.Conv1d(8, channels, 1))


def label(options): return ' '.join(f'{k}={getattr(v, "__name__", v)}' for k, v in options.items())


OPTIONS = [{},
           dict(causal=True),
           dict(groups=2),
           dict(groups=4, bias=False),
           dict(stride=3),
           dict(causal=True, stride=2, groups=2),
           dict(kernel='siren'),
           dict(kernel='fourier', causal=True),
           dict(kernel=perceptron)]


def make(cls, n, sigma=0.4, **options):
    torch.manual_seed(0)
    layer = cls(4, 8, n, **options, **({} if cls is CKConv1d else dict(sigma=sigma)))
    if layer.bias is not None: nn.init.normal_(layer.bias)
    return layer.eval()


def direct_sum(layer, x, t, at=None):
    "y_i = bias + sum_j kernel(t_j - t_i) x_j, pair by pair, from the definition of positions, mask and crop; no batch."
    n, g, at = layer.grid_size[0], layer.groups, t if at is None else at
    y = torch.zeros(layer.out_channels, len(at), dtype=x.dtype)
    if layer.bias is not None: y += layer.bias[:, None]
    step = 2/(n-1)
    for i, ti in enumerate(at):
        for j, tj in enumerate(t):
            position = (tj - ti)*step + (1 if layer.causal else 0)
            if position > 1 + 1e-9 or position < -1 - 1e-9: continue
            weight = layer.cell_volume
            if isinstance(layer, (FlexConv1d,)):
                mean, sigma = layer.mask.mean[0], layer.mask.sigma[0].abs()
                m = torch.exp(-0.5*((position - mean)/sigma)**2)
                farthest = position if layer.causal else -position.abs()        # cropped evenly on both sides
                low = (mean if layer.causal else -mean.abs()) - sigma*(-2*torch.tensor(layer.mask.threshold).log())**0.5
                if farthest < low: continue
                weight = weight*m
            k = layer.kernel_network(position.view(1, 1))[:, 0].view(*layer.shape)*weight       # (O, C/g)
            for group in range(g):
                outputs = slice(group*len(k)//g, (group+1)*len(k)//g)
                inputs = x[group*k.shape[1]:(group+1)*k.shape[1], j]
                y[outputs, i] += k[outputs] @ inputs
    return y


@pytest.mark.parametrize('options', OPTIONS, ids=label)
@pytest.mark.parametrize('n', [1, 9, 129])
@pytest.mark.parametrize('cls, sigma', [(CKConv1d, None), (FlexConv1d, 0.3), (FlexConv1d, 1000.), (FlexConv1d, 0.01)])
@pytest.mark.filterwarnings('ignore:a kernel of')
def test_on_the_grid_it_is_the_layer(cls, sigma, n, options):
    "Kernels shorter and longer than the sequence, wide masks (a rectangle: all of the frame), and one that is a point."
    layer, x = make(cls, n, sigma, **options), torch.randn(3, 4, 60)
    want = layer(x)
    close(layer(x, t=torch.arange(60)), want, 1e-5)
    close(layer(x, t=torch.arange(60.).expand(3, -1)), want, 1e-5)
    close(layer(x, t=torch.arange(60, dtype=torch.float64) + 1e9), want, 1e-5)    # where time begins is of no account
    close(layer(x[0], t=torch.arange(60)), want[0], 1e-5)                         # without a batch
    close(layer(x, t=torch.arange(60), present=torch.ones(60, dtype=torch.bool)), want, 1e-5)


@pytest.mark.parametrize('options', [o for o in OPTIONS if 'stride' not in o], ids=label)
@pytest.mark.parametrize('cls', [CKConv1d, FlexConv1d])
def test_against_a_direct_sum(cls, options):
    layer = make(cls, 9, **options).double()
    x, t = torch.randn(2, 4, 14).double(), torch.rand(2, 14).double()*12
    for i in range(2): close(layer(x, t=t)[i], direct_sum(layer, x[i], t[i]), 1e-9)
    close(layer(x, t=t[0])[1], direct_sum(layer, x[1], t[0]), 1e-9)
    at = torch.rand(5).double()*12
    close(layer.convolve_at(x, t, at=at)[1], direct_sum(layer, x[1], t[1], at), 1e-9)


@pytest.mark.parametrize('scale', [0.5, 2.])
def test_at_another_resolution_a_step_is_one_of_the_grid_in_use(scale):
    layer, x = make(FlexConv1d, 33), torch.randn(2, 4, 50)
    layer.scale = scale
    close(layer(x, t=torch.arange(50)), layer(x), 1e-5)
    short = layer.double()
    t = torch.rand(8).double()*8
    close(short(x[..., :8].double(), t=t)[0], direct_sum(short, x[0, :, :8].double(), t), 1e-9)


@pytest.mark.parametrize('mean', [-0.5, 0.3, 1., 1.4, 5.])
@pytest.mark.parametrize('causal', [False, True])
def test_masks_that_moved(mean, causal):
    layer, x = make(FlexConv1d, 33, 0.2, causal=causal), torch.randn(2, 4, 50)
    with torch.no_grad(): layer.mask.mean.fill_(mean)
    close(layer(x, t=torch.arange(50)), layer(x), 1e-5)


@pytest.mark.parametrize('kernel', ['magnet', 'gabor', 'fourier', 'siren', 'mlp'])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('missing', [False, True])
def test_gradients(kernel, causal, missing):
    "Of input, times, mask and kernel network, in chunks and in one; also the second derivative."
    torch.manual_seed(0)
    layer = FlexConv1d(2, 2, 9, kernel=kernel, causal=causal, sigma=0.7, kernel_options=dict(hidden=3, layers=2))
    layer = layer.double()
    x, t = torch.randn(2, 2, 6).double(), torch.rand(2, 6).double()*5
    present = torch.tensor([True, True, False, True, True, True]) if missing else None
    names, params = zip(*layer.named_parameters())

    def f(x, t, *params):
        return torch.func.functional_call(layer, dict(zip(names, params)), (x,), dict(t=t, present=present))
    inputs = [v.detach().clone().requires_grad_() for v in (x, t, *params)]
    assert torch.autograd.gradcheck(f, inputs, atol=1e-6)
    if kernel == 'magnet' and not missing and not causal: assert torch.autograd.gradgradcheck(f, inputs, atol=1e-5)


@pytest.mark.parametrize('causal', [False, True])
def test_gradients_in_chunks_are_those_of_the_whole(causal, monkeypatch):
    import flexconv.layers as module
    layer = make(FlexConv1d, 33, causal=causal).train()
    x, t = torch.randn(2, 4, 200), torch.rand(2, 200)*150
    grads, calls = [], []
    original = module.conv_at_times
    for pairs in 2**30, 10_000:
        monkeypatch.setattr(module, 'conv_at_times', lambda *a, **kw: original(*a, **kw, pairs=pairs))
        layer.zero_grad()
        y = layer(x, t=t)
        y.square().sum().backward()
        calls.append(y)
        grads.append([p.grad.clone() for p in layer.parameters()])
    close(calls[1], calls[0].detach(), 1e-5)
    for a, b in zip(*grads): close(a, b, 1e-4)


def test_a_kernel_of_one_sample_still_learns_its_size():
    "The gradient for sigma is that of the layer on the grid."
    with pytest.warns(UserWarning, match='single pixel'): layer = FlexConv1d(2, 2, 33, sigma=0.001)
    other, x = copy.deepcopy(layer), torch.randn(2, 2, 40)
    layer(x).square().sum().backward()
    other(x, t=torch.arange(40)).square().sum().backward()
    assert layer.mask.sigma.grad.abs() > 0
    close(other.mask.sigma.grad, layer.mask.sigma.grad, 1e-4)


@pytest.mark.parametrize('causal', [False, True])
def test_order_does_not_matter(causal):
    layer, x, t = make(FlexConv1d, 33, causal=causal), torch.randn(3, 4, 40), torch.rand(3, 40)*30
    order = torch.stack([torch.randperm(40) for _ in range(3)])
    permuted = x.gather(2, order[:, None].expand(-1, 4, -1))
    want = layer(x, t=t).gather(2, order[:, None].expand(-1, 8, -1))
    close(layer(permuted, t=t.gather(1, order)), want.detach(), 1e-5)


@pytest.mark.parametrize('cls', [CKConv1d, FlexConv1d])
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('regular', [False, True])
def test_missing_samples_are_dropped_ones_over_the_share_of_the_mask(cls, causal, regular):
    "With the weights undone by the share, computed here pair by pair. What stands in a missing place is not looked at."
    layer = make(cls, 17, causal=causal).double()
    x = torch.randn(2, 4, 40).double()
    t = torch.arange(40.).double() if regular else torch.rand(40).double()*35
    present = torch.rand(40) < 0.5
    positions = (t[None] - t[:, None])/8 + (1 if causal else 0)                                 # (I, J)
    inside = (positions >= -1 - 1e-9) & (positions <= 1 + 1e-9)
    mask = inside.double()
    if cls is FlexConv1d:
        mask = torch.exp(-0.5*((positions - float(causal))/layer.mask.sigma.detach())**2)*inside
        mask = mask*(mask >= 0.1)
    share = (mask*present).sum(1)/mask.sum(1)
    dropped = layer(x[..., present], t=t[present]) - layer.bias[:, None]
    x[..., ~present] = float('nan')
    outputs = [layer(x, t=t, present=present)] + ([layer(x, present=present)] if regular else [])
    for y in outputs:
        assert y.isfinite().all()
        got = (y - layer.bias[:, None])[..., present]*share[present]
        close(got, dropped.detach(), 1e-9)


def test_a_constant_is_not_seen_to_have_holes():
    "A box for a kernel: the mean over the samples that are there, whatever their number."
    layer = CKConv1d(1, 1, 9, kernel=lambda ndim, channels: nn.Conv1d(ndim, channels, 1), bias=False)
    nn.init.zeros_(layer.kernel_network.weight); nn.init.ones_(layer.kernel_network.bias)
    present = torch.arange(60) % 3 == 0
    ones = torch.ones(2, 1, 60)
    want = layer(ones).detach()
    for given in (dict(), dict(t=torch.arange(60))):
        close(layer(ones.masked_fill(~present, float('nan')), present=present, **given), want, 1e-5)


def test_pixels_may_be_missing():
    "On the grid in two dimensions too, with stride and groups; without any missing it is the layer."
    layer, x = FlexConv2d(2, 4, 9, sigma=0.5, stride=2, groups=2), torch.randn(2, 2, 20, 18)
    present = torch.rand(2, 20, 18) < 0.6
    close(layer(x, present=torch.ones_like(present)), layer(x).detach(), 1e-5)
    k, m = layer.kernel(), layer.mask(layer.positions())[None, None]
    conv = lambda x, w, g: torch.nn.functional.conv2d(x, w, None, 2, [s//2 for s in layer.size], 1, g)
    met, whole = conv(present[:, None].float(), m, 1), conv(torch.ones(2, 1, 20, 18), m, 1)
    close(layer(x.masked_fill(~present[:, None], float('nan')), present=present),
          (conv(x*present[:, None], k, 2)*whole/met).detach(), 1e-4)


def test_nothing_in_reach_gives_the_bias():
    layer, x = make(FlexConv1d, 9, causal=True), torch.randn(1, 4, 30)
    present = torch.arange(30) > 20
    for given in (dict(), dict(t=torch.arange(30))):
        y = layer(x, present=present, **given)
        assert torch.equal(y[0, :, :20], layer.bias[:, None].expand(-1, 20)), given


def test_causal_layers_do_not_look_ahead():
    layer, x, t = make(FlexConv1d, 33, causal=True), torch.randn(1, 4, 40), torch.rand(40)*30
    changed = x + (t > 15)
    y, z = layer(x, t=t), layer(changed, t=t)
    assert torch.allclose(y[..., t <= 15], z[..., t <= 15], atol=1e-6) and (y - z)[..., t > 15].abs().max() > 0.1


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer, x, t = make(FlexConv1d, 33), torch.randn(2, 4, 40), torch.rand(40)*30
    want = layer(x, t=t)
    with torch.autocast('cpu', dtype=dtype): assert layer(x, t=t).dtype == dtype
    half = copy.deepcopy(layer).to(dtype)(x.to(dtype), t=t)
    assert half.dtype == dtype
    close(half, want.detach(), 0.1)


def test_wrong_times():
    layer, x, t = make(FlexConv1d, 9), torch.randn(2, 4, 10), torch.arange(10)
    for bad, message in [(t[:9], r't must have shape \(10,\) or \(2, 10\).*got \(9,\)'),
                         (t.expand(3, 10), 't must have'),
                         (t/0, 't must be finite'), (t.float().log(), 't must be finite')]:
        with pytest.raises(ValueError, match=message): layer(x, t=bad)
    for bad, message in [([0.]*10, 't must be a tensor; got list'), (t > 3, 't must be real numbers; got torch.bool'),
                         (1., 't must be a tensor; got float')]:
        with pytest.raises(TypeError, match=message): layer(x, t=bad)
    with pytest.raises(ValueError, match=r'present must have shape \(10,\) or \(2, 10\)'): layer(x, present=t[:9] > 1)
    with pytest.raises(ValueError, match=r'present must have shape \(10,\) or'): layer(x, t=t, present=t[:9] > 1)
    for given in dict(t=t), {}:
        with pytest.raises(TypeError, match='present must be a bool.*got torch.int64'): layer(x, present=t, **given)
    with pytest.raises(TypeError, match='one floating-point dtype; got torch.float64'): layer(x.double(), t=t)
    with pytest.raises(ValueError, match=r'x must have shape \(batch, 4, length\)'): layer(x[:, :3], t=t)
    for options in dict(padding='valid'), dict(padding_mode='circular'), dict(padding=3), dict(dilation=2):
        with pytest.raises(ValueError, match="t needs padding='same', padding_mode='zeros' and dilation=1"):
            FlexConv1d(4, 4, 9, **options)(x, t=t)


@pytest.mark.parametrize('layer, shape', [(FlexConv2d(1, 1, 9), (1, 1, 9, 9)), (CKConv2d(1, 1, 9), (1, 1, 9, 9)),
                                          (FlexConv3d(1, 1, 9), (1, 1, 9, 9, 9))])
def test_images_and_volumes_have_no_times(layer, shape):
    with pytest.raises(ValueError, match='t is for sequences, layers of one axis; got a layer of'):
        layer(torch.zeros(shape), t=torch.arange(9))
    assert not hasattr(layer, 'reach')


@pytest.mark.parametrize('name', ['flextcn2', 'cktcn', 'cktcn_magnet'])
def test_a_network_at_times(name):
    "On the grid it is the network; its weights learn; samples that are missing are not looked at."
    torch.manual_seed(0)
    net = create_model(name, in_channels=2, kernel_size=60, width=8, **(dict(sigma=0.2) if 'flex' in name else {}))
    timed, x = AtTimes(net.eval()), torch.randn(3, 2, 60)
    close(timed(x, torch.arange(60)), net(x).detach(), 1e-4)
    close(timed(x), net(x).detach(), 1e-6)
    t = torch.rand(3, 60)*60
    timed.train()(x, t).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(not m._forward_pre_hooks for m in net.modules())
    present = torch.rand(3, 60) < 0.6
    holes = x.masked_fill(~present[:, None], float('nan'))
    close(timed.eval()(holes, t.sort(1).values, present), timed(x, t.sort(1).values, present).detach(), 1e-6)


def test_a_network_that_fails_at_times_keeps_no_arguments():
    net = create_model('flextcn2', in_channels=2, kernel_size=60, width=8)
    with pytest.raises(ValueError, match='t must have shape'): AtTimes(net)(torch.randn(3, 2, 60), torch.arange(59))
    assert all(not m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('name', ['flextcn2', 'cktcn_magnet'])
def test_a_stream_at_times_gives_what_the_whole_sequence_gives(name, shared):
    torch.manual_seed(0)
    options = dict(sigma=0.2) if 'flex' in name else {}
    net = create_model(name, in_channels=2, kernel_size=40, width=6, **options).eval()
    x, t = torch.randn(3, 2, 50), torch.rand(*([50] if shared else [3, 50])).mul(3).cumsum(-1)
    stream = Stream(net, times=True)
    for _ in range(2):                                            # twice, to see that reset forgets
        for chunk, times in zip(x.split([1, 20, 2, 27], -1), t.split([1, 20, 2, 27], -1)): scores = stream(chunk, times)
        close(scores, AtTimes(net)(x, t).detach(), 1e-4)
        stream.reset()
    kept = [m.past[0].shape[-1] for m in stream.model.modules() if hasattr(m, 'past') and m.past is not None]
    assert not kept
    for chunk, times in zip(x.split(10, -1), t.split(10, -1)): stream(chunk, times)
    kept = [m.past[0].shape[-1] for m in stream.model.modules() if hasattr(m, 'past')]
    assert kept and max(kept) < 50                                # memory does not grow with the stream


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('name', ['flextcn2', 'cktcn_magnet'])
def test_samples_may_be_missing_on_a_stream(name, shared):
    "Features as of the whole sequence, scores as after the latest sample that is there; chunks with and without gaps."
    torch.manual_seed(0)
    net = create_model(name, in_channels=2, kernel_size=40, width=6, **dict(sigma=0.2) if 'flex' in name else {}).eval()
    x, t = torch.randn(3, 2, 60), torch.rand(60).mul(3).cumsum(-1)
    present = torch.rand(*([60] if shared else [3, 60])) < 0.6
    present[..., 20:40] = True                                   # a chunk without gaps
    x.masked_fill_(~present.expand(3, -1)[:, None], float('nan'))
    features, scores = Stream(net.blocks, times=True), Stream(net, times=True)
    whole = AtTimes(net.blocks)(x, t, present).detach()
    for _ in range(2):
        parts = []
        for start, stop in (0, 20), (20, 40), (40, 42), (42, 60):
            chunk = x[..., start:stop], t[start:stop], None if start == 20 else present[..., start:stop]
            parts.append(features(*chunk))
            close(scores(*chunk), AtTimes(net)(x[..., :stop], t[:stop], present[..., :stop]).detach(), 1e-4)
        close(torch.cat(parts, -1), whole, 1e-4)
        features.reset(), scores.reset()
    with pytest.raises(TypeError, match='present must be a bool tensor'): features(x, t, present.float())


def test_long_sequences_fit():
    """Forward and backward of 1,000 samples under a kernel that spans them all take less than 0.4 GB more. In one
    chunk they took 4.6 GB."""
    code = '''
import resource, torch
from flexconv.layers import FlexConv1d
torch.manual_seed(0)
layer = FlexConv1d(8, 8, 1001, causal=True, sigma=1.)
x, t = torch.randn(1, 8, 1000, requires_grad=True), torch.rand(1, 1000)*1000
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
layer(x, t=t).square().mean().backward()
print((peak() - before)/1e6)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 0.4, out


def test_hooks_on_a_mask_and_other_masks_count_at_given_times():
    class Squared(GaussianMask):
        def forward(self, positions, spacing=0.): return super().forward(positions, spacing)**2
    layer, x = FlexConv1d(2, 3, 33, causal=True).eval(), torch.randn(2, 2, 40)
    t = torch.arange(40.)
    plain = layer(x)
    hook = layer.mask.register_forward_hook(lambda mask, args, output: 2*output)
    torch.testing.assert_close(layer(x, t=t), layer(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(x), plain)
    hook.remove()
    mask = Squared(1, mean=1.)
    mask.load_state_dict(layer.mask.state_dict())
    layer.mask = mask
    torch.testing.assert_close(layer(x, t=t), layer(x), rtol=1e-4, atol=1e-5)


def test_threads_have_times_of_their_own():
    torch.manual_seed(0)
    net = AtTimes(nn.Sequential(FlexConv1d(1, 4, 17, causal=True), nn.ReLU(), FlexConv1d(4, 2, 17, causal=True)).eval())
    inputs = [(torch.randn(1, 1, 40), torch.rand(40).cumsum(0)*(i + 1)) for i in range(4)]
    with torch.no_grad(): want = [net(x, t) for x, t in inputs]
    def run(i):
        with torch.no_grad(): return max((net(*inputs[i]) - want[i]).abs().max().item() for _ in range(30))
    with ThreadPoolExecutor(4) as pool: assert max(pool.map(run, range(4))) < 1e-6


def test_missing_pixels_keep_the_memory_format():
    x = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    present = torch.rand(12, 12) < 0.9
    for method in 'direct', 'fft', 'matmul':
        layer = FlexConv2d(3, 4, 9, conv_method=method)
        wanted = layer(x).is_contiguous(memory_format=torch.channels_last)
        assert layer(x, present=present).is_contiguous(memory_format=torch.channels_last) == wanted


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('dtype,first', [(torch.int64, 1_700_000_000), (torch.int64, 1_700_000_000_000),
                                         (torch.float64, 1.7e9), (torch.int8, -120), (torch.uint8, 15)])
def test_times_of_any_dtype_are_those_of_the_grid(dtype, first, causal):
    "Unix seconds and milliseconds; differences that do not fit into 8 bits. Long enough for several chunks."
    n = 240 if dtype.itemsize == 1 else 2000
    layer, x = make(FlexConv1d, 33, causal=causal), torch.randn(1, 4, n)
    times = (torch.arange(n, dtype=torch.float64) + first).to(dtype)
    close(layer(x, t=times), layer(x).detach(), 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_times_in_half_precision_are_what_they_say(dtype):
    t, layer, x = (torch.rand(100)*90).to(dtype), make(FlexConv1d, 33), torch.randn(1, 4, 100)
    close(layer(x, t=t), layer(x, t=t.double()).detach(), 1e-5)


@pytest.mark.parametrize('options', ids=label,
                         argvalues=[{}, dict(causal=True), dict(shared=True), dict(causal=True, spread=0.3)])
def test_points_with_times_are_those_on_the_grid(options):
    torch.manual_seed(0)
    layer, x, present = SMPConv1d(2, 3, 33, **options).eval(), torch.randn(2, 2, 60), torch.rand(60) < 0.6
    close(layer(x, t=torch.arange(60)), layer(x).detach(), 1e-5)
    close(layer(x, t=torch.arange(60), present=present), layer(x, present=present).detach(), 1e-5)


@pytest.mark.parametrize('dtype,gone', [(torch.float32, 2**24), (torch.bfloat16, 300)])
def test_a_stream_does_not_lose_count(dtype, gone):
    layer, x = make(FlexConv1d, 33, causal=True).to(dtype), torch.randn(1, 4, 120, dtype=dtype)
    stream, late = Stream(layer, times=True), Stream(layer, times=True)
    want = torch.cat([stream(part) for part in x.split(7, -1)], -1)
    late.last = torch.tensor([[gone]])                                        # as after so many samples
    close(torch.cat([late(part) for part in x.split(7, -1)], -1), want, 1e-6)


def test_the_latest_sample_is_scored_wherever_it_lies():
    torch.manual_seed(0)
    net = AtTimes(create_model('flextcn2', 2, 5, kernel_size=60, width=8, sigma=0.2).eval())
    x, t, order = torch.randn(3, 2, 60), torch.arange(60), torch.randperm(60)
    present = order < 45
    with torch.no_grad():
        close(net(x[..., order], t[order]), net.model(x), 1e-5)
        close(net(x[..., order], t[order], present), net.model(x[..., :45]), 1e-5)
        ends = torch.tensor([60, 45, 20])                                     # padded sequences, on the grid
        scores = net(x, present=t < ends[:, None])
        for i, end in enumerate(ends): close(scores[i:i+1], net.model(x[i:i+1, :, :end]), 1e-5)
        close(net(x[..., order], t[order].expand(3, -1), order < ends[:, None]), scores, 1e-5)


def test_streams_and_empty_sequences_say_what_is_wrong():
    layer = make(FlexConv1d, 33, causal=True)
    stream = Stream(layer, times=True)
    stream(torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match=r'chunk must have the batch and channels of those before, \(2, 4\)'):
        stream(torch.randn(1, 4, 5))
    stream.reset()
    stream(torch.randn(1, 4, 5))
    with pytest.raises(ValueError, match=r'x must have at least one sample; got .*\(1, 4, 0\)'):
        layer(torch.randn(1, 4, 0), t=torch.rand(0))
