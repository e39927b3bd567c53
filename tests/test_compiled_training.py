"""torch.compile of whole training steps: no graph break by the methods that can be compiled, a second program for all
other batch sizes, none for a mask that moves within its window."""
import copy
import pytest, torch, torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from flexconv.layers import FlexConv1d, FlexConv2d, conv_layers, refresh_sizes
from flexconv.flexnet import FlexNet, FlexTCN

SHAPES = {FlexNet: (3, 9, 9), FlexTCN: (2, 40)}
SIZES = {FlexNet: dict(widths=(6,), kernel_size=9), FlexTCN: dict(blocks=1, kernel_size=40)}    # of one block


def small(cls, method):
    torch.manual_seed(0)
    return cls(SHAPES[cls][0], width=4, sigma=0.3, conv_method=method, **SIZES[cls])


@pytest.mark.parametrize('cls', SHAPES)
@pytest.mark.parametrize('method,dtype', [('direct', None), ('matmul', None), ('matmul', torch.bfloat16)])
def test_a_training_step_is_one_program_for_all_batch_sizes(cls, method, dtype):
    "With dropout, loss and moving masks: one program, and one more when the batch size is seen to change."
    torch._dynamo.reset()
    model, counter = small(cls, method), CompileCounter()
    refresh_sizes(model)
    opt = torch.optim.Adam(model.parameters(), 1e-4)
    compiled = torch.compile(lambda x, target: F.cross_entropy(model(x), target), backend=counter, fullgraph=True)
    def loss_of(x, target):
        with torch.autocast('cpu', dtype, enabled=dtype is not None): return compiled(x, target)
    for step, batch in enumerate((4, 4, 6, 3, 9, 5)):
        if step == 3: refresh_sizes(model)                               # the window stays
        opt.zero_grad()
        loss_of(torch.randn(batch, *SHAPES[cls]), torch.randint(0, 10, (batch,))).backward()
        opt.step()
    assert counter.frame_count == 2
    with torch.no_grad():
        for m in conv_layers(model).values(): m.mask.sigma *= 2
    refresh_sizes(model)
    loss_of(torch.randn(7, *SHAPES[cls]), torch.randint(0, 10, (7,)))
    assert counter.frame_count == 3                                      # a new window is a new program
    loss_of(torch.randn(8, *SHAPES[cls]), torch.randint(0, 10, (8,)))
    assert counter.frame_count == 3


def test_the_other_methods_are_calls_between_programs():
    torch._dynamo.reset()
    layer, counter = FlexConv2d(2, 2, 9, sigma=0.4, conv_method='fft'), CompileCounter()
    program = torch.compile(lambda x: layer(x).relu(), backend=counter)
    x = torch.randn(1, 2, 9, 9)
    assert torch.allclose(program(x), layer(x).relu(), atol=1e-5) and counter.frame_count > 1


@pytest.mark.parametrize('cls,shape,kw', [(FlexConv1d, (3, 3, 20), dict(kernel_size=14, causal=True)),
                                          (FlexConv1d, (2, 3, 300), dict(kernel_size=301, sigma=0.5)),
                                          (FlexConv2d, (2, 4, 12, 9), dict(kernel_size=13, groups=2)),
                                          (FlexConv2d, (2, 3, 12, 9), dict(kernel_size=13, stride=2, kernel='siren'))])
def test_matmul_in_a_program_gives_what_it_gives_alone(cls, shape, kw):
    "Values and gradients, before and after a call outside of the program, which leaves its own matrices behind."
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = cls(shape[1], 4, conv_method='matmul', **dict(sigma=0.3) | kw), torch.randn(shape, requires_grad=True)
    program = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for t in (x, x, x[:1]):
        t = t.detach().requires_grad_()
        inputs = [t, *layer.parameters()]
        y = program(t)
        found = [y, *torch.autograd.grad(y.square().sum(), inputs)]
        want = layer(t)
        want = [want, *torch.autograd.grad(want.square().sum(), inputs)]
        for a, b in zip(found, want): assert (a - b).abs().max() <= 1e-4*b.abs().max().clamp(min=1e-6)
        refresh_sizes(layer)


def test_a_compiled_optimizer_takes_masks_at_their_own_rate():
    torch._dynamo.reset()
    model = small(FlexTCN, 'direct')
    twin, counter = copy.deepcopy(model), CompileCounter()
    opts = [torch.optim.Adam(m.parameters(), 1e-3) for m in (model, twin)]
    compiled_step = torch.compile(opts[1].step, backend=counter)
    x, target = torch.randn(2, *SHAPES[FlexTCN]), torch.randint(0, 10, (2,))
    for m in (model, twin): m.eval()                                     # without dropout
    for step in range(3):
        for m, update in ((model, opts[0].step), (twin, compiled_step)):
            m.zero_grad()
            F.cross_entropy(m(x), target).backward()
            update()
    for a, b in zip(model.parameters(), twin.parameters()): assert torch.allclose(a, b, atol=1e-5)
