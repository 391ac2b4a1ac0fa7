"""Print how long the whole quickstart takes here, once stage 1 has timed its first steps.

`python -m quickstart.estimate RUN_DIR PID` runs beside stage 1 and ends with the script of that process id.
"""

import json
import os
import sys
import time
from pathlib import Path

# Of the whole: 2.8 of 9.2 minutes on two cores of a Xeon, 8.6 of about 25 by the rates of an EPYC.
STAGE1_SHARE = 1 / 3


def whole_minutes(run: Path) -> float | None:
    """Minutes of the whole quickstart by the first record of stage 1; None before it is there."""
    path = run / "metrics.jsonl"
    first, end, _ = path.read_text().partition("\n") if path.exists() else ("", "", "")
    if not end:
        return None
    return json.loads(first)["hours left"] * 60 / STAGE1_SHARE


def main() -> None:
    run, script = Path(sys.argv[1]), int(sys.argv[2])
    while (minutes := whole_minutes(run)) is None:
        time.sleep(0.5)
        try:
            os.kill(script, 0)  # asks whether it is there
        except ProcessLookupError:
            return
    print(f"\nthe whole quickstart takes about {minutes:.0f} minutes on this machine", flush=True)


if __name__ == "__main__":
    main()
