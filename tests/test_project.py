"The project itself: imports, exported files, README, notebooks."
import ast, configparser, json, os, re, subprocess, sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import pytest
from helpers import python_of

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))
MODULES = '''core kernels magnet mask crop smp transforms correlate costs conv irregular cache layers aliasing
             resolution testing official at_times files registry flexnet baselines convert export stream successors
             hub readers data optimizer callbacks learner checkpoints runs distributed at_resolution plot summary
             jupyter experiments cli predict bench results gpu_check site timm'''.split()


def python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    "`import flexconv` brings torch and neither fastai nor matplotlib."
    heavy = ('torch', 'fastai', 'matplotlib', 'sklearn', 'pandas')
    loaded = python(f'import sys, flexconv; print(*(m for m in {heavy} if m in sys.modules))')
    assert loaded == 'torch'
    loaded = python('import sys; from flexconv.optimizer import param_groups; print("fastai" in sys.modules)')
    assert loaded == 'False'                      # the loop of one's own needs none
    shown = python('import flexconv; print(flexconv.FlexConv2d(3, 8, 33).size, flexconv.__version__)')
    assert shown.startswith('(5, 5)')


def test_all_gives_everything():
    names = set(python('from flexconv.all import *; print(*globals())').split())
    for module in MODULES[:-6]:          # predict, bench, results, gpu_check, site come after all; timm needs a package
        public = set(import_module(f'flexconv.{module}').__all__)
        if module == 'cli': public = {'flexconv_train', 'flexconv_eval', 'flexconv_export'}
        assert public <= names, (module, public - names)
    assert {'torch', 'nn', 'F', 'Learner', 'accuracy', 'FlexConv2d', 'MAGNet', 'GaussianMask', 'conv_nd', 'FlexNet',
            'create_model', 'get_dls', 'flex_learner', 'set_resolution', 'bake', 'Stream', 'convert', 'load_run',
            'layer_table', 'show_kernels', 'param_groups'} <= names


def test_a_cell_is_exported_in_one_way():
    "nbdev heeds the first of several directives, so that public names would be lost."
    cells = [(nb.stem, ''.join(c['source'])) for nb in NOTEBOOKS for c in json.loads(nb.read_text())['cells']]
    assert not [(name, s[:80]) for name, s in cells if len(re.findall(r'^#\| *exports?i?\b', s, re.M)) > 1]


def test_no_name_hides_one_of_fastai():
    "A notebook that imports both has fastai's `Transform`, and ours under names of their own."
    ours, theirs = import_module('flexconv.all'), import_module('fastai.vision.all')
    hidden = [n for n, v in vars(ours).items() if getattr(theirs, n, v) is not v and not n.startswith('_')]
    assert not [n for n in hidden if str(getattr(vars(ours)[n], '__module__', '')).startswith('flexconv')]


def test_imports_point_to_lower_numbers():
    order = {re.search(r'#\| default_exp (\w+)', text).group(1): i for i, nb in enumerate(NOTEBOOKS)
             if (text := ''.join(''.join(c['source']) + '\n' for c in json.loads(nb.read_text())['cells']))
             and '#| default_exp' in text}
    for name, i in order.items():
        for other in re.findall(r'^\s*from \.(\w+) import', (ROOT/f'flexconv/{name}.py').read_text(), re.M):
            assert order[other] < i, (name, other)


def test_examples_use_what_earlier_pages_define():
    "No page imports from a page with a higher number, or from the whole library; its own module it may show first."
    pages = [page for page in NOTEBOOKS if re.match(r'\d\d_', page.stem)]
    numbers = {page.stem[3:]: int(page.stem[:2]) for page in pages}
    for page in pages:
        for cell in json.loads(page.read_text())['cells']:
            if cell['cell_type'] != 'code': continue
            source = ''.join(cell['source'])
            for other in re.findall(r'(?:from|import) flexconv\.(\w+)', source):
                assert numbers[other] <= int(page.stem[:2]), (page.stem, other)
            whole = set(re.findall(r'^from flexconv import (\w+)', source, re.M)) - set(numbers)
            assert not whole or int(page.stem[:2]) >= 90, (page.stem, whole)


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_has_a_docstring(module):
    m = import_module(f'flexconv.{module}')
    assert m.__all__
    for name in m.__all__:
        thing = getattr(m, name)
        if callable(thing): assert (thing.__doc__ or '').strip(), f'{module}.{name}'


def test_help_on_the_page_of_commands_is_what_they_print():
    "With the fastcore of development, which spells options with underscores."
    cells = json.loads((ROOT/'nbs/commands.ipynb').read_text())['cells']
    shown = {''.join(c['source']).split("'")[1]: ''.join(c['outputs'][0]['text']) for c in cells
             if c['cell_type'] == 'code' and 'show_help(' in ''.join(c['source']).splitlines()[-1]}
    assert set(shown) == {f'flexconv_{name}' for name in ('train', 'eval', 'predict', 'export', 'bench')}
    for command, text in shown.items():
        done = subprocess.run([Path(sys.executable).parent/command, '--help'], capture_output=True, text=True,
                              env=os.environ | dict(COLUMNS='88'))
        assert done.stdout.strip() == text.strip(), 'run nbs/commands.ipynb again'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_print(notebook):
    "A title, sources as lists, no machine paths, warnings or errors in its outputs."
    cells = json.loads(notebook.read_text())['cells']
    assert re.match(r'---|# ', ''.join(cells[0]['source']))
    for cell in cells:
        assert isinstance(cell['source'], list)
        for out in cell.get('outputs', []):
            text = json.dumps({k: v for k, v in out.items() if k != 'metadata'})
            assert out['output_type'] != 'error' and out.get('name') != 'stderr', text[:500]
            assert not re.search(r'/(work|root|tmp|home)/', text), text[:500]
            assert not re.search(r'\w*Warning:|Traceback', text), text[:500]


@pytest.mark.parametrize('notebook', [p for p in NOTEBOOKS if p.stem != 'index'], ids=lambda p: p.stem)
def test_imports_stand_alone_in_their_cells(notebook):
    """nbdev_docs runs every cell that imports, alone. (The front page's first cell is an example that can be copied
    whole.)"""
    for cell in json.loads(notebook.read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        imports = [isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(python_of(cell)).body]
        assert all(imports) or not any(imports), ''.join(cell['source'])


def test_readme_is_the_index():
    "README.md and its pictures are what tools/readme.py makes of index.ipynb."
    spec = spec_from_file_location('readme', ROOT/'tools/readme.py')
    readme = module_from_spec(spec); spec.loader.exec_module(readme)
    text, pictures = readme.convert()
    assert text == (ROOT/'README.md').read_text(), 'run python tools/readme.py'
    for name, data in pictures.items(): assert (ROOT/name).read_bytes() == data, name


def test_readme_commands_exist():
    readme, cfg = (ROOT/'README.md').read_text(), configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    for command in cfg['DEFAULT']['console_scripts'].split():
        module, function = re.fullmatch(r'\w+=([\w.]+):(\w+)', command).groups()
        assert callable(getattr(import_module(module), function)) and function in readme
    assert 'pip install -e . && flexconv_train' in readme and "pip install -e '.[dev]' && pytest" in readme


def test_sidebar_names_every_page():
    text = (ROOT/'_quarto.yml').read_text()
    assert (ROOT/'nbs/_quarto.yml').is_symlink()
    named = {n.lstrip('/') for n in re.findall(r'[\w/]+\.ipynb', text)}
    assert named == {str(p.relative_to(ROOT/'nbs')) for p in NOTEBOOKS} - {'404.ipynb'}


def too_long(text):
    "Numbers of the lines over 120 characters, except in what nbdev writes: `__all__` and comments about cells."
    found, in_all = [], False
    for number, line in enumerate(text.splitlines(), 1):
        in_all = in_all or line.startswith('__all__ = [')
        if len(line) > 120 and not in_all and not line.startswith(('# AUTOGENERATED', '# %% ')): found.append(number)
        if in_all and line.endswith(']'): in_all = False
    return found


def test_docstrings_state():
    "None opens with a question word: `The work of ...`, not `What it has to do`."
    asks = re.compile(r'^\s+r?"{1,3}(What|How|Where|Which|When|Whether|Who|Why)\b.*', re.M)
    found = {file.name: asks.findall(file.read_text()) for file in (ROOT/'flexconv').glob('*.py')}
    assert not {name: lines for name, lines in found.items() if lines}


def test_lines_are_short():
    files = [*(ROOT/'flexconv').glob('*.py'), *(ROOT/'tests').glob('*.py')]
    found = {file.name: too_long(file.read_text()) for file in files if file.stem != '_modidx'}
    found = {name: numbers for name, numbers in found.items() if numbers}
    assert not found, f'over 120 characters: {found}'


def is_patch(decorator):
    "True for `@patch`, `@patch(...)` and `@patch_to(...)`."
    if isinstance(decorator, ast.Call): decorator = decorator.func
    return isinstance(decorator, ast.Name) and decorator.id in ('patch', 'patch_to')


def patched_classes(function):
    "Names of the classes to which a decorated function is added: in the annotation of `self`, or given to `patch_to`."
    decorators = [d for d in function.decorator_list if is_patch(d)]
    if not decorators: return set()
    places = [arg.annotation for arg in function.args.args[:1] if arg.annotation]
    places += [arg for d in decorators if isinstance(d, ast.Call) for arg in d.args]
    return {node.id for place in places for node in ast.walk(place) if isinstance(node, ast.Name)}


def test_own_classes_are_whole():
    "Methods of our classes stand in the class; `@patch` is for the classes of others."
    nodes = [(file.name, node) for file in (ROOT/'flexconv').glob('*.py')
             for node in ast.walk(ast.parse(file.read_text()))]
    own = {node.name for _, node in nodes if isinstance(node, ast.ClassDef)}
    functions = [(name, node) for name, node in nodes if isinstance(node, ast.FunctionDef)]
    assert any('Learner' in patched_classes(f) for _, f in functions)            # what is looked for is found
    found = [(name, f.name) for name, f in functions if patched_classes(f) & own]
    assert not found, f'methods outside of their class: {found}'
