"Which method is chosen: costs that are fitted, kept and used, and choices that are measured."
import pytest, torch, torch.nn.functional as F
from flexconv.conv import conv_nd
from flexconv.costs import estimate_seconds


def test_unit_costs_are_fitted_to_what_was_measured():
    "Times that follow the model exactly give back its costs, and a choice that loses nothing."
    from flexconv.bench import calibration_case, calibration_cases, choice_loss, fit_unit_costs
    from flexconv.costs import count_work, unit_costs
    start = unit_costs['cpu']['float32']['training']
    factors = (3, 0.5, 2, 1, 0.3, 2, 1, 4)
    truth = {unit: rate*factors[i % 8] for i, (unit, rate) in enumerate(start.items())}
    rows, counted = [], set()
    for case in calibration_cases(False):
        work = count_work(*case[:2], rank=33, **calibration_case(*case)[1])
        counted |= {unit for units in work.values() for unit, n in units.items() if n and unit in truth}
        rows += [(*case, method, sum(truth.get(unit, 0.)*n for unit, n in units.items()))
                 for method, units in work.items()]
    fitted = fit_unit_costs(rows)
    assert choice_loss(rows, fitted) < 0.01
    # three that hardly differ in these shapes
    for unit in counted - {'matmul_transform', 'matmul_product', 'matmul_frequencies'}:
        assert fitted[unit] == pytest.approx(truth[unit], rel=0.2), unit


def test_unit_costs_that_were_measured_here_are_used(monkeypatch, tmp_path):
    from flexconv import costs
    from flexconv.bench import keep_unit_costs
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    costs.calibrated_unit_costs.cache_clear()
    case = (1, 2, 9), (2, 2, 3), ((1, 1),)
    builtin = estimate_seconds(*case)
    keep_unit_costs('cpu', dict(float32=dict(training=dict(direct_call=7.))))
    try: assert estimate_seconds(*case)['direct'] == 7 and estimate_seconds(*case, training=False)['direct'] != 7
    finally:
        costs.unit_costs_file().write_text('{damaged')
        costs.calibrated_unit_costs.cache_clear()
    assert estimate_seconds(*case) == builtin
    costs.calibrated_unit_costs.cache_clear()


GPU_CASE = (64, 48, 32, 32), (48, 48)


def chosen_on_a_gpu(n, dtype=torch.float32, training=True, batch=64):
    from flexconv.costs import cheapest
    (_, *rest), channels = GPU_CASE
    return cheapest((batch, *rest), (*channels, n, n), ((n//2, n//2),)*2, (1, 1), (1, 1), device='cuda', rank=33,
                    dtype=dtype, channels_last=dtype != torch.float32, training=training)[0]


@pytest.fixture
def tf32():
    "Sets whether a GPU may round float32: of convolutions, of matrix products."
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    def set_it(convolutions, products):
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision('high' if products else 'highest')
    yield set_it
    set_it(before[0], before[1] != 'highest')


def test_choices_on_a_gpu_are_sane(tf32):
    "Direct for small kernels, the longer the faster the tensor cores are; never FFTs for large ones in half precision."
    tf32(False, False)
    assert [chosen_on_a_gpu(n) for n in (3, 5, 33)] == ['direct', 'fft', 'fft']
    tf32(True, False)                                                # torch's default
    assert [chosen_on_a_gpu(n) for n in (3, 5, 7, 11, 33)] == ['direct']*3 + ['fft']*2
    tf32(True, True)
    assert [chosen_on_a_gpu(n) for n in (3, 5, 7)] == ['direct']*3 and chosen_on_a_gpu(17) != 'direct'
    for half in (torch.bfloat16, torch.float16):
        assert [chosen_on_a_gpu(n, half) for n in (3, 9, 11, 17, 33)] == ['direct']*3 + ['matmul']*2
        assert chosen_on_a_gpu(33, half, batch=512) == 'matmul'
    for batch in (1, 8): assert chosen_on_a_gpu(9, batch=batch) == 'direct'      # calls cost more than work


@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_on_a_gpu_everything_costs_something(ndim):
    "No unit without a cost: a method must not seem to be free."
    from flexconv.costs import count_work, unit_costs
    for groups, last, stride in ((1, False, 1), (1, True, 1), (8, False, 1), (1, False, 2), (8, True, 2)):
        for n in (3, 17):
            shapes = (4, 8, *[32]*ndim), (8, 8//groups, *[n]*ndim), ((n//2, n//2),)*ndim
            work = count_work(*shapes, stride=(stride,)*ndim, rank=33, channels_last=last)
            needed = {unit for units in work.values() for unit, k in units.items() if k} - {'matmul_frequencies'}
            for device in ('cuda', 'h200'):
                for by_mode in unit_costs[device].values():
                    for rate in by_mode.values(): assert all(rate.get(unit, 0) > 0 for unit in needed)


def test_autotune_measures_once_and_remembers(monkeypatch):
    from flexconv import conv
    from flexconv.conv import autotuned
    measured, original = [], conv.run_seconds
    monkeypatch.setattr(conv, 'run_seconds', lambda *args: (measured.append(1), original(*args))[1])
    x, w = torch.randn(2, 3, 50), torch.randn(4, 3, 31)
    autotuned.clear()
    y = conv_nd(x, w, method='autotune')
    assert torch.allclose(y, F.conv1d(x, w, padding=15), atol=1e-4)
    # three methods, twice
    assert list(autotuned.values()) in (['direct'], ['fft'], ['matmul']) and len(measured) == 6
    conv_nd(x, w, method='autotune')
    assert len(measured) == 6
    conv_nd(x, w.requires_grad_(), method='autotune')
    assert len(autotuned) == 2                                       # training is another question than inference
    autotuned.clear()
