"What several test files share: commands as a user starts them, random convolutions, and how far two results differ."
import io, math, os, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import torch, torch.nn.functional as F
from hypothesis import strategies as st
from forked import run_forked

BIN = Path(sys.executable).parent
ENV = os.environ | dict(OMP_NUM_THREADS='1')
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-11}


# Commands -------------------------------------------------------------------------------------------------------------

def run(*command, code=0, cwd='.', **kwargs):
    """One of our commands as a user starts it, with the exit code that it must have; what it printed is in the result.
    With options of `subprocess.run` it is a process from the start, imports and all."""
    path, *args = BIN/command[0], *map(str, command[1:])
    if kwargs: done = subprocess.run([path, *args], capture_output=True, text=True, cwd=cwd, **(dict(env=ENV) | kwargs))
    else: done = run_forked(path, *args, folder=cwd)
    assert done.returncode == code, f'{done.returncode}: {done.stdout}{done.stderr}'
    assert 'Traceback' not in done.stderr, done.stderr
    return done


def call(command, *args, code=0, **options):
    "The same without a process of its own: what was printed, `(stdout, stderr)`."
    from flexconv import cli
    out, err, got = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try: getattr(cli, command).__wrapped__(*map(str, args), **options)
        except SystemExit as e: got = e.code
    assert got == code, f'{got}: {out.getvalue()}{err.getvalue()}'
    return out.getvalue(), err.getvalue()


# Notebooks ------------------------------------------------------------------------------------------------------------

def python_of(cell):
    "The Python of a cell of a notebook: its lines without IPython's magics and shell commands."
    return ''.join(line for line in cell['source'] if line[0] not in '%!')


# Random convolutions --------------------------------------------------------------------------------------------------

@st.composite
def problems(draw):
    "Arguments of a convolution that torch's own functions accept."
    ndim = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    top = {1: 40, 2: 14, 3: 7}[ndim]
    sizes = [draw(st.integers(1, top)) for _ in range(ndim)]
    kernel = [draw(st.integers(1, top)) for _ in range(ndim)]
    dilation = tuple(draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(ndim))
    padding = tuple(draw(st.integers(0, 6)) for _ in range(ndim))
    # the kernel fits
    padding = tuple(max(p, math.ceil((d*(k-1) + 1 - s)/2)) for p, d, k, s in zip(padding, dilation, kernel, sizes))
    return dict(batch=draw(st.integers(1, 3)), groups=groups, channels=groups*draw(st.integers(1, 3)),
                out=groups*draw(st.integers(1, 3)),
                sizes=sizes, kernel=kernel, stride=tuple(draw(st.integers(1, 3)) for _ in range(ndim)),
                dilation=dilation, padding=padding,
                bias=draw(st.booleans()), dtype=draw(st.sampled_from([torch.float32, torch.float64])),
                seed=draw(st.integers(0, 2**16)))


def tensors(p):
    g = torch.Generator().manual_seed(p['seed'])
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=p['dtype']).requires_grad_()
    x = new(p['batch'], p['channels'], *p['sizes'])
    weight = new(p['out'], p['channels']//p['groups'], *p['kernel'])
    return x, weight, new(p['out']) if p['bias'] else None


# How far two results differ ------------------------------------------------------------------------------------------

def close(ours, theirs, tolerance, what=''):
    "Asserts that two tensors agree, relative to the largest value of the second: `close(ours, theirs, 1e-5)`."
    assert ours.shape == theirs.shape, f'{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}'
    gap = (ours.detach().double() - theirs.double()).abs().max()/theirs.double().abs().max().clamp(min=1e-30)
    assert gap <= tolerance, f'{what}: differ by {gap:.2e} of the largest value, more than {tolerance:.0e}'


def assert_close(a, b, dtype):
    assert a.shape == b.shape and a.dtype == b.dtype == dtype
    assert (a - b).abs().max() <= TOLERANCE[dtype]*max(1, b.abs().max())


def gradients(y, model): return torch.autograd.grad(y.square().sum(), [p for p in model.parameters()])


def relative_gap(a, b, together=False):
    """Largest difference of two lists of tensors, relative to the largest value of each, or of all together (where
    some are 0 but for rounding)."""
    scale = [y.double().abs().max().clamp(min=1e-30) for y in b]
    return max(((x.double() - y.double()).abs().max()/(max(scale) if together else c)).item()
               for x, y, c in zip(a, b, scale))
