"""How what is written becomes a value, and what a refusal says about it."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from configs.load import lasting, load, load_sizes, resumed_run, save
from configs.schema import Experiment, GeneratorRun, TokenizerRun
from modeling.fields import declared
from tests.refusals import refusal as refused
from tests.unit.configs.test_schema import STAGE1, B, option, refusal, written

# The options that spec.md lists of the published configs, as such a file has them.
AUTHORS = """
experiment:
    project: "alitok"
    name: "alitok_b"
    output_dir: "alitok_b"
    generator_checkpoint: null
    resume: True
    save_every: 10_000
    eval_every: 10_000
    generate_every: 10_000
    log_every: 100
    log_grad_norm_every: 1_000
    max_train_examples: 1_281_167
model:
    vq_model:
        codebook_size: 4096
        token_size: 32
        num_latent_tokens: 273
    generator:
        hidden_size: 768
        num_hidden_layers: 24
        num_attention_heads: 16
        dropout: 0.1
        attn_drop: 0.1
        tok_dropout: 0.1
        class_label_dropout: 0.1
        image_seq_len: 273
        condition_num_classes: 1000
        randomize_temperature: 1.0
        guidance_scale: 16.0
        guidance_scale_pow: 1.8
        use_checkpoint: False
        seed: 42
dataset:
    params:
        pretokenization: "cache_alitok"
        num_workers_per_gpu: 12
    preprocessing:
        crop_size: 256
        random_flip: True
optimizer:
    name: adamw
    params:
        learning_rate: 4e-4
        beta1: 0.9
        beta2: 0.96
        weight_decay: 0.03
lr_scheduler:
    scheduler: "cosine"
    params:
        learning_rate: ${optimizer.params.learning_rate}
        warmup_steps: 62_500
        end_lr: 1e-5
training:
    gradient_accumulation_steps: 1
    per_gpu_batch_size: 128
    mixed_precision: no
    enable_tf32: True
    enable_wandb: False
    use_ema: False
    seed: 42
    max_train_steps: 500_000
    max_grad_norm: 1.0
"""


# ---------------------------------------------------------------------- texts
@pytest.mark.parametrize(
    "text",
    ["2024_06_01", "run #3", "1e3", "0x10", "007", "no", "null", "a: b", "[x]", "'x'", "1:30"],
)
@pytest.mark.parametrize("name", ["experiment.output_dir", "experiment.name"])
def test_text_of_the_command_line_is_taken_as_it_was_typed(name, text):
    assert option(load(GeneratorRun, [B, f"{name}={text}"]), name) == text


@pytest.mark.parametrize("text", ["2024_06_01", "007", "1e3", "no", "12:30"])
def test_text_of_a_file_is_taken_as_it_stands_there(tmp_path, text):
    options = load(GeneratorRun, [written(tmp_path, f"experiment: {{output_dir: {text}}}")])
    assert options.experiment.output_dir == text


@pytest.mark.parametrize(
    "name", ["experiment.output_dir", "experiment.fid_reference", "experiment.resume",
             "dataset.params.pretokenization", "dataset.params.val_pretokenization"]
)  # fmt: skip
def test_a_path_starts_at_home(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", "/home/ada")
    assert option(load(GeneratorRun, [B, f"{name}=~/runs/a"]), name) == "/home/ada/runs/a"
    keys = name.split(".")
    text = "{" + ": {".join(keys) + ": ~/runs/a" + "}" * len(keys)
    assert option(load(GeneratorRun, [written(tmp_path, text)]), name) == "/home/ada/runs/a"


def test_every_option_that_is_a_path_expands_home():
    names = {"output_dir", "resume", "fid_reference", "generator_checkpoint", "codes",
             "prefix", "edit", "mask", "tokenizer_checkpoint", "stage1_checkpoint", "pretokenization", "train_dir",
             "val_pretokenization", "val_dir", "train_root", "init_weights"}  # fmt: skip
    found = {
        name.split(".")[-1]
        for schema in (GeneratorRun, TokenizerRun)
        for name, option in declared(schema).items()
        if option.rule.path
    }
    assert found == names


# ---------------------------------------------------------------------- words, numbers, null
@pytest.mark.parametrize("word", ["no", "No", "NO", "'no'", '"no"'])
def test_precision_no_is_a_word_in_yaml_too(tmp_path, word):
    file = written(tmp_path, f"training: {{mixed_precision: {word}}}")
    assert load(GeneratorRun, [file]).training.mixed_precision == "no"


@pytest.mark.parametrize(
    "text, value",
    [
        ("1", [1]), ("[1]", [1]), ("[3, 4]", [3, 4]), ("null", None),
        ("otter", ["otter"]), ("[golden retriever,otter]", ["golden retriever", "otter"]),
        ("[207, none, otter]", [207, "none", "otter"]), ("['5', 5]", ["5", 5]),
    ],
)  # fmt: skip
def test_one_class_or_several(tmp_path, text, value):
    options = load(GeneratorRun, [B, f"experiment.classes={text}"])
    assert options.experiment.classes == value
    save(options, tmp_path / "config.yaml")
    assert load(GeneratorRun, [f"config={tmp_path}/config.yaml"]).experiment.classes == value


def test_null_is_off_for_clipping_and_the_default_for_seeds(tmp_path):
    text = "{training: {seed: null, max_grad_norm: null}, model: {generator: {seed: ~}}}"
    for argv in (
        [written(tmp_path, text)],
        [B, "training.seed=null", "training.max_grad_norm=null", "model.generator.seed=null"],
    ):
        options = load(GeneratorRun, argv)
        assert (options.training.seed, options.model.generator.seed) == (42, 42)
        assert options.training.max_grad_norm == 0.0


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3", "1E-3"])
def test_a_rate_is_a_number_however_it_is_written(tmp_path, text):
    file = written(tmp_path, f"optimizer: {{params: {{learning_rate: {text}}}}}")
    assert load(GeneratorRun, [file]).optimizer.params.learning_rate == 1e-3


# ---------------------------------------------------------------------- the place of a value
def test_a_refusal_names_the_file_and_the_line(tmp_path):
    file = written(tmp_path, "# mine\ntraining:\n  seed: 3\n  max_grad_norm: -2\n")
    message = refusal(GeneratorRun, file)
    assert message == (f"training.max_grad_norm=-2.0: set at least 0 ({tmp_path}/own.yaml, line 4)")


def test_a_refusal_blames_the_command_line_for_what_came_from_there(tmp_path):
    file = written(tmp_path, "model: {generator: {image_seq_len: 273}}")
    message = refusal(GeneratorRun, file, "model.generator.image_seq_len=50")
    assert message.endswith("(the command line)") and "own.yaml" not in message


def test_options_say_which_were_set_and_where(tmp_path):
    file = written(tmp_path, "training:\n  seed: 3\n  max_train_steps: 9\nphases:\n- steps: 2\n")
    options = load(TokenizerRun, [file, "training.seed=4", "phases=[{steps: 9, name: x}]"])
    line, typed = f"{tmp_path}/own.yaml, line 3", "the command line"
    assert options.places == {
        "training.seed": typed, "training.max_train_steps": line,
        "phases": typed, "phases[0].steps": typed, "phases[0].name": typed,
    }  # fmt: skip


def test_a_line_is_known_inside_a_list_too(tmp_path):
    file = written(tmp_path, "phases:\n  - {steps: 3}\n  - steps: 4\n    gan_weight: -1\n")
    message = refusal(TokenizerRun, file, "optimizer.params.warmup_steps=0")
    assert "phases[1].gan_weight=-1.0: set at least 0" in message
    assert message.endswith(f"({tmp_path}/own.yaml, line 4)")


def test_a_key_that_is_written_twice_is_refused_by_its_line(tmp_path):
    message = refusal(GeneratorRun, written(tmp_path, "training:\n  seed: 3\n  seed: 4\n"))
    assert "seed is written twice" in message and "line 3" in message


def test_merge_keys_and_anchors_are_yaml_as_ever(tmp_path):
    text = "training: &t {seed: 3, max_train_steps: 70000}\noptimizer: {params: {beta1: 0.5}}\n"
    assert load(GeneratorRun, [written(tmp_path, text)]).training.seed == 3
    text = (
        "phases:\n- &p {steps: 20, gan_weight: 0.5}\n- {<<: *p, steps: 30}\n"
        "optimizer: {params: {warmup_steps: 0}}\n"
    )
    phases = load(TokenizerRun, [written(tmp_path, text)]).phases
    assert [(p.steps, p.gan_weight) for p in phases] == [(20, 0.5), (30, 0.5)]


# ---------------------------------------------------------------------- published files
def test_the_authors_config_loads_unchanged_in_both_programs(tmp_path, capsys):
    file = written(tmp_path, AUTHORS)
    load(GeneratorRun, [file], "sample_imagenet")
    assert not capsys.readouterr().err
    options = load(GeneratorRun, [file], "train_ar")
    warning = capsys.readouterr().err
    assert warning.count("dataset.preprocessing (crop_size, random_flip) has no effect") == 1
    assert warning.count("\n") == 1
    assert options.training.mixed_precision == "no" and options.optimizer.name == "adamw"
    schedule = options.lr_scheduler.params
    assert (schedule.learning_rate, schedule.count_from) == (4e-4, 0)


@pytest.mark.parametrize("value", ["", "null", "{}"])
def test_preprocessing_may_be_empty(tmp_path, capsys, value):
    file = written(tmp_path, f"dataset:\n  preprocessing: {value}\n")
    assert load(GeneratorRun, [file]).dataset.preprocessing == {}
    assert not capsys.readouterr().err


def test_preprocessing_of_a_python_object_is_refused(tmp_path):
    file = written(tmp_path, "dataset: {preprocessing: {a: !!python/object:os.x 1}}")
    assert "own.yaml: could not determine a constructor" in refusal(GeneratorRun, file)


def test_preprocessing_may_be_set_on_the_command_line():
    options = load(GeneratorRun, [B, "dataset.preprocessing.crop_size=256"])
    assert options.dataset.preprocessing == {"crop_size": 256}


# ---------------------------------------------------------------------- the other program's options
@pytest.mark.parametrize(
    "program, name, instead",
    [
        ("train_ar", "experiment.generator_checkpoint", "experiment.resume=RUN_DIR"),
        ("train_ar", "experiment.generator_checkpoint", "experiment.init_weights=FILE"),
        ("sample_imagenet", "experiment.init_weights", "experiment.generator_checkpoint"),
        ("train_ar", "experiment.compile", "training.compile"),
        ("sample_imagenet", "training.compile", "experiment.compile"),
        ("sample_imagenet", "training.seed", "model.generator.seed"),
        ("sample_imagenet", "lr_scheduler.params.end_lr", "leave it out"),
        ("train_ar", "experiment", "training.compile"),  # within {compile: 1}
    ],
)
def test_option_of_the_other_program_is_refused_on_the_command_line(program, name, instead):
    value = "{compile: 1}" if name == "experiment" else "1"
    refused(lambda: load(GeneratorRun, [B, f"{name}={value}"], program), program, name, instead)


def test_option_of_the_other_program_is_accepted_in_a_shared_file(tmp_path):
    file = written(
        tmp_path, AUTHORS.replace("generator_checkpoint: null", "generator_checkpoint: x")
    )
    assert load(GeneratorRun, [file], "train_ar").experiment.generator_checkpoint == "x"


# ---------------------------------------------------------------------- a warm-up longer than the run
def test_a_run_that_is_shortened_is_warned_of_and_can_be_used_afterwards(tmp_path, capsys):
    warning = "warmup_steps=62500 is longer than the run of 20 steps"
    save(
        load(GeneratorRun, [B, "training.max_train_steps=20"], "train_ar"), tmp_path / "config.yaml"
    )
    assert warning in capsys.readouterr().err
    load(GeneratorRun, [f"config={tmp_path}"], "train_ar")
    assert warning in capsys.readouterr().err
    load(GeneratorRun, [f"config={tmp_path}"], "sample_imagenet")
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------- changes in a program
def test_changed_options_are_checked_and_keep_their_places():
    options = load(GeneratorRun, [B, "training.seed=3"])
    other = options.changed(training=replace(options.training, seed=4), unread=("model.x",))
    assert (other.training.seed, other.places, other.unread) == (4, options.places, ("model.x",))
    assert (options.training.seed, options.unread) == (3, ())
    cropped = replace(options.dataset, preprocessing={"crop_size": 128})
    refused(lambda: options.changed(dataset=cropped), "dataset.preprocessing.crop_size=128")
    for each in (other, GeneratorRun().changed(training=other.training)):  # the latter never loaded
        copied = pickle.loads(pickle.dumps(each))
        assert (copied, copied.places, copied.unread) == (each, each.places, each.unread)


# ---------------------------------------------------------------------- resuming
def test_options_that_a_resume_compares_are_those_that_decide_the_weights():
    kept = lasting(load(GeneratorRun, [B]))
    assert kept["model.generator.hidden_size"] == 768 and kept["training.numerics"] == "auto"
    free = ("experiment.", "dataset.", "model.vq_model.", "model.generator.guidance_scale",
            "model.generator.use_checkpoint", "training.per_gpu_batch_size", "training.compile",
            "training.enable_wandb", "training.enable_tf32")  # fmt: skip
    assert not [name for name in kept if name.startswith(free)]
    kept = lasting(load(TokenizerRun, [STAGE1]))
    assert kept["phases[2].gan_weight"] == 0.005 and "model.vq_model.token_size" in kept
    assert "dataset.params.resize" in kept and "dataset.params.train_dir" not in kept


@pytest.mark.parametrize("text", ["", " ", "# 5"])
@pytest.mark.parametrize("name", ["dataset.params.pretokenisation", "training.seed"])
def test_a_value_of_which_yaml_reads_nothing_is_refused(name, text):
    """As of a shell's variable that is not set: the option must not keep its default silently."""
    refused(lambda: load(GeneratorRun, [B, f"{name}={text}"]), name)


# ---------------------------------------------------------------------- files
def test_a_rate_of_a_saved_run_follows_the_optimizers_as_in_its_preset(tmp_path):
    file, rate = tmp_path / "config.yaml", "optimizer.params.learning_rate"
    save(load(GeneratorRun, [B]), file)
    assert load(GeneratorRun, [f"config={file}"]) == load(GeneratorRun, [B])
    lower = load(GeneratorRun, [f"config={file}", f"{rate}=1e-5"])
    assert lower.lr_scheduler.params.learning_rate == 1e-5
    save(load(GeneratorRun, [B, "lr_scheduler.params.learning_rate=2e-4"]), file)  # one of its own
    own = load(GeneratorRun, [f"config={file}", f"{rate}=1e-5"])
    assert own.lr_scheduler.params.learning_rate == 2e-4


def test_a_run_folder_may_be_where_one_is(tmp_path, monkeypatch):
    options = load(GeneratorRun, [B, "experiment.output_dir=elsewhere"])
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    save(options, tmp_path / "run/config.yaml")
    monkeypatch.chdir(tmp_path / "run")
    for config in (".", "config.yaml"):
        found = load(GeneratorRun, [f"config={config}"])
        assert found.experiment.output_dir == str(tmp_path / "run")


def test_a_run_folder_brings_its_own_config(tmp_path):
    options = load(GeneratorRun, [B, "experiment.name=mine"])
    save(options, tmp_path / "config.yaml")
    assert load(GeneratorRun, [f"config={tmp_path}"]) == options


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/step-00000010"])
def test_a_run_is_resumed_by_any_of_its_folders(tmp_path, named):
    (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    for resume in (f"{tmp_path}/{named}", f"{tmp_path}/{named}/"):
        experiment = Experiment(output_dir=str(tmp_path / "new"), resume=resume)
        assert resumed_run(experiment) == tmp_path / "run"


@pytest.mark.parametrize(
    "name", ["no", "2024_06_01", "null", "ü #3", "1e-4", "~x", "a: b", "${x", "${a}"]
)
def test_odd_texts_survive_being_saved(tmp_path, name):
    options = load(GeneratorRun, [B])
    options = replace(options, experiment=replace(options.experiment, project=name))
    save(options, tmp_path / "config.yaml")
    if "${" in name:  # a reference, which nothing resolves
        assert "config.yaml" in refusal(GeneratorRun, f"config={tmp_path}/config.yaml")
    else:
        assert load(GeneratorRun, [f"config={tmp_path}/config.yaml"]) == options


def test_tokenizer_config_of_a_file_with_other_sections(tmp_path):
    path = Path(written(tmp_path, AUTHORS + "anything: 3\n").removeprefix("config="))
    assert load_sizes(path, image_size=256).model.vq_model.codebook_size == 4096
    named = "model.vq_model.image_size=100", "the command line"
    refused(lambda: load_sizes(path, image_size=100), *named)


def test_nesting_without_end_is_one_line(tmp_path):
    assert "own.yaml" in refusal(GeneratorRun, written(tmp_path, "training: " + "[" * 50_000))
