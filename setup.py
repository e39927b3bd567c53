"Packaging from settings.ini, which nbdev reads too; `pip install -e .` and `pip install -e '.[dev]'` both come through here."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    long_description=(here/'README.md').read_text(encoding='utf-8').replace('](nbs/', f'](https://raw.githubusercontent.com/{cfg["user"]}/{cfg["repo"]}/v{cfg["version"]}/nbs/'),      # PyPI has no pictures of its own
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Natural Language :: English'] +
                [f'Programming Language :: Python :: 3.{v}' for v in range(10, 14)],
    packages=find_packages(include=['flexconv', 'flexconv.*']),
    include_package_data=True,
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'export')},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']),
    zip_safe=False,
)
