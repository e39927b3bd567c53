"Programs that torch makes of a convolution (export, ONNX, jit, fx, compile) hold for inputs of other sizes."
import io
import warnings
from contextlib import redirect_stderr
import pytest, torch
from torch import nn
from flexconv.conv import LowRankKernel, conv_nd
from flexconv.export import bake, export_onnx, export_program
from flexconv.layers import FlexConv2d
from flexconv.registry import create_model
from helpers import relative_gap

pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning',
                                        'ignore::FutureWarning')
METHODS = ['direct', 'fft', 'matmul', 'auto', 'autotune']
SIZES = {1: [(40,), (4,), (97,)], 2: [(16, 12), (5, 30), (40, 8)], 3: [(6, 5, 4), (9, 3, 8), (3, 4, 12)]}


class Conv(nn.Module):
    "`conv_nd` with a kernel that is larger than the smallest of the inputs."
    def __init__(self, ndim, lowrank=False, **options):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        groups = options.get('groups', 1)
        self.mix = nn.Parameter(torch.randn(4, 2//groups, 3, generator=gen))
        self.basis = nn.Parameter(torch.randn(3, *(9, 7, 5)[:ndim], generator=gen)/10)
        self.weight = nn.Parameter(LowRankKernel(self.mix, self.basis).dense())
        self.bias = nn.Parameter(torch.randn(4, generator=gen))
        self.lowrank, self.options = lowrank, options

    def forward(self, x):
        return conv_nd(x, LowRankKernel(self.mix, self.basis) if self.lowrank else self.weight, self.bias,
                       **self.options)


def images(ndim): return [torch.randn(2, 2, *size) for size in SIZES[ndim]]


def assert_same_at_every_size(program, net, inputs):
    for x in inputs:
        want = net(x)
        assert (program(x) - want).abs().max() <= 1e-5*want.abs().max(), tuple(x.shape)


def exported(net, x):
    "An exported program with free batch and sizes."
    free = {i: torch.export.Dim.DYNAMIC for i in range(x.ndim) if i != 1}
    return torch.export.export(net, (x,), dynamic_shapes=(free,)).module()


OPTIONS = [(1, dict(causal=True)),
           (1, dict(stride=3)),
           (2, dict()),
           (2, dict(stride=2, dilation=(1, 2))),
           (2, dict(padding=((1, 4), (-1, 2)))),
           (2, dict(padding_mode='replicate')), (3, dict(stride=(1, 2, 1)))]


@pytest.mark.parametrize('ndim,options', OPTIONS)
@pytest.mark.parametrize('make', [exported, lambda net, x: torch.jit.trace(net, x),
                                  lambda net, x: torch.fx.symbolic_trace(net)],
                         ids=['export', 'trace', 'fx'])
def test_programs_hold_for_other_sizes(make, ndim, options):
    inputs = images(ndim)
    net = Conv(ndim, **options)
    with torch.no_grad(): assert_same_at_every_size(make(net, inputs[0]), net, inputs)


@pytest.mark.parametrize('method', METHODS + ['lowrank'])
@pytest.mark.parametrize('make', [exported, lambda net, x: torch.jit.trace(net, x, check_trace=False)],
                         ids=['export', 'trace'])
def test_programs_of_every_method_hold_for_other_sizes(make, method):
    "Traced where the kernel is larger than the image, used where it is not."
    inputs = images(2)[::-1]
    net = Conv(2, lowrank=True, method=method)
    with torch.no_grad(): assert_same_at_every_size(make(net, inputs[0]), net, inputs)


def test_a_traced_program_raises_where_padding_does_not_fit():
    net = Conv(1, padding_mode='reflect')
    program = torch.jit.trace(net, torch.randn(1, 2, 20))
    assert torch.allclose(program(torch.ones(1, 2, 50)), net(torch.ones(1, 2, 50)), atol=1e-5)
    with pytest.raises(RuntimeError): program(torch.randn(1, 2, 3))


@pytest.mark.parametrize('name,shape,kw', [('flextcn2', (2, 1, 60), dict(kernel_size=60, sigma=0.3)),
                                           ('flexnet3', (2, 1, 16, 16), dict(width=4, kernel_size=17, sigma=0.3))])
def test_baked_networks_are_exported_with_free_sizes(name, shape, kw):
    torch.manual_seed(0)
    net = bake(create_model(name, in_channels=1, **kw))
    inputs = [torch.randn(b, 1, *(n + k for n in shape[2:])) for b, k in ((2, 0), (5, 13), (1, 70))]
    with torch.no_grad():
        assert_same_at_every_size(exported(net, inputs[0]), net, inputs)
        assert_same_at_every_size(torch.jit.trace(net, inputs[0]), net, inputs)


def test_onnx_with_free_length(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    net = bake(create_model('flextcn2', in_channels=1, kernel_size=60, sigma=0.3))
    free = {0: torch.export.Dim('batch'), 2: torch.export.Dim('length')}
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        torch.onnx.export(net, (torch.randn(2, 1, 60),), str(tmp_path/'net.onnx'), dynamic_shapes=(free,), dynamo=True,
                          input_names=['x'], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/'net.onnx')
    program = lambda x: torch.from_numpy(session.run(None, dict(x=x.numpy()))[0])
    with torch.no_grad():
        assert_same_at_every_size(program, net, [torch.randn(b, 1, n) for b, n in ((2, 60), (3, 41), (1, 300))])


# -- torch.compile

def graphs_and_values(net, inputs, **kw):
    "Compiled values at every size, and the number of graphs that were made until each of them."
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, made = CompileCounter(), []
    compiled = torch.compile(net, backend=counter, **kw)
    for x in inputs:
        y, want = compiled(x), net(x)
        assert (y - want).abs().max() <= 1e-4*want.abs().max()
        made.append(counter.frame_count)
    return made


@pytest.mark.parametrize('method', METHODS + ['lowrank'])
def test_compiled_once_more_for_changing_sizes_and_then_no_more(method):
    "The choice of a method is not part of the compiled program."
    net = nn.Sequential(Conv(2, lowrank=True, method=method, stride=2), nn.Conv2d(4, 2, 1),
                        Conv(2, lowrank=True, method=method, stride=2))
    made = graphs_and_values(net, [torch.randn(2, 2, n, n) for n in (32, 40, 48, 57, 64, 33)])
    if method == 'matmul': assert made == list(range(1, 7)), made           # a program holds matrices of one size
    else: assert made[1] == made[-1], made


def test_the_direct_method_is_part_of_the_compiled_program():
    net = Conv(2, method='direct', stride=2, groups=2, padding=4)
    assert graphs_and_values(net, [torch.randn(2, 2, n, n) for n in (32, 40, 57)], fullgraph=True,
                             dynamic=True) == [1, 1, 1]


def test_no_arithmetic_of_sizes_in_the_compiled_program():
    """Symbolic sizes of one layer feed the next: with divisions or comparisons of them, three layers took minutes to
    compile."""
    names = []
    def backend(graph, example):
        names.extend(str(n.target) for n in graph.graph.nodes if n.op == 'call_function')
        return graph.forward
    torch._dynamo.reset()
    net = nn.Sequential(*[nn.Sequential(Conv(2, method='direct', stride=2), nn.Conv2d(4, 2, 1)) for _ in range(3)])
    torch.compile(net, backend=backend, fullgraph=True, dynamic=True)(torch.randn(2, 2, 64, 48))
    assert sum('conv2d' in n for n in names) >= 3
    assert not [n for n in names if 'floordiv' in n or 'sym_' in n
                or n.endswith(('mod>', 'lt>', 'gt>', 'ceil>'))], names


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


# -- torch.fx

class Doubled(FlexConv2d):
    "A layer with a `forward` of its own."
    def forward(self, x): return 2*super().forward(x) + 1


def hooked(kind, hook):
    layer = FlexConv2d(2, 3, 9)
    getattr(layer, f'register_forward_{kind}')(hook)
    return layer


@pytest.mark.parametrize('make', [lambda: hooked('hook', lambda m, args, out: 2*out),
                                  lambda: hooked('pre_hook', lambda m, args: (args[0] + 1,)),
                                  lambda: Doubled(2, 3, 9), lambda: FlexConv2d(2, 3, 9)],
                         ids=['hook', 'pre-hook', 'subclass', 'layer'])
def test_fx_runs_hooks_and_subclasses_once(make):
    net, x = nn.Sequential(make(), nn.ReLU()).eval(), torch.randn(2, 2, 12, 12)
    graph = torch.fx.symbolic_trace(net)
    graph.graph.lint()
    assert torch.allclose(graph(x), net(x), atol=1e-6)
    with torch.no_grad(): net[0].bias.add_(1)
    assert torch.allclose(graph(x), net(x), atol=1e-6)                       # its parameters, not copies
    whole = torch.fx.symbolic_trace(net.train())
    whole(x).sum().backward()
    assert net[0].mask.sigma.grad.abs().sum() > 0
