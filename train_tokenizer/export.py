"""Write a run's newest tokenizer in the published format: `python -m train_tokenizer.export`."""

import argparse

from modeling.weights import describe, read_state_dict, write_state_dict
from runtime.program import run
from training.checkpoint import weights_file


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m train_tokenizer.export", description=__doc__)
    parser.add_argument("run_dir", help="the run's folder (experiment.output_dir)")
    parser.add_argument("file", help="what to write: .pth or .safetensors")
    args = parser.parse_args(argv)
    source = weights_file(args.run_dir, "tokenizer")
    state = read_state_dict(source)
    write_state_dict(state, args.file)
    print(f"wrote {args.file}: {describe(state)}, from {source}")


if __name__ == "__main__":
    run(main)
