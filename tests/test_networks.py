"What users of timm and of files type: two halves of a network, feature maps, new heads; and the successors."
import copy, json, os, subprocess, sys
import pytest, torch, yaml
from torch import nn
from fastai.data.core import DataLoaders
from flexconv import cli, from_pretrained
from flexconv.baselines import AllCNN
from flexconv.files import flip_bit
from flexconv.kernels import position_grid
from flexconv.layers import conv_layers
from flexconv.learner import model_for
from flexconv.registry import Classifier, FeatureMaps, create_model, list_models, model_registry
from flexconv.runs import load_run
from flexconv.successors import SMPConv2d
from flexconv.testing import test_conv_layer
from helpers import close


def small(name, **options):
    "A narrow network of this name in eval mode, and a batch that it takes."
    torch.manual_seed(0)
    sequence = model_registry[name].input == 'sequence' or options.get('ndim') == 1
    if sequence: options.setdefault('kernel_size', 60)
    net = create_model(name, 2, 5, width=8, **options).eval()
    return net, torch.randn(3, 2, *((60,) if sequence else (16, 16)))


@pytest.mark.parametrize('name', list_models())
@torch.no_grad()
def test_a_network_is_two_halves(name):
    net, x = small(name)
    assert isinstance(net, Classifier)
    features = net.forward_features(x)
    scores = net.forward_head(features)
    assert torch.equal(net(x), scores) and scores.shape == (3, 5) and features.shape[1] == net.num_features
    pooled = net.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, net.num_features)
    head = net.get_classifier()
    weight = head.weight.flatten(1)                     # that of a 1x1 convolution is the same map
    torch.testing.assert_close(pooled @ weight.T + head.bias, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', list_models())
@torch.no_grad()
def test_heads_can_be_replaced(name):
    net, x = small(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    net.reset_classifier(7)
    assert net(x).shape == (3, 7) and net.num_classes == net.config['num_classes'] == 7
    after = net.state_dict()
    assert list(after) == list(before)                  # names stay, and all but the head's values
    changed = {k for k in after if after[k].shape != before[k].shape or not torch.equal(after[k], before[k])}
    assert changed and all(k.startswith(net.head_name + '.') for k in changed)
    net.reset_classifier(0)
    assert torch.equal(net(x), pooled)
    assert net.get_classifier().training is False
    net.double().reset_classifier(3)
    assert net(x.double()).dtype == torch.float64       # the new head is where the network is
    for wrong in (-1, 2.5, '3'):
        with pytest.raises(ValueError, match='num_classes must be an int of at least 0'): net.reset_classifier(wrong)


@pytest.mark.parametrize('name', list_models())
@torch.no_grad()
def test_feature_maps(name):
    net, x = small(name, features_only=True)
    maps, info = net(x), net.feature_info
    assert [f.shape[1] for f in maps] == info.channels()
    assert [x.shape[-1]//f.shape[-1] for f in maps] == info.reduction()
    assert [f.shape[0] for f in maps] == [3]*len(info)
    whole, _ = small(name)                              # of the same seed
    torch.testing.assert_close(maps[-1], whole.forward_features(x))
    outputs = {}
    for module in info.module_name():
        whole.get_submodule(module).register_forward_hook(lambda m, i, y, module=module: outputs.update({module: y}))
    whole(x)
    for module, found in zip(info.module_name(), maps): torch.testing.assert_close(found, outputs[module])
    some = small(name, features_only=True, out_indices=(0, -1))[0]
    assert some.feature_info.channels() == [info.channels()[0], info.channels()[-1]]
    for found, all_of_them in zip(some(x), (maps[0], maps[-1])): assert torch.equal(found, all_of_them)
    assert not any(isinstance(m, nn.Linear) and m.out_features == 5 for m in net.modules())


@pytest.mark.parametrize('name', list_models())
def test_config_says_what_was_typed(name):
    net, _ = small(name, dropout=0.3) if model_registry[name].takes('dropout') else small(name)
    typed = json.loads(json.dumps(net.config))
    assert typed['name'] == name and (typed['in_channels'], typed['num_classes'], typed['width']) == (2, 5, 8)
    again = create_model(**typed)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert again.config == net.config == copy.deepcopy(net).config


def test_config_of_trained_networks():
    "It makes the same network without its weights; whose those are stands apart."
    net = create_model('flexnet7.cifar10', num_classes=3)
    assert net.config == dict(name='flexnet7', in_channels=3, num_classes=3) | net.pretrained_cfg['options']
    again = create_model(**net.config)
    assert not hasattr(again, 'pretrained_cfg')
    again.load_state_dict(net.state_dict())
    maps = create_model('flexnet7.cifar10', features_only=True)
    assert maps.feature_info.channels() == [24, 24, 36, 36, 36, 48, 48] and maps.config['num_classes'] == 0


def test_names_of_weights_stay():
    assert list(create_model('flexnet3').state_dict())[-2:] == ['head.weight', 'head.bias']
    names = [name for name, _ in AllCNN(width=8).named_parameters()]
    assert names[0] == '0.0.weight' and names[-2:] == ['6.weight', '6.bias']


@pytest.mark.parametrize('options,words', [
    (dict(num_classes=-1), 'num_classes must be an int of at least 0; got -1'),
    (dict(features_only=True, out_indices=[3]), 'out_indices must be ints from -3 to 2'),
    (dict(features_only=True, out_indices=['last']), 'out_indices must be ints from -3 to 2'),
    (dict(out_indices=[0]), 'out_indices needs features_only=True')])
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words): create_model('flexnet3', **options)


# Successors -----------------------------------------------------------------------------------------------------------

COUNTS = {'smpnet7': [(3, {}, 489_622)], 'smptcn2': [(1, {}, 103_600)], 'smptcn6': [(1, {}, 370_960), (3, {}, 373_120)],
          'ccnn4_140': [(3, {}, 201_052), (1, dict(ndim=1), 198_774), (3, dict(ndim=1, kernel_size=1024), 199_122)],
          'ccnn6_380': [(3, {}, 1_999_380), (1, dict(ndim=1), 1_993_098)],
          'convmixer256_8': [(3, {}, 594_186)], 'flexmixer256_8': [(3, {}, 643_114)]}


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_counts(name):
    for channels, options, expected in COUNTS[name]:
        assert sum(p.numel() for p in create_model(name, channels, **options).parameters()) == expected


@pytest.mark.parametrize('name,channels', [('ccnn4_140', 1), ('ccnn6_380', 1), ('smptcn2', 2), ('smptcn6', 2)])
@torch.no_grad()
def test_sequences_are_causal(name, channels):
    net, x = small(name, **(dict(ndim=1) if name.startswith('ccnn') else {}))
    later = x.clone()
    later[..., 30] += 1
    gap = (net.forward_features(x) - net.forward_features(later)).abs().amax((0, 1))
    assert gap[:30].max() < 1e-5 < gap[30:].max()


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('groups', [1, 2])
def test_smpconv_is_its_whole_kernel(shared, groups):
    "Output and gradients of the cropped kernel are those of a sum over points on the whole grid."
    torch.manual_seed(0)
    layer = SMPConv2d(4, 6, 17, groups=groups, spread=0.2, shared=shared).double()
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    net, grid = layer.kernel_network, position_grid((17, 17), dtype=torch.float64)
    places, radius = net.places.view(-1, 16, 2), net.radius.view(-1, 16)
    weight = net.output_linear.weight.view(6, 4//groups, 16)
    rows = []
    for o in range(6):
        p, r = (places[0], radius[0]) if shared else (places[o], radius[o])
        g = (1 - (grid[None] - p[:, :, None, None]).abs().sum(1)/r[:, None, None]).clamp(min=0)
        rows.append(torch.einsum('ip,phw->ihw', weight[o], g/(g > 0).sum(0).clamp(min=1)))
    want = nn.functional.conv2d(x, torch.stack(rows), layer.bias, padding=8, groups=groups)
    assert layer.size < (17, 17)
    close(layer(x), want.detach(), 1e-10)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(layer(x).square().sum(), parameters)
    theirs = torch.autograd.grad(want.square().sum(), parameters)
    for a, b in zip(ours, theirs): close(a, b, 1e-8)


def test_smp_shared_points_take_the_low_rank_way():
    shared = SMPConv2d(8, 8, 33, shared=True, conv_method='lowrank', spread=0.3)
    x = torch.randn(2, 8, 20, 20)
    fast = shared(x)
    shared.conv_method = 'direct'
    torch.testing.assert_close(fast, shared(x), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match='needs a kernel network that ends in a linear map'):
        SMPConv2d(8, 8, 33, conv_method='lowrank')


@pytest.mark.parametrize('make', [lambda: SMPConv2d(4, 6, 9), lambda: SMPConv2d(4, 6, 9, shared=True, bias=False),
                                  lambda: SMPConv2d(4, 4, 9, groups=4, init='fan_in')])
def test_smpconv_is_a_layer(make):
    torch.manual_seed(0)
    test_conv_layer(make(), torch.randn(2, 4, 10, 11))


@pytest.mark.parametrize('shape', [(1, 28), (3, 32)])
def test_flex_learner_makes_them_for_images_and_sequences(shape):
    "`ndim` follows the data."
    channels, size = shape
    for ndim in (1, 2):
        items = [(torch.randn(channels, *[size]*ndim), i % 2) for i in range(8)]
        dls = DataLoaders.from_dsets(items, items, bs=4)
        dls.vocab = ['a', 'b']
        net = model_for(dls, 'ccnn4_140', width=4)
        assert {layer.ndim for layer in conv_layers(net).values()} == {ndim}
        assert net.config['ndim'] == ndim and net(dls.one_batch()[0]).shape == (4, 2)


# Files and registries of others ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('data,model', [('digits', 'flexmixer256_8'), ('sdigits', 'ccnn4_140')])
def test_run_to_hub_and_back(data, model, tmp_path, capsys):
    "A run as a folder for the Hub, by the command, and the network of it."
    cli.flexconv_train.__wrapped__(data=data, model=model, epochs=1, width=4, max_items=64, out=str(tmp_path/'run'))
    capsys.readouterr()
    cli.flexconv_export.__wrapped__(str(tmp_path/'run'), hub=str(tmp_path/'hub'))
    names = ['README.md', 'config.json', 'model.safetensors']
    assert capsys.readouterr().out.split() == [str(tmp_path/'hub'/name) for name in names]
    assert sorted(p.name for p in (tmp_path/'hub').iterdir()) == names
    config = json.loads((tmp_path/'hub/config.json').read_text())
    assert config['architecture'] == model and config['options']['width'] == 4
    learn = load_run(tmp_path/'run', 'cpu')
    x = torch.randn(2, *config['data']['input_shape'])
    net = from_pretrained(tmp_path/'hub').eval()
    with torch.no_grad():
        assert torch.equal(net(x), learn.model(x))
        assert from_pretrained(tmp_path/'hub', num_classes=0)(x).shape == (2, 4)
    assert net.pretrained_cfg['data']['classes'] == list(learn.dls.vocab)
    header, card = (tmp_path/'hub/README.md').read_text().split('---\n')[1:3]
    assert yaml.safe_load(header)['library_name'] == 'flexconv' and f'`{model}`' in card
    cli.flexconv_export.__wrapped__(str(tmp_path/'run'), hub=str(tmp_path/'hub'))          # again, over its own
    with pytest.raises(SystemExit): cli.flexconv_export.__wrapped__(str(tmp_path/'run'), hub=str(tmp_path/'run'))
    assert 'hub must be a new folder' in capsys.readouterr().err
    flip_bit(tmp_path/'hub/model.safetensors', -10)
    with pytest.raises(ValueError, match='is damaged'): from_pretrained(tmp_path/'hub')


def python(code, path):
    "Runs code in a process of its own that finds modules in `path` first."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(path), os.environ.get('PYTHONPATH', '')]))
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)


def test_timm_is_asked_for_only_where_it_is_used(tmp_path):
    "Without timm, `flexconv.timm` says what to install, and nothing else needs it."
    (tmp_path/'timm.py').write_text('raise ImportError("no timm here")')
    assert python('import flexconv; flexconv.create_model("flexnet3")', tmp_path).returncode == 0
    done = python('import flexconv.timm', tmp_path)
    assert done.returncode and 'ImportError: flexconv.timm needs timm (pip install timm)' in done.stderr


def test_timm_makes_our_networks():
    timm = pytest.importorskip('timm')
    import flexconv.timm as ours
    assert set(list_models()) <= set(timm.list_models()) and ours.__all__ == ['register_with_timm']
    assert set(timm.list_models('*cifar10', pretrained=True)) >= set(list_models('*cifar10', pretrained=True))
    net = timm.create_model('smpnet7', in_chans=1, num_classes=4, drop_rate=0.3, width=8)
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, 4) and net.blocks[0].dropout.p == 0.3
    assert net.config == dict(name='smpnet7', in_channels=1, num_classes=4, dropout=0.3, width=8)
    trained = timm.create_model('flexnet7.cifar10', pretrained=True, num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = create_model('flexnet7.cifar10').eval()
        assert torch.equal(trained(x), whole.forward_head(whole.forward_features(x), pre_logits=True))
    from timm.data import resolve_model_data_config
    assert resolve_model_data_config(trained)['input_size'] == (3, 32, 32)
    config = timm.models.PretrainedCfg(tag='pmnist')                     # one of several trained versions
    told = timm.create_model('flextcn2', pretrained=True, pretrained_cfg=config)
    assert told.pretrained_cfg['data']['name'] == 'pmnist'


def test_feature_maps_that_do_not_exist_leave_the_network_its_head():
    net = create_model('flexnet3', width=4)
    with pytest.raises(ValueError, match='out_indices must be ints from -3 to 2'): FeatureMaps(net, (9,))
    assert net.get_classifier().out_features == 10


def test_feature_info_is_asked_for_by_number_as_in_timm():
    info = create_model('flexnet7', width=8).feature_info
    assert info.channels(0) == 8 and info.channels([0, -1]) == [8, 16] == [info.channels()[i] for i in (0, -1)]
    assert info.module_name(-1) == 'blocks.6' == info.get_dicts()[-1]['module'] and info.reduction((1,)) == [1]


@pytest.mark.parametrize('name', list_models())
@torch.no_grad()
def test_intermediates_as_in_timm(name):
    "A pair, of the last feature map and those of the blocks; the last few by number; no block after those needed."
    net, x = small(name)
    assert net.head_hidden_size == net.num_features
    features, maps = net.forward_intermediates(x)
    assert torch.equal(features, net.forward_features(x)) and len(maps) == len(net.blocks)
    for indices, same in ((2, maps[-2:]), ((-1, 0), (maps[-1], maps[0])), (range(1), maps[:1])):
        for a, b in zip(net.forward_intermediates(x, indices, intermediates_only=True), same, strict=True):
            assert torch.equal(a, b)
    net.blocks[-1].register_forward_hook(lambda *args: pytest.fail('the last block ran'))
    last, (first,) = net.forward_intermediates(x, [0], stop_early=True)
    assert torch.equal(last, maps[0]) and torch.equal(first, maps[0])
    for wrong in (0, len(maps) + 1, [len(maps)], [], True, '0'):
        with pytest.raises(ValueError, match=f'indices must be ints from -{len(maps)} to'):
            net.forward_intermediates(x, wrong)
