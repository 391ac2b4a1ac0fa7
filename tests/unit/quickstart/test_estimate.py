"""How long the quickstart takes, said after the first steps of its stage 1."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-m", "quickstart.estimate"]


def test_the_first_steps_of_stage_1_tell_the_length_of_the_whole(tmp_path):
    estimate = subprocess.Popen(
        [*PROGRAM, tmp_path, str(os.getpid())], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.1)
    records = tmp_path / "metrics.jsonl"
    first = json.dumps({"step": 50, "images/s": 160.0, "hours left": 0.05})
    records.write_text(first[:20])  # a line that is being written
    time.sleep(1)
    assert estimate.poll() is None
    records.write_text(first + "\n" + json.dumps({"step": 100, "hours left": 9}) + "\n")
    out, _ = estimate.communicate(timeout=60)
    assert "takes about 9 minutes" in out


def test_the_estimate_ends_with_the_script_that_waits_for_it(tmp_path):
    command = f"{sys.executable} -m quickstart.estimate {tmp_path} $$ & exit 3"
    script = subprocess.Popen(["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE)
    assert script.wait(60) == 3
    assert script.communicate(timeout=60) == (b"", None)  # the pipe has closed
