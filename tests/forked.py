"Programs without the seconds that their imports take: a server imports our modules once and forks for each program."
import multiprocessing, os, runpy, subprocess, sys, tempfile
from pathlib import Path

forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(['flexconv.all', 'flexconv.cli', 'nbdev.test'])


def start(path, args, folder, out, err, env):
    "What runs in the new process: the file of a program as `python FILE ARGS` runs it."
    for stream, file in ((1, out), (2, err)): os.dup2(os.open(file, os.O_WRONLY), stream)
    os.chdir(folder)
    os.environ.update(env)
    sys.argv[:] = [path, *args]
    runpy.run_path(path, run_name='__main__')


def run_forked(path, *args, folder='.', **env):
    "A program's `subprocess.CompletedProcess`, with what it printed; `env` sets variables that no import has read yet."
    before = os.environ.get('OMP_NUM_THREADS')
    os.environ['OMP_NUM_THREADS'] = '1'         # when the server starts, with the first program
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary)/name for name in ('out', 'err')]
        for file in files: file.touch()
        command = [str(path), *map(str, args)]
        process = forks.Process(target=start, args=(command[0], command[1:], str(folder), *map(str, files), env))
        process.start()
        if before is None: del os.environ['OMP_NUM_THREADS']
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))
