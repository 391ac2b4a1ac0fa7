"""Names the command that trains the tokenizer, for those who run the published one in this folder."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("__main__.py")))  # it refuses to run as a file
