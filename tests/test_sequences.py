"Causal networks: they never look ahead, and a stream gives what the whole sequence gives."
import pytest, torch
from torch import nn
from hypothesis import given, settings, strategies as st
from flexconv.export import bake
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
