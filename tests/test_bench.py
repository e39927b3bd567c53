"The benchmark: competitors that compute the same, and memory."
import torch
from flexconv.bench import broadcast_fft, peak_memory, plain, with_forward
from flexconv.layers import FlexConv1d, FlexConv2d
from flexconv.registry import create_model
from helpers import relative_gap


def test_competitors_compute_the_same():
    net, x = create_model('flextcn2', in_channels=1, kernel_size=60, sigma=0.5).eval(), torch.randn(2, 1, 60)
    for forward in (plain, broadcast_fft): assert relative_gap([with_forward(net, forward)(x)], [net(x)]) < 1e-4
    net, x = create_model('flexnet3', width=6, sigma=0.3).eval(), torch.randn(2, 3, 32, 32)
    assert relative_gap([with_forward(net, plain)(x)], [net(x)]) < 1e-4


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
