"""A plain PyTorch loop with DistributedDataParallel, two processes by torchrun and gloo: the training of one process,
and all ranks agree on sizes, also where they read them seldom."""
import json, os, subprocess, sys
import pytest

LOOP = '''
import json, sys, torch, torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from flexconv import layers
from flexconv.distributed import sync_batch_norm
from flexconv.layers import conv_layers, kernel_sizes, refresh_sizes
from flexconv.registry import create_model

layers.read_blocks = lambda device: True                        # sizes are read as on a GPU
distributed.init_process_group('gloo')
rank, world = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(rank)                                         # other weights on each rank: those of rank 0 count
model = sync_batch_norm(create_model('flexnet3', width=4, kernel_size=17, dropout=0.))
parallel = DistributedDataParallel(model)
opt = torch.optim.Adam(model.parameters(), 0.02)
data = torch.Generator().manual_seed(5)
losses, sizes, windows = [], [], []
half = torch.bfloat16 if 'half' in sys.argv else torch.float32
for step in range(8):
    x, target = torch.randn(8, 3, 16, 16, generator=data), torch.randint(0, 10, (8,), generator=data)
    mine = slice(rank*8//world, (rank+1)*8//world)
    if step % 4 == 0: refresh_sizes(model)
    with torch.autocast('cpu', half, enabled=half != torch.float32): y = parallel(x[mine])
    loss = F.cross_entropy(y.float(), target[mine])
    opt.zero_grad()
    loss.backward()
    opt.step()
    loss = loss.detach()/world
    distributed.all_reduce(loss)
    losses.append(loss.item())
    sizes.append(kernel_sizes(model))
    windows.append([m.window.bounds for m in conv_layers(model).values()])
gathered = [None]*world
distributed.all_gather_object(gathered, [sizes, windows])
if rank == 0: print(json.dumps(dict(losses=losses, agree=all(g == gathered[0] for g in gathered),
                                    sizes=[list(s.values()) for s in sizes])))
distributed.barrier()                                           # nobody leaves before the others
del parallel
distributed.destroy_process_group()
'''


def torchrun(script, processes, *options):
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    done = subprocess.run([*start, script, *options], capture_output=True, text=True, timeout=500,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def script(tmp_path):
    file = tmp_path/'loop.py'
    file.write_text(LOOP)
    return file


def test_a_plain_loop_of_two_processes_is_that_of_one(script):
    one, two = torchrun(script, 1), torchrun(script, 2)
    assert two['agree'] and two['sizes'] == one['sizes']
    assert two['sizes'][0] != two['sizes'][-1], 'sizes should change, else nothing was tested'
    assert two['losses'] == pytest.approx(one['losses'], abs=2e-3)


def test_two_processes_train_in_half_precision(script):
    "Batch normalisations of all processes, in bfloat16."
    two = torchrun(script, 2, 'half')
    assert two['agree'] and two['losses'][-1] < 1.5*two['losses'][0]
