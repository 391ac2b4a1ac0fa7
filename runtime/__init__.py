"""What every program stands on: errors, whole files, processes, signals, randomness, parts."""

import sys

if sys.platform == "win32":  # neither file locks nor the signals that the programs need
    print("error: the programs run on Linux or macOS, not on Windows: use WSL 2", file=sys.stderr)
    sys.exit(2)
