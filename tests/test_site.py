"""The site, as far as it goes without Quarto: notebooks processed as `nbdev_docs` does before rendering, and every
link, anchor, picture and option in them."""
import ast, inspect, io, json, re, shutil, subprocess, sys
from importlib import import_module
from pathlib import Path
import numpy as np, pytest, torch, yaml
from PIL import Image
from flexconv.site import argument_texts, public_methods
from helpers import python_of

ROOT = Path(__file__).parent.parent
SITE = 'https://flexconv.github.io/flexconv/'
REPO = r'https://github\.com/flexconv/flexconv/(?:blob|tree|raw)/main/([^#?]+)'
CONFIG = yaml.safe_load((ROOT/'_quarto.yml').read_text())
MODULES = [f'flexconv.{p.stem}' for p in sorted((ROOT/'flexconv').glob('*.py'))
           if p.stem not in ('__init__', '_modidx', 'all', 'site')]


def copy_of_the_project(folder):
    "What the site is made of, where nothing else is written to."
    for name in 'settings.ini setup.py pyproject.toml _quarto.yml README.md CHANGELOG.md CITATION.cff'.split():
        shutil.copy(ROOT/name, folder)
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
            self.text = '\n\n'.join(t for i, c in enumerate(cells) if i or not front.startswith('---')
                                    for t in self.texts(c))
            self.code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
            self.figures = [''.join(c['source'])
                            for c in cells if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
        self.raw = self.text
        # examples of Markdown are not Markdown
        self.text = re.sub(r'^(`{3,}|~{3,}).*?^\1', '', self.text, flags=re.M | re.S)

    @staticmethod
    def texts(cell):
        "Markdown and HTML that a cell brings to the page."
        if cell['cell_type'] == 'markdown': return [''.join(cell['source'])]
        return [''.join(o['data'][k]) for o in cell.get('outputs', []) for k in ('text/markdown', 'text/html')
                if k in o.get('data', {})]

    @property
    def links(self):
        """Targets of links and pictures. What is written between backticks goes first, whole spans at a time, so that
        a link in one is none."""
        prose = re.sub(r'(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)', '', self.text)
        return (re.findall(r'\]\(([^()\s]+(?:\([^()\s]*\))?)[^()]*\)', prose)
                + re.findall(r'(?:href|src)="([^"]+)"', self.text))

    @property
    def anchors(self):
        # without a blank line before, it is no heading
        heads = re.findall(r'(?:\A|\n[ \t]*\n)#{1,6} +(.+?) *(?=\n|\Z)', self.text)
        explicit = (re.findall(r'^#.*\{[^}]*#([\w.:-]+)[^}]*\}', self.text, re.M)
                    + re.findall(r'\bid="([^"]+)"', self.text))
        return set(map(anchor, heads)) | set(explicit)


def anchor(heading):
    """What pandoc makes of a heading: no formatting, no punctuation but `_-.`, hyphens for spaces, nothing before the
    first letter."""
    text = re.sub(r'\{[^}]*\}', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading)).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text))) or 'section'


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Pages by the path that they get on the site, and the folder they lie in."
    folder = copy_of_the_project(tmp_path_factory.mktemp('site'))
    (folder/'process.py').write_text(PROCESS)
    done = subprocess.run([sys.executable, 'process.py'], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    pages = [Page(p, folder/'_proc') for p in sorted((folder/'_proc').rglob('*')) if p.suffix == '.ipynb'
             or p.name == 'changelog.md']
    return {p.name: p for p in pages}, folder/'_proc'


def test_every_notebook_becomes_a_page(site):
    pages, _ = site
    sources = {p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb')
               if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts)}
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
        if to is None:
            other = (folder/full).is_file() and full.suffix not in ('.html', '.ipynb')
            return None if other else 'no such page or file'
    return None if not fragment or fragment in to.anchors else f'no anchor {fragment} on {to.source}'


def test_links_anchors_and_pictures_lead_somewhere(site):
    pages, folder = site
    links = [(p, link) for p in pages.values() for link in p.links]
    assert len(links) > 300
    wrong = [f'{p.source}: {link}: {why}' for p, link in links if (why := misses(p, link, pages, folder))]
    assert not wrong, '\n'.join(wrong)
    for p in pages.values():
        m = re.search(r'\[\[`[^]]*\]\([^)]*\)\]\([^)]*\)', p.text)
        assert not m, f'{p.source}: a link in a link: {m[0]}'


def test_wrong_links_are_found(site):
    "The test above can fail."
    pages, folder = site
    page = pages[Path('tutorials/first.html')]
    for good in ('convert.ipynb', '../index.ipynb', '../mask.html', '../mask.html#gaussianmask', SITE + 'conv.html',
                 '../images/logo.svg', 'https://example.org/x'):
        assert misses(page, good, pages, folder) is None, good
    for bad in ('mask.html', '../nothing.ipynb', '../mask.html#nothing', '#nothing', SITE + '03_mask.html',
                '../images/no.png', 'https://github.com/flexconv/flexconv/blob/main/nothing.py'):
        assert misses(page, bad, pages, folder), bad


def test_backticked_names_become_links(site):
    pages, _ = site
    assert '[`FlexConv`](https://flexconv.github.io/flexconv/layers.html#flexconv)' in pages[Path('layers.html')].text


def public_things():
    "Module, name and object of every public class and function."
    for name in MODULES:
        module = import_module(name)
        for public in module.__all__:
            thing = getattr(module, public)
            if getattr(thing, '__module__', None) == name and callable(thing): yield name, public, thing


def entry_of(page, name):
    "The text under the heading that `show_doc` gives a name, up to the next heading."
    after = re.split(rf'^---\n\n\[source\].*\n\n### {re.escape(name)}\n', page.text, flags=re.M)
    assert len(after) == 2, f'{page.source}: {len(after) - 1} entries of {name}'
    return re.split(r'^#{1,6} ', after[1], flags=re.M)[0]


def test_every_public_name_has_an_entry_with_its_arguments(site):
    "A heading that a link can name, and a row with text for each argument that Python's signature has."
    pages, _ = site
    without, rows = [], 0
    for module, public, thing in public_things():
        page = pages[Path(f'{module.split(".")[1]}.html')]
        entry = entry_of(page, public)
        if re.search(r'Takes the arguments of (?:\[)?`', entry): continue
        for name in expected_arguments(thing):
            found = re.search(rf'^\| (?:\\\*)*{name} \| *(.*?) *\|$', entry, re.M)
            assert found, f'{page.source}: {public} has no row for {name}'
            if not found[1]: without.append(f'{module.split(".")[1]}.{public}: {name}')
            rows += 1
    assert rows > 600
    assert not without, '\n'.join(sorted(without))


def expected_arguments(thing):
    "What one passes, by Python's own account: no events of fastai, no context of an autograd function."
    if isinstance(thing, type) and issubclass(thing, BaseException): return {}
    function = thing.forward if isinstance(thing, type) and issubclass(thing, torch.autograd.Function) else thing
    try: parameters = inspect.signature(function).parameters
    except ValueError: return {}
    return {n: p for n, p in parameters.items() if n not in ('self', 'ctx', *getattr(thing, '_methods', ()))}


SIGNATURE = r'^#{3,4} [\w.]+\n\n(?:\[source\].*\n\n)?```python\n([\w.]+\([^`]*)\n```$'


def test_signatures_on_the_pages_are_those_of_python(site):
    "Same names, kinds and defaults, parsed from the page."
    pages, _ = site
    count = 0
    for page in [p for p in pages.values() if p.name != Path('site.html')]:
        for shown in re.findall(SIGNATURE, page.raw, re.M):
            head, rest = shown.split('(', 1)
            tree = ast.parse(f'def f({rest}: pass').body[0].args
            module = import_module(f'flexconv.{page.name.stem}')
            thing = module
            for part in head.removesuffix('.apply').split('.'): thing = getattr(thing, part)
            parameters = expected_arguments(thing)
            kinds = dict(VAR_POSITIONAL=[tree.vararg], VAR_KEYWORD=[tree.kwarg], KEYWORD_ONLY=tree.kwonlyargs,
                         POSITIONAL_OR_KEYWORD=tree.args, POSITIONAL_ONLY=tree.posonlyargs)
            for kind, args in kinds.items():
                expected = [n for n, p in parameters.items() if p.kind.name == kind]
                assert [a.arg for a in args if a is not None] == expected, f'{page.source}: {shown}'
            defaults = [ast.unparse(d) for d in [*tree.defaults, *tree.kw_defaults] if d is not None]
            given = [p.default for p in parameters.values() if p.default is not p.empty]
            named = [getattr(d, '__name__', None) or repr(d) for d in given]
            assert defaults == [ast.unparse(ast.parse(n).body[0].value) for n in named], f'{page.source}: {shown}'
            count += 1
    assert count > 250


def test_every_argument_of_a_method_has_a_text():
    methods = [(f'{module}.{public}.{name}', method) for module, public, thing in public_things()
               if inspect.isclass(thing) for name, method in public_methods(thing).items()]
    without = [f'{name}: {argument}' for name, method in methods
               for argument, text in argument_texts(method).items() if not text]
    assert len(methods) > 80 and not without, '\n'.join(without)


def test_search_finds_every_public_name(site):
    "Quarto's search knows headings of the second level: each name is one, on the page of all names."
    pages, _ = site
    heads = re.findall(r'^## (\w+)$', pages[Path('reference.html')].text, re.M)
    assert sorted(heads) == sorted(public for _, public, _ in public_things())


def test_figures_have_captions_and_alternative_texts(site):
    pages, _ = site
    count = 0
    for page in pages.values():
        for source in page.figures:
            options = {}
            for line in re.findall(r'^#\| *(fig-.*)$', source, re.M): options |= yaml.safe_load(line)
            for key in ('fig-alt', 'fig-cap'):
                texts = options.get(key) or ''
                if isinstance(texts, str): texts = [texts]
                assert texts and all(len(t) > 20 for t in texts), f'{page.source}: {key} is missing in\n{source}'
            count += 1
    assert count > 50


def test_tutorials_open_in_colab(site):
    "Each says where, and installs the library there."
    tutorials = [page for page in site[0].values() if page.source.parts[0] == 'tutorials']
    assert len(tutorials) > 10
    for page in tutorials:
        link, = page.front['code-links']
        assert link['href'] == f'https://colab.research.google.com/github/flexconv/flexconv/blob/main/nbs/{page.source}'
        assert 'pip install -q git+https://github.com/flexconv/flexconv' in (ROOT/'nbs'/page.source).read_text()


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
    items = [item for bar in web['sidebar'] for part in bar['contents'] for item in part.get('contents', [part])]
    named, titles = [item['href'] for item in items], [item['text'] for item in items]
    assert len(named) == len(set(named)) and set(named) == sources - {'404.ipynb'}
    assert len(titles) == len(set(titles)), 'two pages with one title'
    version = web['navbar']['right'][0]['text']
    assert f'version = {version.removeprefix("v")}\n' in (ROOT/'settings.ini').read_text(), 'the version in the navbar'
    assert all(item['href'] in sources for item in web['navbar']['left'])
    # from the root: pages lie in folders
    assert web['open-graph']['image'] == web['twitter-card']['image'] == '/images/card.png'
    themes = [file for theme in CONFIG['format']['html']['theme'].values() for file in theme if '.' in file]
    for file in web['favicon'], 'images/card.png', web['navbar']['logo'], CONFIG['format']['html']['css'], *themes:
        assert (folder/file).is_file(), file
    footer = re.findall(r'\]\(([^)]+)\)', ' '.join(web['page-footer'].values()))
    assert footer and all(link.startswith('https://') or link[0] == '/' and link[1:] in sources
                          for link in footer), footer
    assert CONFIG['project']['output-dir'] == '_docs' and set(CONFIG['format']['html']['theme']) == {'light', 'dark'}


def colours(theme):
    "The colours that a theme's file names, as red, green and blue."
    named = re.findall(r'^\$([\w-]+): #([0-9a-f]{6});', (ROOT/f'nbs/{theme}.scss').read_text(), re.M)
    return {name: [int(value[i:i + 2], 16) for i in (0, 2, 4)] for name, value in named}


def contrast(text, ground, opacity=1.):
    "Ratio of relative luminances as WCAG 2 defines it, from 1 to 21."
    def luminance(colour):
        linear = [v/12.92 if v <= 0.04045 else ((v + 0.055)/1.055)**2.4 for v in (c/255 for c in colour)]
        return sum(w*v for w, v in zip((0.2126, 0.7152, 0.0722), linear))
    mixed = [opacity*t + (1 - opacity)*g for t, g in zip(text, ground)]
    low, high = sorted((luminance(mixed), luminance(ground)))
    return (high + 0.05)/(low + 0.05)


def test_contrast_is_computed_as_wcag_does():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21) and contrast((9, 9, 9), (9, 9, 9)) == 1
    assert contrast((0x77, 0x77, 0x77), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)          # the known near miss


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_text_can_be_read(theme):
    "At least 4.5:1 for all text and ground colours that meet, faded text included."
    named, style = colours(theme), (ROOT/'nbs/styles.css').read_text()
    grounds = {'body-bg': ('body-color', 'link-color', 'text-muted', 'code-color'),
               'code-bg': ('code-color', 'link-color'),
               'code-block-bg': ('body-color', 'text-muted'),
               'navbar-bg': ('navbar-fg', 'navbar-hl'),
               'footer-bg': ('footer-fg',),
               'primary': ('btn-color',)}
    for ground, texts in grounds.items():
        for text in texts: assert contrast(named[text], named[ground]) >= 4.5, (text, ground)
    for opacity in re.findall(r'opacity: ([\d.]+)', style):
        assert contrast(named['body-color'], named['body-bg'], float(opacity)) >= 4.5


def rules(sheet):
    "Selectors and declarations of a style sheet, those inside of @media too."
    sheet = re.sub(r'/\*.*?\*/', '', sheet, flags=re.S)
    return [(selector.strip(), dict(re.findall(r'([\w-]+)\s*:\s*([^;]+)', body)))
            for selector, body in re.findall(r'([^{}]+)\{([^{}]*)\}', sheet)]


def grounds_without_text(sheet, ours):
    "Rules that set a ground but no colour, on tags that hold text and are not reset by our own sheet."
    reset = [s for s, d in ours if d.get('background', '').startswith('none !important')
             and d.get('color', '').startswith('inherit')]
    for selector, declared in rules(sheet):
        ground = declared.get('background', declared.get('background-color', 'none')).split()[0]
        if ground in ('none', 'transparent', 'inherit') or 'color' in declared or selector.startswith('progress'):
            continue
        if not any(re.split(r'[ :]', selector)[0] in s for s in reset): yield selector


def test_style_sheets_leave_colours_to_the_themes(site):
    """Ours inherit them; those that libraries store in a notebook set no ground without a colour for its text, or ours
    resets both."""
    pages, _ = site
    ours = rules((ROOT/'nbs/styles.css').read_text())
    for selector, declared in ours:
        assert declared.get('color', 'inherit').split()[0] == 'inherit', selector
        assert declared.get('background', 'none').split()[0] in ('none', 'white'), selector
        assert 'img' in selector or declared.get('background') != 'white', selector
    stored = [sheet for p in pages.values() for sheet in re.findall(r'<style[^>]*>(.*?)</style>', p.raw, re.S)]
    assert len(stored) > 10 and any('fastprogress' in sheet for sheet in stored)
    for sheet in stored: assert not list(grounds_without_text(sheet, ours)), list(grounds_without_text(sheet, ours))
    # it can fail
    assert list(grounds_without_text('table.other td { background: #f8f9fa; }', ours)) == ['table.other td']


def test_the_body_is_wide_enough_for_the_code():
    "88 characters of code, and nothing is cut."
    html, style = CONFIG['format']['html'], dict(rules((ROOT/'nbs/styles.css').read_text()))
    assert html['grid']['body-width'] == '900px' and html['code-overflow'] == 'wrap'
    assert style['pre, pre code']['white-space'] == 'pre-wrap'


def wide_lines(cells):
    """Lines over 88 characters, directives aside: of code that is neither hidden nor exported,
    and of the blocks of code in texts."""
    for cell in cells:
        lines = ''.join(cell['source']).splitlines()
        if cell['cell_type'] == 'markdown':
            lines = [line for block in re.findall(r'^```\w*\n(.*?)^```', '\n'.join(lines), re.M | re.S)
                     for line in block.splitlines()]
        elif any(re.match(r'#\| *(hide|export[si]?|echo: *false)\b', line) for line in lines): continue
        yield from (line for line in lines if len(line) > 88 and not line.startswith('#|'))


def test_open_code_fits():
    wide = {}
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        name = path.relative_to(ROOT/'nbs').with_suffix('')
        if any(part[0] in '._' for part in name.parts): continue
        wide[str(name)] = list(wide_lines(json.loads(path.read_text())['cells']))
    assert len(wide) > 50
    assert not any(wide.values()), '\n'.join(f'{name}: {line}' for name, lines in wide.items() for line in lines)
    # it can fail
    found = wide_lines([dict(cell_type='code', source=[f'{directive}\n', 'x'*89])
                        for directive in ('#| hide', '#| export', '#| exporti', '#| echo: false', '#| fig-cap: x')])
    assert list(found) == ['x'*89]


def test_drawings_are_what_their_script_draws():
    "Logo and favicon; the card depends on matplotlib's fonts."
    sys.path.insert(0, str(ROOT/'tools'))
    try: import logo
    finally: sys.path.pop(0)
    assert logo.svg(logo.mark()) == (ROOT/'nbs/images/logo.svg').read_text()
    def pixels(file): return np.asarray(Image.open(file).convert('RGB'), dtype=int)
    drawn = pixels(io.BytesIO(logo.favicon(logo.mark())))
    saved = pixels(ROOT/'nbs/images/favicon.png')
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
            for node in ast.walk(ast.parse(python_of(cell))):
                if isinstance(node, ast.Name): names.add(node.id)
                elif isinstance(node, ast.Attribute): names.add(node.attr)
                elif isinstance(node, ast.keyword): names.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names |= set(re.findall(r'\b[a-z]\w+\b', node.value)) if len(node.value) < 40 else set()
    return names


def test_every_public_name_has_an_example():
    seen = examples()
    missing = [f'{name}.{public}' for name in MODULES for public in import_module(name).__all__ if public not in seen]
    assert not missing, ', '.join(missing)


@pytest.mark.skipif(shutil.which('quarto') is None, reason='Quarto is not installed')
def test_site_renders_without_a_warning(tmp_path):
    folder = copy_of_the_project(tmp_path)
    done = subprocess.run([Path(sys.executable).parent/'nbdev_docs'], cwd=folder, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0 and 'WARN:' not in log, log        # Quarto colours the word
    assert (folder/'README.md').read_text() == (ROOT/'README.md').read_text() and not (folder/'index_files').exists()
    for page in ('index', 'mask', 'reference', 'changelog', 'tutorials/first', 'experiments/results'):
        assert '<main' in (folder/f'_docs/{page}.html').read_text()
