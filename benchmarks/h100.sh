#!/usr/bin/env bash
# Measure what needs a GPU, the most telling first: `bash benchmarks/h100.sh --output DIR --minutes 9`.
# Another call with the same DIR resumes. `--tiny` runs all steps at small sizes on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m benchmarks.h100 "$@"
