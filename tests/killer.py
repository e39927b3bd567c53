"""Kills training runs at 20 moments, resumes them, and compares what comes out with a run that was left alone. Started
by test_reliability.py: a process of its own, because it forks its runs, to pay for imports once. Prints one line for
each moment."""
import os, random, signal, sys, time
from pathlib import Path
import torch
from flexconv import cli

cli.draw = lambda *args: None          # pictures come after the training that is killed here
OPTIONS = dict(epochs=4, width=4, max_items=128, bs=32, dropout=0.2)


def start(kill_at=None, **kwargs):
    "Train in a forked process, which kills itself at its `kill_at`-th file operation; its process id."
    pid = os.fork()
    if pid: return pid
    log = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2): os.dup2(log, fd)
    if kill_at is not None:
        count = 0
        def deadly(operation):
            def wrapped(*args):
                nonlocal count
                for act in (lambda: None, lambda: operation(*args)):          # before it, and after it
                    act()
                    if count == kill_at: os.kill(os.getpid(), signal.SIGKILL)
                    count += 1
            return wrapped
        os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
    code = 1
    try: cli.flexconv_train.__wrapped__(**kwargs); code = 0
    except SystemExit as e: code = e.code
    finally: os._exit(code)


def finish(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder):
    "What must be the same: weights, bit for bit, and the table of epochs without its seconds."
    rows = [[v for k, v in r.items() if k != 'seconds'] for r in cli.read_csv(folder/'metrics.csv')]
    state = torch.load(folder/'checkpoint.pt', weights_only=True)
    assert not list(folder.glob('*.part')), 'left behind'
    generators = [r['torch'].tolist() for r in state['random']]
    return (folder/'model.safetensors').read_bytes(), rows, state['epoch'], generators


def main(base):
    began = time.perf_counter()
    assert finish(start(out=str(base/'whole'), **OPTIONS)) == 0
    seconds = time.perf_counter() - began
    want, rng = outcome(base/'whole'), random.Random(0)
    moments = [dict(after=rng.uniform(0.05, 1)*seconds) for _ in range(10)]
    moments += [dict(kill_at=k) for k in rng.sample(range(48), 10)]
    for i, moment in enumerate(moments):
        folder = base/str(i)
        pid = start(out=str(folder), kill_at=moment.get('kill_at'), **OPTIONS)
        if 'after' in moment:
            time.sleep(moment['after'])
            os.kill(pid, signal.SIGKILL)
        code = finish(pid)
        done = len(cli.read_csv(folder/'metrics.csv')) if (folder/'metrics.csv').exists() else 0
        again = dict(resume=str(folder)) if (folder/'config.json').exists() else dict(out=str(folder), **OPTIONS)
        assert finish(start(**again)) == 0, moment
        got = outcome(folder)
        print(moment, 'killed' if code == -signal.SIGKILL else f'exit code {code}', f'{done} epochs recorded',
              'same' if got == want else 'DIFFERENT', flush=True)


if __name__ == '__main__': main(Path(sys.argv[1]))
