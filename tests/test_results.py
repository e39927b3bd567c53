"The page of results shows what the files say, and nothing without a file."
import ast, json, re, shutil
from pathlib import Path
import pandas as pd, pytest
from helpers import python_of

PAGES = Path(__file__).parent.parent/'nbs/experiments'


def cells(page):
    return [c for c in json.loads((PAGES/f'{page}.ipynb').read_text())['cells'] if c['cell_type'] == 'code']


def value_of(source, space):
    "Run a cell; the value of its last expression, or None."
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, 'cell', 'exec'), space)
    return eval(compile(ast.Expression(last.value), 'cell', 'eval'), space) if last else None


def html(value): return re.sub(r'\s+', ' ', re.sub(r'<style.*?</style>', '', value._repr_html_(), flags=re.S))


def test_tables_are_those_of_the_files(monkeypatch):
    "Every table that is stored in the page, made anew."
    monkeypatch.chdir(PAGES)
    space, tables = {}, 0
    for cell in cells('results'):
        value = value_of(python_of(cell), space)
        if not isinstance(value, pd.DataFrame): continue
        stored, = (o['data']['text/html'] for o in cell['outputs'] if 'data' in o)
        stored = re.sub(r'\s+', ' ', re.sub(r'<style.*?</style>', '', ''.join(stored), flags=re.S))
        assert stored == html(value), 'run nbs/experiments/results.ipynb again'
        tables += 1
    assert tables >= 4


def test_no_file_no_number(monkeypatch, tmp_path):
    "Without run folders every measured cell says so."
    (tmp_path/'results').mkdir()
    shutil.copy(PAGES/'results/quoted.csv', tmp_path/'results')
    monkeypatch.chdir(tmp_path)
    space, seen = {}, 0
    for cell in cells('results'):
        value = value_of(python_of(cell), space)
        if not isinstance(value, pd.DataFrame): continue
        for column in value:
            if 'measured' in column:
                assert set(value[column]) <= {'not measured', '-'}, column
                seen += 1
    assert seen >= 6


@pytest.mark.parametrize('page', ['results', 'resolution', 'speed', 'fitting'])
def test_no_result_is_typed_in(page):
    "No accuracy, ratio or time stands in the code of a page of results (the paper's own table of resolutions apart)."
    code = '\n'.join(''.join(c['source']) for c in cells(page) if "'16, change'" not in ''.join(c['source']))
    assert not re.search(r'(?<![\d.])\d\d\.\d', code), re.search(r'.*(?<![\d.])\d\d\.\d.*', code)


def test_every_committed_run_is_whole_or_named():
    "Each run folder can be read; the ones that were stopped are known."
    from flexconv.results import read_runs
    runs = read_runs(PAGES/'results')
    assert len(runs) > 10 and set(runs[~runs.finished.astype(bool)].folder) <= {'smnist-flextcn2-penalty'}
    assert runs.accuracy.between(0, 100).all() and (runs.minutes > 0).all()
