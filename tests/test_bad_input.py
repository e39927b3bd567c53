"""Wrong uses, each with the exact exception and what its message must say: the argument, what is allowed, what was
found. A row is (what is wrong, a call, the exception, parts of its message)."""
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch import nn
from flexconv import (FlexConv1d, FlexConv2d, FlexNet, GaussianMask, MAGNet, aliasing_loss, conv_nd,
                      create_kernel_network, create_model, highest_frequency,
                      nyquist_frequency, position_grid, bench, cli)
from flexconv.baselines import CIFARResNet, DeformableConv2d, DilatedBasisConv2d, NJetConv2d, TCN
from flexconv.conv import LowRankKernel
from flexconv.data import get_dls
from flexconv.tensors import ImageTensors
from flexconv.distributed import ShardedDL
from flexconv.convert import convert
from flexconv.export import export_onnx, export_program
from flexconv.stream import Stream
from flexconv.flexnet import FlexTCN
from flexconv.callbacks import AliasingLoss, KernelNorm, kernel_norm
from flexconv.learner import cosine_schedule, flex_learner
from flexconv.checkpoints import load_checkpoint, save_checkpoint
from flexconv.files import load_weights
from flexconv.plot import kernel_spectrum, show_kernel_sizes, show_kernels, show_spectra
from flexconv.at_resolution import ProgressiveResize, dls_at
from flexconv.resolution import set_resolution
from flexconv.results import read_runs

x1, x2 = torch.randn(2, 3, 20), torch.randn(2, 3, 12, 12)
dls = get_dls('digits', max_items=128)

API = [
    ('even kernel', lambda: FlexConv2d(3, 4, 8), ValueError, ['kernel_size must be odd unless causal', 'got 8']),
    ('kernel of 0', lambda: FlexConv2d(3, 4, 0), ValueError, ['kernel_size must be an int of at least 1', 'got 0']),
    ('kernel size of another dimension', lambda: FlexConv2d(3, 4, (3, 3, 3)), ValueError,
     ['kernel_size must be an int', 'tuple of 2', '(3, 3, 3)']),
    ('kernel size as text', lambda: FlexConv2d(3, 4, '33'), ValueError, ['kernel_size must be an int', "'33'"]),
    ('kernel size as float', lambda: FlexConv2d(3, 4, 33.), ValueError, ['kernel_size must be an int', '33.0']),
    ('no channels', lambda: FlexConv2d(0, 4, 9), ValueError, ['in_channels must be an int of at least 1', 'got 0']),
    ('channels as float', lambda: FlexConv2d(3, 4.5, 9), ValueError, ['out_channels must be an int', '4.5']),
    ('groups', lambda: FlexConv2d(3, 4, 9, groups=2), ValueError,
     ['in_channels must be divisible by groups', 'in_channels=3, groups=2']),
    ('stride', lambda: FlexConv2d(3, 4, 9, stride=0), ValueError, ['stride must be', 'got 0']),
    ('dilation', lambda: FlexConv2d(3, 4, 9, dilation=-1), ValueError, ['dilation must be', 'got -1']),
    ('negative padding', lambda: FlexConv2d(3, 4, 9, padding=-1), ValueError, ['padding must be', 'got -1']),
    ('name of padding', lambda: FlexConv2d(3, 4, 9, padding='sane'), ValueError, ['padding must be', "'sane'"]),
    ('padding mode', lambda: FlexConv2d(3, 4, 9, padding_mode='zero'), ValueError,
     ['padding_mode must be one of', "'zero'", "Did you mean 'zeros'?"]),
    ('kernel network', lambda: FlexConv2d(3, 4, 9, kernel='magnett'), ValueError,
     ['kernel must be one of', "Did you mean 'magnet'?"]),
    ('sigma as text', lambda: FlexConv2d(3, 4, 9, sigma='wide'), ValueError, ['sigma must be a number', "'wide'"]),
    ('sigma of NaN', lambda: FlexConv2d(3, 4, 9, sigma=float('nan')), ValueError, ['sigma must be a number', 'nan']),
    ('three sigmas in two dimensions', lambda: FlexConv2d(3, 4, 9, sigma=(1, 2, 3)), ValueError,
     ['sigma must be a number or 2 of them', '(1, 2, 3)']),
    ('threshold', lambda: FlexConv2d(3, 4, 9, threshold=1.5), ValueError,
     ['threshold must be a number above 0 and below 1', '1.5']),
    ('causal images', lambda: FlexConv2d(3, 4, 9, causal=True), ValueError, ['causal']),
    ('method', lambda: FlexConv2d(3, 4, 9, conv_method='ftt'), ValueError,
     ['conv_method must be one of', "Did you mean 'fft'?"]),
    ('init', lambda: FlexConv2d(3, 4, 9, init='fanin'), ValueError, ['init must be one of', "'fan_in'"]),
    ('options of the kernel', lambda: FlexConv2d(3, 4, 9, kernel_options=['hidden']), ValueError,
     ['kernel_options must be a dict', "['hidden']"]),
    ('unknown option of the kernel', lambda: FlexConv2d(3, 4, 9, kernel_options=dict(hiden=8)), TypeError, ['hiden']),
    ('channels of the input', lambda: FlexConv2d(3, 4, 9)(torch.randn(2, 5, 12, 12)), ValueError,
     ['x must have shape (batch, 3, *spatial)', '(2, 5, 12, 12)']),
    ('dimensions of the input', lambda: FlexConv2d(3, 4, 9)(torch.randn(12, 12)), ValueError,
     ['x must have shape', '(12, 12)']),
    ('input of integers', lambda: FlexConv2d(3, 4, 9)(torch.ones(2, 3, 12, 12, dtype=torch.uint8)), TypeError,
     ['floating-point dtype', 'uint8']),
    ('input of another dtype', lambda: FlexConv2d(3, 4, 9)(x2.double()), TypeError,
     ['one floating-point dtype', 'float64', 'float32']),
    ('no tensor', lambda: FlexConv1d(3, 4, 9)([[1., 2.]]), TypeError, ['x must be a tensor', 'list']),
    ('reflection farther than the image', lambda: FlexConv2d(3, 4, 33, padding_mode='reflect')(x2), ValueError,
     ['reflect', '12']),
    ('conv_nd: groups', lambda: conv_nd(x2, torch.randn(4, 3, 3, 3), groups=2), ValueError,
     ['x must have shape (batch, 6', '(2, 3, 12, 12)']),
    ('conv_nd: weight', lambda: conv_nd(x2, torch.randn(4, 2, 3, 3)), ValueError, ['(2, 3, 12, 12)', '2']),
    ('conv_nd: bias', lambda: conv_nd(x2, torch.randn(4, 3, 3, 3), torch.randn(5)), ValueError,
     ['bias must have shape (4,)', '(5,)']),
    ('conv_nd: causal images', lambda: conv_nd(x2, torch.randn(4, 3, 3, 3), causal=True), ValueError, ['causal']),
    ('conv_nd: factors', lambda: conv_nd(x2, LowRankKernel(torch.randn(4, 3, 5), torch.randn(6, 3, 3))), ValueError,
     ['basis (R, *N)', '(4, 3, 5)', '(6, 3, 3)']),
    ('hidden', lambda: MAGNet(2, 4, hidden=0), ValueError, ['hidden must be an int of at least 1', 'got 0']),
    ('input_scale', lambda: MAGNet(2, 4, input_scale=-1), ValueError, ['input_scale must be a number above 0', '-1']),
    ('positions', lambda: MAGNet(2, 4)(position_grid(9, 3)), ValueError,
     ['positions must have shape (2, *spatial)', '(3, 9, 9, 9)']),
    ('layers of a SIREN', lambda: create_kernel_network('siren', 2, 4, layers=1), ValueError,
     ['layers must be an int of at least 2', 'got 1']),
    ('size of a grid', lambda: position_grid(0), ValueError, ['size must be an int of at least 1', 'got 0']),
    ('mask: positions', lambda: GaussianMask(2)(position_grid(9)), ValueError,
     ['positions must have shape (2, *spatial)', '(1, 9)']),
    ('name of a model', lambda: create_model('flexnet8'), ValueError, ['name must be one of', "Did you mean 'flexnet"]),
    ('argument of a model', lambda: create_model('flexnet3', depth=3), TypeError, ['depth']),
    ('widths', lambda: FlexNet(widths=24), ValueError, ['widths must be a tuple of ints', '24']),
    ('dropout', lambda: FlexTCN(dropout=1), ValueError, ['dropout must be a number from 0 and below 1', 'got 1']),
    ('ResNet depth', lambda: CIFARResNet(depth=30), ValueError, ['depth must be 6n + 2', '30']),
    ('N-Jet order', lambda: NJetConv2d(3, 4, order=-1), ValueError, ['order must be an int of at least 0', '-1']),
    ('N-Jet sigma', lambda: NJetConv2d(3, 4, sigma=0), ValueError, ['sigma must be a number above 0', 'got 0']),
    ('taps', lambda: DilatedBasisConv2d(3, 4, taps=2), ValueError, ['taps must be odd', 'got 2']),
    ('deformable kernel', lambda: DeformableConv2d(3, 4, 4), ValueError, ['kernel_size must be odd', 'got 4']),
    ('TCN width', lambda: TCN(width=0), ValueError, ['width must be an int of at least 1', 'got 0']),
    ('resolution 0', lambda: aliasing_loss(FlexConv2d(3, 4, 9), 0), ValueError,
     ['resolution must be an int of at least 1', 'got 0']),
    ('aliasing of a plain network', lambda: aliasing_loss(nn.Linear(2, 2), 16), ValueError,
     ['model must contain', 'Linear has none']),
    ('frequency of a SIREN', lambda: highest_frequency(FlexConv2d(3, 4, 9, kernel='siren')), ValueError,
     ['MAGNet, Gabor and Fourier', 'SIREN']),
    ('Nyquist frequency of one position', lambda: nyquist_frequency(1), ValueError,
     ['size must be an int of at least 2', 'got 1']),
    ('aliasing method', lambda: aliasing_loss(FlexConv2d(3, 4, 9), 16, method='sum'), ValueError,
     ['method must be one of', "Did you mean 'summed'?"]),
    ('scale', lambda: set_resolution(FlexConv2d(3, 4, 9), 0), ValueError, ['scale must be a number above 0', 'got 0']),
    ('resolution of a plain network', lambda: set_resolution(nn.Linear(2, 2), 2), ValueError, ['Linear has none']),
    ('convert: threshold', lambda: convert(nn.Conv2d(3, 4, 3), threshold=1.), ValueError,
     ['threshold must be a number above 0 and below 1', '1.0']),
    ('convert: even kernel by name', lambda: convert(nn.Sequential(nn.Conv2d(3, 4, 4)), select=lambda name, m: True),
     ValueError, ['0: conv must have an odd kernel', '(4, 4)']),
    ('convert: nothing there', lambda: convert(nn.Linear(2, 2)), ValueError,
     ['model must contain an nn.Conv2d', 'Linear has none']),
    ('export: no batch', lambda: export_program(FlexConv2d(3, 4, 9), torch.randn(3, 3)), ValueError,
     ['example must be a batch', '(3, 3)']),
    ('export to nowhere', lambda: export_onnx(FlexConv2d(3, 4, 9), 'x', 'y.onnx'), ValueError,
     ['example must be a batch', 'x']),
    ('stream of an image network', lambda: Stream(FlexConv2d(3, 4, 9)), ValueError, ['causal', 'Conv2d']),
    ('stream: chunk', lambda: Stream(FlexConv1d(3, 4, 9, causal=True))(torch.randn(3, 5)), ValueError,
     ['chunk must have shape (B, C, L)', '(3, 5)']),
    ('kernels of a plain network', lambda: show_kernels(nn.Linear(2, 2)), ValueError,
     ['model must contain', 'Linear has none']),
    ('spectra of a plain network', lambda: show_spectra(nn.Linear(2, 2)), ValueError,
     ['model must contain', 'Linear has none']),
    ('sizes', lambda: show_kernel_sizes([]), ValueError, ['sizes must be a dict', '[]']),
    ('learning rate', lambda: flex_learner(dls, lr=0), ValueError, ['lr must be a number above 0', 'got 0']),
    ('model for sequences', lambda: flex_learner(dls, 'flextcn2'), ValueError,
     ['model flextcn2 takes sequences', '64, 1, 8, 8']),
    ('name of a model for data', lambda: flex_learner(dls, 'flexnet33'), ValueError, ["Did you mean 'flexnet3'?"]),
    ('epochs', lambda: flex_learner(dls).fit_cosine(2.5), ValueError, ['epochs must be an int of at least 1', '2.5']),
    ('warm-up', lambda: flex_learner(dls).fit_cosine(2, warmup_epochs=3), ValueError,
     ['warmup_epochs must be a number from 0 and below 2', 'got 3']),
    ('factor', lambda: AliasingLoss(-1), ValueError, ['factor must be a number from 0', '-1']),
    ('kernel norm of a plain network', lambda: kernel_norm(nn.Linear(2, 2)), ValueError,
     ['model must contain', 'Linear has none']),
    ('kernel norm', lambda: KernelNorm('much'), ValueError, ['factor must be a number', "'much'"]),
    ('a wrong kind of data loader for another size', lambda: dls_at(get_dls('sdigits', max_items=64), 16), ValueError,
     ['dls must be of images']),
    ('batches for three processes', lambda: ShardedDL(dls.train, 0, 3), ValueError,
     ['bs must be divisible by the number of processes, 3', 'got 64']),
    ('runs of nowhere', lambda: read_runs('nowhere'), FileNotFoundError, ['path must be a folder', 'nowhere']),
    ('checkpoint of nowhere', lambda: load_checkpoint(flex_learner(dls), 'nowhere.pt'), FileNotFoundError,
     ['nowhere.pt']),
    *((f'{name} of a schedule: {value!r}', lambda kw={name: value}: flex_learner(dls).fit_cosine(2, 0.01, **kw),
       ValueError, [f'{name} must ', f'got {value!r}'])
      for name, value in (('final', -1.), ('final', 'a'), ('start_epoch', 0.5), ('start_epoch', None),
                          ('start_epoch', True), ('start_epoch', 2), ('warmup_epochs', 2))),
    ('warm-up of all', lambda: cosine_schedule(0.01, 1), ValueError, ['warmup must be a number from 0 and below 1']),
    *((f'stages {stages!r}', lambda stages=stages: ProgressiveResize(stages), ValueError, ['stages must be pairs'])
      for stages in ([(4,)], '4x1', [4, 1])),
    ('no optimiser', lambda: save_checkpoint(flex_learner(dls), 'nowhere/c.pt', 1), ValueError, ['have an optimiser']),
    ('epoch of a checkpoint', lambda: save_checkpoint(flex_learner(dls), 'nowhere/c.pt', 'a'), ValueError,
     ['epoch must be an int of at least 0', "'a'"]),
    ('spectrum of a table', lambda: kernel_spectrum(nn.Conv2d(1, 1, 3)), TypeError, ['layer must be a', 'Conv2d']),
    *((f'{name} of {channels!r} channels', lambda a=(name, channels): create_model(*a), ValueError,
       ['in_channels must be an int of at least 1', repr(channels)])
      for name in ('cifar_resnet32', 'tcn', 'njet_allcnn') for channels in (0, -1, '3', True)),
    ("timm's word", lambda: create_model('flexnet3', in_chans=1), TypeError,
     ["flexnet3 takes in_channels; in_chans is timm's word"]),
    ('weights in a list', lambda: create_model('flexnet7', pretrained=['cifar10']), ValueError, ['pretrained must be']),
    ('weights of nowhere', lambda: load_weights(nn.Linear(2, 2), 'nowhere.safetensors'), FileNotFoundError,
     ['nowhere.safetensors does not exist']),
]

u8 = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
DATA = [
    ('name of a data set', lambda: get_dls('cifar11'), ValueError, ["Did you mean 'cifar10'?", 'cifar11']),
    ('batch size', lambda: get_dls('digits', bs=0), ValueError, ['bs must be an int of at least 1', 'got 0']),
    ('size of images', lambda: get_dls('digits', size=-3), ValueError, ['size must be', '-3']),
    ('part for validation', lambda: get_dls('digits', valid_pct=1.5), ValueError,
     ['valid_pct must be a number', '1.5']),
    ('items', lambda: get_dls('digits', max_items=0), ValueError, ['max_items must be an int', 'got 0']),
    ('path', lambda: get_dls('cifar10', path='/nowhere'), FileNotFoundError, ['/nowhere']),
    ('augmentation as text', lambda: get_dls('digits', augment='no'), TypeError, ['augment must be a bool', "'no'"]),
    ('seed as text', lambda: get_dls('digits', seed='a'), ValueError, ['seed must be an int of at least 0', "'a'"]),
    ('seed as float', lambda: get_dls('digits', seed=1.5), ValueError, ['seed must be an int of at least 0', '1.5']),
    ('images of floats', lambda: ImageTensors(u8.float(), torch.tensor([0, 1, 2]), 'abc', 0), ValueError, ['uint8']),
    ('fewer labels than images', lambda: ImageTensors(u8, torch.tensor([0, 1]), 'abc', 0), ValueError,
     ['one length', '3', '2']),
    ('labels beyond the classes', lambda: ImageTensors(u8, torch.tensor([0, 1, 7]), 'abc', 0), ValueError,
     ['labels must lie in 0..2', '7']),
    ('no images', lambda: ImageTensors(u8[:0], torch.tensor([], dtype=torch.long), 'abc', 0), ValueError,
     ['at least 1']),
]


@pytest.mark.parametrize('what,call,error,words', API + DATA, ids=lambda v: v if isinstance(v, str) else '')
def test_wrong_use(what, call, error, words):
    with pytest.raises(error) as e: call()
    assert type(e.value) is error, repr(e.value)
    for word in words: assert word in str(e.value), f'{word!r} is not in: {e.value}'


def folder_of_images(path, **files):
    "A folder with classes a and b, six images each; `files` replace some: name -> bytes or an image."
    for c in 'ab':
        (path/c).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.random.RandomState(i).randint(0, 255, (9, 9), np.uint8)).save(path/c/f'{i}.png')
    for name, content in files.items():
        target = path/'b'/f'{name}.png'
        if isinstance(content, bytes): target.write_bytes(content)
        else: content.save(target)
    return path


def empty(path): path.mkdir(); return path
def flat(path): path.mkdir(); Image.new('L', (9, 9)).save(path/'1.png'); return path
def truncated(path):
    folder_of_images(path)
    data = (path/'b'/'3.png').read_bytes(); (path/'b'/'3.png').write_bytes(data[:len(data)//2])
    return path
def text(path): return folder_of_images(path, x=b'this is no image')
def one_class(path):
    folder_of_images(path)
    for f in (path/'b').iterdir(): f.unlink()
    (path/'b').rmdir()
    return path


@pytest.mark.parametrize('make,words', [(empty, ['data']),
                                        (flat, ['data']),
                                        (truncated, ['3.png']),
                                        (text, ['x.png']),
                                        (one_class, ['class'])], ids=lambda v: getattr(v, '__name__', ''))
def test_wrong_folders(make, words, tmp_path, monkeypatch):
    "Through the command: exit code 2, the file or what is missing, and no run folder."
    monkeypatch.chdir(tmp_path)
    _, err = command('flexconv_train', data=str(make(tmp_path/'data')), epochs=1, width=4)
    assert all(w in err for w in words), err
    assert not (tmp_path/'runs').exists()


def command(name, *args, **options):
    "A console command that must fail with exit code 2 and without a traceback; what it printed."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as e:
        getattr(bench if name == 'flexconv_bench' else cli, name).__wrapped__(*args, **options)
    assert e.value.code == 2, err.getvalue()
    assert 'Traceback' not in err.getvalue() and err.getvalue().startswith(f'{name}: '), err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A run of one epoch."
    folder = tmp_path_factory.mktemp('runs')/'run'
    with redirect_stdout(io.StringIO()):
        cli.flexconv_train.__wrapped__(epochs=1, width=4, max_items=64, bs=32, out=str(folder))
    return folder


COMMANDS = [
    ('flexconv_train', dict(data='cifar11'), ['cifar11', "Did you mean 'cifar10'?"]),
    ('flexconv_train', dict(model='flexnet'), ['model must be one of', 'Did you mean']),
    ('flexconv_train', dict(model='cktcn'), ['model cktcn takes sequences']),
    ('flexconv_train', dict(experiment='mnist-flexnet8'), ['experiment must be one of', 'Did you mean']),
    ('flexconv_train', dict(epochs=0), ['epochs must be an int of at least 1', 'got 0']),
    ('flexconv_train', dict(lr=-0.1), ['lr must be a number above 0', '-0.1']),
    ('flexconv_train', dict(bs=-1), ['bs must be an int of at least 1', '-1']),
    ('flexconv_train', dict(seed=-1), ['seed must be an int of at least 0', '-1']),
    ('flexconv_train', dict(device='gpu'), ["device 'gpu' cannot be used"]),
    ('flexconv_train', dict(device='cuda:99'), ["device 'cuda:99' cannot be used"]),
    ('flexconv_train', dict(width=0), ['width must be an int of at least 1', 'got 0']),
    ('flexconv_train', dict(dropout=1.0), ['dropout must be a number from 0 and below 1', '1.0']),
    ('flexconv_train', dict(kernel_size=8), ['kernel_size must be odd', 'got 8']),
    ('flexconv_train', dict(kernel='sirene'), ['kernel must be one of', "Did you mean 'siren'?"]),
    ('flexconv_train', dict(conv_method='fast'), ['conv_method must be one of', "'fast'"]),
    ('flexconv_train', dict(aliasing=-1.), ['aliasing must be a number from 0', '-1']),
    ('flexconv_train', dict(model='cifar_resnet32', sigma=0.1), ['model cifar_resnet32 does not take', 'sigma']),
    ('flexconv_train', dict(model='flexnet3', kernel='siren', aliasing=0.1), ['MAGNet, Gabor and Fourier', 'SIREN']),
    ('flexconv_train', dict(resume='nowhere'), ['nowhere is not a run folder']),
    ('flexconv_train', dict(target=1), ['target must be an int of at least 2', 'got 1']),
    ('flexconv_train', dict(device='meta'), ["device 'meta' cannot be used"]),
    ('flexconv_train', dict(seed=2**70), ['seed must be below 2**32']),
    *((name, {option: ''}, [f"{option} must not be empty; got ''"])
      for name, options in (('flexconv_train', ('out', 'resume', 'init', 'data')), ('flexconv_bench', ('out',)),
                            ('flexconv_export', ('run', 'out', 'hub')), ('flexconv_eval', ('run', 'data')))
      for option in options),
    ('flexconv_train', dict(valid_pct=2.), ['valid_pct must be a number', '2']),
    ('flexconv_train', dict(target_epochs=1), ['target_epochs needs a target']),
    ('flexconv_train', dict(progressive='5x9', epochs=9), ['progressive must leave epochs at full size', '[(5, 9)]']),
    ('flexconv_train', dict(progressive='16x1', epochs=2), ['progressive must have sizes below 8', '[(16, 1)]']),
    *(('flexconv_train', {name: value, 'progressive': '6x1', 'epochs': 2, 'valid_pct': 0.2},
       [f'--{name} would compare accuracies at different sizes of images'])
      for name, value in (('keep_best', True), ('patience', 1))),
]


@pytest.mark.parametrize('name,options,words', COMMANDS, ids=lambda v: '-'.join(v) if isinstance(v, dict) else '')
def test_wrong_commands(name, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, err = command(name, **options)
    for word in words: assert word in err, f'{word!r} is not in: {err}'
    assert not list(tmp_path.iterdir()), 'nothing may be left behind'


@pytest.mark.parametrize('name,args,option', [('flexconv_train', (), 'out'), ('flexconv_bench', (), 'out'),
                                              ('flexconv_export', ('flextcn2.smnist',), 'out'),
                                              ('flexconv_export', ('flextcn2.smnist',), 'hub')])
def test_no_command_writes_below_a_file(name, args, option, tmp_path):
    file = tmp_path/'notes.txt'
    file.write_text('mine')
    for out in file/'run', file/'deep/run':
        said, err = command(name, *args, **{option: str(out)})
        assert f'{option} must name a' in err and f'folder; {file} is a file' in err and not said
    assert file.read_text() == 'mine'


def test_wrong_commands_on_runs(finished, tmp_path):
    "An existing run as output, options beside --resume, foreign and damaged runs, sizes and formats."
    for name, args, options, words in [
            ('flexconv_train', (), dict(out=str(finished)), ['out must not hold a run already', '--resume']),
            ('flexconv_train', (), dict(resume=str(finished), lr=0.1, out='x'), ['drop --lr --out']),
            ('flexconv_eval', (str(finished),), dict(size='8,x'), ['size must be an int of at least 2', "'8,x'"]),
            ('flexconv_eval', (str(finished),), dict(size='1'), ['size must be', "'1'"]),
            ('flexconv_eval', (str(finished),), dict(bs=0), ['bs must be', 'got 0']),
            ('flexconv_eval', (str(tmp_path),), {}, ['has no config.json']),
            ('flexconv_export', (str(finished),), dict(format='tflite'), ['format must be one of', "'tflite'"]),
            ('flexconv_export', (str(finished),), dict(format='onnx', hub=str(tmp_path/'hub')), ['format is for']),
            ('flexconv_export', (str(finished),), dict(out=str(tmp_path/'o'), hub=str(tmp_path/'h')), ['out is for']),
            ('flexconv_export', (str(tmp_path),), {}, ['has no config.json'])]:
        _, err = command(name, *args, **options)
        for word in words: assert word in err, f'{word!r} is not in: {err}'


@pytest.mark.parametrize('change,words', [(dict(epochs='many'), ['config.json', 'epochs', "'many'"]),
                                          (dict(test_sizes=5), ['config.json', 'test_sizes must be a list', '5']),
                                          (dict(width='8'), ['config.json', 'width must be an int', "'8'"]),
                                          (dict(model=3), ['config.json', 'model must be text', '3']),
                                          (dict(model='flexnet99'), ['Did you mean']),
                                          (dict(width=8), ['model.safetensors', 'weights of this model']),
                                          (dict(data='no/such/folder'), ['no/such/folder'])],
                         ids=['epochs', 'sizes', 'text', 'number', 'model', 'width', 'data'])
def test_configurations_of_strangers(change, words, finished, tmp_path):
    import json, shutil
    folder = Path(shutil.copytree(finished, tmp_path/'run'))
    (folder/'config.json').write_text(json.dumps(json.loads((folder/'config.json').read_text()) | change))
    _, err = command('flexconv_eval', str(folder))
    for word in words: assert word in err, f'{word!r} is not in: {err}'


def test_NaN_pixels_stop_training():
    "Images are bytes and cannot hold NaN; a data loader of one's own can, and is named."
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from flexconv.callbacks import NonFiniteLoss
    items = [(torch.full((1, 8, 8), float('nan')) if i == 9 else torch.randn(1, 8, 8), torch.tensor(i % 2))
             for i in range(16)]
    own = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
    learn = flex_learner(own, create_model('flexnet3', 1, 2, width=4, kernel_size=9, sigma=0.3),
                         loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(), pytest.raises(NonFiniteLoss, match='step 1 of 2: the input of this batch'):
        learn.fit(1)
