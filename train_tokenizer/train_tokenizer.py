"""Names the command that trains the tokenizer, for those who run the published one in this folder."""

import sys

if __name__ == "__main__":
    print(
        "error: run `python -m train_tokenizer config=configs/tokenizer_stage1.yaml "
        "dataset.params.train_dir=FOLDER_OR_LIST` (or accelerate launch -m train_tokenizer ...) in the "
        "folder above this one; README_AliTok.md explains its options",
        file=sys.stderr,
    )
    sys.exit(2)
