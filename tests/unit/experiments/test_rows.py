"""Rows and variations set what they name over the quickstart's configs, and nothing else."""

import dataclasses

import pytest

import configs.load
from configs.load import flatten
from configs.schema import GeneratorRun, TokenizerRun
from experiments.alignment.ablation import chains_of
from experiments.alignment.rows import (
    GENERATOR,
    ROWS,
    STAGE1,
    STAGE2,
    VARIATIONS,
    Overrides,
    Recipe,
    recipe,
    varied,
)
from tests.refusals import refusal

# What a row changes in stage 1, beside the number of tokens.
CHANGED = {
    "bidirectional": {"model.vq_model.causal": False},
    "causal": {},
    "prefix": {},
    "aux": {"model.vq_model.prefix_head": True, "losses.aux_weight": 3.0},
}
TRAINED = [row for row in ROWS if not row.run]
EXAMPLES = [f"{name}={value}" for name, v in VARIATIONS.items() for value in v.examples]


def options(schema, config, arguments, program=""):
    loaded = configs.load.load(schema, [f"config={config}", *arguments], program)
    return flatten(dataclasses.asdict(loaded))


def changes(schema, config, arguments, program=""):
    plain, now = (options(schema, config, a, program) for a in ([], arguments))
    assert plain.keys() <= now.keys()  # photographs have a second phase
    return {name: value for name, value in now.items() if value != plain.get(name)}


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_a_row_changes_nothing_but_what_it_is_about(row):
    made = recipe(row, Overrides())
    tokens = {} if row.prefix else {"model.vq_model.num_latent_tokens": 64}
    assert changes(TokenizerRun, STAGE1, made.stage1) == CHANGED[row.name] | tokens
    codes = {} if row.prefix else {**tokens, "model.generator.image_seq_len": 64}
    assert changes(GeneratorRun, GENERATOR, made.train, "train_ar") == codes
    assert changes(GeneratorRun, GENERATOR, made.sample, "sample_imagenet") == codes


def test_the_row_of_the_quickstart_sets_nothing_and_shares_the_codes_of_its_stage_1(tmp_path):
    rows = {row.name: row for row in ROWS}
    assert recipe(rows["prefix"], Overrides()) == Recipe([], [], [], [])
    for asked in ([rows["quickstart"]], [rows["prefix"], rows["quickstart"]]):
        [chain] = chains_of(tmp_path, tmp_path, asked, [42], Overrides())
        assert chain.folder == tmp_path / "seed_42/prefix"
        assert [step.name for step in chain.steps][-3:] == [
            "stage2", "samples_stage2", "judge_stage2"
        ]  # fmt: skip
    [chain] = chains_of(tmp_path, tmp_path, [rows["prefix"]], [42], Overrides())
    assert chain.steps[-1].name == "judge_stage1"
    [chain] = chains_of(tmp_path, tmp_path, [rows["stage2"]], [42], Overrides())
    assert chain.folder == tmp_path / "seed_42/aux" and chain.steps[-1].name == "judge_stage2"
    assert set(rows["aux"].stage1) < set(chain.steps[0].command)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_variation_loads_for_its_rows(text):
    overrides, names = varied(text)
    for row in (row for row in ROWS if row.name in names):
        made = recipe(row, overrides)
        changed = changes(TokenizerRun, STAGE1, made.stage1)
        generator = options(GeneratorRun, GENERATOR, made.train, "train_ar")
        options(GeneratorRun, GENERATOR, made.sample, "sample_imagenet")
        options(TokenizerRun, STAGE2, made.stage2)
        tokenizer = options(TokenizerRun, STAGE1, made.stage1)
        for name in ("codebook_size", "num_latent_tokens", "patch_size", "encoder_layers"):
            option = f"model.vq_model.{name}"
            assert tokenizer[option] == generator[option]
        if not text.startswith(("data=", "generator_steps=")):
            assert changed != changes(TokenizerRun, STAGE1, recipe(row, Overrides()).stage1)


def test_lengths_are_scaled_and_sizes_follow():
    assert varied("image_size=32,data=photographs") == varied("data=photographs,image_size=32")
    overrides, _ = varied("steps=0.5,patch_size=8")
    made = recipe(ROWS[0], overrides)
    stage1 = configs.load.load(TokenizerRun, [f"config={STAGE1}", *made.stage1])
    plain = configs.load.load(TokenizerRun, [f"config={STAGE1}"])
    assert [p.steps for p in stage1.phases] == [p.steps / 2 for p in plain.phases]
    assert stage1.phases[0].learning_rate == plain.phases[0].learning_rate
    assert stage1.model.vq_model.num_tokens == 16
    generator = configs.load.load(GeneratorRun, [f"config={GENERATOR}", *made.train], "train_ar")
    assert generator.model.generator.image_seq_len == 16
    halved = configs.load.load(GeneratorRun, [f"config={GENERATOR}"]).training.max_train_steps / 2
    assert generator.training.max_train_steps == halved


@pytest.mark.parametrize(
    "text", ["colour=red", "position_init", "steps=", "steps=-1", "steps=nan", "codebook_size=many"]
)
def test_a_variation_that_makes_no_sense_is_refused(text):
    refusal(lambda: varied(text), f"--vary {text}")
