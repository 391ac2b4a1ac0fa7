"""Names the command that trains the tokenizer, for those who have the published one."""

import sys

if __name__ == "__main__":
    print(
        "error: the tokenizer is trained by `python -m train_tokenizer config=configs/"
        "tokenizer_stage1.yaml dataset.params.train_dir=FOLDER_OR_LIST` (or accelerate launch -m "
        "train_tokenizer …); train_tokenizer/README_AliTok.md explains its options",
        file=sys.stderr,
    )
    sys.exit(2)
