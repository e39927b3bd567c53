"Shared helpers of the tests."
import os
# before torch is imported: workers share the cores
if 'PYTEST_XDIST_WORKER' in os.environ:
    for name in ('OMP_NUM_THREADS', 'TORCHINDUCTOR_COMPILE_THREADS'): os.environ.setdefault(name, '1')
from pathlib import Path
import numpy as np, pytest, torch

DATA = Path(__file__).parent/'data'


class Golden(dict):
    "Arrays of the authors' code by name, as tensors (see data/README.md)."
    def state(self, prefix='sd/'):
        "The arrays under `prefix`, without it."
        return {k[len(prefix):]: v for k, v in self.items() if k.startswith(prefix)}


@pytest.fixture(scope='session')
def golden():
    "Loads one file of golden numbers: `golden('magnet2d')`."
    return lambda name: Golden({k: torch.from_numpy(np.asarray(v)) for k, v in np.load(DATA/f'{name}.npz').items()})
