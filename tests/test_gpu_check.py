"The check for machines with a GPU runs on this one, so that it cannot rot: `tools/gpu_check.sh --device cpu --small`."
import json, os, subprocess, sys
from pathlib import Path
from flexconv import gpu_check

ROOT = Path(__file__).parent.parent
NEED_CUDA = {'no_waiting', 'cuda_graph', 'reduce_overhead'}


def run_checks(out, *options):
    env = os.environ | dict(PYTHON=sys.executable, OMP_NUM_THREADS='1')
    command = [ROOT/'tools'/'gpu_check.sh', '--device', 'cpu', '--small', '--out', out, *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(out).parent)


def test_every_check_runs_on_a_cpu_and_is_not_repeated(tmp_path):
    "From a plain checkout, in another folder; about half a minute of one core."
    out = tmp_path/'report.json'
    first = run_checks(out, '--minutes', '60')
    assert first.returncode == 0, first.stdout + first.stderr
    report = json.loads(out.read_text())
    assert {name for name, r in report['checks'].items() if r['state'] == 'skipped'} == NEED_CUDA
    passed = {name: r for name, r in report['checks'].items() if r['state'] == 'passed'}
    assert set(passed) == set(gpu_check.checks) - NEED_CUDA
    assert passed['golden']['figures']['largest_gap'] < 2e-5
    assert passed['cifar10']['figures']['batch4_data'] == 'random images'
    text = out.with_suffix('.md').read_text()
    assert all(f'| {name} | passed |' in text for name in passed)
    again = run_checks(out)
    assert again.returncode == 0 and not again.stdout and json.loads(out.read_text()) == report


def test_a_report_goes_on_where_it_was(tmp_path, monkeypatch):
    "After a kill: new checks first, then those that failed, and last the one that was running."
    done, file = [], tmp_path/'report.json'
    def fails(place): done.append('fails'); raise AssertionError('wrong')
    fine = lambda name: lambda place: (done.append(name), dict(x=1.5))[1]
    monkeypatch.setattr(gpu_check, 'checks', dict(a=fine('a'), fails=fails, killed=fine('killed'), b=fine('b')))
    place = gpu_check.Place('cpu', True)
    report = gpu_check.new_report(place)
    report['checks'] = dict(a=dict(state='passed'), killed=dict(state='running'))
    gpu_check.save_report(report, file)
    report = gpu_check.run_checks(place, file)
    assert done == ['fails', 'b', 'killed'] and gpu_check.still_to_do(report) == ['fails']
    assert 'AssertionError: wrong' in report['checks']['fails']['error']
    assert gpu_check.run_checks(place, file, minutes=0)['checks'] == report['checks']
    report['subject']['torch'] = 'another'
    gpu_check.save_report(report, file)
    assert not gpu_check.load_report(file, place)['checks']
    file.write_text('{damaged')
    assert not gpu_check.load_report(file, place)['checks']
