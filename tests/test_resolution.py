"Other resolutions: formulas, responses, Learner, commands."
import copy, json, math, pickle
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from flexconv.data import get_dls
from flexconv.export import bake
from flexconv.registry import create_model
from flexconv.layers import CKConv1d, CKConv2d, CKConv3d, FlexConv1d, FlexConv2d, FlexConv3d, refresh_sizes, scaled_size
from flexconv.callbacks import AliasingLoss
from flexconv.learner import flex_learner, model_for
from flexconv.files import read_csv
from flexconv.plot import kernel_spectrum, show_spectra
from flexconv.runs import load_run
from fastai.callback.core import Callback
from flexconv.at_resolution import ProgressiveResize, dls_at, resize_images, resolution_table
from flexconv.resolution import set_resolution
from helpers import run

SCALES = [0.5, 0.875, 1.125, 2, 3]
LAYERS = [(FlexConv1d, 33, dict(sigma=0.2)),
          (FlexConv1d, 32, dict(sigma=0.2, causal=True)),
          (FlexConv2d, 33, dict(sigma=(0.1, 0.3))),
          (FlexConv2d, (33, 17), dict(sigma=0.2)),
          (FlexConv3d, 17, dict(sigma=(0.2, 0.4, 0.3))), (CKConv1d, 17, {}), (CKConv2d, 17, {}), (CKConv3d, 9, {})]


def by_hand(layer, r):
    "Kernel `(out, in/groups, *cropped)` at scale `r`, in float64 numpy from the formulas of the paper."
    P = {k: v.detach().double().numpy() for k, v in layer.state_dict().items()}
    axes = []
    for d, n in enumerate(layer.kernel_size):
        m = int(np.floor((n-1)*r + 0.5)) + 1 if layer.causal else 2*int(np.floor((n-1)*r/2 + 0.5)) + 1
        axis = np.linspace(-1, 1, m)
        if 'mask.sigma' in P:
            mean, reach = P['mask.mean'][d], abs(P['mask.sigma'][d])*math.sqrt(-2*math.log(0.1)) + 1e-9
            axis = axis[axis >= mean - reach] if layer.causal else axis[np.abs(axis) <= abs(mean) + reach]
        axes.append(axis)
    x = np.stack(np.meshgrid(*axes, indexing='ij'), -1)
    f = lambda l, name: P[f'kernel_network.filters.{l}.{name}']
    g = lambda l: (np.exp(-0.5*((f(l, 'gamma')*(x[..., None, :] - f(l, 'mu')))**2).sum(-1))
                   *np.sin(x @ f(l, 'linear.weight').T + f(l, 'linear.bias')))
    h = g(0)
    for l in range(3): h = (h @ P[f'kernel_network.linear.{l}.weight'].T + P[f'kernel_network.linear.{l}.bias'])*g(l+1)
    k = h @ P['kernel_network.output_linear.weight'].T + P['kernel_network.output_linear.bias']
    if 'mask.sigma' in P: k = k*np.exp(-0.5*(((x - P['mask.mean'])/P['mask.sigma'])**2).sum(-1))[..., None]
    return np.moveaxis(k, -1, 0).reshape(layer.out_channels, -1, *x.shape[:-1])/r**layer.ndim


@pytest.mark.parametrize('cls,size,kw', LAYERS)
@pytest.mark.parametrize('r', SCALES)
def test_kernels_follow_the_formulas_and_come_back_without_drift(cls, size, kw, r):
    torch.manual_seed(0)
    layer = cls(2, 3, size, dtype=torch.float64, **kw)
    before, state = layer.kernel(), copy.deepcopy(layer.state_dict())
    set_resolution(layer, r)
    want = by_hand(layer, r)
    assert layer.size == want.shape[2:] == layer.kernel().shape[2:]
    assert np.abs(layer.kernel().detach().numpy() - want).max() < 1e-10*np.abs(want).max()
    set_resolution(layer, 1)
    assert torch.equal(layer.kernel(), before) and all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@given(st.integers(1, 2000), st.floats(0.05, 8), st.booleans())
@settings(deadline=None)
def test_sizes_are_rounded_to_the_nearest_allowed(n, r, causal):
    n = n if causal else 2*n - 1
    m, = scaled_size((n,), r, causal)
    assert m >= 1 and (causal or m % 2 == 1)
    assert abs(m - ((n-1)*r + 1)) <= (0.5 if causal else 1) + 1e-9


@pytest.mark.parametrize('cls', [FlexConv1d, FlexConv2d])
@pytest.mark.parametrize('sigma', [0.15, (0.12, 0.25)])
@pytest.mark.parametrize('threshold,tolerance', [(1e-3, 0.01), (0.1, 0.05)])
def test_one_response_at_all_resolutions(cls, sigma, threshold, tolerance):
    """A kernel and a signal without high frequencies: the response is the same function of position, to 1%. (Cut off
    at the default threshold, the kernel has an edge, which is a high frequency: 5%.)"""
    torch.manual_seed(1)
    sigma = sigma if cls is FlexConv2d or not isinstance(sigma, tuple) else sigma[0]
    layer = cls(1, 1, 33, sigma=sigma, threshold=threshold, dtype=torch.float64)
    with torch.no_grad():
        for f in layer.kernel_network.filters: f.linear.weight *= 0.1; f.gamma.clamp_(max=2.)
    responses = {}
    for r in (0.5, 1, 1.5, 2, 3):
        # 16 r pixels per unit of position
        axis = torch.linspace(-2, 2, int(64*r) + 1, dtype=torch.float64)
        grid = torch.meshgrid(*[axis]*layer.ndim, indexing='ij')
        signal = sum(torch.sin((2 + d)*g + d) for d, g in enumerate(grid)) + math.prod(torch.cos(3*g) for g in grid)
        with torch.no_grad(): y = set_resolution(layer, r)(signal[None, None])[0, 0]
        # positions that all five grids have: multiples of 1/8
        step = int(2*r) if r >= 1 else 1
        common = y[(slice(None, None, step),)*layer.ndim]
        responses[r] = common[(slice(8, -8),)*layer.ndim]                                    # away from the padding
    for r, y in responses.items():
        assert y.shape == responses[3].shape and (y - responses[3]).abs().max() < tolerance*responses[3].abs().max(), r


@pytest.mark.parametrize('r', [0.5, 2, 1.3])
@pytest.mark.parametrize('make,shape',
                         [(lambda: create_model('flexnet3', width=4, kernel_size=17, sigma=0.3), (2, 3, 20, 20)),
                          (lambda: create_model('flextcn2', in_channels=3, kernel_size=40, sigma=0.3), (2, 3, 40)),
                          (lambda: nn.Sequential(FlexConv3d(3, 2, 5, sigma=0.5)), (1, 3, 6, 6, 6))])
def test_with_baking_saving_copying_and_remembering(r, make, shape):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        first = net(x)
        y = set_resolution(net, r)(x)
        assert y.shape == first.shape and (y - first).abs().max() > 1e-3*first.abs().max()
        for other in (bake(net), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert (other(x) - y).abs().max() < 1e-4*y.abs().max()
        fresh = make().eval()
        fresh.load_state_dict(net.state_dict())
        # weights are those of the training resolution
        assert torch.allclose(fresh(x), first, atol=1e-6*first.abs().max().item())
        assert torch.equal(set_resolution(net, 1)(x), first)


def test_padding_given_in_pixels_grows_with_the_kernel():
    layer = FlexConv2d(1, 1, 9, padding=4, sigma=1.)
    for r, size in ((0.5, 10), (2, 40)):
        assert set_resolution(layer, r)(torch.randn(1, 1, size, size)).shape[2:] == (size, size)
    strided = FlexConv2d(1, 1, 9, stride=2, sigma=1.)
    assert strided(torch.randn(1, 1, 10, 10)).shape[2] == 5
    assert set_resolution(strided, 2)(torch.randn(1, 1, 20, 20)).shape[2] == 10


@pytest.mark.skipif(torch.__version__ < '2.6', reason='torch.compile of torch 2.5 cannot compile a layer in eval mode')
def test_compiled_and_waiting_layers_see_a_new_resolution(monkeypatch):
    from flexconv import layers
    layer, x = FlexConv2d(2, 2, 9, sigma=0.4, conv_method='direct'), torch.randn(1, 2, 16, 16)
    refresh_sizes(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='aot_eager')
    for scale in (1, 2, 0.5):
        set_resolution(layer, scale)
        want = layer(x)
        assert torch.allclose(compiled(x), want, atol=1e-5)
        with monkeypatch.context() as m:
            m.setattr(layers, 'read_blocks', lambda device: True)
            assert torch.allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize('bad', [0, -1, float('nan'), 'two', None])
def test_bad_scales_are_refused(bad):
    with pytest.raises(ValueError, match='scale'): set_resolution(FlexConv2d(1, 1, 9, sigma=0.3), bad)


def test_the_regulariser_reads_the_resolution_of_the_batch():
    dls = get_dls('digits', max_items=64)
    for size in (8, 12):
        learn = flex_learner(dls_at(dls, size), model_for(dls, 'flexnet3', width=4), cbs=AliasingLoss(0.1))
        seen = []
        import flexconv.callbacks as module
        original = module.aliasing_loss
        module.aliasing_loss = lambda model, resolution, **kw: (seen.append(resolution),
                                                                original(model, resolution, **kw))[1]
        try:
            with learn.no_bar(), learn.no_logging(): learn.fit_cosine(1)
        finally: module.aliasing_loss = original
        assert set(seen[1:]) == {size}


def test_train_fine_tune_evaluate(tmp_path):
    """A cell of the paper's table on the digits, its files, evaluation of both parts, and going on after an
    interruption."""
    small = ['--epochs', 2, '--target_epochs', 2, '--width', 4, '--max_items', 200, '--device', 'cpu']
    run('flexconv_train', '--experiment', 'cross-digits-8-16', *small, '--out', tmp_path/'a')
    a = tmp_path/'a'
    table = read_csv(a/'resolution.csv')
    assert [(r['size'], r['scale']) for r in table] == [('6', '0.75'),
                                                        ('8', '1'),
                                                        ('10', '1.25'),
                                                        ('12', '1.5'),
                                                        ('16', '2')]
    assert float(table[1]['accuracy']) == pytest.approx(float(read_csv(a/'metrics.csv')[-1]['accuracy']), abs=1e-6)
    sub = json.loads((a/'at-16'/'config.json').read_text())
    assert (sub['size'], sub['scale'], sub['kernel_size'], sub['source']) == (16, 2.0, 9, '..')
    assert len(read_csv(a/'at-16'/'metrics.csv')) == 2
    accuracy = 100*float(read_csv(a/'at-16'/'metrics.csv')[-1]['accuracy'])
    assert f'accuracy {accuracy:.2f}%' in run('flexconv_eval', a/'at-16', '--device', 'cpu').stdout
    out = run('flexconv_eval', a, '--size', '8,16', '--device', 'cpu').stdout
    assert table[4]['accuracy'] in out and table[1]['accuracy'] in out
    # as if it had stopped in the first epoch of fine-tuning
    for name in ('checkpoint.pt', 'previous-checkpoint.pt'): (a/'at-16'/name).unlink()
    assert 'resume that' in run('flexconv_train', '--resume', a/'at-16', '--device', 'cpu', code=2).stderr
    before = [r['accuracy'] for r in read_csv(a/'at-16'/'metrics.csv')]
    run('flexconv_train', '--resume', a, '--device', 'cpu')
    assert len(read_csv(a/'at-16'/'metrics.csv')) == 2 and len(before) == 2


@pytest.mark.parametrize('args,message', [(['flexconv_eval', 'RUN', '--size', 'large'], "size must be an int"),
                                          (['flexconv_train', '--target', '1'], 'target must be'),
                                          (['flexconv_train', '--data', 'sdigits', '--target', '16'],
                                           'dls must be of images')])
def test_mistakes(args, message, tmp_path):
    assert message in run(*args, code=2, cwd=tmp_path).stderr


def test_folders_of_images_say_what_they_cannot_do():
    with pytest.raises(ValueError, match='dls must be of images'): dls_at(get_dls('sdigits'), 12)


# Small images first

class Interrupt(Callback):
    "A KeyboardInterrupt in the third batch."
    def before_batch(self):
        if self.train_iter == 2: raise KeyboardInterrupt


def quietly(learn, method, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, method)(*args, **kwargs)


def narrow_learner(**kwargs):
    dls = get_dls('digits', max_items=128, device='cpu')
    return flex_learner(dls, create_model('flexnet3', 1, 10, width=4, kernel_size=9), **kwargs)


def test_small_images_are_for_training_alone():
    learn = narrow_learner(cbs=ProgressiveResize([(4, 1)]))
    quietly(learn, 'fit_cosine', 2)
    last, found = list(learn.final_record[1:]), list(quietly(learn, 'validate'))
    assert found == pytest.approx(last)
    assert list(quietly(learn, 'validate_at', 8)) == pytest.approx(last)
    table = resolution_table(learn, [8, 16])
    learn.remove_cb(ProgressiveResize)
    assert list(quietly(learn, 'validate')) == found and resolution_table(learn, [8, 16]) == table


@pytest.mark.parametrize('stays', [False, True])
def test_an_interrupted_training_on_small_images_leaves_full_size(stays):
    progressive = ProgressiveResize([(4, 1)])
    learn = narrow_learner(cbs=progressive if stays else None)
    with pytest.raises(KeyboardInterrupt):
        quietly(learn, 'fit_cosine', 3, cbs=[Interrupt()] + [progressive]*(not stays))
    assert learn.model.stem.scale == 1 and '_do_epoch' not in vars(learn)
    seen = []
    class Watch(Callback):
        def before_batch(self): seen.append((self.epoch, self.x.shape[-1], self.model.stem.scale))
    quietly(learn, 'fit_cosine', 2, cbs=Watch())
    assert set(seen) == ({(0, 4, 0.5), (1, 8, 1.)} if stays else {(0, 8, 1.), (1, 8, 1.)})
    assert learn.model.stem.scale == 1


def test_images_that_are_not_square_keep_their_shape():
    assert resize_images(torch.zeros(2, 1, 12, 24), 12).shape == (2, 1, 6, 12)


def test_a_run_on_small_images_first_is_evaluated_at_full_size(tmp_path):
    small = '--epochs', 2, '--width', 4, '--max_items', 200, '--kernel_size', 9, '--device', 'cpu'
    run('flexconv_train', *small, '--progressive', '4x1', '--target', 16, '--target_epochs', 2, '--out', tmp_path/'a')
    def last(folder): return float(read_csv(folder/'metrics.csv')[-1]['accuracy'])
    assert f'accuracy {100*last(tmp_path/"a"):.2f}%' in run('flexconv_eval', tmp_path/'a', '--device', 'cpu').stdout
    assert float(read_csv(tmp_path/'a'/'resolution.csv')[0]['accuracy']) == pytest.approx(last(tmp_path/'a'), abs=1e-6)
    # what was trained at the target says so: its data, and who reads it without the run's own
    finer = tmp_path/'a'/'at-16'
    record = json.loads((finer/'data.json').read_text())
    assert (record['size'], record['input_shape'], record['resize']) == ([16, 16], [1, 16, 16], 16)
    assert json.loads((finer/'config.json').read_text())['progressive'] is None
    out = run('flexconv_eval', finer, '--data', 'digits', '--device', 'cpu').stdout
    assert f'accuracy {100*last(finer):.2f}%' in out
    learn = load_run(finer, 'cpu')
    learn.dls = get_dls('digits', size=16, device='cpu')
    assert quietly(learn, 'validate')[1] == pytest.approx(last(finer), abs=1e-6)


def test_small_images_first_is_not_for_sequences(tmp_path):
    err = run('flexconv_train', '--data', 'sdigits', '--progressive', '4x1', code=2, cwd=tmp_path).stderr
    assert 'progressive is for images; sdigits has sequences' in err and not any(tmp_path.iterdir())


def test_a_call_that_is_refused_leaves_the_learner_as_it_was():
    learn = flex_learner(get_dls('digits', max_items=64, bs=32), create_model('flexnet3', 1, width=4, kernel_size=9))
    with pytest.raises(ValueError, match='warmup_epochs must be a number from 0 and below 1; got 5'):
        learn.fine_tune_at(12, 1, warmup_epochs=5)
    with pytest.raises(ValueError, match='lr must be a number above 0'): learn.fine_tune_at(12, 1, lr=-1.)
    assert learn.dls.one_batch()[0].shape[-1] == 8 and learn.model.stem.scale == 1


def test_validation_at_a_size_of_the_set_that_was_asked_for():
    learn = flex_learner(get_dls('digits', max_items=64, bs=32), create_model('flexnet3', 1, width=4, kernel_size=9))
    learn.validate = lambda dl, **kwargs: len(dl.dataset)
    assert (learn.validate_at(12), learn.validate_at(12, ds_idx=0)) == (360, 64)


def test_images_that_are_no_squares_have_no_other_size():
    dls = get_dls('digits', max_items=64)
    for dl in dls.loaders: dl.dataset.record = dl.dataset.record | dict(input_shape=[1, 8, 16])
    with pytest.raises(ValueError, match=r'dls must be of square images; got \(1, 8, 16\)'): dls_at(dls, 12)


def test_spectra_of_layers_of_every_kind():
    "Up to the highest frequency of an axis, in the precision of the layer, in autocast too; lines where grids end."
    torch.manual_seed(0)
    freqs, share = kernel_spectrum(FlexConv2d(2, 2, (5, 65)))
    assert freqs[-1] == 63.75 and share.sum() == pytest.approx(1, abs=1e-3) and share[-1] < 1e-4
    layer = FlexConv2d(3, 4, 17, kernel='siren')
    want = kernel_spectrum(layer)[1]
    with torch.autocast('cpu', dtype=torch.bfloat16): found = kernel_spectrum(layer)[1]
    assert torch.equal(found, want)
    precise = kernel_spectrum(layer.double())[1]
    assert precise.dtype == torch.float64 and torch.allclose(precise.float(), want, atol=1e-5)
    for p in layer.kernel_network.parameters(): nn.init.zeros_(p)
    assert not kernel_spectrum(layer)[1].any()
    finer = FlexConv2d(3, 4, 17)
    set_resolution(finer, 2)
    assert [line.get_xdata()[0] for line in show_spectra(finer).lines[1:]] == [8.0]
