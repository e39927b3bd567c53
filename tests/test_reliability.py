"Nothing lost, nothing silent: killed, starved, damaged and poisoned runs, and runs of several processes."
import os, pickle, resource, shutil, signal, subprocess, sys
from pathlib import Path
import pytest, safetensors.torch, torch
from flexconv import FlexConv1d, FlexConv2d
from flexconv.files import load_weights, read_csv, read_weights, save_weights, write_atomically
from flexconv.registry import create_model
from helpers import BIN, ENV, call, run

HERE = Path(__file__).parent
SMALL = ['--epochs', '2', '--width', '4', '--max_items', '128', '--bs', '32']
small = dict(epochs=2, width=4, max_items=128, bs=32)


# Killed ---------------------------------------------------------------------------------------------------------------

def test_twenty_kills(tmp_path):
    """SIGKILL at ten random times and around ten file operations: every run, resumed, ends bit for bit like one that
    was left alone."""
    done = subprocess.run([sys.executable, HERE/'killer.py', tmp_path], capture_output=True, text=True, env=ENV)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 20, done.stdout + done.stderr[-3000:]
    assert all(line.endswith('same') for line in lines), done.stdout
    assert sum('killed' in line for line in lines) >= 15, done.stdout         # a random time may come too late


@pytest.mark.parametrize('sign,code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_polite_stops_say_how_to_go_on(sign, code, tmp_path):
    process = subprocess.Popen([BIN/'flexconv_train', *SMALL[2:], '--epochs', '500', '--out', tmp_path/'run'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
                               # what runs in the background ignores it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in process.stdout:
        if line.split()[:1] == ['1']: break
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and 'Traceback' not in err
    assert f'Go on with: flexconv_train --resume {tmp_path/"run"}' in err
    assert len(read_csv(tmp_path/'run/metrics.csv')) >= 1


# No room, no right ----------------------------------------------------------------------------------------------------

def test_a_full_disk(tmp_path):
    "A file system that takes no more than 300 kB a file: a clear message, and the last good checkpoint stays."
    call('flexconv_train', out=str(tmp_path/'run'), **small)
    config = (tmp_path/'run/config.json').read_text()
    (tmp_path/'run/config.json').write_text(config.replace('"epochs": 2', '"epochs": 4'))
    before = (tmp_path/'run/checkpoint.pt').read_bytes()
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)))
    err = run('flexconv_train', '--resume', tmp_path/'run', code=2, **limit).stderr
    assert 'could not be written and is as it was: File too large' in err
    assert 'Go on with: flexconv_train --resume' in err
    assert (tmp_path/'run/checkpoint.pt').read_bytes() == before and not list((tmp_path/'run').glob('*.part'))
    call('flexconv_train', resume=str(tmp_path/'run'))
    assert len(read_csv(tmp_path/'run/metrics.csv')) == 4


def test_nowhere_to_write(tmp_path):
    (tmp_path/'file').write_text('')
    for out in (tmp_path/'file', tmp_path/'file/below', '/proc/here'):
        assert str(out) in call('flexconv_train', out=str(out), code=2, **small)[1]


def test_atomic_writes(tmp_path):
    write_atomically(tmp_path/'a', 'one'); write_atomically(tmp_path/'a', b'two')
    assert (tmp_path/'a').read_bytes() == b'two' and [p.name for p in tmp_path.iterdir()] == ['a']
    with pytest.raises(OSError, match='b/c could not be written and is as it was'):
        write_atomically(tmp_path/'b/c', 'x')
    (tmp_path/'d').mkdir()
    with pytest.raises(OSError, match='could not be written'): write_atomically(tmp_path/'d', 'x')
    assert {p.name for p in tmp_path.iterdir()} == {'a', 'd'}


# Damaged --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A run of two epochs."
    folder = tmp_path_factory.mktemp('finished')/'run'
    call('flexconv_train', out=str(folder), **small)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path/'copy'))


def flip(file):
    "Flip one bit of the largest tensor in a file."
    data = bytearray(file.read_bytes())
    if file.suffix == '.pt': tensors = torch.load(file, weights_only=True)['model']
    else: tensors = safetensors.torch.load_file(file)
    largest = max(tensors.values(), key=torch.Tensor.numel)
    data[data.index(largest.contiguous().numpy().tobytes()) + 17] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize('how', ['flipped', 'cut', 'empty', 'missing'])
def test_a_damaged_checkpoint_gives_way_to_the_previous(how, copy, finished):
    file = copy/'checkpoint.pt'
    if how == 'flipped': flip(file)
    elif how == 'missing': file.unlink()
    else: file.write_bytes(file.read_bytes()[:100_000 if how == 'cut' else 0])
    out, err = call('flexconv_train', resume=str(copy))
    assert 'checkpoint.pt' in err and 'going on from' in err and '1 of 2 epochs are done' in out
    got, want = (read_weights(run/'model.safetensors')[0] for run in (copy, finished))        # beside them are hours
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)


def test_both_checkpoints_damaged(copy):
    for name in ('checkpoint.pt', 'previous-checkpoint.pt'): flip(copy/name)
    assert 'previous-checkpoint.pt is not a readable checkpoint' in call('flexconv_train', resume=str(copy), code=2)[1]


def test_damaged_weights_and_table(copy):
    flip(copy/'model.safetensors')
    _, err = call('flexconv_eval', copy, code=2)
    assert 'model.safetensors' in err and 'does not match its checksum' in err
    (copy/'metrics.csv').write_text('nonsense')
    call('flexconv_train', resume=str(copy))                        # the checkpoint knows the table
    assert len(read_csv(copy/'metrics.csv')) == 2
    call('flexconv_eval', copy)                                     # and the weights


def test_a_run_is_not_written_over(finished, copy):
    "Whatever is left of a run, a new one does not begin in its folder, and does not take over its checkpoint."
    for gone in ('checkpoint.pt', 'config.json'):
        (copy/gone).unlink()
        assert 'out must not hold a run already' in call('flexconv_train', out=str(copy), code=2, **small)[1]


@pytest.mark.parametrize('opt', ['sgd', 'fastai', 'masks'])
def test_checkpoints_of_other_optimisers(opt, tmp_path):
    "Whatever numbers their states are made of; and a checkpoint of another model or optimiser changes nothing."
    from functools import partial
    import numpy as np
    from fastai.optimizer import Adam, OptimWrapper
    from flexconv.data import get_dls
    from flexconv.runs import RunRecorder
    from flexconv.learner import flex_learner, model_for
    from flexconv.checkpoints import load_checkpoint
    dls = get_dls('digits', max_items=64, bs=32)
    opts = dict(sgd=partial(OptimWrapper, opt=torch.optim.SGD), fastai=Adam, masks=None)
    new = lambda name=opt, width=4: flex_learner(dls, model_for(dls, 'flexnet3', width=width), opt_func=opts[name])
    learn, again = new(), new()
    with learn.no_bar(), learn.no_logging():
        if opt == 'masks': learn.fit(1, lr=np.float64(1e-2), cbs=RunRecorder(tmp_path))
        else: learn.fit_cosine(1, cbs=RunRecorder(tmp_path))
    assert load_checkpoint(again, tmp_path/'checkpoint.pt')[0] == 1
    for a, b in zip(learn.model.state_dict().values(), again.model.state_dict().values()): assert torch.equal(a, b)
    other = new(width=8)
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(ValueError, match='another model'): load_checkpoint(other, tmp_path/'checkpoint.pt')
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())
    with pytest.raises(ValueError, match='does not hold the weights'):
        load_weights(other.model, tmp_path/'model.safetensors')
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())


def test_weights_without_a_checksum_load(tmp_path):
    "Weights that somebody else saved as safetensors."
    a, b = FlexConv1d(1, 2, 9, sigma=0.5), FlexConv1d(1, 2, 9, sigma=0.5)
    safetensors.torch.save_file(a.state_dict(), tmp_path/'w.safetensors')
    load_weights(b, tmp_path/'w.safetensors')
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    save_weights(a.bfloat16(), tmp_path/'half.safetensors'); load_weights(b.bfloat16(), tmp_path/'half.safetensors')


def test_equal_weights_make_equal_files(tmp_path):
    "Bytes that can be compared, and cached by what is in them."
    layer, files = FlexConv1d(1, 2, 9, sigma=0.5), [tmp_path/f'{i}.safetensors' for i in range(20)]
    for file in files: save_weights(layer, file, about=dict(model='mine', classes=['a', 'b']))
    assert len({file.read_bytes() for file in files}) == 1
    assert read_weights(files[0])[1] == dict(model='mine', classes=['a', 'b'])


# Strangers ------------------------------------------------------------------------------------------------------------

class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, 'w'))           # what an attacker would replace by something worse


@pytest.mark.parametrize('name', ['checkpoint.pt', 'model.safetensors', 'config.json'])
@pytest.mark.parametrize('form', ['pickle', 'torch'])
def test_nothing_a_stranger_sends_runs(name, form, copy, tmp_path):
    victim = tmp_path/'it-ran'
    pickle.loads(pickle.dumps(Bomb(victim))).close()
    assert victim.exists(); victim.unlink()                         # the bomb works
    state = dict(epoch=1, model=Bomb(victim), opt={}, random=[], rows=[])
    if form == 'pickle': (copy/name).write_bytes(pickle.dumps(state))
    else: torch.save(state, copy/name)
    (copy/'previous-checkpoint.pt').unlink()
    if name == 'checkpoint.pt': _, err = call('flexconv_train', resume=str(copy), code=2)
    else: _, err = call('flexconv_eval', copy, code=2)
    assert name in err
    if name == 'model.safetensors': call('flexconv_export', copy, code=2)
    assert not victim.exists()


def test_no_unsafe_loading_in_the_library():
    "No pickle is read anywhere: torch.load only with weights_only, numpy never with allow_pickle."
    import re
    for file in (HERE.parent/'flexconv').glob('*.py'):
        text = file.read_text()
        assert 'allow_pickle=True' not in text and 'load_learner' not in text
        assert all('weights_only=True' in line for line in text.splitlines() if 'torch.load(' in line), file
        # testing.py: test_conv_layer reads what it wrote
        assert file.name == 'testing.py' or not re.search(r'pickle\.loads?\(', text), file


# Guards ---------------------------------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_ends_the_command(tmp_path):
    _, err = call('flexconv_train', lr=1e30, out=str(tmp_path/'run'), code=1, **small)
    assert 'in epoch' in err and 'not finite' in err and 'No epoch was finished' in err
    assert not (tmp_path/'run/checkpoint.pt').exists()


@pytest.mark.parametrize('ndim,start', [(1, 'pixel'), (1, 'outside'), (2, 'pixel')])
def test_masks_come_back(ndim, start):
    "A kernel that must be wide, learned from a mask of one pixel or outside of the frame."
    torch.manual_seed(0)
    layer = {1: FlexConv1d, 2: FlexConv2d}[ndim](1, 1, 17, sigma=0.3)
    conv = torch.nn.functional.conv1d if ndim == 1 else torch.nn.functional.conv2d
    x = torch.randn(16, 1, *[24]*ndim)
    y = conv(x, torch.ones(1, 1, *[7]*ndim)/7**ndim, padding=3)
    with torch.no_grad():
        if start == 'pixel': layer.mask.sigma.fill_(1e-3)
        else: layer.mask.mean.fill_(-4.)
    before = layer.size
    masks = list(layer.mask.parameters())
    opt = torch.optim.Adam([dict(params=masks, lr=0.03),
                            dict(params=[p for p in layer.parameters() if all(p is not m for m in masks)], lr=0.01)])
    losses = []
    for _ in range(300):
        loss = (layer(x) - y).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2*losses[0], (losses[0], losses[-1])
    if start == 'pixel': assert before == (1,)*ndim and min(layer.size) >= 5
    else: assert layer.mask.mean.abs().max() < 4


def test_seeds_repeat_runs(tmp_path):
    for name, seed in (('a', 3), ('b', 3), ('c', 4)): call('flexconv_train', seed=seed, out=str(tmp_path/name), **small)
    a, b, c = (read_weights(tmp_path/name/'model.safetensors')[0] for name in 'abc')
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)


# Several processes ----------------------------------------------------------------------------------------------------

LAUNCH = ['accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--main_process_port',
          '0', '--mixed_precision', 'no', '--dynamo_backend', 'no', BIN/'flexconv_train', '--device', 'cpu']


def launch(*options, **kwargs):
    return subprocess.Popen([BIN/LAUNCH[0], *map(str, LAUNCH[1:]), *map(str, options)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=ENV, **kwargs)


def test_two_processes_train_as_one_and_resume(tmp_path):
    """Training losses to 1e-5 at equal global batch, one run folder; and the run goes on after it was stopped, with
    two processes and with one."""
    options = ['--epochs', 3, *SMALL[2:], '--dropout', 0]
    call('flexconv_train', **small | dict(epochs=3), dropout=0., out=str(tmp_path/'one'))
    two = launch(*options, '--out', tmp_path/'two')
    out, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    assert out.count('-> ') == 1 and {p.name for p in tmp_path.iterdir()} == {'one', 'two'}
    losses = lambda name: [float(r['train_loss']) for r in read_csv(tmp_path/name/'metrics.csv')]
    assert losses('one') == pytest.approx(losses('two'), abs=1e-5) and len(losses('two')) == 3
    shutil.rmtree(tmp_path/'two')
    # with dropout: random numbers are restored too
    two = launch(*options[:-1], 0.2, '--out', tmp_path/'two')
    assert two.communicate(timeout=300) and two.returncode == 0
    state = torch.load(tmp_path/'two/checkpoint.pt', weights_only=True)
    assert len(state['random']) == 2 and not any(k.startswith('module.') for k in state['model'])
    for name in ('checkpoint.pt', 'model.safetensors'): (tmp_path/'two'/name).unlink()
    # from the previous checkpoint, two epochs done
    again = launch('--resume', tmp_path/'two')
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and '2 of 3 epochs are done' in out, out + err
    after = torch.load(tmp_path/'two/checkpoint.pt', weights_only=True)
    for name, v in state['model'].items(): assert torch.equal(v, after['model'][name]), name
    (tmp_path/'two/checkpoint.pt').unlink()
    call('flexconv_train', resume=str(tmp_path/'two'), device='cpu')               # and with one process
    assert len(losses('two')) == 3


def test_a_killed_worker_ends_the_run(tmp_path):
    process = launch('--epochs', 2000, *SMALL[2:], '--out', tmp_path/'run', start_new_session=True)
    try:
        for line in process.stdout:
            if line.split()[:1] == ['1']: break
        children = subprocess.run(['pgrep', '-f', f'flexconv_train.*{tmp_path}'], capture_output=True,
                                  text=True).stdout.split()
        ranks = {}
        for pid in children:
            variables = Path(f'/proc/{pid}/environ').read_text().split('\0')
            ranks[int(pid)] = dict(v.split('=', 1) for v in variables if '=' in v).get('RANK')
        victim, = (pid for pid, rank in ranks.items() if rank == '1')
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert f'Go on with: flexconv_train --resume {tmp_path/"run"}' in err, err[-3000:]
    assert 'another process ended' in err or 'was lost' in err, err[-3000:]


def test_an_error_of_ones_own_is_not_a_lost_process(monkeypatch):
    from flexconv import cli
    monkeypatch.setenv('WORLD_SIZE', '2')
    @cli.user_errors
    def fails(message): raise RuntimeError(message)
    with pytest.raises(RuntimeError, match='shapes do not match'): fails('shapes do not match')
    for message in ('[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234',
                    'CUDA out of memory. Tried to allocate 2 GiB'):
        with pytest.raises(SystemExit) as e: fails(message)
        assert e.value.code == 1


def test_batches_must_be_shared_evenly(tmp_path):
    process = launch('--epochs', 1, '--width', 4, '--max_items', 128, '--bs', 33, '--out', tmp_path/'run')
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and 'bs must be divisible by the number of processes, 2; got 33' in err


def test_names_of_weights_are_those_of_the_plain_model(tmp_path):
    "Saved from and loaded into models of which a part is compiled."
    plain, compiled = (create_model('flexnet3', 1, 4, width=4, kernel_size=9) for _ in range(2))
    compiled.blocks = torch.compile(compiled.blocks)
    save_weights(compiled, tmp_path/'a')
    load_weights(plain, tmp_path/'a')
    save_weights(plain, tmp_path/'b')
    load_weights(compiled, tmp_path/'b')
    assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes()
    assert sorted(read_weights(tmp_path/'a')[0]) == sorted(plain.state_dict())
