#!/usr/bin/env bash
# Measure everything that needs a GPU, in at most 25 minutes, and write it into benchmarks/README.md:
# `bash benchmarks/h100.sh`. `--tiny` tries the steps on a CPU and writes a copy of the README instead.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m benchmarks.h100 "$@"
