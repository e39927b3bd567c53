"""How the pages read, in figures: how soon a definition is followed by an example, how long cells and lines are.

    python tools/measure.py          # one row for each notebook that exports code, and all of them
    python tools/measure.py --runs   # and the runs of cells without an example, longest first

A definition is an exported cell with a function or a class; an example is a code cell that is not exported and does
more than import. A run is definitions in a row without an example, whatever text stands between them.
"""
import argparse, ast, json
from pathlib import Path
from statistics import mean, median

NBS = Path(__file__).resolve().parent.parent/'nbs'


def kind(cell):
    "'definition', 'exported' (imports and constants), 'example', or None (text, imports, directives alone)."
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code': return None
    directives = [line for line in source.splitlines() if line.startswith('#|')]
    try: tree = ast.parse(source)
    except SyntaxError: return 'example'                                        # a magic or a shell command
    exported = any(line.split()[1].startswith('export') for line in directives if len(line.split()) > 1)
    defines = any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)
    if exported: return 'definition' if defines else 'exported'
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body): return None
    return 'example'


def code_lines(cell):
    "Lines of a cell that are code: no directives, no blank ones."
    return [line for line in ''.join(cell['source']).splitlines() if line.strip() and not line.startswith('#|')]


def runs_without_example(cells):
    "Lists of definitions with no example between them."
    runs, run = [], []
    for cell in cells:
        found = kind(cell)
        if found == 'definition': run.append(cell)
        elif found == 'example' and run:
            runs.append(run)
            run = []
    return runs + [run]*bool(run)


def measure(cells):
    "The figures of some cells in reading order, a dict."
    kinds = [(kind(cell), cell) for cell in cells if cell['cell_type'] == 'code' and kind(cell)]
    definitions = [cell for found, cell in kinds if found == 'definition']
    followed = sum(kinds[i + 1][0] == 'example' for i in range(len(kinds) - 1) if kinds[i][0] == 'definition')
    lines = [line for found, cell in kinds if found in ('definition', 'exported') for line in code_lines(cell)]
    runs = runs_without_example(cells)
    return {'definitions': len(definitions),
            'followed at once by an example': f'{100*followed/max(1, len(definitions)):.0f}%',
            'longest run without one': max(map(len, runs), default=0),
            'its lines': max((sum(len(code_lines(c)) for c in run) for run in runs), default=0),
            'cell, median lines': round(median(len(code_lines(c)) for c in definitions)) if definitions else 0,
            'cell, most lines': max((len(code_lines(c)) for c in definitions), default=0),
            'line, mean characters': round(mean(map(len, lines))) if lines else 0,
            'lines over 120': sum(len(line) > 120 for line in lines),
            '@patch': sum('@patch' in ''.join(c['source']) for c in definitions)}


def pages():
    "Cells of the notebooks that export code, by name."
    found = {path.stem: json.loads(path.read_text())['cells'] for path in sorted(NBS.glob('*.ipynb'))}
    return {name: cells for name, cells in found.items() if any(kind(c) == 'definition' for c in cells)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', action='store_true', help='list runs of three definitions and more')
    args = parser.parse_args()
    books = pages()
    # an empty example ends a page: a run does not reach across pages
    end = dict(cell_type='code', source=['pass'])
    rows = {name: measure(cells) for name, cells in books.items()}
    rows['all'] = measure([cell for cells in books.values() for cell in [*cells, end]])
    width = max(map(len, rows))
    names = list(rows['all'])
    print('\n'.join(f'{i}: {name}' for i, name in enumerate(names, 1)))
    print(' '*width, *(f'{i:>5}' for i in range(1, len(names) + 1)))
    for page, row in rows.items(): print(f'{page:<{width}}', *(f'{value:>5}' for value in row.values()))
    if not args.runs: return
    for name, cells in books.items():
        for run in runs_without_example(cells):
            if len(run) < 3: continue
            print(name, len(run), [node.name for cell in run for node in ast.parse(''.join(cell['source'])).body
                                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))])


if __name__ == '__main__': main()
