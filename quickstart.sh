#!/usr/bin/env bash
# From images to generated images on two CPU cores: real handwritten digits through the whole pipeline.
# Run it again to resume after an interruption; remove output/quickstart to start over.
set -euo pipefail
cd "$(dirname "$0")"
source tests/environment.sh requirements.txt

out=output/quickstart
started=$SECONDS
step() { printf '\n[%s min] %s\n' "$(((SECONDS - started) / 60))" "$*"; }

step "digits: scikit-learn's handwritten digits as PNG folders"
python -m quickstart.digits $out/data
step "tokenizer, stage 1: causal decoder, prefix tokens, clustered codebook"
[ -e $out/stage1/metrics.jsonl ] || python -m quickstart.estimate $out/stage1 $$ &
python -m train_tokenizer config=configs/digits_stage1.yaml
step "tokenizer, stage 2: bidirectional decoder"
python -m train_tokenizer config=configs/digits_stage2.yaml
step "pretokenization: five crops per image, none mirrored"
for split in train val; do
    python pretokenization.py --config configs/digits_generator.yaml --img_size 32 --five_crop \
        --data_path $out/data/$split --cached_path $out/cache_$split \
        --tokenizer_checkpoint $out/stage2/tokenizer.pth --num_workers 0
done
step "generator"
python train_ar.py config=configs/digits_generator.yaml
step "sampling: 500 digits"
python sample_imagenet.py config=configs/digits_generator.yaml experiment.output_dir=$out/samples \
    experiment.generator_checkpoint=$out/generator/generator_best.bin
step "report"
python -m quickstart.report $out
step "done"
