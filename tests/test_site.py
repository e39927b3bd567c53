"The site, as far as it goes without Quarto: notebooks processed as `nbdev_docs` does before rendering, and every link, anchor, picture and option in them."
import ast, io, json, re, shutil, subprocess, sys
from importlib import import_module
from pathlib import Path
import numpy as np, pytest, yaml
from PIL import Image
from fastcore.docments import docments

ROOT = Path(__file__).parent.parent
SITE, REPO = 'https://flexconv.github.io/flexconv/', r'https://github\.com/flexconv/flexconv/(?:blob|tree|raw)/main/([^#?]+)'
CONFIG = yaml.safe_load((ROOT/'_quarto.yml').read_text())
MODULES = [f'flexconv.{p.stem}' for p in sorted((ROOT/'flexconv').glob('*.py')) if p.stem not in ('__init__', '_modidx', 'all')]


def copy_of_the_project(folder):
    "What the site is made of, where nothing else is written to."
    for name in 'settings.ini setup.py pyproject.toml _quarto.yml README.md CHANGELOG.md CITATION.cff'.split(): shutil.copy(ROOT/name, folder)
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs', '_proc', '_docs')
    for name in 'nbs', 'flexconv': shutil.copytree(ROOT/name, folder/name, symlinks=True, ignore=ignore)
    return folder


PROCESS = '''
from nbdev import doclinks, quarto
from nbdev.serve import proc_nbs
if __name__ == '__main__':
    quarto.refresh_quarto_yml(); doclinks._build_modidx(); quarto.nbdev_sidebar.__wrapped__()
    proc_nbs(n_workers=2)
'''


class Page:
    "A processed notebook or a Markdown file: its front matter, text, and cells with pictures."
    def __init__(self, path, root):
        self.source, self.figures, self.code = path.relative_to(root), [], []
        if path.suffix == '.md': self.text, self.name = path.read_text(), self.source.with_suffix('.html')
        else:
            cells = json.loads(path.read_text())['cells']
            front = ''.join(cells[0]['source'])
            self.front = yaml.safe_load(front.strip().strip('-')) if front.startswith('---') else {}
            self.name = self.source.with_name(self.front.get('output-file', self.source.with_suffix('.html').name))
            self.text = '\n\n'.join(t for i, c in enumerate(cells) if i or not front.startswith('---') for t in self.texts(c))
            self.code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
            self.figures = [''.join(c['source']) for c in cells if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
        self.text = re.sub(r'^(`{3,}|~{3,}).*?^\1', '', self.text, flags=re.M | re.S)       # examples of Markdown are not Markdown

    @staticmethod
    def texts(cell):
        "Markdown and HTML that a cell brings to the page."
        if cell['cell_type'] == 'markdown': return [''.join(cell['source'])]
        return [''.join(o['data'][k]) for o in cell.get('outputs', []) for k in ('text/markdown', 'text/html') if k in o.get('data', {})]

    @property
    def links(self):
        "Targets of links and pictures. What is written between backticks goes first, whole spans at a time, so that a link in one is none."
        prose = re.sub(r'(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)', '', self.text)
        return re.findall(r'\]\(([^()\s]+(?:\([^()\s]*\))?)[^()]*\)', prose) + re.findall(r'(?:href|src)="([^"]+)"', self.text)

    @property
    def anchors(self):
        heads = re.findall(r'(?:\A|\n[ \t]*\n)#{1,6} +(.+?) *(?=\n|\Z)', self.text)             # without a blank line before, it is no heading
        explicit = re.findall(r'^#.*\{[^}]*#([\w.:-]+)[^}]*\}', self.text, re.M) + re.findall(r'\bid="([^"]+)"', self.text)
        return set(map(anchor, heads)) | set(explicit)


def anchor(heading):
    "What pandoc makes of a heading: no formatting, no punctuation but `_-.`, hyphens for spaces, nothing before the first letter."
    text = re.sub(r'\{[^}]*\}', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading)).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text))) or 'section'


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Pages by the path that they get on the site, and the folder they lie in."
    folder = copy_of_the_project(tmp_path_factory.mktemp('site'))
    (folder/'process.py').write_text(PROCESS)
    done = subprocess.run([sys.executable, 'process.py'], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    pages = [Page(p, folder/'_proc') for p in sorted((folder/'_proc').rglob('*')) if p.suffix == '.ipynb' or p.name == 'changelog.md']
    return {p.name: p for p in pages}, folder/'_proc'


def test_every_notebook_becomes_a_page(site):
    pages, _ = site
    sources = {p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts)}
    assert {p.source for p in pages.values()} == sources | {Path('changelog.md')}
    for p in pages.values():
        if p.source.suffix == '.ipynb': assert p.front.get('title') and p.front.get('description'), p.source


def misses(page, link, pages, folder):
    "Why a link leads nowhere, or None."
    if m := re.match(REPO, link): return None if (ROOT/m[1].rstrip('/')).exists() else 'no such file in the repository'
    if link.startswith(SITE): target = Path(link[len(SITE):] or 'index.html')
    elif re.match(r'[a-z]+:', link): return None
    else: target = Path(link)
    path, _, fragment = str(target).partition('#')
    if path in ('', '.'): to = page
    else:
        base = Path() if link.startswith(SITE) else page.name.parent
        full = Path(*[]) if not path else Path(shutil.os.path.normpath(base/path))
        to = pages.get(full) or next((p for p in pages.values() if p.source == full), None)
        if to is None: return None if (folder/full).is_file() and full.suffix not in ('.html', '.ipynb') else 'no such page or file'
    return None if not fragment or fragment in to.anchors else f'no anchor {fragment} on {to.source}'


def test_links_anchors_and_pictures_lead_somewhere(site):
    pages, folder = site
    links = [(p, link) for p in pages.values() for link in p.links]
    assert len(links) > 300
    wrong = [f'{p.source}: {link}: {why}' for p, link in links if (why := misses(p, link, pages, folder))]
    assert not wrong, '\n'.join(wrong)
    for p in pages.values(): assert not (m := re.search(r'\[\[`[^]]*\]\([^)]*\)\]\([^)]*\)', p.text)), f'{p.source}: a link in a link: {m[0]}'


def test_wrong_links_are_found(site):
    "The test above can fail."
    pages, folder = site
    page = pages[Path('tutorials/first.html')]
    for good in ('convert.ipynb', '../index.ipynb', '../mask.html', '../mask.html#gaussianmask', SITE + 'conv.html', '../images/logo.svg', 'https://example.org/x'): assert misses(page, good, pages, folder) is None, good
    for bad in ('mask.html', '../nothing.ipynb', '../mask.html#nothing', '#nothing', SITE + '03_mask.html', '../images/no.png', 'https://github.com/flexconv/flexconv/blob/main/nothing.py'): assert misses(page, bad, pages, folder), bad


def test_backticked_names_become_links(site):
    pages, _ = site
    assert '[`FlexConv`](https://flexconv.github.io/flexconv/layers.html#flexconv)' in pages[Path('layers.html')].text


def test_every_public_name_is_documented_on_its_page(site):
    "A heading that a link can name, a link to the source, and a table of the arguments where there are some."
    pages, _ = site
    shown = re.compile(r'^#{2,4} +([\w.]+)$', re.M)
    commented = 0
    for name in MODULES:
        module, page = import_module(name), pages[Path(f'{name.split(".")[1]}.html')]
        for public in module.__all__:
            thing = getattr(module, public)
            if getattr(thing, '__module__', None) != name or not callable(thing): continue
            assert public in shown.findall(page.text), f'{page.source}: {public}'
            entry = re.split(r'^#{1,4} ', page.text.split(f'### {public}\n')[1], flags=re.M)[0]
            named = [n for n, p in docments(thing, full=True).items() if p.get('docment') and n not in ('self', 'return')]
            assert all(f'| {n} |' in entry for n in named), f'{page.source}: {public}: {named}'
            commented += len(named)
    assert commented > 300


def test_figures_have_captions_and_alternative_texts(site):
    pages, _ = site
    count = 0
    for page in pages.values():
        for source in page.figures:
            options = {}
            for line in re.findall(r'^#\| *(fig-.*)$', source, re.M): options |= yaml.safe_load(line)
            for key in ('fig-alt', 'fig-cap'):
                texts = options.get(key) or ''
                assert texts and all(len(t) > 20 for t in ([texts] if isinstance(texts, str) else texts)), f'{page.source}: {key} is missing in\n{source}'
            count += 1
    assert count > 50


def test_cell_options_are_those_of_quarto(site):
    "What is left of `#|` lines must be YAML: a directive of nbdev among them would stop Quarto."
    pages, _ = site
    known = {'echo', 'output', 'code-fold', 'code-summary', 'fig-cap', 'fig-alt'}
    for page in pages.values():
        for source in page.code:
            lines = re.findall(r'^#\|(.*)$', source, re.M)
            options = yaml.safe_load('\n'.join(l.strip() for l in lines)) or {}
            assert isinstance(options, dict) and set(options) <= known, f'{page.source}: {lines}'


def test_config_names_what_exists(site):
    pages, folder = site
    sources, web = {str(p.source) for p in pages.values()}, CONFIG['website']
    named = [page for part in web['sidebar']['contents'] for page in ([part] if isinstance(part, str) else part['contents'])]
    assert len(named) == len(set(named)) and set(named) == sources
    assert all(item['href'] in sources for item in web['navbar']['left'])
    assert web['open-graph']['image'] == web['twitter-card']['image'] == '/images/card.png'      # from the root: pages lie in folders
    for file in web['favicon'], 'images/card.png', web['navbar']['logo'], CONFIG['format']['html']['css']: assert (folder/file).is_file(), file
    footer = re.findall(r'\]\(([^)]+)\)', ' '.join(web['page-footer'].values()))
    assert footer and all(link.startswith('https://') or link[0] == '/' and link[1:] in sources for link in footer), footer
    assert CONFIG['project']['output-dir'] == '_docs' and set(CONFIG['format']['html']['theme']) == {'light', 'dark'}


def test_drawings_are_what_their_script_draws():
    "Logo and favicon; the card depends on matplotlib's fonts."
    sys.path.insert(0, str(ROOT/'tools'))
    try: import logo
    finally: sys.path.pop(0)
    assert logo.svg(logo.mark()) == (ROOT/'nbs/images/logo.svg').read_text()
    drawn, saved = (np.asarray(Image.open(f).convert('RGB'), dtype=int) for f in (io.BytesIO(logo.favicon(logo.mark())), ROOT/'nbs/images/favicon.png'))
    assert abs(drawn - saved).max() < 8
    assert (ROOT/'nbs/images/card.png').stat().st_size < 300_000 and len(logo.trained().blocks) == 7


def examples():
    "Names that occur in code on a page which is not exported, and in its shell commands."
    names = set()
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        if any(part[0] in '._' for part in path.relative_to(ROOT).parts): continue
        for cell in json.loads(path.read_text())['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'markdown': names |= set(re.findall(r'\bflexconv_\w+', source)); continue
            if re.search(r'^#\| *export', source, re.M): continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Name): names.add(node.id)
                elif isinstance(node, ast.Attribute): names.add(node.attr)
                elif isinstance(node, ast.keyword): names.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str): names |= set(re.findall(r'\b[a-z]\w+\b', node.value)) if len(node.value) < 40 else set()
    return names


def test_every_public_name_has_an_example():
    seen = examples()
    missing = [f'{name}.{public}' for name in MODULES for public in import_module(name).__all__ if public not in seen]
    assert not missing, ', '.join(missing)


@pytest.mark.skipif(shutil.which('quarto') is None, reason='Quarto is not installed')
def test_site_renders_without_a_warning(tmp_path):
    folder = copy_of_the_project(tmp_path)
    (folder/'README.md').touch()                   # newer than the index: not to be rendered
    done = subprocess.run([Path(sys.executable).parent/'nbdev_docs'], cwd=folder, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0 and not re.search(r'\bWARN', log), log
    for page in ('index', 'mask', 'reference', 'changelog', 'tutorials/first', 'experiments/results'): assert '<main' in (folder/f'_docs/{page}.html').read_text()
