#!/usr/bin/env bash
# Does the library work with this Python and these versions? A fresh environment with the runtime requirements alone, and what a user does first:
# import, train the digits, evaluate; then the tests that need no more than that. With ALL=1 every test that needs no nbdev, and what they need.
#   tools/compatibility.sh [python] [requirement ...]      e.g. tools/compatibility.sh python3.10 torch==2.5.1 torchvision==0.20.1 fastai==2.7.18
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}; shift || true
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
. "$work/venv/bin/activate"
export PIP_DISABLE_PIP_VERSION_CHECK=1
git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source
extra=${ALL:+[export]} more=${ALL:+pytest-xdist timm fft-conv-pytorch ipywidgets}
pip install --quiet "$work/source$extra" "$@" pytest hypothesis $more 2>&1 | grep -v 'is ignored: it is neither a file nor a directory' || true
cd "$work"
python -c 'import sys, torch, fastai, fastcore, numpy, flexconv; print("python", sys.version.split()[0], "torch", torch.__version__, "fastai", fastai.__version__, "fastcore", fastcore.__version__, "numpy", numpy.__version__)'
flexconv_train | tee train.log | tail -2
flexconv_eval runs/digits-flexnet3-seed0
python - <<'END'
import re
accuracy = float(re.search(r'Last epoch: accuracy ([\d.]+)%', open('train.log').read()).group(1))
assert accuracy >= 97, f'{accuracy}% of the held-out digits is too little'
END
if [ -n "${ALL:-}" ]; then
    cd source && rm -rf flexconv               # what is tested is what was installed
    python -m pytest -q -p no:cacheprovider tests --ignore tests/test_notebooks.py --ignore tests/test_project.py --ignore tests/test_site.py
    exit
fi
cp -r source/tests tests && rm -rf source
python -m pytest -q -p no:cacheprovider tests/test_conv.py tests/test_correlate.py tests/test_layers.py tests/test_golden.py tests/test_properties.py tests/test_bad_input.py tests/test_resolution.py
