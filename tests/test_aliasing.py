"The penalty on aliasing: what it compares with."
import pytest, torch
from torch import nn
from flexconv.aliasing import aliasing_loss, highest_frequency, nyquist_frequency
from flexconv.layers import CKConv1d, CKConv2d


def slow(layer, frequency):
    "A layer whose filters' highest frequencies add up to `frequency`."
    share = frequency/len(highest_frequency(layer))/highest_frequency(layer)
    with torch.no_grad():
        for f, factor in zip(layer.kernel_network.filters, share): f.linear.weight *= factor; f.gamma *= factor
    assert highest_frequency(layer).sum().item() == pytest.approx(frequency, rel=1e-5)
    return layer


@pytest.mark.parametrize('method', ['together', 'summed'])
@pytest.mark.parametrize('kernel_size,pixels', [(17, 16), (17, 32), (17, 200), (33, 32), (9, 28)])
def test_a_kernel_is_held_below_what_its_own_grid_carries(kernel_size, pixels, method):
    "However large the images are: 17 positions carry 4 cycles, and a kernel of 7.9 is penalised."
    limit = nyquist_frequency(kernel_size)
    below, above = (slow(CKConv2d(2, 3, kernel_size), f*limit) for f in (0.999, 1.975))
    for resolution in (None, pixels):
        assert aliasing_loss(below, resolution, method=method).item() == 0
        want = (0.975*limit)**2/(len(highest_frequency(above)) if method == 'together' else 1)
        assert aliasing_loss(above, resolution, factor=1., method=method).item() == pytest.approx(want, rel=1e-3)


def test_a_coarser_resolution_lowers_the_limit():
    layer = slow(CKConv2d(2, 3, 33), 7)
    assert aliasing_loss(layer).item() == aliasing_loss(layer, 32).item() == 0
    assert aliasing_loss(layer, 16, 1., 'summed').item() == pytest.approx((7 - 4)**2, rel=1e-3)


def test_a_layer_at_another_resolution_has_another_grid():
    layer = slow(CKConv2d(2, 3, 17), 7)
    layer.scale = 2.
    assert layer.grid_size == (33, 33) and aliasing_loss(layer).item() == 0
    layer.scale = 0.5
    assert layer.grid_size == (9, 9)
    assert aliasing_loss(layer, 32, 1., 'summed').item() == pytest.approx((7 - 2)**2, rel=1e-3)


def test_axes_of_a_single_position_do_not_count():
    assert aliasing_loss(CKConv1d(1, 1, 1)).item() == 0
    flat = slow(CKConv2d(1, 1, (1, 33)), 7)
    assert aliasing_loss(flat).item() == 0 and aliasing_loss(flat, 16).item() > 0


def test_layers_of_one_network_have_limits_of_their_own():
    net = nn.Sequential(slow(CKConv2d(2, 2, 33), 7), slow(CKConv2d(2, 2, 17), 7), nn.Conv2d(2, 2, 3))
    assert aliasing_loss(net, 32, 1., 'summed').item() == pytest.approx((7 - 4)**2, rel=1e-3)
