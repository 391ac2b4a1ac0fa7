"""Write a run's newest tokenizer in the published format: `python -m train_tokenizer.export`."""

from pathlib import Path

import yaml

from configs.load import as_dict, config_beside, tokenizer_config
from modeling.weights.metadata import TOKENIZER, about_file, about_model
from modeling.weights.tensors import describe, read_state_dict, write_state_dict
from runtime.arguments import Parser, new_file, path
from runtime.files import write_whole
from runtime.program import run
from training.checkpoint import weights_file

FORMATS = (".pth", ".pt", ".bin", ".safetensors")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m train_tokenizer.export", description=__doc__)
    parser.add_argument(
        "run_dir", type=path, help="the run's folder (experiment.output_dir), or a checkpoint of it"
    )
    parser.add_argument("file", type=new_file(*FORMATS), help="what to write: .pth or .safetensors")
    args = parser.parse_args(argv)
    source = weights_file(args.run_dir, "tokenizer")
    state, about, config = read_state_dict(source), about_file(source), config_beside(args.run_dir)
    if about is not None:
        about.expect(TOKENIZER, source)
    elif config is not None:  # a run of an earlier version
        about = about_model(TOKENIZER, tokenizer_config(config))
        about.check_tensors(state, source)
    write_state_dict(state, args.file, about)
    if config is not None:
        # The numbers of heads, and whether the decoder is causal, are in no tensor's shape.
        sizes = {"model": {"vq_model": as_dict(tokenizer_config(config))}}
        write_whole(Path(args.file).with_suffix(".yaml"), yaml.safe_dump(sizes).encode())
    print(f"wrote {args.file}: {describe(state)}, from {source}")


if __name__ == "__main__":
    run(main)
