"Correlation in the frequency domain: kernels in two factors, gradients, chunks; and layers by every method."
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from flexconv import layers
from flexconv.bench import with_forward
from flexconv.conv import LowRankKernel, conv_nd
from flexconv.layers import FlexConv2d
from helpers import CONVS, assert_close, gradients, problems, relative_gap, tensors


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
