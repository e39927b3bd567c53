#!/usr/bin/env bash
# Builds sdist and wheel into dist/, installs each in a fresh environment away from the sources, and trains the digits with it.
#   tools/check_release.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m venv "$work/build" && "$work/build/bin/pip" install --quiet build twine
rm -rf dist build && "$work/build/bin/python" -m build --outdir dist . > "$work/build.log" || { cat "$work/build.log" >&2; exit 1; }
"$work/build/bin/twine" check --strict dist/*
version=$("$python" -c 'import re; print(re.search(r"__version__ = \"(.+)\"", open("flexconv/__init__.py").read())[1])')
for file in "dist/flexconv-$version.tar.gz" "dist/flexconv-$version-py3-none-any.whl"; do
    path=$PWD/$file env=$work/env
    rm -rf "$env" "$work/run" && mkdir "$work/run" && "$python" -m venv "$env"
    "$env/bin/pip" install --quiet "$path" 2>&1 | grep -v 'is ignored: it is neither a file nor a directory' || true
    (cd "$work/run" && "$env/bin/flexconv_train" > train.log && "$env/bin/flexconv_eval" runs/digits-flexnet3-seed0 > eval.log)
    accuracy=$(sed -n 's/^Last epoch: accuracy \([0-9.]*\)%.*/\1/p' "$work/run/train.log")
    found=$(cd "$work/run" && "$env/bin/python" -c 'import flexconv; print(flexconv.__version__)')
    echo "$file: version $found, $accuracy% of the held-out digits"
    test "$found" = "$version"
    awk "BEGIN { exit !($accuracy >= 97) }"
done
