"Compiled layers and networks compute what eager ones do, and half precision trains as float32 does."
import copy
import pytest, torch, torch.nn.functional as F
from flexconv.layers import FlexConv1d, FlexConv2d, FlexConv3d, refresh_sizes
from flexconv.registry import create_model
from helpers import gradients, relative_gap


LAYERS = [(FlexConv1d, (2, 3, 20), dict(kernel_size=15)), (FlexConv1d, (2, 3, 20), dict(kernel_size=14, causal=True)),
          (FlexConv2d, (2, 3, 12, 9), dict(kernel_size=13)), (FlexConv3d, (1, 3, 6, 5, 6), dict(kernel_size=5))]


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


@pytest.mark.parametrize('method', ['direct', 'fft', 'lowrank'])
def test_inductor_computes_a_block_as_it_is(method):
    "Two convolutions with their normalisations and shortcut; without a graph break where the method has none."
    torch._dynamo.reset()
    net = create_model('flexnet3', width=4, kernel_size=9, sigma=0.4, dropout=0., conv_method=method).blocks[0]
    x = torch.randn(2, 4, 9, 9)
    refresh_sizes(net)
    y = torch.compile(net, fullgraph=method == 'direct')(x)
    assert relative_gap([y], [net(x)]) < 1e-3
    if method == 'direct': return                                    # whose gradients the test above compares
    assert relative_gap(gradients(y, net), gradients(net(x), net), together=True) < 1e-3


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
