"""Write a run's newest tokenizer in the published format: `python -m train_tokenizer.export`."""

from modeling.weights.metadata import TOKENIZER
from modeling.weights.opened import open_weights
from modeling.weights.tensors import describe, write_state_dict
from runtime.arguments import Parser, new_file, path
from runtime.program import run

FORMATS = (".pth", ".pt", ".bin", ".safetensors")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m train_tokenizer.export", description=__doc__)
    parser.add_argument(
        "run_dir", type=path, help="the run's folder (experiment.output_dir), or a checkpoint of it"
    )
    parser.add_argument("file", type=new_file(*FORMATS), help="what to write: .pth or .safetensors")
    args = parser.parse_args(argv)
    weights = open_weights(args.run_dir, TOKENIZER)
    about = None if weights.about.assumed else weights.about  # state no guessed sizes
    write_state_dict(weights.state, args.file, about)
    print(f"wrote {args.file}: {describe(weights.state)}, from {weights.file}")


if __name__ == "__main__":
    run(main)
