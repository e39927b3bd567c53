"Which method is chosen: rates that are fitted, kept and used, and choices that are measured."
import pytest, torch, torch.nn.functional as F
from flexconv.conv import conv_nd
from flexconv.costs import estimate_seconds


def test_rates_are_fitted_to_what_was_measured():
    "Times that follow the model exactly give back its rates, and a choice that loses nothing."
    from flexconv.bench import calibration_case, calibration_cases, choice_loss, fit_rates
    from flexconv.costs import count_work, rates
    start = rates['cpu']['float32']['training']
    factors = (3, 0.5, 2, 1, 0.3, 2, 1, 4)
    truth = {unit: rate*factors[i % 8] for i, (unit, rate) in enumerate(start.items())}
    rows, counted = [], set()
    for case in calibration_cases(False):
        work = count_work(*case[:2], rank=33, **calibration_case(*case)[1])
        counted |= {unit for units in work.values() for unit, n in units.items() if n}
        rows += [(*case, method, sum(truth[unit]*n for unit, n in units.items())) for method, units in work.items()]
    fitted = fit_rates(rows)
    assert choice_loss(rows, fitted) < 0.01
    # three that hardly differ in these shapes
    for unit in counted - {'matmul_transform', 'matmul_product', 'matmul_frequencies'}:
        assert fitted[unit] == pytest.approx(truth[unit], rel=0.2), unit


def test_rates_that_were_measured_here_are_used(monkeypatch, tmp_path):
    from flexconv import costs
    from flexconv.bench import keep_rates
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    costs.calibrated_rates.cache_clear()
    case = (1, 2, 9), (2, 2, 3), ((1, 1),)
    builtin = estimate_seconds(*case)
    keep_rates('cpu', dict(float32=dict(training=dict(direct_call=7.))))
    try: assert estimate_seconds(*case)['direct'] == 7 and estimate_seconds(*case, training=False)['direct'] != 7
    finally:
        costs.rates_file().write_text('{damaged')
        costs.calibrated_rates.cache_clear()
    assert estimate_seconds(*case) == builtin
    costs.calibrated_rates.cache_clear()


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
