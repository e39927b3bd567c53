"Folders of images, their splits and records, test sets of one's own, and learners written to files."
import json, random, re, shutil, warnings, zlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from flexconv.cli import flexconv_eval, flexconv_train
from flexconv.data import get_dls, record_dls
from flexconv.folders import check_record, divide, folder_record, hold_out, labelled_images, trained_on
from flexconv.tensors import common_size, label_numbers, open_image
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from flexconv.learner import flex_learner
from flexconv.runs import export_weights, load_run
from torch import nn


def write(path, files, size=(10, 12), mode='RGB'):
    "Random images; the folder."
    for f in files:
        rng = np.random.default_rng(zlib.crc32(f.encode()))                   # no two are equal
        (path/f).parent.mkdir(parents=True, exist_ok=True)
        array = rng.integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
        Image.fromarray(array if mode == 'RGB' else array[..., 0]).save(path/f)
    return path


def pictures(n, *folders): return [f'{folder}/{i}.png' for folder in folders for i in range(n)]


def small_net(classes=2): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(classes))


def learner(dls, net=None):
    net = net or small_net(len(dls.vocab))
    net(dls.one_batch()[0])                   # shapes of the lazy layer
    return flex_learner(dls, net)


@pytest.fixture
def folder(tmp_path): return write(tmp_path/'pets', pictures(10, 'cat', 'dog', 'emu'))


# Splits

def relative(files, path): return [f.relative_to(path).as_posix() for f in files]


def test_split_does_not_depend_on_the_order_of_the_file_system(folder, monkeypatch):
    import flexconv.folders as folders
    want, get = divide(folder), folders.get_files
    for seed in range(5):
        def shuffled(path):
            files = list(get(path))
            random.Random(seed).shuffle(files)
            return files
        monkeypatch.setattr(folders, 'get_files', shuffled)
        assert divide(folder) == want and [list(d) for d in divide(folder)] == [list(d) for d in want]


def test_split_of_a_copy_is_the_split(folder, tmp_path):
    copy, files = tmp_path/'copy', pictures(10, 'cat', 'dog', 'emu')
    for f in reversed(files):                 # made in the other order
        (copy/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder/f, copy/f)
    a, b = get_dls(folder, bs=4), get_dls(str(copy), bs=4)
    for part in 'train_ds', 'valid_ds':
        assert relative(getattr(a, part).files, folder) == relative(getattr(b, part).files, copy)
    assert {**a.record, 'name': ''} == {**b.record, 'name': ''}


def test_split_follows_seed_and_part_and_loses_nothing(folder):
    train, valid = divide(folder, 0.3, seed=1)
    assert not set(train) & set(valid) and len(train) + len(valid) == 30
    assert [list(valid.values()).count(c) for c in ('cat', 'dog', 'emu')] == [3, 3, 3]
    assert divide(folder, 0.3, seed=2) != (train, valid) == divide(folder, 0.3, seed=1)


def test_hold_out_leaves_every_class_a_training_image():
    labels = {'a/1.png': 'a', 'b/1.png': 'b', 'b/2.png': 'b'}
    assert hold_out(labels, 0.99, 0) in (['b/1.png'], ['b/2.png'])
    with pytest.raises(ValueError, match='no class has two images'): hold_out({'a/1.png': 'a', 'b/1.png': 'b'}, 0.5, 0)


@pytest.mark.parametrize('train', ['train', 'training', 'Train'])
@pytest.mark.parametrize('valid', ['val', 'valid', 'validation', 'test', 'testing', 'VAL'])
def test_names_of_splits(tmp_path, train, valid):
    write(tmp_path, pictures(3, f'{train}/a', f'{train}/b') + pictures(2, f'{valid}/a', f'{valid}/b'))
    dls = get_dls(tmp_path, bs=2)
    assert all(f.parts[-3] == train for f in dls.train_ds.files) and len(dls.train_ds) == 6
    assert all(f.parts[-3] == valid for f in dls.valid_ds.files) and len(dls.valid_ds) == 4
    assert list(dls.vocab) == ['a', 'b'] and dls.valid_ds.y.tolist() == [0, 0, 1, 1]


def test_valid_comes_before_test(tmp_path):
    write(tmp_path, pictures(2, 'train/a', 'train/b', 'val/a', 'test/b') + ['test/loose.png'])
    assert {f.parts[-3] for f in get_dls(tmp_path).valid_ds.files} == {'val'}


def test_a_class_without_validation_images_is_named(tmp_path):
    write(tmp_path, pictures(2, 'train/a', 'train/b', 'val/b'))
    (tmp_path/'val/a').mkdir()
    with pytest.warns(RuntimeWarning, match='has no images for validation of a$'): divide(tmp_path)
    write(tmp_path, pictures(2, 'val/a'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        divide(tmp_path)


AB = pictures(4, 'train/a', 'train/b')
LAYOUTS = {                                   # files, folders without files, options, what the error says
    'no images': ([], ['a', 'b'], {}, 'holds no images'),
    'loose images': (['1.png', '2.png'], [], {}, r'found 1.png, 2.png'),
    'loose beside classes': (pictures(2, 'a', 'b') + ['x.png'], [], {}, 'found x.png'),
    'one class': (pictures(4, 'a'), [], {}, r"at least 2 classes, each in its own folder; found \['a'\]"),
    'one class in train': (pictures(4, 'train/a', 'val/a'), [], {}, r"at least 2 classes"),
    'empty class': (pictures(4, 'a', 'b'), ['c'], {}, 'found none in c'),
    'empty class in train': (AB + pictures(2, 'val/a'), ['train/c'], {}, 'found none in c'),
    'nested classes': (pictures(2, 'a/x', 'a/y', 'b/x'), [], {}, 'found a/x/0.png'),
    'nested in train': (AB + pictures(2, 'train/a/x', 'val/a'), [], {}, 'found train/a/x/0.png'),
    'folder of a folder': (pictures(2, 'pets/train/a', 'pets/train/b', 'pets/val/a'), [], {},
                           'found pets/train/a/0.png'),
    'unlabelled train': (['train/1.png', 'val/a/1.png'], [], {}, 'train/CLASS/IMAGE; found train/1.png'),
    'unlabelled valid': (AB + ['val/1.png'], [], {}, 'val/CLASS/IMAGE; found val/1.png'),
    'unlabelled test': (AB + ['test/1.png', 'test/2.png'], [], {},
                        'no labelled images .* found 2 images in test, 8 images in train'),
    'half-labelled test': (AB + ['test/a/1.png', 'test/2.png'], [], {}, 'no labelled images'),
    'train alone': (AB, [], {}, 'no labelled images .* found 8 images in train'),
    'empty valid': (AB, ['val'], {}, 'no labelled images .* 0 images in val'),
    'valid alone': (pictures(2, 'val/a', 'val/b'), [], {}, 'must hold train beside val'),
    'test alone': (pictures(2, 'test/a', 'test/b'), [], {}, 'must hold train beside test'),
    'val and valid': (AB + pictures(2, 'val/a', 'valid/a'), [], {}, 'holds both val and valid'),
    'test and testing': (AB + pictures(2, 'test/a', 'testing/a'), [], {}, 'holds both test and testing'),
    'others beside train': (AB + pictures(2, 'val/a', 'extra/a'), [], {},
                            'found extra/a/0.png, extra/a/1.png beside train, val'),
    'a class beside train': (AB + pictures(2, 'a'), [], dict(valid_pct=0.5), 'found a/0.png'),
    'unknown class in valid': (AB + pictures(2, 'val/a', 'val/cat'), [], {}, 'must be among a, b; found cat'),
    'unknown class in test': (AB + pictures(2, 'test/a', 'test/cat'), [], {}, 'must be among a, b; found cat'),
    'part of a divided folder': (AB + pictures(2, 'val/a'), [], dict(valid_pct=0.5),
                                 'valid_pct is for folders without'),
    'part of all': (pictures(4, 'a', 'b'), [], dict(valid_pct=1.), 'valid_pct must be a number'),
    'one image per class': (pictures(1, 'a', 'b'), [], {}, 'no class has two images'),
}


@pytest.mark.parametrize('case', LAYOUTS)
def test_what_is_not_understood_is_an_error(tmp_path, case):
    files, empty, options, said = LAYOUTS[case]
    write(tmp_path, files)
    for e in empty: (tmp_path/e).mkdir(parents=True, exist_ok=True)
    with pytest.raises((ValueError, FileNotFoundError), match=said): get_dls(tmp_path, **options)


@pytest.mark.parametrize('more', [[], ['test/1.png', 'test/2.png'], pictures(2, 'test/a')])
def test_part_of_train_on_request(tmp_path, more):
    write(tmp_path, AB + more)
    dls = get_dls(tmp_path, bs=2, valid_pct=0.25)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (6, 2) and not set(dls.train_ds.files) & set(dls.valid_ds.files)
    assert {f.parts[-3] for f in dls.valid_ds.files} == {'train'}


def test_hidden_files_are_no_images(folder):
    for f in '.ipynb_checkpoints/1.png', '__MACOSX/cat/1.png', 'cat/._1.png', 'cat/.ipynb_checkpoints/1.png':
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        (folder/f).write_bytes(b'no image')
    (folder/'readme.txt').write_text('words')
    assert get_dls(folder).record['train_items'] == 24


# Files

def gradient(size=(8, 4)):
    w, h = size
    return np.linspace(0, 65535, w*h).reshape(h, w).astype(np.uint16)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    array = np.zeros((4, 8, 3), np.uint8); array[0, 0] = 255              # the corner says how it was turned
    exif = Image.Exif(); exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path/'a.png', exif=exif)
    im = open_image(tmp_path/'a.png')
    turned = {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.transpose(1, 0, 2),
              6: np.rot90(array, -1), 7: array[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(array, 1)}[orientation]
    assert np.array_equal(np.asarray(im), turned)


def test_exif_counts_for_the_common_size(tmp_path):
    write(tmp_path, pictures(3, 'a', 'b'), size=(8, 4))
    exif = Image.Exif(); exif[0x0112] = 6
    Image.new('RGB', (4, 8)).save(tmp_path/'a'/'0.png', exif=exif)
    assert get_dls(tmp_path, bs=2).record['size'] == [4, 8]


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_size_of_photographs(tmp_path, orientation):
    exif = Image.Exif(); exif[0x0112] = orientation
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(2): Image.new('RGB', (320, 200)).save(tmp_path/c/f'{i}.jpg', exif=exif)
    dls = get_dls(tmp_path, bs=2)
    assert dls.record['size'] == ([320, 200] if orientation > 4 else [200, 320])
    assert list(dls.one_batch()[0].shape[2:]) == dls.record['size']


def test_16_bits(tmp_path):
    for name in 'a.png', 'a.tif':
        Image.fromarray(gradient()).save(tmp_path/name)
        want = (gradient()/257).round()
        assert np.array_equal(np.asarray(open_image(tmp_path/name)), np.stack([want]*3, -1))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr'])
def test_modes(tmp_path, mode):
    array = np.zeros((4, 8, 3), np.uint8); array[:, :4] = 255
    name = 'a.tif' if mode in ('CMYK', 'YCbCr') else 'a.png'
    Image.fromarray(array).convert(mode).save(tmp_path/name)
    im = open_image(tmp_path/name)
    assert im.mode == 'RGB' and np.abs(np.asarray(im).astype(int) - array).max() <= 2


@pytest.mark.parametrize('mode', ['F', 'I'])
def test_numbers_of_no_known_range(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path/'a.tif')
    with pytest.raises(ValueError, match=f'a.tif .*mode {mode}'): open_image(tmp_path/'a.tif')


@pytest.mark.parametrize('ending', ['gif', 'png', 'tif', 'webp'])
def test_animations(tmp_path, ending):
    frames = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (0, 120, 255)]
    frames[0].save(tmp_path/f'a.{ending}', save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=f'a.{ending} .*holds 3 pictures'): open_image(tmp_path/f'a.{ending}')


def test_first_picture_of_a_photograph(tmp_path):
    a, b = Image.new('RGB', (8, 8), (200, 0, 0)), Image.new('RGB', (8, 8))
    a.save(tmp_path/'a.jpg', format='MPO', save_all=True, append_images=[b])
    assert np.asarray(open_image(tmp_path/'a.jpg'))[..., 0].min() > 190


@pytest.mark.parametrize('content', ['cut', 'empty', 'text'])
def test_damaged_files_are_named(folder, content):
    file = folder/'dog'/'7.png'
    file.write_bytes(dict(cut=file.read_bytes()[:150], empty=b'', text=b'<html>not found</html>')[content])
    with pytest.raises(ValueError, match=r'1 of 30 files are not readable images.*dog/7.png'): get_dls(folder)


def test_mixed_sizes_and_modes(tmp_path):
    write(tmp_path, pictures(3, 'a', 'b'))
    write(tmp_path, pictures(3, 'c'), size=(20, 9), mode='L')
    with pytest.raises(ValueError, match=r'different sizes, so size must be given; got .*10x12.*20x9'):
        get_dls(tmp_path)
    assert get_dls(tmp_path, size=8, bs=3).one_batch()[0].shape == (3, 3, 8, 8)


def test_values_are_those_of_the_files(folder):
    dls = get_dls(folder, bs=4)
    x, y = next(iter(dls.valid))
    arrays = [torch.from_numpy(np.array(Image.open(f))) for f in dls.valid_ds.files[:4]]
    rgb = torch.stack(arrays).permute(0, 3, 1, 2)/255
    mean, std = (torch.tensor(dls.record[k]).view(3, 1, 1) for k in ('mean', 'std'))
    torch.testing.assert_close(x.as_subclass(torch.Tensor), (rgb - mean)/std)
    assert y.tolist() == [list(dls.vocab).index(f.parent.name) for f in dls.valid_ds.files[:4]]


# Records

def test_record_is_json_and_makes_the_same_dls(folder):
    dls = get_dls(folder, bs=4, size=8, valid_pct=0.3, seed=5)
    record = json.loads(json.dumps(dls.record))
    assert record == dls.record == folder_record(folder, 8, 0.3, 5)
    want = dict(classes=['cat', 'dog', 'emu'], num_classes=3, channels=3, size=[8, 8], input_shape=[3, 8, 8], seed=5,
                valid_pct=0.3, train_items=21, valid_items=9)
    assert {k: record[k] for k in want} == want
    again = record_dls(record, folder, bs=4)
    assert again.train_ds.files == dls.train_ds.files and again.valid_ds.files == dls.valid_ds.files
    for (x, y), (v, w) in zip(dls.valid, again.valid): assert torch.equal(x, v) and torch.equal(y, w)


def test_changes_are_named(folder):
    record = folder_record(folder)
    check_record(record, folder)
    write(folder, ['cat/new.png'])
    (folder/'dog'/'1.png').unlink()
    (folder/'emu'/'only.png').write_bytes((folder/'emu'/'2.png').read_bytes() + b'0')
    with pytest.raises(ValueError, match='came: cat/new.png, emu/only.png; went: dog/1.png'):
        check_record(record, folder)


def test_moves_are_named(tmp_path):
    write(tmp_path, pictures(3, 'train/a', 'train/b', 'val/a', 'val/b') + ['test/a/1.png'])
    (tmp_path/'train'/'a'/'seven.png').write_bytes((tmp_path/'train'/'a'/'1.png').read_bytes())
    record = folder_record(tmp_path)
    (tmp_path/'test'/'a'/'1.png').unlink()                # nothing was made of the test set
    check_record(record, tmp_path)
    (tmp_path/'train'/'a'/'seven.png').rename(tmp_path/'val'/'a'/'seven.png')
    with pytest.raises(ValueError, match='moved: train/a/seven.png to val/a/seven.png$'): check_record(record, tmp_path)
    with pytest.raises(ValueError, match='moved'): record_dls(record, tmp_path)


def test_changed_content_is_named(folder):
    record = folder_record(folder)
    Image.new('RGB', (10, 12)).save(folder/'cat'/'0.png')
    with pytest.raises(ValueError, match='changed: cat/0.png$'): check_record(record, folder)


def test_record_without_the_folder(folder, tmp_path):
    other = write(tmp_path/'other', pictures(3, 'dog', 'cat'), size=(14, 14))
    dls = get_dls(folder, bs=4)
    learn = learner(dls)
    want = learn.get_preds(dl=dls.test_dl(labelled_images(other, dls.vocab)))
    record = json.loads(json.dumps(dls.record))
    shutil.rmtree(folder)
    new = record_dls(record)
    assert list(new.vocab) == ['cat', 'dog', 'emu'] and len(new.train_ds) == len(new.valid_ds) == 0
    got = flex_learner(new, learn.model).get_preds(dl=new.test_dl(labelled_images(other, new.vocab)))
    assert torch.equal(got[0], want[0]) and got[1].tolist() == want[1].tolist() == [0]*3 + [1]*3
    with pytest.raises(FileNotFoundError, match='is no folder'): record_dls(record, folder)


@pytest.mark.parametrize('name, size', [('digits', None), ('digits', 12), ('sdigits', None)])
def test_record_of_a_set_in_memory(name, size):
    dls = get_dls(name, size=size, max_items=64)
    record = json.loads(json.dumps(dls.record))
    assert record == dls.record and record['input_shape'] == list(dls.one_batch()[0].shape[1:])
    new, images = record_dls(record), dls.valid_ds.x[:5]
    (x,), (want, _) = next(iter(new.test_dl(images))), next(iter(dls.valid.new(bs=5)))
    assert torch.equal(x, want) and new.vocab == dls.vocab
    with pytest.raises(ValueError, match='record must be of a folder'): record_dls(record, '.')


def test_labelled_images(folder, tmp_path):
    assert labelled_images(folder, ['cat', 'dog', 'emu'])[0] == (folder/'cat'/'0.png', 'cat')
    with pytest.raises(ValueError, match='among cat, dog; .* has emu'): labelled_images(folder, ['cat', 'dog'])
    divided = write(tmp_path/'divided', pictures(1, 'train/cat', 'test/cat', 'test/dog'))
    assert [c for _, c in labelled_images(divided, ['cat', 'dog'])] == ['cat', 'dog']
    with pytest.raises(FileNotFoundError, match='is no folder'): labelled_images(tmp_path/'nowhere', ['a'])


def test_images_that_were_trained_on_are_known_wherever_they_lie(folder, tmp_path):
    "An undivided folder whose images were moved into train and val later."
    record = get_dls(folder, bs=4).record
    for name in ('cat', 'dog', 'emu'): shutil.copytree(folder/name, tmp_path/'moved'/'val'/name)
    for f in pictures(2, 'cat', 'dog', 'emu'): write(tmp_path/'moved'/'train', [f])
    with pytest.warns(RuntimeWarning, match='was trained on 24 of 30 of these images'):
        labelled_images(tmp_path/'moved', ['cat', 'dog', 'emu'], record)
    later = dict(files=dict(train={}, valid={f'val/{f}': n for f, n in record['files']['train'].items()}))
    assert trained_on(later, record).startswith('24 of 24 validation images')


# Test sets

def test_labels_are_numbers_or_names():
    vocab = ['a', 'b', 'c']
    assert label_numbers(['c', 0, np.int64(1), torch.tensor(2)], vocab).tolist() == [2, 0, 1, 2]
    for bad in 'd', 3, -1, 1.5, None, True:
        with pytest.raises(ValueError, match='label must be one of the classes a, b, c'): label_numbers([bad], vocab)


@pytest.mark.parametrize('name', ['digits', 'sdigits'])
def test_labels_of_pairs_are_kept(name):
    dls = get_dls(name, max_items=64)
    keep = [3, 100, 7, 42]
    items = [(dls.valid_ds.x[i], int(dls.valid_ds.y[i])) for i in keep]
    test = dls.test_dl(items, with_labels=True)
    x, y = next(iter(test))
    assert y.tolist() == dls.valid_ds.y[keep].tolist() and torch.equal(test.dataset.x, dls.valid_ds.x[keep])
    named = dls.test_dl([(x, dls.vocab[y]) for x, y in items], with_labels=True)
    assert torch.equal(named.dataset.y, test.dataset.y)
    with pytest.raises(ValueError, match='2 of 4 are'): dls.test_dl(items[:2] + [x for x, _ in items[2:]])


def test_accuracy_is_that_of_the_labels():
    dls = get_dls('digits', max_items=64)
    learn = learner(dls)
    items = [(dls.valid_ds.x[i], int(dls.valid_ds.y[i])) for i in range(50)]
    with learn.no_bar(), learn.no_logging():
        loss, accuracy = learn.validate(dl=dls.test_dl(items, with_labels=True))
        scores = learn.get_preds(dl=dls.test_dl([x for x, _ in items]))
        assert accuracy == pytest.approx((scores[0].argmax(1) == dls.valid_ds.y[:50]).float().mean().item())
        assert loss == pytest.approx(F.nll_loss(scores[0].log(), dls.valid_ds.y[:50].long()).item(), rel=1e-4)
        assert scores[1] is None or len(scores[1]) == 0
        assert list(learn.validate(dl=dls.test_dl([x for x, _ in items]))) == [None, None]


@pytest.mark.parametrize('kind', ['digits', 'sdigits', 'folder'])
def test_top_losses_and_results_show_the_sets_own_pictures(kind, folder, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    if kind == 'folder':
        dls = get_dls(folder, bs=4)
        other = write(tmp_path/'other', pictures(2, 'cat', 'emu'))
        for i, f in enumerate(sorted(other.glob('*/*.png'))): Image.new('RGB', (10, 12), (60*i, 0, 0)).save(f)
        items = labelled_images(other, dls.vocab)
    else:
        dls = get_dls(kind, max_items=64)
        items = [(torch.full((1, 8, 8), 60*i, dtype=torch.uint8), i) for i in range(4)]
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(len(dls.vocab)))
    learn = learner(dls, net)
    test = dls.test_dl(items, with_labels=True)
    own = torch.cat([x for x, _ in test]).as_subclass(torch.Tensor)
    with learn.no_bar():
        interp = ClassificationInterpretation.from_learner(learn, dl=test)
        losses, idx, pairs = interp.top_losses(items=True)
        want = F.cross_entropy(net(own), torch.cat([y for _, y in test]).as_subclass(torch.Tensor), reduction='none')
        torch.testing.assert_close(losses.as_subclass(torch.Tensor), want.detach()[idx])
        shown, _, labels, _, _ = interp[idx]
        assert torch.equal(shown.as_subclass(torch.Tensor), own[idx])
        assert labels.tolist() == test.dataset.y[idx].tolist()
        assert [label for _, label in pairs] == labels.tolist()
        interp.plot_top_losses(4, nrows=2)
        titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
        assert [t.split('/')[1].strip() for t in titles] == [str(dls.vocab[i]) for i in labels]
        assert [float(t.split('/')[2]) for t in titles] == pytest.approx(losses.tolist(), abs=0.006)
        interp.show_results([0, 1])
        learn.show_results(dl=test, shuffle=False)
    if kind == 'sdigits':
        shown = [ax for ax in plt.gcf().axes if ax.lines]                                         # one grid for all
        said = [ax.get_title().splitlines() for ax in shown]
        guesses = [dls.vocab[i] for i in net(own).argmax(1)]
        assert said == [[str(dls.vocab[y]), str(guess)] for y, guess in zip(test.dataset.y, guesses)]
        assert [ax.title.get_color() == 'green' for ax in shown] == [label == guess for label, guess in said]
        dls.show_batch(max_n=3, nrows=1, lw=2)
        shown = [ax for ax in plt.gcf().axes if ax.lines]
        assert len(shown) == 3 and shown[0].lines[0].get_linewidth() == 2
        assert {ax.get_title() for ax in shown} <= set(map(str, dls.vocab))
        dls.test_dl([x for x, _ in items]).show_batch()                                           # no labels
        assert [ax.get_title() for ax in plt.gcf().axes if ax.lines] == ['']*4
    with learn.no_bar(): learn.show_results(dl=dls.test_dl([x for x, _ in items]))                # no labels
    guesses = [str(dls.vocab[i]) for i in net(own).argmax(1)]
    assert [ax.get_title() for ax in plt.gcf().axes if ax.get_title()] == guesses
    plt.close('all')


def test_predict(folder):
    dls = get_dls(folder, bs=4)
    learn = learner(dls)
    with learn.no_bar():
        file, image = folder/'cat'/'0.png', Image.open(folder/'cat'/'0.png')
        scores = [learn.predict(s)[2] for s in (file, str(file), image, np.array(image), file.read_bytes())]
    for s in scores[1:]: assert torch.equal(s, scores[0])
    assert learn.predict(folder/'cat'/'0.png')[0] in dls.vocab


@pytest.mark.parametrize('items', ['cat/0.png', [np.zeros((4, 4))], [3]])
def test_no_images(folder, items):
    with pytest.raises(ValueError, match='items must be a list of images|is not a readable image: it must be a path'):
        list(get_dls(folder, bs=4).test_dl(items))


# Export

@pytest.mark.parametrize('kind', ['digits', 'sdigits', 'folder'])
def test_export(kind, folder, tmp_path):
    dls = get_dls(folder if kind == 'folder' else kind, bs=8)
    learn = learner(dls, nn.Sequential(nn.Flatten(), nn.LazyLinear(len(dls.vocab))))
    item = dls.valid_ds.items[0][0]
    with learn.no_bar(): want = learn.predict(item)
    learn.export(tmp_path/'a.pkl')
    assert learn.dls is dls and sorted(p.name for p in tmp_path.glob('a.pkl*')) == ['a.pkl']
    with pytest.warns(UserWarning, match='insecure'): new = load_learner(tmp_path/'a.pkl')
    with new.no_bar(): got = new.predict(item)
    assert got[0] == want[0] and torch.equal(got[2], want[2]) and new.dls.record == dls.record


def test_export_holds_no_images(tmp_path):
    dls = get_dls('digits', max_items=100)
    small, large = learner(dls), learner(get_dls('digits'))
    small.export(tmp_path/'a.pkl'); large.export(tmp_path/'b.pkl')
    sizes = [(tmp_path/f'{f}.pkl').stat().st_size for f in 'ab']
    assert abs(sizes[0] - sizes[1]) < 1000                  # 1,337 images more, of 64 bytes at least
    empty = dls.new_empty()
    assert all(d.x.untyped_storage().nbytes() == 0 and len(d) == 0 for d in (empty.train_ds, empty.valid_ds))


def test_failed_export_changes_nothing(tmp_path):
    dls = get_dls('digits', max_items=100)
    learn = learner(dls)
    learn.create_opt()
    learn.export(tmp_path/'a.pkl')
    before, opt = (tmp_path/'a.pkl').read_bytes(), learn.opt
    import threading
    learn.other = threading.Lock()            # cannot be pickled
    with pytest.raises(TypeError, match='pickle'): learn.export(tmp_path/'a.pkl')
    assert learn.dls is dls and learn.opt is opt and len(learn.dls.train_ds) == 100
    assert (tmp_path/'a.pkl').read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['a.pkl']


# Plain loops

@pytest.mark.parametrize('kind', ['digits', 'sdigits', 'folder'])
def test_plain_loop(kind, folder):
    torch.manual_seed(0)
    dls = get_dls(folder if kind == 'folder' else kind, bs=8, plain=True)
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(len(dls.vocab)))
    opt = torch.optim.SGD((net(dls.one_batch()[0]), net)[1].parameters(), 0.01)
    for x, y in dls.train:
        assert type(x) is type(y) is torch.Tensor
        loss = F.cross_entropy(net(x), y, label_smoothing=.1)
        opt.zero_grad(); loss.backward(); opt.step()
        assert type(loss) is torch.Tensor
    assert type(next(iter(dls.valid))[0]) is torch.Tensor
    learn = learner(dls, net)                 # a Learner takes them as well
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.show_results()
    assert [type(t) for t in next(iter(dls.test_dl([dls.valid_ds.items[0][0]])))] == [torch.Tensor]


@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(label_smoothing=0.1), F.cross_entropy, F.multi_margin_loss,
                                       lambda logits, y: F.mse_loss(logits, F.one_hot(y, 10).float()),
                                       lambda logits, y: -logits.log_softmax(1)[torch.arange(len(y)), y].mean()])
def test_fastai_batches_in_a_plain_loop(loss_func):
    x, y = get_dls('digits', max_items=64).one_batch()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    loss = loss_func(net(x), y)
    plain_x, plain_y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    assert torch.equal(loss.as_subclass(torch.Tensor), loss_func(net(plain_x), plain_y))
    loss.backward()
    hits = net(x).topk(5)[1].eq(y[:, None]).any(1).sum() + (net(x).argmax(1) == y).sum()
    assert net[1].weight.grad.abs().max() > 0 and 0 <= hits <= 128


# Runs

def test_a_run_keeps_its_split(folder, tmp_path, capsys):
    from flexconv.cli import flexconv_eval, flexconv_train
    run = tmp_path/'run'
    options = dict(data=str(folder), model='flexnet3', width=4, epochs=1, bs=8, device='cpu')
    flexconv_train(**options, out=str(run))
    record = json.loads((run/'data.json').read_text())
    assert record == get_dls(folder, bs=8).record | dict(name=record['name'])
    flexconv_eval(str(run), device='cpu')
    assert 'on 6 items' in capsys.readouterr().out
    other = folder_record(folder, seed=1)
    (run/'data.json').write_text(json.dumps(other))
    with pytest.raises(SystemExit): flexconv_eval(str(run), device='cpu')
    assert 'otherwise than this version does' in capsys.readouterr().err
    (run/'data.json').write_text(json.dumps(record))
    (folder/'cat'/'new.png').write_bytes((folder/'cat'/'0.png').read_bytes())
    for command in (lambda: flexconv_eval(str(run), device='cpu'),
                    lambda: flexconv_train(resume=str(run), device='cpu')):
        with pytest.raises(SystemExit): command()
        assert 'came: cat/new.png' in capsys.readouterr().err


def divided(path, splits):
    random = np.random.RandomState(0)
    for split, n in splits.items():
        for c in range(2):
            (path/split/f'c{c}').mkdir(parents=True)
            for i in range(n):
                image = random.randint(0, 255, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(image).save(path/split/f'c{c}'/f'{i}.png')
    return path


def test_best_epoch_early_stopping_and_augmentation(tmp_path, capsys, monkeypatch):
    from flexconv.cli import flexconv_eval, flexconv_train
    from flexconv.files import read_csv
    monkeypatch.chdir(tmp_path)
    data, run = divided(tmp_path/'p', dict(train=12, valid=8)), tmp_path/'run'
    options = dict(data=str(data), width=4, bs=8, device='cpu')
    flexconv_train(**options, epochs=9, patience=2, keep_best=True, augment=True, out=str(run))
    rows = [float(row['accuracy']) for row in read_csv(run/'metrics.csv')]
    best = rows.index(max(rows))
    assert len(rows) == 9 or len(rows) - 1 - best == 2
    assert f'Best epoch: {best}, accuracy {100*max(rows):.2f}%' in capsys.readouterr().out
    assert json.loads((run/'data.json').read_text())['augment'] is True
    flexconv_eval(str(run/'best.safetensors'), data=str(data), device='cpu')
    assert f'accuracy {100*max(rows):.2f}%' in capsys.readouterr().out
    flexconv_train(resume=str(run))                                   # what was stopped early stays stopped
    assert len(read_csv(run/'metrics.csv')) == len(rows)


@pytest.mark.parametrize('options', [dict(keep_best=True), dict(patience=3)])
@pytest.mark.parametrize('data', ['digits', 'with a test set'])
def test_nothing_is_chosen_on_a_test_set(data, options, tmp_path, capsys):
    from flexconv.cli import flexconv_train
    if data != 'digits': data = str(divided(tmp_path/'p', dict(train=6, test=3)))
    with pytest.raises(SystemExit): flexconv_train(data=data, epochs=1, width=4, out=str(tmp_path/'run'), **options)
    said = capsys.readouterr().err
    assert f'--{next(iter(options))}' in said and 'test set' in said and '--valid_pct' in said
    assert not (tmp_path/'run').exists()


def test_augmented_folder(tmp_path):
    data = divided(tmp_path/'p', dict(train=6, valid=3))
    dls = get_dls(data, bs=4, augment=True)
    torch.manual_seed(0)
    first, second = (dls.train.new(shuffle=False).one_batch()[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(dls.valid.one_batch()[0], dls.valid.one_batch()[0])
    assert dls.record['augment'] and not get_dls(data, bs=4).record['augment']


# What a network was trained on is not what it is measured on

@pytest.fixture
def trained(folder, tmp_path):
    "A run on the folder, 24 images to train on and 6 held out."
    done = tmp_path/'run'
    flexconv_train(data=str(folder), epochs=1, width=4, kernel_size=5, bs=8, size=10, device='cpu', out=str(done))
    return done


def evaluated(capsys, *args, **kwargs):
    "How many items `flexconv_eval` says it counted."
    capsys.readouterr()
    flexconv_eval(*map(str, args), device='cpu', **{k: str(v) for k, v in kwargs.items()})
    return int(re.search(r'on (\d+) items', capsys.readouterr().out)[1])


def test_an_evaluation_leaves_out_what_was_trained_on(trained, folder, tmp_path, capsys):
    copy, other = tmp_path/'copy', write(tmp_path/'other', pictures(3, 'cat', 'dog', 'emu'), size=(11, 12))
    shutil.copytree(folder, copy)
    export_weights(trained, tmp_path/'w.safetensors')
    for source in trained, trained/'model.safetensors', tmp_path/'w.safetensors':
        assert evaluated(capsys, source) == evaluated(capsys, source, data=copy) == 6
        assert evaluated(capsys, source, data=other) == 9
    (copy/'cat'/'1.png').rename(copy/'cat'/'one.png')
    with pytest.raises(SystemExit): flexconv_eval(str(trained), data=str(copy), device='cpu')
    assert 'copy is not as it was when it was split: came: cat/one.png; went: cat/1.png' in capsys.readouterr().err


def test_only_an_evaluation_on_the_runs_own_data_draws_its_confusion(trained, folder, tmp_path):
    other = write(tmp_path/'other', pictures(3, 'cat', 'dog', 'emu'), size=(11, 12))
    flexconv_eval(str(trained), data=str(other), device='cpu')
    assert not (trained/'confusion.png').exists()
    flexconv_eval(str(trained), device='cpu')
    assert (trained/'confusion.png').exists()


def test_a_warm_start_on_another_split_says_so(trained, folder, tmp_path, capsys):
    options = dict(epochs=1, width=4, kernel_size=5, bs=8, size=10, device='cpu', init=str(trained))
    flexconv_train(data=str(folder), out=str(tmp_path/'same'), **options)
    assert 'was trained on' not in capsys.readouterr().err
    flexconv_train(data=str(folder), seed=1, out=str(tmp_path/'other'), **options)
    held, known = divide(folder, seed=1)[1], divide(folder)[0]
    assert f'was trained on {len(set(held) & set(known))} of 6 validation images' in capsys.readouterr().err


def test_trained_on_of_data_sets_in_memory():
    record = lambda **kw: dict(name='digits', seed=0, valid_pct=None) | kw
    assert trained_on(record(), record(valid_pct=0.2)) == ''                              # a test set
    assert trained_on(record(valid_pct=0.2), record(valid_pct=0.2)) == ''
    for other in dict(seed=1), dict(valid_pct=0.1), dict(valid_pct=None):
        assert 'give the seed and valid_pct' in trained_on(record(valid_pct=0.2), record(**dict(valid_pct=0.2) | other))
    assert trained_on(record(valid_pct=0.2), record(name='mnist')) == ''


@pytest.mark.parametrize('change', [dict(seed=3), dict(valid_pct=0.5), dict(max_items=90)])
def test_a_run_does_not_go_on_with_another_split(change, tmp_path, capsys):
    done = tmp_path/'run'
    flexconv_train(epochs=1, width=4, valid_pct=0.2, max_items=100, device='cpu', out=str(done))
    cfg = json.loads((done/'config.json').read_text())
    (done/'config.json').write_text(json.dumps(cfg | change))
    with pytest.raises(SystemExit): flexconv_train(resume=str(done), epochs=2, device='cpu')
    assert f'written for other values of {next(iter(change))}' in capsys.readouterr().err


def test_weights_of_a_resumed_run_say_what_they_are(tmp_path):
    done = tmp_path/'run'
    flexconv_train(epochs=1, width=4, max_items=64, device='cpu', out=str(done))
    flexconv_train(resume=str(done), device='cpu')
    assert load_run(done/'model.safetensors', 'cpu').dls.record['name'] == 'digits'


@pytest.mark.parametrize('link,target', [('valid', 'train'), ('valid/cat', '../train/cat'),
                                         ('valid/cat/0.png', '../../train/dog/3.png'), ('train/emu', 'cat')])
def test_one_file_is_not_in_two_places(link, target, tmp_path):
    path = write(tmp_path/'d', pictures(4, 'train/cat', 'train/dog') + ['valid/dog/9.png'])
    if link == 'valid': shutil.rmtree(path/'valid')
    (path/link).parent.mkdir(parents=True, exist_ok=True)
    (path/link).symlink_to(target)
    with pytest.raises(ValueError, match='holds one file as .* and as'): divide(path)


def test_hard_links_and_copies(tmp_path):
    "A hard link is one file; copies are files of their own, whose accuracy means little."
    path = write(tmp_path/'d', pictures(4, 'train/cat', 'train/dog') + ['valid/dog/9.png', 'valid/cat/9.png'])
    images = [path/f for f in pictures(4, 'train/cat', 'train/dog')]
    for i, file in enumerate(images): Image.fromarray(np.full((12, 10, 3), i, np.uint8)).save(file)
    shutil.copy(images[1], path/'valid/cat/8.png')
    with pytest.warns(RuntimeWarning, match='1 of 3 validation images are copies of .*: valid/cat/8.png$'): divide(path)
    (path/'valid/cat/7.png').hardlink_to(images[2])
    with pytest.raises(ValueError, match='holds one file as train/cat/2.png and as valid/cat/7.png'): divide(path)


def test_pairs_may_be_lists():
    dls = get_dls('digits')
    batch = dls.test_dl([[dls.valid_ds.x[i], int(dls.valid_ds.y[i])] for i in range(3)]).one_batch()
    assert batch[1].tolist() == dls.valid_ds.y[:3].tolist()


def test_files_without_the_name_of_an_image_are_named(tmp_path):
    path = write(tmp_path/'d', pictures(5, 'cat', 'dog'))
    (path/'cat'/'3.png').rename(path/'cat'/'3.weird')
    (path/'dog'/'2.png').rename(path/'dog'/'2')
    (path/'dog'/'Thumbs.db').write_text('')
    (path/'labels.csv').write_text('')
    with pytest.warns(RuntimeWarning, match=r'left out, .*: cat/3.weird, dog/2$'): train, valid = divide(path)
    assert len(train) + len(valid) == 8


@pytest.mark.parametrize('name', ['dev', 'eval', 'unlabeled', 'Unlabelled', 'train_set', 'test-images', 'valset'])
def test_a_folder_that_looks_like_a_split_is_no_class(name, tmp_path):
    path = write(tmp_path/'d', pictures(3, 'cat', 'dog', name))
    with pytest.raises(ValueError, match=f'holds {name}, which is no class .* train, training, valid'): divide(path)


@pytest.mark.parametrize('names', ['trainA trainB testA testB', 'train2017 val2017', 'X_train X_test', 'trn tst',
                                   'my_train my_val', 'train-1 test-1', 'training_a testing_a'])
def test_parts_of_names_that_say_splits(names, tmp_path):
    path = write(tmp_path/'d', pictures(3, *names.split()))
    with pytest.raises(ValueError, match=f'holds {sorted(names.split())[0]}, .*, which is no class'): divide(path)


@pytest.mark.parametrize('names', ['tram trolley', 'contest latest', 'valley hill'])
def test_names_of_classes_that_resemble_splits(names, tmp_path):
    path = write(tmp_path/'d', pictures(3, *names.split()))
    assert len(divide(path)[1]) == 2                                  # one of each class


@pytest.mark.parametrize('kind', ['png', 'jpg', 'tiff', 'webp'])
@pytest.mark.parametrize('turn', [1, 3, 6, 8])
def test_the_size_of_a_turned_image(kind, turn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.new('RGB', (40, 24)).save(tmp_path/f'a.{kind}', exif=exif)
    width, height = open_image(tmp_path/f'a.{kind}').size
    assert common_size([tmp_path/f'a.{kind}']) == (height, width)
    assert (width, height) == ((24, 40) if turn > 4 else (40, 24))
