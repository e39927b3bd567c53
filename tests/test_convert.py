"Other people's networks with FlexConvs in them: they train, bake back and export."
import pytest, torch
from torch import nn
from torchvision import models
from flexconv import FlexConv2d
from flexconv.convert import convert
from flexconv.export import bake, export_onnx, export_program
from flexconv.layers import CKConv


def convnext():
    return models.convnext.ConvNeXt([models.convnext.CNBlockConfig(16, 32, 1),
                                     models.convnext.CNBlockConfig(32, None, 1)], num_classes=4)
def resnet(): return models.resnet18(num_classes=4)
def inception(): return models.googlenet(num_classes=4, aux_logits=False, init_weights=False)
def mobile(): return models.mobilenet_v3_small(num_classes=4)

networks = dict(resnet=resnet, convnext=convnext, inception=inception, mobile=mobile)


@pytest.mark.parametrize('name', networks)
def test_converted_network_trains_bakes_and_exports(name, tmp_path):
    torch.manual_seed(0)
    original = networks[name]()
    net = convert(original, kernel_size=9)
    spatial = [m for m in original.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
               and m.kernel_size[0] % 2]
    layers = [m for m in net.modules() if isinstance(m, FlexConv2d)]
    assert len(layers) == len(spatial) > 0
    for a, b in zip(spatial, layers):
        assert (a.kernel_size, a.stride, a.groups, a.bias is None) == (b.size, b.stride, b.groups, b.bias is None)
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    opt, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for _ in range(6):
        loss = nn.functional.cross_entropy(net.train()(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, losses
    assert all(m.mask.sigma.grad.isfinite().all() and m.mask.sigma.grad.abs().max() > 0 for m in layers)
    want, baked = net.eval()(x).detach(), bake(net)
    assert not any(isinstance(m, CKConv) for m in baked.modules())
    assert (baked(x) - want).abs().max() <= 1e-4*want.abs().max()
    got = export_program(net, x).module()(x[:5])
    assert (got - want[:5]).abs().max() <= 1e-4*want.abs().max()


def test_converted_network_as_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    torch.manual_seed(0)
    net, x = convert(convnext(), kernel_size=9).eval(), torch.randn(3, 3, 64, 64)
    export_onnx(net, x, tmp_path/'net.onnx')
    y, = onnxruntime.InferenceSession(str(tmp_path/'net.onnx')).run(None, {'x': x.numpy()})
    assert (torch.from_numpy(y) - net(x)).abs().max() <= 1e-4*net(x).abs().max()


def test_fan_in_keeps_the_scale():
    "Unit variance in, unit variance out, whatever was replaced."
    torch.manual_seed(0)
    for conv in (nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 64, 7, padding=3, groups=64),
                 nn.Conv2d(3, 64, 7, 2, 3)):
        assert 0.6 < convert(conv)(torch.randn(8, conv.in_channels, 32, 32)).std() < 1.4, conv


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'efficientnet_b0', 'mobilenetv3_small_050'])
def test_timm(name):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    net = timm.create_model(name, num_classes=4).eval()
    new, x = convert(net, kernel_size=15).eval(), torch.randn(1, 3, 64, 64)
    assert new(x).shape == net(x).shape == (1, 4)
    assert any(isinstance(m, FlexConv2d) for m in new.modules())
    want = new(x).detach()
    assert (bake(new)(x) - want).abs().max() <= 1e-4*want.abs().max()
