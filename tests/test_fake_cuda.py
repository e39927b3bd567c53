"""Layers and networks on CUDA tensors without values (FakeTensorMode): no read by the host in a steady training step,
nothing on another device. Backward passes are not covered: autograd's engine asks for the CUDA runtime, also for fake
tensors."""
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from flexconv.callbacks import RefreshSizes
from flexconv.cache import longest_interval
from flexconv.registry import create_model
from flexconv.layers import conv_layers, refresh_sizes

NETWORKS = {'flexnet3': (2, 3, 32, 32), 'flextcn2': (2, 1, 784)}
CASES = [(name, method, False) for name in NETWORKS for method in ('auto', 'direct', 'fft', 'matmul')]
CASES += [('flexnet3', 'auto', True)]


class OffDevice(TorchDispatchMode):
    """Notes operations that give more than a number on another device than CUDA; constants that are made and moved are
    allowed."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or t.device.type == 'cuda' or t.numel() <= 1: continue
            if 'lift_fresh' not in str(func):
                self.found.append((str(func), tuple(t.shape)))
        return out


def on_fake_cuda(model, mode):
    "A model with parameters and buffers replaced by fake CUDA tensors, whose sizes were read before."
    refresh_sizes(model)
    with mode:
        for m in model.modules():
            for store in (m._parameters, m._buffers):
                for name, t in store.items():
                    if t is None: continue
                    fake = torch.empty(t.shape, dtype=t.dtype, device='cuda')
                    store[name] = nn.Parameter(fake) if isinstance(t, nn.Parameter) else fake
    return model


def steady(model):
    "As after some readings: each layer may go without one for as long as it ever may."
    for m in conv_layers(model).values(): m.window.interval, m.window.age = longest_interval, 0


@pytest.mark.parametrize('name,method,channels_last', CASES)
def test_a_steady_step_reads_nothing_and_stays_on_its_device(name, method, channels_last):
    shape = NETWORKS[name]
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    model = on_fake_cuda(create_model(name, in_channels=shape[1], conv_method=method, width=8), mode)
    steady(model)                                                # the callback reads more often than a layer must
    with mode:
        x = torch.randn(shape, device='cuda')
        if channels_last: x = x.to(memory_format=torch.channels_last)
        with OffDevice() as off: scores = model(x)
    assert scores.device.type == 'cuda' and scores.dtype == torch.float32 and scores.shape == (shape[0], 10)
    assert not off.found, off.found[:3]


def test_the_callback_comes_before_a_layer_must_read(): assert RefreshSizes().every < longest_interval


def test_a_read_would_be_seen():
    "The check can fail: a layer that was never read asks its device."
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    model = on_fake_cuda(create_model('flexnet3', width=8), mode)
    for m in conv_layers(model).values(): m.window.clear()
    with mode, pytest.raises(DataDependentOutputException): model(torch.randn(2, 3, 32, 32, device='cuda'))
