#!/usr/bin/env bash
# The whole test suite: `bash tests/run.sh`; further arguments go to pytest (-m 'not slow' leaves out the longest).
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
basedpyright --level error
# Two workers with a thread each: most tests wait for small programs to start.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile "$@"
