#!/usr/bin/env bash
# Ten minutes on a machine with a GPU: checks, times and two epochs of CIFAR-10, into gpu_check/report.json and .md. Called again, it goes on.
#   tools/gpu_check.sh [--data FOLDER] [--minutes 10] [--again]            tools/gpu_check.sh --device cpu --small: everywhere
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -c 'import sys; from flexconv.gpu_check import main; sys.exit(main())' "$@"
