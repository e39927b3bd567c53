"Trained networks that come with the package: what they say of themselves, and that they still compute it."
from pathlib import Path
import numpy as np, pytest, safetensors, torch
from flexconv.files import read_weights
from flexconv.registry import create_model, list_models, shipped_weights
from flexconv.runs import load_run

DATA = Path(__file__).parent/'data'
# of each data set
SAMPLES = dict(cifar10='cifar10', smnist='mnist', pmnist='mnist', scifar10='cifar10', npcifar10='cifar10')
# of 200 test images, recorded when it was shipped
CORRECT = {'flexnet7.cifar10': 173, 'flextcn2.npcifar10': 116, 'flextcn2.pmnist': 190, 'flextcn2.scifar10': 116,
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
    (dict(name='flexnet7.cifar10', in_channels=1), 'stem.kernel_network.output_linear.weight must have shape'),
    (dict(name='flexnet9.cifar10'), "Did you mean 'flexnet"), (dict(name='flexnet7', pretrained=3), 'got 3')])
def test_wrong_weights_are_named(wrong, words):
    with pytest.raises(ValueError) as e: create_model(**wrong)
    assert words in str(e.value)
