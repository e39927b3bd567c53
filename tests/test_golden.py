"Our layers against the numbers of the authors' code: same weights and inputs, same outputs and gradients."
import pytest, torch
from torch import nn
from flexconv.aliasing import aliasing_loss, highest_frequency, mask_frequency, nyquist_frequency
from flexconv.registry import create_model
from flexconv.kernels import GaborNet, SIREN
from flexconv.layers import CKConv2d, FlexConv1d, FlexConv2d
from flexconv.official import from_official
from flexconv.magnet import MAGNet
from flexconv.mask import GaussianMask, cutoff_in_sigmas
from helpers import close

FLOAT32, FLOAT64 = 1e-5, 1e-10     # relative to the largest value


def with_weights(module, state):
    "`module` with the authors' weights, in their precision."
    state = from_official(state)
    module.to(next(iter(state.values())).dtype).load_state_dict(state)
    return module


# Kernel networks ------------------------------------------------------------------------------------------------------

NETWORKS = dict(magnet2d=lambda: MAGNet(2, 12), gabornet2d=lambda: GaborNet(2, 12), siren2d=lambda: SIREN(2, 12),
                siren1d_wn=lambda: SIREN(1, 12, weight_norm=True))


@pytest.mark.parametrize('name', NETWORKS)
def test_kernel_network(name, golden):
    g = golden(name)
    net = with_weights(NETWORKS[name](), g.state())
    for size in [k[3:] for k in g if k.startswith('pos')]:
        points, want = g[f'pos{size}'][0], g[f'out{size}'][0]
        close(net(points), want, FLOAT32, f'out{size}')
        for l, f in enumerate(getattr(net, 'filters', [])):
            close(f(points.flatten(1)).view(g[f'filter{l}_{size}'][0].shape), g[f'filter{l}_{size}'][0], FLOAT32,
                  f'filter{l}_{size}')
        close(net.double()(points.double()), g[f'out{size}_f64'][0], FLOAT64, f'out{size}_f64')
        net.float()


# Masks ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ndim,case', [(2, 'a'), (2, 'init'), (2, 'wide'), (1, 'init'), (1, 'wide'), (1, 'mid')])
def test_mask(ndim, case, golden):
    g = golden('masks')
    params, want = g[f'mask{ndim}d_params_{case}'], g[f'mask{ndim}d_{case}']
    mask = GaussianMask(ndim, params[:, 1].tolist(), params[:, 0].tolist())
    points = g['pos33' if ndim == 2 else 'pos33_1d'][0]
    close(mask(points), want.view(points.shape[1:]), FLOAT32, case)
    reach = cutoff_in_sigmas(0.1)
    if ndim == 2:
        close(params[:, 0].abs() + reach*params[:, 1].abs(), g[f'mask2d_absroots_{case}'].flatten(), FLOAT32, 'roots')
    else: close(params[:, 0] - reach*params[:, 1].abs(), g[f'mask1d_minroot_{case}'].flatten(), FLOAT32, 'root')


# Layers ---------------------------------------------------------------------------------------------------------------

def check_case(layer, g, case, tolerance):
    "Output, kernel and all gradients of one case, by both engines."
    state = g.state() | {k: g[f'{case}/{k}'] for k in ('mask_params',) if f'{case}/{k}' in g}
    for method in ('direct', 'fft'):
        layer = with_weights(layer, state)
        layer.conv_method = method
        x = g['x'].clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        close(y, g[f'{case}/out'], tolerance, f'{case}/out by {method}')
        close(layer.kernel(), g[f'{case}/kernel'], tolerance, f'{case}/kernel')
        (y*g['R']).sum().backward()
        wanted = from_official(g.state(f'{case}/grad/'))
        ours = dict(layer.named_parameters(), x=x)
        assert set(wanted) >= set(ours) - {'x'}                # the float64 file has no gradient of x
        for name, want in wanted.items(): close(ours[name].grad, want, tolerance, f'{case}/grad/{name} by {method}')


CASES2D = {'init0.075': 5, 's0.25': 17, 's0.4': 27, 's0.6': 33, 's1.2': 33, 'uneq': (17, 25), 'uneq_swapped': (25, 17),
           'onlyrow_cropped': (7, 33), 'uneq_nocrop': 33}


@pytest.mark.parametrize('case', CASES2D)
def test_flexconv2d(case, golden):
    layer, size = FlexConv2d(3, 4, 33, threshold=1e-9 if 'nocrop' in case else 0.1), CASES2D[case]
    check_case(layer, golden('flexconv2d'), case, FLOAT32)
    assert layer.size == (size if isinstance(size, tuple) else (size, size))


@pytest.mark.parametrize('case', ['init0.075', 's0.25', 's0.6', 'uneq'])
def test_flexconv2d_float64(case, golden):
    check_case(FlexConv2d(3, 4, 33), golden('flexconv2d_f64'), case, FLOAT64)


def test_ckconv2d(golden):
    check_case(CKConv2d(3, 4, 33), golden('ckconv2d'), 'ck', FLOAT32)


CASES1D = {'init0.075': 8, 's0.3': 32, 's0.5': 54, 's1.0': 100, 'm0.6_s0.1': 31, 'negsigma': 8}


@pytest.mark.parametrize('case', CASES1D)
def test_flexconv1d_causal(case, golden):
    layer = FlexConv1d(2, 3, 100, causal=True)
    check_case(layer, golden('flexconv1d'), case, FLOAT32)
    assert layer.size == (CASES1D[case],)


def test_mask_beyond_the_newest_sample_keeps_one(golden):
    "The authors' kernel jumps to full length there (their case m1.5_s0.1, 100 taps); ours keeps the newest sample."
    g = golden('flexconv1d')
    layer = with_weights(FlexConv1d(2, 3, 100, causal=True), g.state() | {'mask_params': g['m1.5_s0.1/mask_params']})
    assert g['m1.5_s0.1/kernel'].shape[-1] == 100 and layer.size == (1,)
    assert layer.kernel().abs().max() > 0


@pytest.mark.parametrize('length', [60, 140])
def test_other_lengths_meet_the_same_kernel(length, golden):
    g = golden('flexconv1d')
    layer = with_weights(FlexConv1d(2, 3, 100, causal=True), g.state() | {'mask_params': g['s0.5/mask_params']})
    close(layer.kernel(), g[f'len{length}/kernel'], FLOAT32)
    close(layer(g[f'len{length}/x']), g[f'len{length}/out'], FLOAT32)


# Aliasing -------------------------------------------------------------------------------------------------------------

def aliasing_layers(g, prefix='sd/', kernel_size=33):
    """The authors' layers; the Nyquist frequency is that of `kernel_size` positions, for them one more than the
    resolution."""
    layers = [FlexConv2d(*channels, kernel_size) for channels in ((3, 4), (4, 4), (4, 6))]
    return with_weights(nn.Sequential(*layers), g.state(prefix))


@pytest.mark.parametrize('stddevs', [1, 2])
def test_highest_frequency(stddevs, golden):
    g = golden('antialiasing')
    for i, layer in enumerate(aliasing_layers(g)):
        close(highest_frequency(layer, bound='layer', stddevs=stddevs), g[f'freq/gabor/std{stddevs}/layer{i}'], FLOAT32)
        close(mask_frequency(layer, stddevs), g[f'maskfreq/gabor+mask/std{stddevs}/layer{i}'], FLOAT32)


@pytest.mark.parametrize('stddevs', [1, 2])
@pytest.mark.parametrize('method', ['together', 'summed'])
@pytest.mark.parametrize('mask', [False, True])
@pytest.mark.parametrize('size', [17, 33, 65])
def test_aliasing_loss(size, mask, method, stddevs, golden):
    g, target = golden('antialiasing'), 'gabor+mask' if mask else 'gabor'
    model = aliasing_layers(g, kernel_size=size)
    assert nyquist_frequency(size) == g[f'nyquist/{size}'].item()
    loss = aliasing_loss(model, size-1, method=method, include_mask=mask, bound='layer', stddevs=stddevs)
    close(loss, g[f'reg/{size}/{target}/{method}/l2_relu/std{stddevs}'], FLOAT32)
    if stddevs == 1: return                                     # the stored gradients are those of 2
    loss.backward()
    for name, want in g.state(f'grad/{size}/{target}/{method}/').items():
        layer, name = int(name[5]), name[7:]
        p = model[layer].mask if name.startswith('mask') else model[layer].kernel_network
        if name == 'mask_params':
            ours = torch.stack([p.mean.grad if p.mean.grad is not None else torch.zeros(2), p.sigma.grad], 1)
        else: ours = p.get_parameter(name.replace('f', 'filters.', 1)).grad
        close(ours, want.view(ours.shape), FLOAT32, name)


def test_aliasing_loss_of_slow_kernels_is_zero(golden):
    g = golden('antialiasing')
    for method in ('together', 'summed'):
        loss = aliasing_loss(aliasing_layers(g, 'small/sd/'), 32, method=method, bound='layer')
        assert loss.item() == g[f'small/reg/33/gabor/{method}/l2_relu/std2'].item() == 0


# A whole network ------------------------------------------------------------------------------------------------------

def official_flexnet3(g):
    "The authors' FlexNet-3 in our names, and the function that renames."
    def rename(name):
        for old, new in (('blocks', 'BLOCKS'), ('cconv', 'conv'), ('out_layer', 'head'), ('shortcut.0', 'shortcut'),
                         ('BLOCKS', 'blocks')):
            name = name.replace(old, new)
        return name.replace('conv1', 'stem', 1).replace('norm1', 'norm', 1) if not name.startswith('blocks') else name
    state = {rename(k): v for k, v in from_official(g.state()).items()}
    net = create_model('flexnet3', dropout=0)
    state['head.weight'] = state['head.weight'].view(10, 48)
    net.load_state_dict({k: v.view(net.state_dict()[k].shape) for k, v in state.items()}, strict=False)
    missing = set(net.state_dict()) - set(state)
    assert all(k.endswith('num_batches_tracked') for k in missing), missing
    return net, rename


def mask_params(layer): return torch.stack([layer.mask.mean, layer.mask.sigma], 1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_flexnet3(golden, dtype):
    """Logits, gradients and five steps of Adam. Rounding grows from step to step, so later numbers get more room, and
    the last are those of a run in float64, from which theirs are as far as rounding takes them."""
    g = golden('network_flexnet3')
    net, rename = official_flexnet3(g)
    x, y = g['x'].to(dtype), g['y'].long()
    net.to(dtype)
    with torch.no_grad(): close(net.eval()(x), g['logits_eval_init'], FLOAT32, 'logits in eval')
    layers = [m for m in net.modules() if isinstance(m, FlexConv2d)]
    masks = [p for m in layers for p in m.mask.parameters()]
    rest = [p for n, p in net.named_parameters() if 'mask' not in n]
    opt = torch.optim.Adam([dict(params=rest, lr=0.01), dict(params=masks, lr=0.001)])
    net.train()
    for step in range(5):
        logits = net(x)
        if step == 0: close(logits, g['logits_train_init'], FLOAT32, 'logits in training')
        loss = nn.functional.cross_entropy(logits, y)
        close(loss, g['losses'][step].to(loss.dtype), FLOAT32 if step == 0 else 3e-3, f'loss at step {step}')
        opt.zero_grad(); loss.backward()
        if step == 0: check_first_gradients(net, layers, g, rename)
        opt.step()
        ours = torch.stack([mask_params(m) for m in layers])
        assert (ours - g['mask_params_after_step'][step]).abs().max() < 3e-4*(step+1)
    with torch.no_grad():
        close(net.eval()(x), g['logits_eval_final'], 0.05 if dtype == torch.float64 else 0.08, 'logits after training')


def check_first_gradients(net, layers, g, rename):
    names = [k[len('grad/'):-len('.mask_params')] for k in g if k.startswith('grad/')]
    assert len(names) == len(layers)
    # in float32 on AVX2, oneDNN adds up the gradient of a weight one by one: 2e-4 from float64, with AVX512 less
    tolerance = 1e-3 if next(net.parameters()).dtype == torch.float32 else 1e-4
    for name in names:
        mask = net.get_submodule(rename(name)).mask
        close(torch.stack([mask.mean.grad, mask.sigma.grad], 1), g[f'grad/{name}.mask_params'], tolerance, name)
    norms = {rename(k).replace('Kernel', 'kernel_network'): v for k, v in g.state('gradnorm/').items()
             if 'mask_params' not in k}
    largest = max(norms.values())
    ours = dict(net.named_parameters())
    for name, want in norms.items():
        assert abs(ours[name].grad.norm() - want) < 1e-4*want + 5e-6*largest, (name, ours[name].grad.norm(), want)
