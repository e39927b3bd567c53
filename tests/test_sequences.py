"Causal networks: they never look ahead, and a stream gives what the whole sequence gives."
import pytest, torch
from torch import nn
from hypothesis import given, settings, strategies as st
from flexconv.at_times import AtTimes
from flexconv.export import bake
from flexconv.baselines import NJetConv1d
from flexconv.registry import create_model, list_models
from flexconv.layers import kernel_sizes
from flexconv.layers import FlexConv1d
from flexconv.stream import Stream


@pytest.mark.parametrize('name', list_models('*tcn*'))
@pytest.mark.parametrize('t', [0, 1, 29, 59])
def test_no_output_depends_on_the_future(name, t):
    torch.manual_seed(0)
    net = create_model(name, in_channels=2, kernel_size=60, width=8).eval()
    x = torch.randn(2, 2, 60)
    y = x.clone(); y[..., t] += 1
    a, b = net.blocks(x), net.blocks(y)
    gap = (a - b).abs().amax((0, 1))
    assert not t or gap[:t].max() < 1e-5*a.abs().max()
    assert gap[t:].max() > 1e-4*a.abs().max()


@pytest.mark.parametrize('length', [1, 30, 60, 100])
def test_sequences_of_other_lengths(length):
    "The grid belongs to the layer: shorter and longer sequences meet the same kernels."
    net = create_model('flextcn2', in_channels=2, kernel_size=60, width=8, sigma=0.2).eval()
    x = torch.randn(2, 2, length)
    before = kernel_sizes(net)
    assert net(x).shape == (2, 10) and kernel_sizes(net) == before
    torch.testing.assert_close(bake(net)(x), net(x), rtol=1e-4, atol=1e-4)
    longer = torch.cat([x, torch.randn(2, 2, 40)], -1)
    torch.testing.assert_close(net.blocks(longer)[..., :length], net.blocks(x), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from([0.02, 0.2, 1.]),
       st.sampled_from(['flextcn2', 'cktcn', 'flextcn4']))
def test_a_stream_gives_what_the_whole_sequence_gives(seed, chunks, sigma, name):
    torch.manual_seed(seed)
    net = create_model(name, in_channels=2, kernel_size=40, width=6,
                       **(dict(sigma=sigma) if 'flex' in name else {})).eval()
    x = torch.randn(3, 2, sum(chunks))
    stream = Stream(net)
    for _ in range(2):                                            # twice, to see that reset forgets
        for chunk in x.split(chunks, -1): scores = stream(chunk)
        torch.testing.assert_close(scores, net(x), rtol=1e-4, atol=1e-4)
        stream.reset()


def test_the_mean_of_a_mask_moves_the_kernel_in_time():
    """Whatever mean and sigma a causal mask has, the kernel ends at the newest sample, and its size changes by single
    steps."""
    layer, sizes = FlexConv1d(1, 1, 101, causal=True, sigma=0.1), []
    for mean in torch.linspace(2, -0.5, 501).tolist():
        with torch.no_grad(): layer.mask.mean.fill_(mean)
        sizes.append(layer.size[0])
        assert layer.bounds()[0][1] == 101
    assert sizes[0] == 1 and all(0 <= b - a <= 1 for a, b in zip(sizes, sizes[1:])), 'the size jumps'


def test_stream_of_a_weight_normalised_network():
    "The TCN of Bai et al. on a stream: weight normalisation is resolved, the original keeps it."
    torch.manual_seed(0)
    net = create_model('tcn', 2, blocks=3, width=4).eval()
    x = torch.randn(2, 2, 40)
    stream = Stream(net.blocks)
    got = torch.cat([stream(chunk) for chunk in x.split(7, -1)], -1)
    assert torch.allclose(got, net.blocks(x), atol=1e-5)
    assert hasattr(net.blocks[0].conv1, 'parametrizations')


def test_a_stream_of_shared_layers_and_hooks():
    torch.manual_seed(0)
    layer = FlexConv1d(2, 2, 9, causal=True, sigma=0.5)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    net, x = torch.nn.Sequential(layer, torch.nn.ReLU(), layer).eval(), torch.randn(1, 2, 30)
    for times in False, True:
        stream = Stream(net, times=times)
        assert torch.allclose(torch.cat([stream(part) for part in x.split([7, 13, 10], -1)], -1), net(x), atol=1e-5)


def test_times_fall_after_a_chunk_without_times():
    stream = Stream(FlexConv1d(1, 1, 9, causal=True), times=True)
    x = torch.randn(2, 1, 10)
    stream(x)                                                             # at 0 to 9
    with pytest.raises(ValueError, match='t must rise'): stream(x, torch.arange(10.))
    stream(x, torch.arange(10., 20.).expand(2, -1))
    stream(x)                                                             # at 20 to 29
    with pytest.raises(ValueError, match='t must rise'): stream(x, torch.arange(25., 35.))


@pytest.mark.parametrize('times', [False, True])
def test_a_stream_keeps_no_more_than_it_needs(times):
    stream = Stream(FlexConv1d(1, 1, 9, causal=True), times=times)
    stream(torch.randn(1, 1, 10_000))
    past, = [m.past[0] if times else m.past for m in stream.model.modules() if getattr(m, 'past', None) is not None]
    assert past.untyped_storage().nbytes() == past.numel()*4 <= 4*9


class Echo(nn.Module):
    "Adds what was some samples ago."
    def __init__(self, lag):
        super().__init__()
        self.lag = lag
    def forward(self, x): return x + 0.5*nn.functional.pad(x, (self.lag, 0))[..., :x.shape[-1]]


@pytest.mark.parametrize('lag', [1, 31, 32, 50, 700, 1500])
def test_layers_that_look_far_back_are_refused(lag):
    net = nn.Sequential(FlexConv1d(1, 4, 17, causal=True), Echo(lag), nn.Conv1d(4, 2, 1)).eval()
    with pytest.raises(ValueError, match='must act on each time step alone'): Stream(net)


class Pooled(nn.Module):
    "A causal convolution, and something about the whole sequence."
    def __init__(self, pool, form=lambda y, pooled: pooled):
        super().__init__()
        self.conv, self.pool, self.form = FlexConv1d(1, 8, 33, causal=True, size=9), pool, form
    def forward(self, x):
        y = self.conv(x)
        return self.form(y, self.pool(y))


@pytest.mark.parametrize('times', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('pool', [lambda y: y.amax(-1), lambda y: y.mean(-1), lambda y: y.abs().mean(-1)])
def test_pooling_over_time_is_refused(pool, dtype, times):
    with pytest.raises(ValueError, match='must act on each time step alone'): Stream(Pooled(pool).to(dtype), times)


@pytest.mark.parametrize('form', [lambda y, pooled: (y, pooled), lambda y, pooled: [pooled],
                                  lambda y, pooled: dict(y=y, mean=pooled)], ids=['tuple', 'list', 'dict'])
def test_pooling_is_found_in_every_output(form):
    with pytest.raises(ValueError, match='must act on each time step alone'): Stream(Pooled(lambda y: y.mean(-1), form))


@pytest.mark.parametrize('times', [False, True])
@torch.no_grad()
def test_a_chunk_that_fails_changes_nothing(times):
    net, x = create_model('flextcn2', 1, kernel_size=40, width=8).eval(), torch.randn(2, 1, 60)
    stream = Stream(net, times)
    with pytest.raises((RuntimeError, ValueError)): stream(torch.randn(2, 3, 5))       # channels
    stream(x[..., :20])
    if not times:                                                                      # which casts it
        with pytest.raises(RuntimeError): stream(x[..., 20:].double())
    with pytest.raises(TypeError, match='chunk must be a tensor of floats; got ndarray'): stream(x[..., 20:].numpy())
    with pytest.raises(TypeError, match='chunk must be a tensor of floats; got torch.int64'): stream(x[..., 20:].long())
    torch.testing.assert_close(stream(x[..., 20:]), net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_samples_of_one_time_come_in_one_chunk():
    "Each sees the other, which a stream that has answered already cannot make up for."
    net, x, t = FlexConv1d(1, 4, 33, causal=True, size=9), torch.randn(1, 1, 6), torch.tensor([0, 1, 2, 2, 3, 4])
    stream = Stream(net, times=True)
    want = AtTimes(net)(x, t)
    torch.testing.assert_close(stream(x, t), want)
    stream.reset()
    with pytest.raises(ValueError, match='t must begin after the last sample of the chunk before'):
        for part, when in zip(x.split(3, -1), t.split(3)): stream(part, when)
    stream.reset()
    parts = [stream(part, when) for part, when in zip(x.split([2, 4], -1), t.split([2, 4]))]
    torch.testing.assert_close(torch.cat(parts, -1), want)


class Tagger(nn.Module):
    "Scores of each sample, from the features of a network that scores a sequence; `last`: those of the network itself."
    def __init__(self, last=False):
        super().__init__()
        self.tcn, self.head, self.last = create_model('flextcn2', 1, kernel_size=33, width=8), nn.Conv1d(8, 3, 1), last
    def forward(self, x):
        features = self.tcn.forward_features(x)
        return self.tcn.forward_head(features) if self.last else self.head(features)


@pytest.mark.parametrize('last', [False, True])
@torch.no_grad()
def test_outputs_are_in_the_order_of_the_samples(last):
    "Whatever the order of their times; scores of the sequence do not depend on it."
    torch.manual_seed(0)
    net, x, order = Tagger(last).eval(), torch.randn(2, 1, 8), torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    t, present = torch.arange(8.), torch.tensor([True, True, True, False, True, True, True, True])
    want = AtTimes(net)(x, t, present)
    other = AtTimes(net)(x[..., order], t[order], present[order])
    torch.testing.assert_close(other, want if last else want[..., order])
    torch.testing.assert_close(Stream(net, times=True)(x, t, present), want)
    if not last: torch.testing.assert_close(want[..., 0], net(x[..., :1])[..., 0], rtol=1e-4, atol=1e-5)
    assert net.tcn.feature_orders == {}


@pytest.mark.parametrize('layer', [nn.ConvTranspose1d(4, 4, 3, padding=1), nn.MaxPool1d(2), NJetConv1d(4, 4),
                                   nn.Conv1d(4, 4, 1, stride=2)], ids=lambda layer: type(layer).__name__)
def test_layers_that_cannot_be_told_the_times(layer):
    with pytest.raises(ValueError, match='^model must have'): AtTimes(nn.Sequential(FlexConv1d(1, 4, 33), layer))


@pytest.mark.parametrize('x,found', [(torch.randn(1, 12), r'\(1, 12\)'), (None, 'NoneType')])
def test_times_are_for_batches_of_sequences(x, found):
    net = AtTimes(FlexConv1d(1, 4, 33))
    with pytest.raises(ValueError, match=rf'x must be a tensor of shape \(B, C, L\); got {found}'): net(x)
