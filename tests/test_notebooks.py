"Every notebook runs from top to bottom, each in a process of its own; tutorials away from the repository."
import os, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest
from forked import run_forked

ROOT = Path(__file__).parent.parent
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS)
                   for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
TUTORIALS = [p for p in NOTEBOOKS if p.parent.name == 'tutorials']


def command(path): return Path(sys.executable).parent/'nbdev_test', '--path', path, '--n_workers', '0', '--do_print'


@pytest.mark.parametrize('notebook', [p for p in NOTEBOOKS if p not in TUTORIALS], ids=lambda p: str(p.with_suffix('')))
def test_notebook(notebook):
    done = run_forked(*command(NBS/notebook), folder=ROOT, MPLBACKEND='agg')
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='session')
def installed(tmp_path_factory):
    "The environment of programs that find the package as a wheel installs it, in a folder of its own."
    source, folder = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('installed')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/'flexconv', source/'flexconv', ignore=shutil.ignore_patterns('__pycache__'))
    build = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', folder, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob('*.whl'))) as wheel: wheel.extractall(folder)
    env = os.environ | dict(PYTHONPATH=str(folder))
    where = subprocess.run([sys.executable, '-c', 'import flexconv; print(flexconv.__file__)'], capture_output=True,
                           text=True, env=env, cwd=tmp_path_factory.mktemp('elsewhere'))
    assert Path(where.stdout.strip()).is_relative_to(folder), where.stdout + where.stderr
    return env


@pytest.mark.parametrize('notebook', TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs_from_a_wheel_in_an_empty_folder(notebook, installed, tmp_path):
    nb = Path(shutil.copy(NBS/notebook, tmp_path))
    done = subprocess.run(command(nb), capture_output=True, text=True, cwd=tmp_path,
                          env=installed | dict(MPLBACKEND='agg'))
    assert done.returncode == 0, done.stdout + done.stderr
