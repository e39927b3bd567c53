"""Layers and networks on CUDA tensors without values (FakeTensorMode): no read by the host in a steady training step,
nothing on another device. Backward passes are not covered: autograd's engine asks for the CUDA runtime, also for fake
tensors."""
from contextlib import contextmanager
import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from flexconv.callbacks import RefreshSizes
from flexconv.cache import longest_interval
from flexconv.registry import create_model
from flexconv.layers import conv_layers, refresh_sizes
from flexconv.optimizer import param_groups

NETWORKS = {'flexnet7': (2, 3, 32, 32), 'flextcn2': (2, 1, 784)}
METHODS = 'auto', 'direct', 'fft', 'matmul'
CASES = [(name, method, False, torch.float32) for name in NETWORKS for method in METHODS]
CASES += [('flexnet7', method, True, torch.float32) for method in METHODS]
CASES += [(name, method, False, dtype) for name in NETWORKS for method in METHODS
          for dtype in (torch.bfloat16, torch.float16)]


class OffDevice(TorchDispatchMode):
    """Notes operations that give more than a number on another device than CUDA; constants that are made and moved are
    allowed, and so are matrices, which are kept only where they have values."""
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


@contextmanager
def autocast(dtype):
    "`torch.autocast('cuda')` switches itself off where there is no GPU."
    if dtype == torch.float32:
        yield
        return
    usual = torch.get_autocast_dtype('cuda')
    torch.set_autocast_enabled('cuda', True)
    torch.set_autocast_dtype('cuda', dtype)
    try: yield
    finally:
        torch.set_autocast_enabled('cuda', False)
        torch.set_autocast_dtype('cuda', usual)
        torch.clear_autocast_cache()


def steady(model):
    "As after some readings: each layer may go without one for as long as it ever may."
    for m in conv_layers(model).values(): m.window.interval, m.window.age = longest_interval, 0


@pytest.mark.parametrize('name,method,channels_last,dtype', CASES)
def test_a_steady_step_reads_nothing_and_stays_on_its_device(name, method, channels_last, dtype):
    shape = NETWORKS[name]
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    model = on_fake_cuda(create_model(name, in_channels=shape[1], conv_method=method, width=8), mode)
    steady(model)                                                # the callback reads more often than a layer must
    with mode:
        x = torch.randn(shape, device='cuda')
        if channels_last: x = x.to(memory_format=torch.channels_last)
        with autocast(dtype), OffDevice() as off:
            features = model.forward_features(x)
            scores = model.forward_head(features)
    assert scores.device.type == 'cuda' and scores.shape == (shape[0], 10)
    assert scores.dtype == dtype and features.dtype in (dtype, torch.float32)
    if channels_last: assert features.is_contiguous(memory_format=torch.channels_last)
    else: assert features.is_contiguous()
    assert not off.found, off.found[:3]


@pytest.mark.parametrize('options', [dict(foreach=True, capturable=True), dict(fused=True)], ids=['foreach', 'fused'])
@pytest.mark.parametrize('name', NETWORKS)
def test_a_step_of_adam_stays_on_its_device(name, options):
    "All but the backward pass, whose gradients are made here: the optimizer's step, and the passes before and after."
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    shape = NETWORKS[name]
    model = on_fake_cuda(create_model(name, in_channels=shape[1], width=8), mode)
    with mode:
        groups = param_groups(model, lr=0.01, mask_lr=0.1)
        opt = torch.optim.Adam(groups, **options)
        for i in range(12):
            steady(model)
            for p in model.parameters(): p.grad = torch.zeros_like(p)
            with OffDevice() as off:
                model(torch.ones(shape, device='cuda'))
                opt.step()
                opt.zero_grad()
            if i: assert not off.found, off.found[:3]            # the first makes the optimizer's own numbers


def test_the_callback_comes_before_a_layer_must_read(): assert RefreshSizes().every < longest_interval


def test_a_read_would_be_seen():
    "The check can fail: a layer that was never read asks its device."
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    model = on_fake_cuda(create_model('flexnet3', width=8), mode)
    for m in conv_layers(model).values(): m.window.clear()
    with mode, pytest.raises(DataDependentOutputException): model(torch.randn(2, 3, 32, 32, device='cuda'))
