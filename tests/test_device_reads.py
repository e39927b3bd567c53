"""What a host reads from a device, counted on a CPU that is taken for a GPU: in training steps with backward pass and
optimizer; and that sizes which are read seldom never cost a value in silence."""
import copy, math, warnings
from collections import Counter
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from flexconv import callbacks, conv, layers
from flexconv.cache import Window, longest_interval, rim
from flexconv.callbacks import kernel_norm
from flexconv.crop import crop_axis
from flexconv.layers import FlexConv1d, FlexConv2d, conv_layers, refresh_sizes
from flexconv.mask import cutoff_in_sigmas
from flexconv.registry import create_model

NETWORKS = {'flexnet7': (2, 3, 32, 32), 'flextcn2': (2, 1, 784)}
WAITS = {'_local_scalar_dense', 'equal', 'is_nonzero', 'nonzero', 'masked_select', 'unique_consecutive', '_unique2'}


class HostReads(TorchDispatchMode):
    "Counts what would make the host wait for a device: operations, and methods that copy to the host."
    def __init__(self, monkeypatch):
        super().__init__()
        self.counts, self.inside = Counter(), False
        for name in ('tolist', 'numpy', 'cpu'):
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, self.counting(name, original))

    def counting(self, name, original):
        def method(t, *args, **kwargs):
            if self.inside: return original(t, *args, **kwargs)           # subclasses of Tensor come twice
            self.counts[name] += 1
            self.inside = True
            try: return original(t, *args, **kwargs)
            finally: self.inside = False
        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split('::')[1]
        masked = name in ('index', 'index_put_') and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS or masked: self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def take(self):
        "The number of reads since the last call."
        n = sum(self.counts.values())
        self.counts.clear()
        return n


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (layers, callbacks): monkeypatch.setattr(module, 'read_blocks', lambda device: True)


def training_step(model, shape, penalty=0., dtype=torch.float32):
    "A function: forward, loss, backward and a step of Adam, which keeps its own numbers on the device."
    opt = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    x, target = torch.randn(shape), torch.randint(0, 10, shape[:1])
    def step():
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32): y = model(x)
        loss = F.cross_entropy(y.float(), target)
        if penalty: loss = loss + kernel_norm(model, penalty)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return step


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('penalty,dtype', [(0., torch.float32), (1e-4, torch.float32), (0., torch.bfloat16)])
def test_a_steady_training_step_reads_nothing(name, penalty, dtype, as_on_a_gpu, monkeypatch):
    "RefreshSizes reads once for all layers, every tenth step; nothing else does."
    torch.manual_seed(0)
    model = create_model(name, in_channels=NETWORKS[name][1], width=6)
    step, reads = training_step(model, NETWORKS[name], penalty, dtype), HostReads(monkeypatch)
    for m in conv_layers(model).values(): m.window.interval = longest_interval
    counts = []
    with reads:
        for i in range(12):
            if i % 10 == 0: refresh_sizes(model)
            # the first readings come early (see the next test): as after some
            for m in conv_layers(model).values(): m.window.interval = longest_interval
            step()
            counts.append(reads.take())
    assert counts == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]


def test_the_first_steps_read_each_layer(as_on_a_gpu, monkeypatch):
    "Passes 0, 1, 3, 7, 15, 31: one read for each layer; in eval mode and for a penalty none of them more."
    torch.manual_seed(0)
    model = create_model('flexnet3', width=6)
    for p in model.parameters(): p.requires_grad_(not any(p is q for m in conv_layers(model).values()
                                                          for q in m.mask.parameters()))
    step, reads = training_step(model, (2, 3, 32, 32), 1e-4), HostReads(monkeypatch)
    counts = []
    with reads:
        for _ in range(18):
            step()
            counts.append(reads.take())
    number = len(conv_layers(model))
    assert [i for i, n in enumerate(counts) if n] == [0, 1, 3, 7, 15]
    assert {n for n in counts if n} == {number}


def test_a_read_is_counted(monkeypatch):
    "The counter can find something: without the windows every layer reads in every step, and a penalty again."
    model = create_model('flexnet3', width=6)
    reads, number = HostReads(monkeypatch), len(conv_layers(model))
    with reads:
        training_step(model, (2, 3, 32, 32))()
        assert reads.take() == number
        training_step(model, (2, 3, 32, 32), 1e-4)()
        assert reads.take() == 2*number
        torch.ones(3)[torch.tensor([True, False, True])], bool(torch.ones(()))
        assert reads.take() == 2


def test_a_parametrized_sigma_is_not_read_more_often(as_on_a_gpu, monkeypatch):
    class Exponential(torch.nn.Module):
        def forward(self, t): return t.exp()
        def right_inverse(self, sigma): return sigma.log()
    layer = FlexConv2d(2, 2, 33)
    parametrize.register_parametrization(layer.mask, 'sigma', Exponential())
    x, reads = torch.randn(1, 2, 32, 32), HostReads(monkeypatch)
    with reads:
        for _ in range(16): layer(x).sum().backward()
        assert reads.take() == 5                                         # before passes 0, 1, 3, 7 and 15


def test_a_learner_reads_once_per_batch(as_on_a_gpu, monkeypatch):
    "fastai's Recorder copies the loss of every batch to the host; the rest of a batch reads seldom."
    from fastai.optimizer import OptimWrapper
    from flexconv.data import get_dls
    from flexconv.learner import flex_learner
    torch.manual_seed(0)
    adam = lambda params, lr, **kwargs: OptimWrapper(params, torch.optim.Adam, lr=lr, fused=True)
    learn = flex_learner(get_dls('digits', bs=16, seed=0), 'flexnet3', opt_func=adam, cbs=callbacks.KernelNorm())
    reads, counts = HostReads(monkeypatch), []

    class Count(callbacks.Callback):
        order, run_valid = 100, False                                    # after the Recorder
        def after_batch(self):
            counts.append(Counter(reads.counts))
            reads.counts.clear()
    with reads, learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Count())
    steady = counts[33:]
    assert len(steady) > 30 and {c['cpu'] for c in steady} == {1}        # the Recorder
    further = [sum(c.values()) - c['cpu'] for c in steady]
    assert sum(map(bool, further)) <= len(steady)/4, further


# -- sizes that are read seldom

def kept(layer): return layer.bounds()[0][0]


def sampled(layer): return layer.window.bounds[0][0]


@settings(max_examples=200, deadline=None)
@given(st.integers(5, 2000), st.booleans(), st.floats(0.01, 1), st.randoms(use_true_random=False))
def test_within_the_bound_no_position_is_cut(n, causal, start, random):
    "An edge that moves per pass at most twice as far as on average between the last two readings."
    n += (n % 2 == 0) and not causal
    window, cutoff, edge = Window(), cutoff_in_sigmas(0.1), start
    readings, limit = [], math.inf
    for i in range(120):
        # at speeds that change by jumps, now and then
        if i: edge = abs(edge + random.uniform(-1, 1)*min(limit, random.choice([1e-4, 2e-3, 0.05, 0.5])))
        sigma = (edge + 1)/cutoff if causal else edge/cutoff
        bounds = (crop_axis(n, float(causal), sigma, cutoff, causal),)
        place = cutoff*sigma - 1 if causal else cutoff*sigma
        if window.must_read((n,)):
            assert window.update(bounds, (n,), (place,)) == 0
            readings.append((i, place))
            if len(readings) > 1:
                (i0, p0), (i1, p1) = readings[-2:]
                limit = 2*abs(p1 - p0)/(i1 - i0)
        assert window.bounds[0][0] <= bounds[0][0] and window.bounds[0][1] >= bounds[0][1]
        free = window.interval == 1 or len(readings) < 2                 # read before every pass: any speed
        limit = math.inf if free else limit if len(readings) > 1 else math.inf


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(st.sampled_from([0.02, 0.03, 0.05, 0.1, 0.3, 0.8, -0.4]), min_size=10, max_size=60),
       st.integers(1, 8))
def test_beyond_the_bound_there_is_a_warning(causal, sigmas, stay):
    "Jumps of sigma at any time: a layer whose kernel was cut says so at its next reading, and only such a layer."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(layers, 'read_blocks', lambda device: True)
        layer, x, missed = FlexConv1d(1, 1, 65, causal=causal), torch.randn(1, 1, 4), 0
        for sigma in [s for s in sigmas for _ in range(stay)]:
            with torch.no_grad(): layer.mask.sigma.fill_(sigma)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                layer(x)
            if layer.window.age == 0:                                    # it has read before this pass
                assert [f'kernel: {missed} positions were' in str(w.message) for w in caught] == [True]*bool(missed)
                missed = 0
                assert sampled(layer) <= kept(layer)
            assert layer.window.age == 0 or not caught
            missed = max(missed, sampled(layer) - kept(layer))


@pytest.mark.parametrize('optimizer,lr', [(torch.optim.Adam, 0.001), (torch.optim.Adam, 0.03), (torch.optim.Adam, 0.3),
                                          (torch.optim.SGD, 0.1), (torch.optim.SGD, 3.)])
@pytest.mark.parametrize('n', [33, 785])
def test_large_learning_rates_never_cost_a_value_in_silence(optimizer, lr, n, as_on_a_gpu):
    torch.manual_seed(0)
    layer, x = FlexConv1d(1, 1, n, sigma=0.06, conv_method='fft'), torch.randn(2, 1, n)
    target = F.conv1d(x, torch.linspace(-1, 1, 25).sign()[None, None], padding=12)
    opt, missed = optimizer(layer.parameters(), lr), 0
    for _ in range(80):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            y = layer(x)
        if layer.window.age == 0:
            assert bool(caught) == bool(missed), 'the reading finds what was cut since the last one'
            missed = 0
        cut = sampled(layer) - kept(layer)
        if cut <= 0: assert (y - layer.to_conv()(x)).abs().max() <= 1e-4*y.abs().max().clamp(min=1), 'exact'
        missed = max(missed, cut)
        if optimizer is torch.optim.Adam and lr == 0.001: assert cut <= 0
        opt.zero_grad()
        F.mse_loss(y, target).backward()
        opt.step()
        if not all(p.isfinite().all() for p in layer.parameters()): break


def test_the_papers_settings_are_within_the_bound():
    "Ten steps of Adam at the masks' learning rate move an edge by less than the rim."
    assert 10*0.001*cutoff_in_sigmas(0.1) < rim


def test_a_compiled_step_says_that_it_may_have_cut():
    torch._dynamo.reset()
    layer, x = FlexConv1d(1, 1, 33, conv_method='direct'), torch.randn(1, 1, 32)
    step = torch.compile(layer, backend='eager', fullgraph=True)
    refresh_sizes(layer)
    step(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        refresh_sizes(layer)                                             # nothing has moved
    with torch.no_grad(): layer.mask.sigma.fill_(0.3)
    step(x)
    with pytest.warns(RuntimeWarning, match='may have been cut off'): refresh_sizes(layer)
    assert torch.allclose(step(x), layer(x), atol=1e-5)


def test_what_a_window_notes_is_copied_with_its_layer(as_on_a_gpu):
    layer, x = FlexConv1d(1, 1, 33), torch.randn(1, 1, 32)
    for _ in range(3): layer(x)
    assert layer.window.farthest is not None and not layer.window.farthest.requires_grad
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


# -- what must not hide that a kernel was cut

def grown(layer, x, passes=33, start=0.05):
    "A layer whose mask has rested for so long that it reads seldom."
    with torch.no_grad(): layer.mask.sigma.fill_(start)
    for _ in range(passes): layer(x).sum().backward()
    return layer


def test_a_kernel_that_is_kept_is_whole(as_on_a_gpu):
    "Without gradients a kernel is kept while its parameters stay equal: it must not be one that was cut."
    layer, x = FlexConv1d(1, 1, 65), torch.randn(1, 1, 64)
    grown(layer, x)
    with torch.no_grad():
        layer.mask.sigma.fill_(0.4)
        want = layer.to_conv()(x)
        for _ in range(3): torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


CHANGES = dict(nothing=lambda layer: None, eval=lambda layer: layer.eval(), train=lambda layer: layer.train(),
               to=lambda layer: layer.to(torch.float64), load=lambda layer: layer.load_state_dict(layer.state_dict()))

@pytest.mark.parametrize('change', CHANGES)
def test_a_change_of_mode_does_not_hide_what_was_cut(change, as_on_a_gpu):
    layer, x = FlexConv1d(1, 1, 65), torch.randn(1, 1, 64)
    grown(layer, x)
    with torch.no_grad(): layer.mask.sigma.fill_(0.4)
    layer(x).sum().backward()
    CHANGES[change](layer)
    with pytest.warns(RuntimeWarning, match='outgrew .* positions were cut off'): refresh_sizes(layer)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        refresh_sizes(layer)                                             # said once


def test_other_parameters_do_not_hide_what_was_cut(as_on_a_gpu):
    layer, x = FlexConv1d(1, 1, 65), torch.randn(1, 1, 64)
    grown(layer, x)
    other = {k: v.detach().clone() for k, v in layer.named_parameters()}
    with torch.no_grad(): layer.mask.sigma.fill_(0.4)
    layer(x).sum().backward()
    with pytest.warns(RuntimeWarning, match='positions were cut off'): torch.func.functional_call(layer, other, (x,))


def test_tensors_that_come_and_go_are_told_apart(as_on_a_gpu):
    "The `id` of a tensor that is gone is given again: here a mask of 0.5 would get the window of 0.1."
    layer, x = FlexConv1d(1, 1, 65), torch.randn(1, 1, 64)
    other = {k: v.detach() for k, v in layer.named_parameters()}
    outputs = []
    for i in range(100):
        sigma = torch.full((1,), 0.1 if i < 96 else 0.5)
        outputs.append(torch.func.functional_call(layer, other | {'mask.sigma': sigma}, (x,)))
        del sigma
    with torch.no_grad(): layer.mask.sigma.fill_(0.5)
    for y in outputs[96:]: torch.testing.assert_close(y, layer.to_conv()(x), rtol=1e-4, atol=1e-5)


def test_a_learner_reports_what_was_cut_in_the_last_batch(as_on_a_gpu):
    "Validation comes next, for which fastai changes the mode first."
    from flexconv.data import get_dls
    from flexconv.learner import flex_learner

    class Grow(callbacks.Callback):
        order = -100
        def before_batch(self):
            if not self.training or self.iter < self.n_iter - 1: return
            with torch.no_grad():
                for m in conv_layers(self.model).values(): m.mask.sigma.fill_(0.8)
    learn = flex_learner(get_dls('digits', bs=16, seed=0), 'flexnet3', cbs=Grow())
    with warnings.catch_warnings(record=True) as caught, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.fit(1)
    named = {str(w.message).split()[3] for w in caught if 'outgrew' in str(w.message)}
    assert named == set(conv_layers(learn.model))


def test_an_eager_pass_does_not_hide_that_a_compiled_one_was_cut(as_on_a_gpu):
    torch._dynamo.reset()
    layer, x = FlexConv1d(1, 1, 65, conv_method='direct'), torch.randn(1, 1, 64)
    step = torch.compile(layer, backend='eager', fullgraph=True)
    for f in step, layer:
        refresh_sizes(layer)
        f(x)
    with torch.no_grad(): layer.mask.sigma.fill_(0.5)
    step(x)
    with pytest.warns(RuntimeWarning, match='may have been cut off'): refresh_sizes(layer)


def test_weights_that_are_loaded_are_not_taken_for_a_mask_that_grew(as_on_a_gpu):
    "A compiled step samples whole kernels until the sizes are read again: nothing is cut, and nothing is said."
    torch._dynamo.reset()
    layer, x = FlexConv1d(1, 1, 65, conv_method='direct'), torch.randn(1, 1, 64)
    step = torch.compile(layer, backend='eager', fullgraph=True)
    refresh_sizes(layer)
    step(x)
    layer.load_state_dict(layer.state_dict() | {'mask.sigma': torch.full((1,), 0.5)})
    torch.testing.assert_close(step(x), layer.to_conv()(x), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        refresh_sizes(layer)


def test_a_recorded_step_is_compared_with_what_it_samples(as_on_a_gpu):
    "A program of `torch.jit.trace` goes on sampling the same window, as does a CUDA graph of one's own."
    layer, x = FlexConv1d(1, 1, 65, conv_method='direct'), torch.randn(1, 1, 64)
    refresh_sizes(layer)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        step = torch.jit.trace(layer, x, check_trace=False)
    found = []
    for _ in range(60):
        with torch.no_grad(): layer.mask.sigma += 0.005
        y = step(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            refresh_sizes(layer)
        found.append(bool(caught))
        if not caught: torch.testing.assert_close(y, layer.to_conv()(x), rtol=1e-4, atol=1e-5)
    assert found == sorted(found) and not found[0] and found[-1]
    assert 'record the step again' in str(caught[0].message)


@pytest.mark.parametrize('method', ['fft', 'matmul'])
@pytest.mark.parametrize('cls,n,size', [(FlexConv1d, 785, 784), (FlexConv2d, 33, 20)])
def test_matrices_are_copied_to_the_device_once(cls, n, size, method, monkeypatch):
    "A copy from the host in every pass would make the host wait, and cannot be captured."
    layer, x, copies = cls(2, 2, n, conv_method=method), torch.randn(1, 2, *[size]*cls.ndim), []
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, 'from_numpy', lambda a: (copies.append(a.shape), from_numpy(a))[1])
    counts = []
    for _ in range(3):
        layer(x).sum().backward()
        counts.append(len(copies))
    assert counts == counts[:1]*3, copies[counts[0]:]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_replicas_of_data_parallel_compute_the_same(dtype):
    "Made as `nn.DataParallel` makes them: tensors where there were parameters, which are listed elsewhere."
    model = create_model('flexnet3', width=6).to(dtype)
    replicas = {name: m._replicate_for_data_parallel() for name, m in model.named_modules()}
    for name, module in model.named_modules():
        replica = replicas[name]
        replica._former_parameters = {key: p.detach() for key, p in module._parameters.items() if p is not None}
        for key in module._parameters: replica._parameters[key] = None
        for key, p in replica._former_parameters.items():
            del replica._parameters[key]
            setattr(replica, key, p)
        for child in module._modules: replica._modules[child] = replicas[f'{name}.{child}'.removeprefix('.')]
    x = torch.randn(4, 3, 16, 16, dtype=dtype)
    torch.manual_seed(0)
    want = model(x)
    torch.manual_seed(0)
    assert torch.equal(replicas[''](x), want)


# -- autotune in a capture

def test_autotune_measures_nothing_while_a_graph_is_captured(monkeypatch):
    x, w = torch.randn(2, 3, 50), torch.randn(4, 3, 31)
    conv.autotuned.clear()
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, 'is_available', lambda: True)
        m.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        m.setattr(conv, 'run_seconds', lambda *args: pytest.fail('waits for the device'))
        assert torch.allclose(conv.conv_nd(x, w, method='autotune'), F.conv1d(x, w, padding=15), atol=1e-4)
        assert not conv.autotuned
    conv.conv_nd(x, w, method='autotune')
    key, = conv.autotuned
    conv.autotuned[key] = 'matmul'
    with monkeypatch.context() as m:                                     # measured before: that is taken
        m.setattr(torch.cuda, 'is_available', lambda: True)
        m.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        assert conv.conv_method(x, w, method='autotune') == 'matmul'
    conv.autotuned.clear()


def test_other_parameters_have_a_window_of_their_own(as_on_a_gpu):
    "A layer that is called with another mask, as meta-learning does, reads its size first."
    layer, x = FlexConv2d(2, 3, 33), torch.randn(1, 2, 40, 40)
    for _ in range(4): layer(x)
    wide = torch.full((2,), 0.4)
    other = {k: v.detach() for k, v in layer.named_parameters()} | {'mask.sigma': wide}
    got = torch.func.functional_call(layer, other, (x,))
    with torch.no_grad(): layer.mask.sigma.copy_(wide)
    torch.testing.assert_close(got, layer.to_conv()(x), rtol=1e-4, atol=1e-5)


def test_a_checkpointed_forward_pass_is_recomputed_at_the_same_size(as_on_a_gpu):
    layer, x = FlexConv2d(2, 2, 33), torch.randn(1, 2, 40, 40, requires_grad=True)
    reads = []
    update = layer.window.update
    layer.window.update = lambda *args: (reads.append(layer.window.age), update(*args))[1]
    for step in range(40):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        y.square().sum().backward()                  # a CheckpointError if a shape differs
        with torch.no_grad(): layer.mask.sigma += 0.002
    assert len(reads) > 3 and sum(reads) <= 40       # a recomputation does not count
