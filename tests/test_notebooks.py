"Every notebook runs from top to bottom, each in a process of its own."
import os, subprocess, sys
from pathlib import Path
import pytest

NBS = Path(__file__).parent.parent/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS)
                   for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: str(p.with_suffix('')))
def test_notebook(notebook):
    done = subprocess.run([Path(sys.executable).parent/'nbdev_test', '--path', NBS/notebook, '--n_workers', '0',
                           '--do_print'],
                          capture_output=True, text=True, env=os.environ | dict(MPLBACKEND='agg'), cwd=NBS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
