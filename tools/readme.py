"README.md from nbs/index.ipynb, with its pictures in nbs/images. `nbdev_readme` does the same where Quarto is installed."
import html, re
from pathlib import Path
import nbformat, yaml
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parent.parent


def options(cell):
    "The `#|` lines of a code cell, as a dict; directives of nbdev have the value None."
    lines = re.findall(r'^#\| *(.*)$', cell.source, re.M) if cell.cell_type == 'code' else []
    return {k: v for line in lines for k, v in (yaml.safe_load(line) if ': ' in line else {line.strip(): None}).items()}


def convert():
    "The README's text, and its pictures by path."
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    nb.metadata.language_info = dict(name='python')
    nb.cells = [c for c in nb.cells if 'hide' not in options(c)]
    figures = {i: o for i, c in enumerate(nb.cells) if 'fig-alt' in (o := options(c))}
    for c in nb.cells:
        if options(c).get('echo') is False: c.metadata.tags = ['no-code']
        if c.cell_type == 'code': c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags=['no-code']),
                                              ExtractOutputPreprocessor=dict(output_filename_template='nbs/images/index_{cell_index}{extension}')))
    body, resources = exporter.from_notebook_node(nb)
    def picture(match):
        "A picture with its text, caption and width: it has two pixels for each of the page."
        path, i = match[1], int(match[2])
        width = next(o.metadata['image/png'].width for o in nb.cells[i].outputs if 'image/png' in o.get('data', {}))
        return f'<img src="{path}" alt="{html.escape(figures[i]["fig-alt"])}" width="{width}">\n\n*{figures[i]["fig-cap"]}*'
    body = re.sub(r'!\[png\]\((nbs/images/index_(\d+)\.png)\)', picture, body)
    return re.sub(r'\n{4,}', '\n\n\n', '\n'.join(line.rstrip() for line in body.strip().splitlines())) + '\n', resources['outputs']


if __name__ == '__main__':
    text, pictures = convert()
    (root/'README.md').write_text(text)
    (root/'nbs/images').mkdir(exist_ok=True)
    for old in (root/'nbs/images').glob('index_*'): old.unlink()
    for name, data in pictures.items(): (root/name).write_bytes(data)
