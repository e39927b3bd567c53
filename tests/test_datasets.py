"The paper's other data sets, in the formats in which they are published: small files of random numbers."
import importlib.util, json, pickle, shutil, sys
import numpy as np, pytest, torch
from scipy.io import savemat, wavfile
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR100, STL10
from flexconv.at_times import AtTimes
from flexconv.data import data_sets, get_dls, record_dls
from flexconv.experiments import paper_experiments, resolve_config
from flexconv.learner import flex_learner
from flexconv.registry import create_model
from flexconv.readers import drop_samples, read_speechcommands, speech_words, split_70_15_15

needs_torchaudio = pytest.mark.skipif(not importlib.util.find_spec('torchaudio'), reason='torchaudio is not installed')
needs_aeon = pytest.mark.skipif(not importlib.util.find_spec('aeon'), reason='aeon is not installed')


@pytest.fixture
def rng(): return np.random.default_rng(0)


def check(dls, shape, classes, train, valid):
    "What every set must have: shapes, class names, normalised values, a record that JSON can hold and that is enough."
    x, y = dls.one_batch()
    assert tuple(x.shape[1:]) == shape and x.dtype == torch.float32 and x.isfinite().all()
    assert list(dls.vocab) == classes and (len(dls.train_ds), len(dls.valid_ds)) == (train, valid)
    record = json.loads(json.dumps(dls.record))
    assert record['input_shape'] == list(shape) and record['classes'] == classes and record['train_items'] == train
    again = record_dls(record).test_dl([dls.valid_ds.x[0]])
    assert torch.equal(next(iter(again))[0], next(iter(dls.valid))[0][:1])
    return x, y


@pytest.fixture
def unchecked(monkeypatch):
    "Torchvision's sets without the checksums of the published files."
    nameless = lambda files: [[name, None] for name, _ in files]
    for cls in CIFAR100, STL10:
        for split in 'train_list', 'test_list': monkeypatch.setattr(cls, split, nameless(getattr(cls, split)))
    monkeypatch.setattr(CIFAR100, 'meta', CIFAR100.meta | dict(md5=None))


@pytest.fixture
def cifar100_folder(tmp_path, rng):
    "Rows of 3,072 bytes, red first; names of fine and coarse classes."
    folder = tmp_path/'cifar-100-python'
    folder.mkdir()
    names = [f'class{i}' for i in range(100)]
    for split, n in dict(train=200, test=100).items():
        data = rng.integers(0, 255, (n, 3072), np.uint8)
        data[0] = np.arange(3072) // 1024                                       # red 0, green 1, blue 2
        labels = [(i*7) % 100 for i in range(n)]
        content = dict(data=data, fine_labels=labels, coarse_labels=[0]*n, filenames=[''.encode()]*n)
        (folder/split).write_bytes(pickle.dumps(content))
    (folder/'meta').write_bytes(pickle.dumps(dict(fine_label_names=names, coarse_label_names=['all'])))
    return tmp_path


def test_cifar100(cifar100_folder, unchecked):
    dls = get_dls('cifar100', cifar100_folder, bs=32)
    check(dls, (3, 32, 32), [f'class{i}' for i in range(100)], 200, 100)
    assert dls.train_ds.y[:3].tolist() == [0, 7, 14] and dls.record['augment']
    assert [dls.train_ds.x[0, c].unique().tolist() for c in range(3)] == [[0], [1], [2]]


def test_files_that_are_not_the_published_ones(cifar100_folder, tmp_path):
    "Torchvision knows the checksum of each file."
    with pytest.raises(ValueError, match='does not hold CIFAR-100 for Python as it was published'):
        get_dls('cifar100', cifar100_folder)


def test_stl10(tmp_path, rng, unchecked):
    folder = tmp_path/'stl10_binary'
    folder.mkdir()
    names = 'airplane bird car cat deer dog horse monkey ship truck'.split()
    (folder/'class_names.txt').write_text('\n'.join(names) + '\n')
    (folder/'unlabeled_X.bin').write_bytes(b'')
    for split, n in dict(train=20, test=10).items():
        images = rng.integers(0, 255, (n, 3, 96, 96), np.uint8)
        images[0, 1, 5, 80] = 77                                                # row 5, column 80; stored by columns
        images.transpose(0, 1, 3, 2).tofile(folder/f'{split}_X.bin')
        (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder/f'{split}_y.bin')
    dls = get_dls('stl10', tmp_path, bs=4)
    check(dls, (3, 96, 96), names, 20, 10)
    assert dls.train_ds.y[:3].tolist() == [0, 1, 2] and dls.train_ds.x[0, 1, 5, 80] == 77
    assert not dls.record['augment']


@pytest.mark.parametrize('named', [False, True])
def test_imagenet32(tmp_path, rng, named):
    "Labels from 1 to 1000, in ten files."
    for i in [*range(1, 11), None]:
        data = rng.integers(0, 255, (4, 3072), np.uint8)
        file = 'val_data.npz' if i is None else f'train_data_batch_{i}.npz'
        labels = [1, 2, 999, 1000] if i == 1 or i is None else list(rng.integers(1, 1001, 4))
        np.savez(tmp_path/file, data=data, labels=np.array(labels), mean=np.zeros(3072))
    if named:
        rows = [f'n{i:08d} {i} name_{i // 2}' for i in range(1, 1001)]
        (tmp_path/'map_clsloc.txt').write_text('\n'.join(rows))
    classes = [f'name_{i // 2} (n{i:08d})' if named else str(i) for i in range(1, 1001)]
    dls = get_dls('imagenet32', tmp_path, bs=8)
    check(dls, (3, 32, 32), classes, 40, 4)
    assert dls.train_ds.y[:4].tolist() == [0, 1, 998, 999] and dls.record['augment']
    (tmp_path/'train_data_batch_7.npz').unlink()
    with pytest.raises(FileNotFoundError, match='train_data_batch_7.npz. Get it from https://image-net.org'):
        get_dls('imagenet32', tmp_path)
    (tmp_path/'train_data_batch_7.npz').write_bytes(b'garbage')
    with pytest.raises(ValueError, match='train_data_batch_7.npz is not a file of ImageNet32'):
        get_dls('imagenet32', tmp_path)


@pytest.fixture
def speech_folder(tmp_path, rng):
    "Speech Commands 0.02: a folder for each word, names of speakers with _nohash_; other words too."
    folder = tmp_path/'SpeechCommands'/'speech_commands_v0.02'
    for word in [*speech_words, 'marvin', '_background_noise_']:
        (folder/word).mkdir(parents=True)
        for i in range(8):
            length = 15000 if i == 7 else 16000                                 # a short one is left out
            sound = rng.integers(-2000, 2000, length).astype(np.int16)
            sound[0] = speech_words.index(word) if word in speech_words else -1
            wavfile.write(folder/word/f'{i:08x}_nohash_0.wav', 16000, sound)
    for name in 'validation_list.txt', 'testing_list.txt': (folder/name).write_text('')
    return tmp_path


@needs_torchaudio
def test_speechcommands(speech_folder):
    dls = get_dls('speechcommands', speech_folder, bs=8)
    check(dls, (1, 16000), speech_words, 49, 11)                                # 70 of 80: 7 for each word
    assert dls.train_ds.x.dtype == torch.int16 and abs(dls.one_batch()[0].std() - 1) < 0.05
    for ds in dls.train_ds, dls.valid_ds: assert torch.equal(ds.x[:, 0, 0].long(), ds.y)          # each sound its word
    assert (speech_folder/'SpeechCommands/flexconv_sc10.safetensors').exists()
    assert len(get_dls('speechcommands', speech_folder).train_ds) == 49         # from what was kept
    recordings = speech_folder/'SpeechCommands/speech_commands_v0.02'
    for word in speech_words:                                                   # more of them: read anew, also as MFCC
        get_dls('speechcommands_mfcc', speech_folder)
        shutil.copy(recordings/word/'00000000_nohash_0.wav', recordings/word/'00000009_nohash_0.wav')
    for name in 'speechcommands', 'speechcommands_mfcc':
        assert len(get_dls(name, speech_folder).train_ds) == 56                 # 70% of 80
    shutil.rmtree(recordings/'yes')
    with pytest.raises(ValueError, match='holds no recordings of yes'): get_dls('speechcommands', speech_folder)


@needs_torchaudio
def test_speechcommands_mfcc(speech_folder):
    import torchaudio
    dls = get_dls('speechcommands_mfcc', speech_folder, bs=8)
    check(dls, (20, 161), speech_words, 49, 11)
    x, _, _ = read_speechcommands(speech_folder, mfcc=True)
    sounds, _, _ = read_speechcommands(speech_folder)
    transform = torchaudio.transforms.MFCC(log_mels=True, n_mfcc=20, melkwargs=dict(n_fft=200, n_mels=64))
    torch.testing.assert_close(x[3], transform(sounds[3, 0].float()/32768))
    batch = torch.cat([x for x, _ in dls.train])
    assert batch.mean((0, 2)).abs().max() < 0.2 and (batch.std((0, 2)) - 1).abs().max() < 0.2
    learn = flex_learner(dls, 'flextcn2')
    assert learn.model(dls.one_batch()[0]).shape == (8, 10)


@needs_torchaudio
def test_recordings_of_another_kind(speech_folder):
    file = speech_folder/'SpeechCommands/speech_commands_v0.02/no/00000000_nohash_0.wav'
    wavfile.write(file, 8000, np.zeros(16000, np.int16))
    with pytest.raises(ValueError, match='00000000_nohash_0.wav must be 16-bit, mono, of 16,000 Hz; got .* 8000 Hz'):
        get_dls('speechcommands', speech_folder)


@pytest.mark.parametrize('name', ['speechcommands', 'speechcommands_mfcc'])
def test_without_torchaudio(name, tmp_path, monkeypatch):
    for module in [m for m in sys.modules if m.split('.')[0] == 'torchaudio']: monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, 'torchaudio', None)                        # an import of it fails
    with pytest.raises(ImportError, match='Speech Commands needs torchaudio.*pip install torchaudio'):
        get_dls(name, tmp_path)


def letters(rng, n=200):
    "Trajectories of 3 channels and different lengths, and their letters."
    names = list('abceghlmnopqrsuvwyz') + ['d']
    return [rng.standard_normal((3, 60 + i % 50)) + i % 20 for i in range(n)], [names[i % 20] for i in range(n)], names


@pytest.fixture
def uci_folder(tmp_path, rng):
    "UCI's file: a cell array of trajectories, numbers of letters from 1 and the letters."
    sequences, labels, names = letters(rng)
    cells = np.empty(len(sequences), object)
    for i, s in enumerate(sequences): cells[i] = s
    consts = dict(charlabels=np.array([names.index(label) + 1 for label in labels]), key=np.array(names, object))
    savemat(tmp_path/'mixoutALL_shifted.mat', dict(mixout=cells, consts=consts))
    return tmp_path


def test_chartrajectories(uci_folder, rng):
    dls = get_dls('chartrajectories', uci_folder, bs=16)
    classes = sorted('abceghlmnopqrsuvwyzd')
    x, _ = check(dls, (3, 109), classes, 140, 30)
    sequences, labels, _ = letters(np.random.default_rng(0))
    train, _, test = split_70_15_15(torch.tensor([classes.index(label) for label in labels]))
    i = test[4].item()
    got, length = dls.valid_ds.x[4], sequences[i].shape[1]
    torch.testing.assert_close(got[:, :length], torch.from_numpy(sequences[i]).float())
    assert (got[:, length:] == got[:, length-1:length]).all()                   # continued with the last values
    assert classes[dls.valid_ds.y[4]] == labels[i]
    batch = torch.cat([x for x, _ in get_dls('chartrajectories', uci_folder, bs=140).train])
    assert batch.mean((0, 2)).abs().max() < 1e-4 and (batch.std((0, 2)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize('percent', [30, 50, 70])
def test_dropped_samples(uci_folder, percent):
    name = f'chartrajectories{percent}'
    dls, whole = get_dls(name, uci_folder, bs=16), get_dls('chartrajectories', uci_folder)
    check(dls, (4, 109), list(whole.vocab), 140, 30)
    x, _ = next(iter(dls.valid))
    present = x[:, 3]
    assert set(present.unique().tolist()) == {0., 1.} and (present.sum(1) == 109 - int(1.09*percent)).all()
    assert (x[:, :3].transpose(1, 2)[present == 0] == 0).all()                  # missing: the mean
    kept = dls.valid_ds.x[:, :3].isfinite()
    assert torch.equal(dls.valid_ds.x[:, :3][kept], whole.valid_ds.x[kept])     # the others are as they were
    again, other = get_dls(name, uci_folder), get_dls(name, uci_folder, seed=1)
    assert torch.equal(again.valid_ds.x[:, 3], dls.valid_ds.x[:, 3])
    assert not torch.equal(other.valid_ds.x[:, 3], dls.valid_ds.x[:, 3])


def test_samples_are_dropped_as_in_the_papers():
    "The draw of their code: one generator, a permutation for each sequence, the first of it dropped."
    random, x = torch.Generator().manual_seed(56789), torch.zeros(3, 2, 50)
    got = drop_samples(x, 0.3)
    for i in range(3):
        removed = torch.randperm(50, generator=random)[:int(50*float(30)/100.0)]
        assert sorted(removed.tolist()) == got[i, 0].isnan().nonzero().flatten().tolist()


def test_the_split_is_that_of_the_papers():
    "Theirs splits values, ours indices."
    y = torch.arange(200) % 4
    values = torch.randn(200, 3)
    train, rest, _, rest_y = train_test_split(values, y, train_size=0.7, random_state=0, shuffle=True, stratify=y)
    valid, test = train_test_split(rest, train_size=0.5, random_state=1, shuffle=True, stratify=rest_y)
    for ours, theirs in zip(split_70_15_15(y), (train, valid, test)): assert torch.equal(values[ours], theirs)


@needs_aeon
def test_chartrajectories_of_uea(tmp_path, rng):
    sequences, _, _ = letters(rng)
    head = ('@problemName CharacterTrajectories\n@timeStamps false\n@missing false\n@univariate false\n@dimensions 3\n'
            '@equalLength false\n@classLabel true ' + ' '.join(str(i) for i in range(1, 21)) + '\n@data\n')
    row = lambda i: ':'.join(','.join(f'{v:.6f}' for v in channel) for channel in sequences[i]) + f':{i % 20 + 1}'
    for split, part in dict(TRAIN=range(100), TEST=range(100, 200)).items():
        (tmp_path/f'CharacterTrajectories_{split}.ts').write_text(head + '\n'.join(map(row, part)) + '\n')
    dls = get_dls('chartrajectories', tmp_path, bs=16)
    check(dls, (3, 109), [str(i) for i in range(1, 21)], 140, 30)
    train, _, test = split_70_15_15(torch.arange(200) % 20)
    i = train[7].item()
    got = dls.train_ds.x[7][:, :sequences[i].shape[1]]
    torch.testing.assert_close(got, torch.from_numpy(sequences[i]).float(), atol=1e-5, rtol=0)
    assert torch.equal(dls.train_ds.y, train % 20)


def test_ts_files_without_aeon(tmp_path, monkeypatch):
    for split in 'TRAIN', 'TEST': (tmp_path/f'CharacterTrajectories_{split}.ts').write_text('@data\n')
    for module in [m for m in sys.modules if m.split('.')[0] == 'aeon']: monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, 'aeon', None)
    with pytest.raises(ImportError, match=r'CharacterTrajectories in .ts files needs aeon.*pip install aeon'):
        get_dls('chartrajectories', tmp_path)


def test_a_matlab_file_that_is_something_else(tmp_path):
    savemat(tmp_path/'mixoutALL_shifted.mat', dict(x=np.zeros(3)))
    with pytest.raises(ValueError, match="is not UCI's file of character trajectories"):
        get_dls('chartrajectories', tmp_path)


@pytest.mark.parametrize('name, where', [('cifar100', 'cs.toronto.edu'), ('stl10', 'cs.stanford.edu'),
                                         ('imagenet32', 'image-net.org'), ('chartrajectories', 'archive.ics.uci.edu'),
                                         ('chartrajectories50', 'timeseriesclassification.com')])
def test_data_that_is_absent(name, where, tmp_path, monkeypatch):
    "Nothing is downloaded; the message says where to get it, and the path that must exist."
    monkeypatch.setattr('socket.socket.connect', lambda *a: pytest.fail('a download was tried'))
    monkeypatch.setattr('flexconv.data.fastai_path', lambda folder: tmp_path)
    for path in None, tmp_path:
        with pytest.raises(FileNotFoundError, match=rf'is not here: there is no {tmp_path}.*Get it from .*{where}'):
            get_dls(name, path)


@needs_torchaudio
def test_speech_that_is_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match='Get it from http://download.tensorflow.org.*speech_commands_v0.02'):
        get_dls('speechcommands', tmp_path)


def test_a_network_learns_from_dropped_samples(uci_folder):
    "A learner takes the sequences like any others; a batch can be split into samples and their presence."
    torch.manual_seed(0)
    dls = get_dls('chartrajectories30', uci_folder, bs=35)
    learn = flex_learner(dls, create_model('flextcn2', 4, 20, kernel_size=109, width=8, sigma=0.2))
    with learn.no_logging(), learn.no_bar(): learn.fit(8, 0.01)
    assert learn.validate()[0] < np.log(20) - 0.2
    x, _ = dls.one_batch()
    x = x.as_subclass(torch.Tensor)
    net = AtTimes(learn.model.eval())
    assert net(x, present=x[:, 3] > 0).shape == (35, 20)


def test_experiments():
    "The authors' published commands."
    known = paper_experiments()
    assert known['stl10-flexnet7'] | dict(epochs=100, bs=256, lr=0.01) == known['stl10-flexnet7']
    assert known['imagenet32-flexnet5'] | dict(bs=2048, lr=0.01) == known['imagenet32-flexnet5']
    assert resolve_config('imagenet32-flexnet5', {})['epochs'] == 350
    assert known['cifar100-flexnet7'] == known['cifar10-flexnet7'] | dict(data='cifar100')
    for data in 'speechcommands', 'speechcommands_mfcc', 'chartrajectories', 'chartrajectories70':
        assert resolve_config(None, dict(data=data))['model'] == 'flextcn2'
        assert known[f'{data}-flextcn4']['epochs'] == 200
    assert {cfg['data'] for cfg in known.values() if 'data' in cfg} | {'digits'} == set(data_sets)
