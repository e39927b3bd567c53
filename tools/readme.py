"README.md from nbs/index.ipynb, with its pictures in nbs/images. `nbdev_readme` does the same where Quarto is installed."
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parent.parent


def convert():
    "The README's text, and its pictures by path."
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    nb.metadata.language_info = dict(name='python')
    exporter = MarkdownExporter(config=Config(ExtractOutputPreprocessor=dict(output_filename_template='nbs/images/index_{cell_index}{extension}')))
    body, resources = exporter.from_notebook_node(nb)
    return '\n'.join(line.rstrip() for line in body.strip().splitlines()) + '\n', resources['outputs']


if __name__ == '__main__':
    text, pictures = convert()
    (root/'README.md').write_text(text)
    (root/'nbs/images').mkdir(exist_ok=True)
    for name, data in pictures.items(): (root/name).write_bytes(data)
