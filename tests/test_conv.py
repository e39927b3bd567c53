"The convolution engine against torch's, over random shapes, values and options."
import itertools, math, threading, time
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from flexconv.conv import conv_nd
from flexconv.correlate import LowRankKernel
from flexconv.costs import estimate_seconds
from flexconv.transforms import fast_length, is_channels_last
from helpers import CONVS, assert_close, problems, tensors


def by_definition(x, weight, bias, stride, pads, dilation, groups):
    """The sum over all taps, output by output, as it is written on the page:
    y[o, t] = b[o] + sum over i, j of w[o, i, j] x[i, s t + d j - p]."""
    x = F.pad(x, [n for pair in reversed(pads) for n in pair])                      # (B, C, *padded)
    taps = weight.shape[2:]
    sizes = [(n - d*(k - 1) - 1)//s + 1 for n, k, s, d in zip(x.shape[2:], taps, stride, dilation)]
    ins, outs = x.shape[1]//groups, weight.shape[0]//groups
    y = torch.zeros(len(x), weight.shape[0], *sizes, dtype=x.dtype)
    for b, o in itertools.product(range(len(x)), range(weight.shape[0])):
        first = o//outs*ins                                                         # channel of the group
        for t in itertools.product(*map(range, sizes)):
            for i, *j in itertools.product(range(ins), *map(range, taps)):
                at = tuple(s*p + d*q for s, p, d, q in zip(stride, t, dilation, j))
                y[(b, o, *t)] += weight[(o, i, *j)]*x[(b, first + i, *at)]
            if bias is not None: y[(b, o, *t)] += bias[o]
    return y


@pytest.mark.parametrize('method', ['direct', 'fft', 'lowrank', 'matmul'])
@pytest.mark.parametrize('sizes,taps,stride,pads,dilation,groups', [
    ([9], [5], [1], [(2, 2)], [1], 1),
    ([10], [4], [2], [(6, 0)], [2], 2),
    ([5, 4], [3, 5], [1, 2], [(1, 1), (2, 2)], [1, 1], 1),
    ([4, 6], [3, 2], [2, 1], [(0, 3), (1, 0)], [1, 2], 4),
    ([3, 2, 4], [2, 1, 3], [1, 1, 2], [(1, 0), (0, 0), (1, 1)], [1, 1, 1], 2)])
def test_against_the_definition(method, sizes, taps, stride, pads, dilation, groups):
    "In float64, to rounding; a kernel of two factors, which every method takes."
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x, kernel, bias = new(2, 4, *sizes), LowRankKernel(new(4, 4//groups, 3), new(3, *taps)), new(4)
    want = by_definition(x, kernel.dense(), bias, stride, pads, dilation, groups)
    padded = F.pad(x, [n for pair in reversed(pads) for n in pair])
    got = conv_nd(padded, kernel, bias, tuple(stride), 0, groups, dilation=tuple(dilation), method=method)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-12*want.abs().max()


@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul', 'auto'])
@settings(max_examples=120, deadline=None)
@given(problems())
def test_values_and_gradients(method, p):
    args = tensors(p)
    ours = conv_nd(*args, p['stride'], p['padding'], p['groups'], dilation=p['dilation'], method=method)
    theirs = CONVS[len(p['sizes'])](*args, p['stride'], p['padding'], p['dilation'], p['groups'])
    assert_close(ours, theirs, p['dtype'])
    wanted = [a for a in args if a is not None]
    r = torch.randn(theirs.shape, dtype=p['dtype'], generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(ours, wanted, r), torch.autograd.grad(theirs, wanted, r)):
        assert_close(a, b, p['dtype'])


@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul'])
@settings(max_examples=60, deadline=None)
@given(problems())
def test_same_padding(method, p):
    "padding='same' at stride 1 is torch's, even kernels included; at stride s it keeps every s-th output."
    x, w, b = tensors(p)
    full = CONVS[len(p['sizes'])](x, w, b, 1, 'same', p['dilation'], p['groups'])
    ours = conv_nd(x, w, b, p['stride'], 'same', p['groups'], dilation=p['dilation'], method=method)
    assert_close(ours, full[(..., *(slice(None, None, s) for s in p['stride']))], p['dtype'])


@pytest.mark.parametrize('mode', ['reflect', 'replicate', 'circular'])
@pytest.mark.parametrize('ndim', [1, 2, 3])
@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul'])
def test_padding_modes(mode, ndim, method):
    if mode == 'reflect' and ndim == 3: size = (8, 8, 8)
    else: size = (9, 8, 7)[:ndim]
    kernel = (5, 3, 7)[:ndim]
    cls = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[ndim-1]
    conv = cls(4, 6, kernel, stride=2, padding=tuple(k//2 for k in kernel), groups=2, padding_mode=mode)
    x = torch.randn(2, 4, *size)
    assert_close(conv_nd(x, conv.weight, conv.bias, 2, groups=2, padding_mode=mode, method=method), conv(x),
                 torch.float32)


@pytest.mark.parametrize('length,taps', [(1, 1), (5, 9), (40, 7), (40, 8), (40, 40), (40, 100)])
@pytest.mark.parametrize('method', ['direct', 'fft', 'matmul'])
def test_causal(length, taps, method):
    x, w = torch.randn(2, 3, length, dtype=torch.float64), torch.randn(4, 3, taps, dtype=torch.float64)
    want = torch.zeros(2, 4, length, dtype=torch.float64)
    for t in range(length):
        for j in range(taps):
            if t - j >= 0: want[:, :, t] += x[:, :, t-j]@w[:, :, taps-1-j].T
    assert_close(conv_nd(x, w, causal=True, method=method), want, torch.float64)


@pytest.mark.parametrize('dtype,tolerance', [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    x, w = torch.randn(2, 8, 24, 24), torch.randn(4, 8, 15, 15)/40
    want = conv_nd(x.to(dtype).float(), w.to(dtype).float())
    ours = conv_nd(x.to(dtype), w.to(dtype), method='fft')
    assert ours.dtype == dtype and (ours.float() - want).abs().max() < tolerance*want.abs().max()


def test_autocast_is_torchs():
    x, w = torch.randn(1, 2, 9), torch.randn(3, 2, 5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for method in ('direct', 'fft', 'matmul'):
            assert conv_nd(x, w, method=method).dtype == F.conv1d(x, w).dtype == torch.bfloat16
            assert F.conv1d(x.double(), w.double()).dtype == torch.float64
            assert conv_nd(x.double(), w.double(), method=method).dtype == torch.float64


def test_numbers_that_are_not_floating_point_are_refused():
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match='floating-point'):
            conv_nd(torch.ones(1, 2, 9, dtype=dtype), torch.ones(3, 2, 5, dtype=dtype))


def test_gradcheck():
    for shape, kernel, kw in [((2, 2, 7), (3, 2, 4), {}),
                              ((1, 4, 5, 6), (2, 2, 3, 5), dict(groups=2, stride=(1, 2))),
                              ((1, 2, 4, 3, 4), (2, 2, 3, 3, 1), dict(padding=1))]:
        args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, kernel)]
        for method in 'fft', 'matmul':
            f = lambda x, w: conv_nd(x, w, method=method, **kw)
            assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)


def test_only_the_wanted_gradient_is_computed():
    for wanted in (0, 1):
        args = [torch.randn(2, 3, 20), torch.randn(4, 3, 9)]
        args[wanted].requires_grad_()
        for method in 'fft', 'matmul':
            args[wanted].grad = None
            conv_nd(*args, method=method).sum().backward()
            assert args[wanted].grad is not None and args[1-wanted].grad is None


@given(st.integers(1, 20_000))
def test_fast_length(n):
    m = fast_length(n)
    assert n <= m <= 2*n and m % 2 == 0
    for p in (2, 3, 5):
        while m % p == 0: m //= p
    assert m == 1


def test_auto_takes_each_way_where_it_is_far_faster():
    pairs = lambda n: ((n//2, n//2),)*2
    small, large = (estimate_seconds((8, 48, 32, 32), (48, 48, n, n), pairs(n)) for n in (3, 33))
    assert small['direct'] < small['fft'] and large['fft'] < large['direct']
    half = estimate_seconds((64, 48, 32, 32), (48, 48, 17, 17), pairs(17), rank=33, dtype=torch.bfloat16,
                            channels_last=True)
    assert min(half, key=half.get) == 'matmul'
    long = estimate_seconds((1, 16, 2**18), (16, 16, 2**18), ((2**18 - 1, 0),), rank=33)
    assert min(long, key=long.get) in ('fft', 'lowrank')


# -- matrix products in half precision

def inputs(kind, n, generator):
    "Images of one kind, `(4, 16, 32, 32)`, and a random kernel of n x n."
    x = torch.randn(4, 16, 32, 32, generator=generator)
    if kind == 'relu': x = x.relu()
    if kind == 'smooth': x = F.avg_pool2d(x, 5, 1, 2)*5
    if kind == 'large mean': x = x + 10
    return x, torch.randn(16, 16, n, n, generator=generator)/(4*n)


def error(ours, want): return ((ours.double() - want).norm()/want.norm()).item()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', ['random', 'relu', 'smooth', 'large mean'])
@pytest.mark.parametrize('n', [3, 5, 17, 33])
def test_half_precision_errs_little_more_than_torch(dtype, kind, n):
    "Against float64, values and gradients err at most 2.5 times as much as those of F.conv2d in the same precision."
    x, w = inputs(kind, n, torch.Generator().manual_seed(n))
    g = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(1))
    def run(f, dtype):
        args = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = f(*args)
        return y, *torch.autograd.grad(y, args, g.to(dtype))
    direct = lambda x, w: F.conv2d(x, w, padding=n//2)
    want = run(direct, torch.float64)
    torchs = run(direct, dtype)
    ours = run(lambda x, w: conv_nd(x, w, method='matmul'), dtype)
    for exact, theirs, mine, name in zip(want, torchs, ours, ('values', 'gradient of x', 'gradient of w')):
        assert mine.dtype == dtype, name
        assert error(mine, exact) <= 2.5*error(theirs, exact), (name, error(mine, exact), error(theirs, exact))


def test_float16_does_not_overflow():
    x, w = torch.full((1, 2, 64, 64), 200.), torch.full((2, 2, 5, 5), 0.1)      # a sum over all pixels would be 819,200
    y = conv_nd(x.half(), w.half(), method='matmul')
    assert y.isfinite().all() and error(y, F.conv2d(x.double(), w.double(), padding=2)) < 3e-3


@pytest.mark.parametrize('method', ['fft', 'lowrank', 'matmul'])
def test_everything_of_torch_func(method):
    "grad, vmap, jacobians and forward mode agree with the direct method."
    gen = torch.Generator().manual_seed(0)
    x, mix, basis, b = (torch.randn(*s, generator=gen, dtype=torch.float64)
                        for s in ((2, 4, 7, 6), (6, 2, 3), (3, 5, 3), (6,)))
    def f(method):
        return lambda x, mix, basis, b: conv_nd(x, LowRankKernel(mix, basis), b, (2, 1), groups=2, method=method)
    ours, want = f(method), f('direct')
    loss = lambda f: lambda *args: f(*args).square().sum()
    args = x, mix, basis, b
    for i in range(4):
        assert torch.allclose(torch.func.grad(loss(ours), i)(*args), torch.func.grad(loss(want), i)(*args))
        assert torch.allclose(torch.func.jacfwd(ours, i)(*args), torch.func.jacrev(want, i)(*args))
    many = torch.randn(3, *x.shape, generator=gen, dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(ours, (0, None, None, None))(many, *args[1:]),
                          torch.stack([want(m, *args[1:]) for m in many]))
    per_sample = lambda f: torch.func.vmap(torch.func.grad(loss(f), 1), (0, None, None, None))(many, *args[1:])
    assert torch.allclose(per_sample(ours), per_sample(want))
    tangent = torch.randn(*basis.shape, generator=gen, dtype=torch.float64)
    jvp = lambda f: torch.func.jvp(lambda basis: f(x, mix, basis, b), (basis,), (tangent,))[1]
    assert torch.allclose(jvp(ours), jvp(want))
    assert torch.allclose(torch.func.functionalize(ours)(*args), want(*args))


@pytest.mark.parametrize('method', ['direct', 'fft', 'lowrank', 'matmul', 'auto'])
@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans())
def test_outputs_are_dense_and_keep_the_memory_format(method, p, last):
    x, w, b = (None if t is None else t.detach() for t in tensors(p))
    if last: x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if method == 'lowrank':
        w = LowRankKernel(w.flatten(2), torch.eye(w[0, 0].numel(), dtype=w.dtype).view(-1, *w.shape[2:]))
    options = dict(dilation=p['dilation'], method=method)
    y = conv_nd(x, w, b, p['stride'], p['padding'], p['groups'], **options)
    single = conv_nd(x[0], w, b, p['stride'], p['padding'], p['groups'], **options)
    assert single.untyped_storage().nbytes() == single.numel()*single.element_size()
    if not is_channels_last(y): single.view(-1)
    assert y.untyped_storage().nbytes() == y.numel()*y.element_size()
    assert y.view(len(y), -1).shape[0] == len(y) if not is_channels_last(y) else y.movedim(1, -1).is_contiguous()
    if method == 'matmul': assert is_channels_last(y) == is_channels_last(x) or 1 in y.shape[1:] or 1 in x.shape[1:]


@pytest.mark.parametrize('method', ['fft', 'lowrank', 'matmul'])
@pytest.mark.parametrize('shape,size,dilation', [((2, 4, 23, 17), (5, 3), (1, 2)),
                                                 ((1, 4, 99), (9,), (3,)),
                                                 ((1, 2, 9, 8, 7), (3, 1, 5), (1, 1, 1))])
def test_tiles_change_nothing(method, shape, size, dilation):
    "Values and gradients of a convolution tile by tile, in float64, are those of the direct one."
    from flexconv.conv import in_tiles, padding_pairs
    gen, ndim = torch.Generator().manual_seed(0), len(size)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).requires_grad_()
    x, mix, basis, b = new(*shape), new(6, shape[1]//2, 3), new(3, *size), new(6)
    pairs = padding_pairs('same', size, dilation)
    ours = in_tiles(method, 4, x, LowRankKernel(mix, basis), b, (1,)*ndim, pairs, 2, dilation)
    want = CONVS[ndim](x, LowRankKernel(mix, basis).dense(), b, padding='same', dilation=dilation, groups=2)
    assert_close(ours, want, torch.float64)
    r = torch.randn(want.shape, generator=gen, dtype=torch.float64)
    for a, c in zip(torch.autograd.grad(ours, (x, mix, basis, b), r), torch.autograd.grad(want, (x, mix, basis, b), r)):
        assert_close(a, c, torch.float64)


def test_auto_cuts_large_images_into_tiles_and_computes_the_same():
    from flexconv.conv import conv_method
    x, w = torch.randn(1, 8, 200, 190), torch.randn(8, 8, 33, 33)/30
    assert 'in tiles of' in conv_method(x, w)
    assert_close(conv_nd(x, w), F.conv2d(x, w, padding=16), torch.float32)


# -- threads

class Shared(dict):
    "A dict that lets other threads run after each of its steps."
    def __contains__(self, key): found = super().__contains__(key); time.sleep(0); return found
    def get(self, key): found = super().get(key); time.sleep(0); return found
    def clear(self): super().clear(); time.sleep(0)
    def __setitem__(self, key, value): super().__setitem__(key, value); time.sleep(0)


def in_threads(work, arguments, seconds):
    "Run `work(argument)` again and again, one thread for each argument; the exceptions that were raised."
    end, errors = time.perf_counter() + seconds, []
    def run(argument):
        try:
            while time.perf_counter() < end: work(argument)
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=run, args=(a,)) for a in arguments]
    for t in threads: t.start()
    for t in threads: t.join()
    return errors


def test_threads_that_share_what_is_kept_get_their_own():
    from flexconv.correlate import cached_spectrum
    kept = Shared()
    def work(i):
        value, = cached_spectrum(kept, i, 1, lambda: [torch.tensor(i)])
        assert value.item() == i
    assert in_threads(work, range(4), 1) == [] and len(kept) == 1


@pytest.mark.parametrize('method', ['fft', 'lowrank', 'matmul'])
def test_threads_that_share_a_network_predict_exactly(method):
    from flexconv.layers import FlexConv2d
    torch.manual_seed(0)
    layers = [FlexConv2d(channels, 4, 17, sigma=0.4, conv_method=method) for channels in (3, 4)]
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).eval()
    images = [torch.randn(1, 3, size, size) for size in (16, 20, 24, 32)]
    with torch.no_grad(): want = [net(x) for x in images]
    def work(i):
        with torch.no_grad(): assert torch.equal(net(images[i]), want[i])
    assert in_threads(work, range(4), 2) == []


@pytest.mark.parametrize('size,method', [((70, 66), 'fft'),
                                         ((70, 66), 'matmul'),
                                         ((90,), 'lowrank'),
                                         ((12, 13, 14), 'matmul')])
@pytest.mark.parametrize('last', [False, True])
def test_outputs_of_tiles_are_dense_and_keep_the_memory_format(size, method, last):
    from flexconv.conv import in_tiles
    x = torch.randn(2, 3, *size)
    if last: x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    k = LowRankKernel(torch.randn(4, 3, 2), torch.randn(2, *[5]*len(size)))
    y = in_tiles(method, 8, x, k, None, (1,)*len(size), ((2, 2),)*len(size), 1, (1,)*len(size))
    assert y.untyped_storage().nbytes() == y.numel()*y.element_size()
    if last and len(size) > 1: assert is_channels_last(y)
    else: assert y.view(2, -1).shape == (2, 4*math.prod(size))


# -- dtypes

@pytest.mark.parametrize('method', ['direct', 'fft', 'lowrank', 'matmul', 'auto'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_a_bias_of_another_dtype_is_refused(method, dtype):
    x, k = torch.randn(1, 2, 9), LowRankKernel(torch.randn(3, 2, 2), torch.randn(2, 5))
    w, b = k if method == 'lowrank' else k.dense(), torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match=f'bias must have the dtype of x, torch.float32; got {dtype}'):
        conv_nd(x, w, b, method=method)
    with pytest.raises(RuntimeError): F.conv1d(x, k.dense(), b)                   # as torch does
    with torch.autocast('cpu', dtype=torch.bfloat16):
        if dtype == torch.bfloat16:
            assert conv_nd(x, w, b, method=method).dtype == F.conv1d(x, k.dense(), b).dtype == dtype
        else:
            with pytest.raises(TypeError, match='bias must have the dtype of x'): conv_nd(x, w, b, method=method)


def test_a_bias_in_float32_is_taken_under_autocast():
    x, w, b = torch.randn(1, 2, 9), torch.randn(3, 2, 5), torch.randn(3)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for method in ('direct', 'fft', 'matmul'):
            for t in (x, x.bfloat16()):
                y = conv_nd(t, w, b, method=method)
                assert y.dtype == torch.bfloat16
                assert error(y, F.conv1d(x.double(), w.double(), b.double(), padding=2)) < 0.02


@pytest.mark.parametrize('arguments', [dict(x=torch.ones(1, 2, 9, dtype=torch.float64)),
                                       dict(weight=torch.ones(3, 2, 5, dtype=torch.float16)),
                                       dict(x=torch.ones(1, 2, 9, dtype=torch.complex64)),
                                       dict(x=torch.ones(1, 2, 9, dtype=torch.int64))])
def test_inputs_and_weights_of_two_dtypes_are_refused(arguments):
    both = dict(x=torch.ones(1, 2, 9), weight=torch.ones(3, 2, 5)) | arguments
    with pytest.raises(TypeError, match='x and weight must have one floating-point dtype'): conv_nd(**both)
    with pytest.raises(RuntimeError): F.conv1d(*both.values())


# -- what the page on accuracy says

def test_a_quiet_part_beside_a_loud_one():
    "By FFT errors are relative to the loudest position, directly to what an output is made of."
    gen = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 1, 2048, generator=gen), torch.hann_window(65)[None, None]/32
    x[..., 1024:] *= 1e5
    want = F.conv1d(x.double(), w.double(), padding=32)
    gaps = {m: (conv_nd(x, w, method=m) - want).abs() for m in ('direct', 'fft', 'matmul')}
    loudest, quiet = want.abs().max(), want[..., :900].abs().max()
    assert gaps['direct'][..., :900].max() < 1e-6*quiet < gaps['fft'][..., :900].max()
    for gap in gaps.values(): assert gap.max() < 1e-6*loudest


@pytest.mark.parametrize('method', ['direct', 'fft', 'lowrank', 'matmul', 'auto', 'autotune'])
def test_an_empty_batch(method):
    x, mix, basis, b = (torch.randn(*s, requires_grad=True) for s in ((0, 2, 9, 8), (3, 2, 2), (2, 5, 5), (3,)))
    y = conv_nd(x, LowRankKernel(mix, basis), b, stride=2, method=method)
    assert y.shape == (0, 3, 5, 4)
    for t, g in zip((x, mix, basis, b), torch.autograd.grad(y.sum(), (x, mix, basis, b))):
        assert g.shape == t.shape and not g.any()
