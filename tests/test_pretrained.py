"Trained networks that come with the package: what they say of themselves, and that they still compute it."
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import numpy as np, pytest, safetensors, torch
from flexconv import baselines                                           # registers its networks
from flexconv.files import read_weights, save_weights
from flexconv.hub import from_pretrained, save_hub
from flexconv.layers import FlexConv2d
from flexconv.registry import create_model, download_weights, list_models, shipped_weights
from flexconv.resolution import set_resolution
from flexconv.runs import load_run

DATA = Path(__file__).parent/'data'
# of each data set
SAMPLES = dict(cifar10='cifar10', smnist='mnist', pmnist='mnist', scifar10='cifar10', npcifar10='cifar10')
# of 200 test images, recorded when it was shipped
CORRECT = {'flexnet7.cifar10': 168, 'flextcn2.npcifar10': 115, 'flextcn2.pmnist': 192, 'flextcn2.scifar10': 116,
           'flextcn2.smnist': 198}


def test_every_shipped_network_has_a_record(): assert list_models(pretrained=True) == sorted(CORRECT)


def test_weights_are_small(): assert sum(path.stat().st_size for path in shipped_weights().values()) < 6e6


@pytest.mark.parametrize('name', sorted(CORRECT))
def test_a_shipped_network_computes_what_it_did(name):
    "Accuracy on 20 test images of each class, through the transforms that travel with the weights."
    model, data = name.split('.')
    sample = np.load(DATA/f'{SAMPLES[data]}_200.npz')
    learn = load_run(name, 'cpu')
    with torch.no_grad():
        scores = torch.cat([learn.model(x) for x, in learn.dls.test_dl(list(sample['images']), bs=50)])
    correct = (scores.argmax(1).numpy() == sample['labels']).sum()
    # rounding may move an image on the border
    assert abs(correct - CORRECT[name]) <= 1, correct


@pytest.mark.parametrize('name', sorted(CORRECT))
def test_a_shipped_network_says_what_it_is(name):
    model, data = name.split('.')
    about = read_weights(shipped_weights()[name])[1]
    assert about['model'] == model and about['data']['name'] == data
    assert about['num_classes'] == len(about['data']['classes']) and about['data']['mean'] and about['data']['std']
    assert 0 < about['results']['accuracy'] <= 1 and about['results']['epochs'] and about['results']['hours'] > 0
    assert about['licence'] and about['limits'] and about['training']['seed'] == 0
    with safetensors.safe_open(shipped_weights()[name], 'pt') as file: assert '"sha256":' in file.metadata()['flexconv']


def test_both_spellings_and_a_new_head():
    a, b = create_model('flexnet7', pretrained='cifar10'), create_model('flexnet7.cifar10')
    assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values()))
    torch.manual_seed(0)
    few = create_model('flexnet7.cifar10', num_classes=3)
    assert few.head.weight.shape == (3, 48) and torch.equal(few.stem.mask.sigma, a.stem.mask.sigma)
    assert create_model('flexnet7', pretrained=True).pretrained_cfg == a.pretrained_cfg


@pytest.mark.parametrize('wrong,words', [
    (dict(name='flexnet7.imagenet'), "a trained version of flexnet7 ('cifar10')"),
    (dict(name='flexnet3.cifar10'), 'none comes with the package'),
    (dict(name='flexnet7.cifar10', width=8), 'stem.bias must have shape (8,); got (24,)'),
    (dict(name='flexnet9.cifar10'), "Did you mean 'flexnet"), (dict(name='flexnet7', pretrained=3), 'got 3')])
def test_wrong_weights_are_named(wrong, words):
    with pytest.raises(ValueError) as e: create_model(**wrong)
    assert words in str(e.value)


@pytest.mark.parametrize('name', list_models(pretrained=True))
def test_trained_weights_adapt_to_other_channels(name):
    "Gray in every channel, one or several, is gray."
    net, size = create_model(name).eval(), (16, 16) if name.startswith('flexnet') else (64,)
    known, gray = net.config['in_channels'], torch.randn(2, 1, *size)
    with torch.no_grad(): want = net(gray.expand(2, known, *size))
    for channels in {1, 2*known} - {known}:
        with torch.no_grad(): got = create_model(name, channels).eval()(gray.expand(2, channels, *size))
        assert torch.allclose(got, want, atol=2e-3*want.abs().max()), channels


def test_only_the_first_layer_adapts_to_other_channels():
    net, colours = create_model('flexnet7.cifar10', 4), create_model('flexnet7.cifar10')
    changed = [n for n, v in net.state_dict().items() if v.shape != colours.state_dict()[n].shape]
    assert changed == ['stem.kernel_network.output_linear.weight', 'stem.kernel_network.output_linear.bias']
    assert net.config['in_channels'] == 4


@pytest.mark.parametrize('name,options,why', [
    ('ccnn4_140', dict(width=8, kernel_size=9), r'stem\.0\.bias is of a depthwise convolution'),
    ('tcn', dict(width=4, blocks=2), 'original1 is normalised'),
    ('cktcn', dict(width=4, kernel_size=20), 'weight_g is normalised')], ids=lambda v: v if isinstance(v, str) else '')
@pytest.mark.parametrize('channels', [1, 6])
def test_weights_that_do_not_adapt_to_other_channels(name, options, why, channels, tmp_path):
    file = tmp_path/'weights.safetensors'
    about = dict(model=name, in_channels=3, num_classes=4, options=options)
    save_weights(create_model(name, 3, 4, **options), file, about)
    with pytest.raises(ValueError, match=f'in_channels must be 3, that of the trained weights, since .*{why}; got'):
        create_model(name, channels, pretrained=file)
    assert create_model(name, pretrained=file).config['in_channels'] == 3


def test_a_name_with_weights_made_without_them():
    assert not hasattr(create_model('flexnet7.cifar10', pretrained=False), 'pretrained_cfg')


def test_trained_kernels_keep_their_grid():
    with pytest.raises(ValueError, match='kernel_size must be that of the trained weights, 33; got 65'):
        create_model('flexnet7.cifar10', kernel_size=65)


def test_device_and_dtype_are_those_of_the_whole_network():
    assert all(p.is_meta for p in create_model('flexnet3', device='meta').parameters())
    net = create_model('flexnet3', 1, dtype=torch.float64, kernel_size=9)
    assert net(torch.randn(2, 1, 8, 8, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(TypeError, match='dtype must be a floating'): create_model('flexnet3', dtype=torch.int8)


@pytest.mark.parametrize('name,shape', [('flexnet3', (2, 3, 8, 8)), ('flextcn2', (2, 3, 20)),
                                        ('cifar_resnet32', (2, 3, 8, 8))])
def test_torch_fx_traces_networks(name, shape):
    net, x = create_model(name, **({} if 'resnet' in name else dict(kernel_size=9))).eval(), torch.randn(shape)
    with torch.no_grad(): assert torch.allclose(torch.fx.symbolic_trace(net)(x), net(x), atol=1e-5)


@pytest.fixture
def address(tmp_path, monkeypatch):
    "Address of a web server of the folder `served`; downloads go to a cache that is empty at first."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path/'served')
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_weights_at_a_url(address, tmp_path):
    nets = {part: create_model('flexnet3', width=4, kernel_size=5) for part in 'ab'}
    for part, net in nets.items():
        (tmp_path/'served'/part).mkdir(parents=True)
        save_weights(net, tmp_path/'served'/part/'model.safetensors')
    x = torch.randn(1, 3, 8, 8)
    for _ in range(2):                                              # files of one name; the second time from the cache
        for part, net in nets.items():
            url = f'{address}/{part}/model.safetensors?download=true'
            loaded = create_model('flexnet3', width=4, kernel_size=5, pretrained=url).eval()
            with torch.no_grad(): assert torch.equal(loaded(x), net.eval()(x))
        for file in (tmp_path/'served').rglob('*.safetensors'): file.unlink()
    names = sorted(path.name.split('-')[1] for path in (tmp_path/'cache').rglob('*.safetensors'))
    assert names == ['model.safetensors']*2


def test_urls_without_weights(address, tmp_path):
    (tmp_path/'served').mkdir()
    (tmp_path/'served'/'page.html').write_text('<p>Please sign in</p>')
    with pytest.raises(ValueError, match='pretrained must be the URL of trained weights; at http.*/page.html: .*'):
        download_weights(f'{address}/page.html')
    with pytest.raises(OSError, match='could not be downloaded from http.*/none.safetensors .*404'):
        download_weights(f'{address}/none.safetensors')
    assert not [path for path in (tmp_path/'cache').rglob('*') if path.is_file()]


@pytest.mark.parametrize('files', [{'config.json': '{"architecture": "resnet10t"}'}, {'README.md': 'Mine.'},
                                   {'model.safetensors': 'weights'}], ids=lambda files: next(iter(files)))
def test_a_folder_of_somebody_else_stays_as_it_is(files, tmp_path):
    for name, text in files.items(): (tmp_path/name).write_text(text)
    net = create_model('flexnet7.cifar10')
    with pytest.raises(ValueError, match=f'hub must be a new folder; .* has {next(iter(files))} of something else'):
        save_hub(net, tmp_path, net.pretrained_cfg)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_description_that_is_none(tmp_path):
    net = create_model('flexnet3', width=4)
    with pytest.raises(ValueError, match=r"about must be what trained weights say .*; it lacks \['model'\]"):
        save_hub(net, tmp_path, net.config)
    config = create_model('flexnet3', width=4, conv=FlexConv2d).config
    with pytest.raises(ValueError, match="conv must be a class or function; got 'FlexConv2d'"): create_model(**config)
    assert create_model(**config | dict(conv=FlexConv2d)).stem.ndim == 2


def test_a_folder_for_the_hub_holds_the_network_as_it_is(tmp_path):
    net, x = create_model('flexnet3', 1, 10, width=4, kernel_size=9).eval(), torch.randn(2, 1, 16, 16)
    about = dict(model='flexnet3', in_channels=1, num_classes=10, options=dict(width=4, kernel_size=9),
                 data=dict(name='digits', classes=list('0123456789')))
    net.reset_classifier(5)
    set_resolution(net, 2)
    again = from_pretrained(save_hub(net, tmp_path/'net', about)).eval()
    with torch.no_grad(): assert torch.allclose(again(x), net(x), atol=1e-6) and again(x).shape == (2, 5)
    net.reset_classifier(0)
    with pytest.raises(ValueError, match='model must have a head'): save_hub(net, tmp_path/'none', about)


@pytest.mark.parametrize('kw', [dict(threshold=0.4), dict(in_channels=2), dict(width=8, pretrained=False)],
                         ids=lambda kw: next(iter(kw)))
@torch.no_grad()
def test_a_folder_for_the_hub_has_the_options_that_were_typed(kw, tmp_path):
    "Not only those of the weights that it started from."
    about = create_model('flextcn2.smnist').pretrained_cfg
    net = create_model('flextcn2.smnist', **dict(kernel_size=784) | kw).eval()
    again = from_pretrained(save_hub(net, tmp_path/'net', about)).eval()
    x = torch.randn(2, net.config['in_channels'], 50)
    assert torch.equal(again(x), net(x))
    shown = (tmp_path/'net/README.md').read_text()
    assert ('mean' in shown) == (net.config['in_channels'] == 1)       # of data with other channels it would be wrong


@torch.no_grad()
def test_a_folder_for_the_hub_of_a_network_by_default(tmp_path):
    "No option was typed: those of the description are of another network."
    net, x = create_model('flexnet3', 1).eval(), torch.randn(2, 1, 9, 9)
    about = dict(model='flexnet3', in_channels=1, num_classes=10, options=dict(width=4))
    assert torch.equal(from_pretrained(save_hub(net, tmp_path/'net', about)).eval()(x), net(x))


@pytest.mark.parametrize('about,words', [(None, 'about must be what trained weights say'),
                                         (dict(model='mine', in_channels=1, num_classes=10), 'about must be of this'),
                                         (dict(model='tcn', in_channels=1, num_classes=10), 'about must be of this')])
def test_a_folder_for_the_hub_is_written_whole_or_not_at_all(about, words, tmp_path):
    with pytest.raises(ValueError, match=words): save_hub(create_model('flextcn2', 1, width=4), tmp_path/'net', about)
    assert not (tmp_path/'net').exists()


def test_timm_takes_weights_of_ones_own(tmp_path):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    import flexconv.timm
    net = create_model('flexnet7.cifar10')
    with torch.no_grad(): net.head.bias += 1
    save_weights(net, tmp_path/'own.safetensors', net.pretrained_cfg)
    for how in 'pretrained_cfg', 'pretrained_cfg_overlay':
        given = {how: dict(file=str(tmp_path/'own.safetensors'))}
        got = timm.create_model('flexnet7.cifar10' if 'overlay' in how else 'flexnet7', pretrained=True, **given)
        assert torch.equal(got.head.bias, net.head.bias)
