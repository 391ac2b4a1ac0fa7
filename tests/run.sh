#!/usr/bin/env bash
# The whole test suite: `bash tests/run.sh`; further arguments go to pytest (-m 'not slow' leaves out the longest).
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
types=$(mktemp) memory=
basedpyright --level error > "$types" 2>&1 & checker=$!  # beside the tests
trap 'kill "$checker" 2> /dev/null || true; rm -rf "$types" ${memory:+"$memory"}' EXIT
unset PYTHONDONTWRITEBYTECODE  # the tests start Python more than a hundred times
folder=()
# The programs under test sync thousands of small files, which takes no time in memory.
if [ "$(df --output=avail /dev/shm 2> /dev/null | tail -n 1)" -gt 8000000 ] 2> /dev/null; then
    memory=$(mktemp -d /dev/shm/alitok-tests.XXXXXX)
    folder=(--basetemp="$memory/tests")
fi
# Two workers with a thread each: most tests wait for small programs to start.
status=0
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${folder[@]+"${folder[@]}"} "$@" || status=$?
wait "$checker" || { cat "$types"; status=1; }
exit "$status"
