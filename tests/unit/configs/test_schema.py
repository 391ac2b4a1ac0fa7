from dataclasses import FrozenInstanceError, asdict, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.load import load, save
from configs.schema import GeneratorRun, TokenizerRun
from runtime.errors import InputError

CONFIGS = Path(__file__).parents[3] / "configs"
PRESETS = sorted(path.name for path in CONFIGS.glob("*.yaml") if "accelerate" not in path.name)
B = f"config={CONFIGS}/alitok_b.yaml"
STAGE1 = f"config={CONFIGS}/tokenizer_stage1.yaml"


def schema_of(preset):
    of_tokenizers = ("tokenizer_", "digits_stage", "finetune_decoder")
    return TokenizerRun if preset.startswith(of_tokenizers) else GeneratorRun


def refusal(schema, *argv):
    """The one line that refuses these arguments."""
    return str(refused(schema, *argv))


def refused(schema, *argv):
    with pytest.raises(InputError) as caught:
        load(schema, list(argv))
    assert "\n" not in str(caught.value)
    return caught.value


def written(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"config={path}"


def option(options, name):
    for part in name.split("."):
        options = getattr(options, part)
    return options


# ---------------------------------------------------------------------- presets
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fits_its_schema(preset):
    assert isinstance(load(schema_of(preset), [f"config={CONFIGS / preset}"]), schema_of(preset))


@pytest.mark.parametrize(
    "preset, hidden, layers, scale, power, seed, batch, steps",
    [
        ("alitok_b", 768, 24, 16.0, 1.8, 42, 128, 500_000),
        ("alitok_l", 1024, 24, 6.0, 0.7, 42, 64, 500_000),
        ("alitok_xl", 1280, 32, 13.0, 1.4, 2, 32, 250_000),
    ],
)
def test_generator_presets_hold_the_published_figures(
    preset, hidden, layers, scale, power, seed, batch, steps
):
    options = load(GeneratorRun, [f"config={CONFIGS}/{preset}.yaml"])
    model, training = options.model.generator, options.training
    assert (model.hidden_size, model.num_hidden_layers) == (hidden, layers)
    assert (model.num_attention_heads, model.image_seq_len) == (16, 273)
    assert (model.codebook_size, model.condition_num_classes) == (4096, 1000)
    assert (model.guidance_scale, model.guidance_scale_pow) == (scale, power)
    assert (model.seed, model.randomize_temperature) == (seed, 1.0)
    assert (training.per_gpu_batch_size, training.max_train_steps) == (batch, steps)
    assert options.experiment.output_dir == f"output/{preset}"


@pytest.mark.parametrize("preset", ["alitok_b", "alitok_l", "alitok_xl"])
def test_generator_presets_hold_the_published_recipe(preset):
    options = load(GeneratorRun, [f"config={CONFIGS}/{preset}.yaml"])
    optimizer, schedule = options.optimizer.params, options.lr_scheduler
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (4e-4, 0.9, 0.96)
    assert optimizer.weight_decay == 0.03 and options.training.max_grad_norm == 1.0
    assert (schedule.params.learning_rate, schedule.params.end_lr) == (4e-4, 1e-5)
    assert (schedule.scheduler, schedule.params.warmup_steps) == ("cosine", 62_500)
    model = options.model.generator
    assert model.dropout == model.attn_drop == model.tok_dropout == model.class_label_dropout == 0.1
    assert options.dataset.params.pretokenization == "cache_alitok"
    assert options.experiment.num_fid_samples == 50_000
    assert options.experiment.tokenizer_checkpoint == "weights/AliTok.pth"


@pytest.mark.parametrize("stage, main_steps, warmup", [(1, 200_000, 10_000), (2, 150_000, 0)])
def test_tokenizer_presets_hold_the_published_phases(stage, main_steps, warmup):
    options = load(TokenizerRun, [f"config={CONFIGS}/tokenizer_stage{stage}.yaml"])
    figures = [
        (p.steps, p.learning_rate, p.end_lr, p.perceptual_weight, p.lpips_weight, p.gan_weight)
        for p in options.phases
    ]
    assert figures == [
        (50_000, 1e-4, None, 0.1, 1.0, 0.0),
        (main_steps, 1e-4, 2e-5, 1.0, 0.0, 0.0),
        (100_000, 2e-5, 2e-6, 1.0, 0.0, 0.005),  # 0.1 × 0.05
    ]
    assert [p.reset_optimizer for p in options.phases] == [False, True, True]
    optimizer = options.optimizer.params
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    assert (optimizer.warmup_steps, options.training.per_gpu_batch_size) == (warmup, 48)


@pytest.mark.parametrize("stage, steps, buffers", [(1, 600_000, 1), (2, 300_000, 64)])
def test_v3_presets_hold_the_figures_of_the_last_revision(stage, steps, buffers):
    options = load(TokenizerRun, [f"config={CONFIGS}/tokenizer_v3_stage{stage}.yaml"])
    assert sum(p.steps for p in options.phases) == steps
    assert [p.gan_weight for p in options.phases] == [0.0, 0.0, 0.1]
    vq = options.model.vq_model
    assert (vq.num_tokens, vq.num_prefix_tokens, vq.num_buffer_tokens) == (272, 16, buffers)
    assert (vq.causal, vq.prefix_head, vq.clustering) == ((stage == 1,) * 3)
    if stage == 1:
        assert options.losses.aux == "stitched"


@pytest.mark.parametrize("stage", [1, 2])
def test_512_presets_are_the_published_recipe_on_a_grid_of_32(stage):
    small, large = (
        load(TokenizerRun, [f"config={CONFIGS}/tokenizer_stage{stage}{size}.yaml"])
        for size in ("", "_512")
    )
    vq = large.model.vq_model
    assert (vq.grid, vq.num_prefix_tokens, vq.num_tokens) == (32, 33, 1057)
    assert (large.phases, large.losses) == (small.phases, small.losses)
    batches = [
        o.training.per_gpu_batch_size * o.training.gradient_accumulation_steps
        for o in (small, large)
    ]
    assert batches == [48, 48]


@pytest.mark.parametrize("preset", [p for p in PRESETS if not p.startswith("digits")])
def test_presets_of_published_models_compile_on_cuda(preset):
    assert load(schema_of(preset), [f"config={CONFIGS / preset}"]).training.compile == "auto"


def test_stage_presets_build_the_two_tokenizers():
    first, second = (
        load(TokenizerRun, [f"config={CONFIGS}/tokenizer_stage{stage}.yaml"]).model
        for stage in (1, 2)
    )
    vq = first.vq_model
    assert (vq.causal, vq.prefix_head, vq.clustering, vq.num_buffer_tokens) == (True, True, True, 1)
    vq = second.vq_model
    assert (vq.causal, vq.prefix_head, vq.clustering) == (False, False, False)
    assert (vq.num_buffer_tokens, second.decoder_init) == (32, "stage1")


def test_digits_presets_are_of_one_tokenizer():
    stage1, stage2, generator = (
        load(schema_of(name), [f"config={CONFIGS / name}"]).model.vq_model
        for name in ("digits_stage1.yaml", "digits_stage2.yaml", "digits_generator.yaml")
    )
    # The number of buffer tokens is the weights': the study samples with the decoder of stage 1 too.
    assert stage2 == replace(generator, num_buffer_tokens=stage2.num_buffer_tokens)
    for name in ("codebook_size", "token_size", "image_size", "patch_size", "encoder_width"):
        assert getattr(stage1, name) == getattr(stage2, name)


# ---------------------------------------------------------------------- names
PUBLISHED = {
    "experiment.project": "p",
    "experiment.name": "n",
    "experiment.output_dir": "output/o",
    "experiment.generator_checkpoint": "weights/alitok_b.bin",
    "experiment.resume": False,
    "experiment.save_every": 11,
    "experiment.eval_every": 12,
    "experiment.generate_every": 13,
    "experiment.log_every": 14,
    "experiment.log_grad_norm_every": 15,
    "experiment.max_train_examples": 16,
    "model.vq_model.codebook_size": 64,
    "model.vq_model.token_size": 17,
    "model.vq_model.num_latent_tokens": 272,
    "model.generator.hidden_size": 128,
    "model.generator.num_hidden_layers": 18,
    "model.generator.num_attention_heads": 4,
    "model.generator.dropout": 0.21,
    "model.generator.attn_drop": 0.22,
    "model.generator.tok_dropout": 0.23,
    "model.generator.class_label_dropout": 0.24,
    "model.generator.image_seq_len": 272,
    "model.generator.condition_num_classes": 19,
    "model.generator.randomize_temperature": 0.25,
    "model.generator.guidance_scale": 2.6,
    "model.generator.guidance_scale_pow": 2.7,
    "model.generator.use_checkpoint": True,
    "model.generator.seed": 20,
    "dataset.params.pretokenization": "c",
    "dataset.params.num_workers_per_gpu": 21,
    "optimizer.params.learning_rate": 0.28,
    "optimizer.params.beta1": 0.29,
    "optimizer.params.beta2": 0.31,
    "optimizer.params.weight_decay": 0.32,
    "lr_scheduler.scheduler": "constant",
    "lr_scheduler.params.learning_rate": 0.33,
    "lr_scheduler.params.warmup_steps": 22,
    "lr_scheduler.params.end_lr": 0.34,
    "training.gradient_accumulation_steps": 23,
    "training.per_gpu_batch_size": 24,
    "training.mixed_precision": "bf16",
    "training.enable_tf32": False,
    "training.enable_wandb": True,
    "training.use_ema": True,
    "training.seed": 25,
    "training.max_train_steps": 26,
    "training.max_grad_norm": 0.35,
}


def test_every_published_option_arrives_from_the_command_line():
    options = load(GeneratorRun, [B, *(f"{name}={value}" for name, value in PUBLISHED.items())])
    assert {name: option(options, name) for name in PUBLISHED} == PUBLISHED


# Schema, arguments, the option that the refusal names.
G, T = GeneratorRun, TokenizerRun
REFUSED = [
    # names
    (G, "zzz=1", "zzz"),
    (G, "=1", ""),
    (G, "dataset.params.random_flip=x", "dataset.params.random_flip"),
    (G, "training.seed.x=1", "training.seed.x"),
    (T, "experiment.tokenizer_checkpoint=x", "experiment.tokenizer_checkpoint"),
    (T, "phases[3].steps=1", "phases[3].steps"),
    # types
    (G, "training.seed=1.5", "training.seed"),
    (G, "training.seed=", "training.seed"),
    (G, "training.max_train_steps=many", "training.max_train_steps"),
    (G, "training.max_train_steps={a: 1}", "training.max_train_steps"),
    (G, "training.enable_wandb=maybe", "training.enable_wandb"),
    (G, "optimizer.params.learning_rate=abc", "optimizer.params.learning_rate"),
    (G, "model.generator.hidden_size=null", "model.generator.hidden_size"),
    (G, "experiment.classes=[", "experiment.classes"),
    (G, "experiment.classes=[[a]]", "experiment.classes"),
    (G, "experiment.name=${nothing}", "experiment.name"),
    (G, "dataset.preprocessing=3", "dataset.preprocessing"),
    (G, "model=3", "model"),
    (G, "model.generator=[1]", "model.generator"),
    (G, "experiment=null", "experiment"),
    (T, "phases=3", "phases"),
    (T, "phases=[3]", "phases[0]"),
    (T, "phases=[{steps: x}]", "phases[0].steps"),
    # choices
    (G, "training.mixed_precision=fp8", "training.mixed_precision"),
    (G, "training.compile=fast", "training.compile"),
    (G, "lr_scheduler.scheduler=poly", "lr_scheduler.scheduler"),
    (G, "optimizer.name=sgd", "optimizer.name"),
    (T, "model.stage=3", "model.stage"),
    (T, "losses.aux=row", "losses.aux"),
    (T, "model.decoder_init=random", "model.decoder_init"),
    # ranges
    (G, "training.max_grad_norm=-1", "training.max_grad_norm"),
    (G, "training.per_gpu_batch_size=0", "training.per_gpu_batch_size"),
    (G, "training.ema_decay=7", "training.ema_decay"),
    (G, "optimizer.params.learning_rate=nan", "optimizer.params.learning_rate"),
    (G, "optimizer.params.learning_rate=inf", "optimizer.params.learning_rate"),
    (G, "optimizer.params.beta2=1", "optimizer.params.beta2"),
    (G, "model.generator.num_hidden_layers=0", "model.generator.num_hidden_layers"),
    (G, "model.generator.randomize_temperature=0", "model.generator.randomize_temperature"),
    (G, "model.generator.top_p=0", "model.generator.top_p"),
    (G, "model.generator.class_label_dropout=1.5", "model.generator.class_label_dropout"),
    (G, "model.vq_model.codebook_size=70000", "model.vq_model.codebook_size"),
    (G, "experiment.classes=[-1]", "experiment.classes"),
    (G, "experiment.classes=[]", "experiment.classes"),
    (G, "experiment.classes=[otter, '']", "experiment.classes"),
    (T, "dataset.params.resize=0", "dataset.params.resize"),
    (T, "phases=[{steps: 10, learning_rate: -1}]", "phases[0].learning_rate"),
    (T, "phases=[{steps: 1}, {name: late}]", "phases[1].steps"),
    # texts
    (G, "experiment.output_dir=", "experiment.output_dir"),
    (G, "experiment.output_dir= ", "experiment.output_dir"),
    (G, "experiment.output_dir=a\nb", "experiment.output_dir"),
    (G, "experiment.output_dir=a\x00b", "experiment.output_dir"),
    (G, "experiment.output_dir=\udcff", "experiment.output_dir"),
    (G, "experiment.output_dir=.", "experiment.output_dir"),
    (G, "experiment.output_dir=a/..", "experiment.output_dir"),
    (G, "experiment.output_dir=~nobody-has-this-name/run", "experiment.output_dir"),
    (G, "experiment.fid_reference=False", "experiment.fid_reference"),
    (G, "experiment.fid_reference=None", "experiment.fid_reference"),
    # what does not fit together
    (G, "model.generator.image_seq_len=272", "model.generator.image_seq_len"),
    (G, "model.generator.image_seq_len=50", "model.generator.image_seq_len"),
    (G, "model.vq_model.num_latent_tokens=256", "model.generator.image_seq_len"),
    (G, "model.generator.codebook_size=32", "model.generator.codebook_size"),
    (G, "model.generator.hidden_size=100", "model.generator.hidden_size"),
    (G, "model.vq_model.decoder_layers=0", "model.vq_model.decoder_layers"),
    (G, "dataset.preprocessing.crop_size=128", "dataset.preprocessing.crop_size"),
    (G, "experiment.prefix_rows=3", "experiment.prefix_rows"),
    (G, "experiment.prefix_mask=true", "experiment.prefix_mask"),
    (G, "experiment.codes=b.npz & experiment.prefix=a.npy", "experiment.codes"),
    (G, "experiment.edit=a.png", "experiment.edit"),
    (G, "experiment.mask=a.png", "experiment.mask"),
    (
        G,
        "experiment.prefix=a.npy & experiment.edit=a.png & experiment.mask=b.png",
        "experiment.prefix",
    ),
    (T, "model.vq_model.image_size=100", "model.vq_model.image_size"),
    (T, "model.vq_model.encoder_heads=5", "model.vq_model.encoder_width"),
    (T, "model.vq_model.num_latent_tokens=256", "model.vq_model.prefix_head"),
    (T, "model.vq_model.num_latent_tokens=77", "model.vq_model.num_latent_tokens"),
    (T, "model.vq_model.clustering=false", "model.cluster_in_critic_steps"),
    (T, "losses.aux_weight=0", "losses.aux_weight"),
    (T, "losses.aux=stitched", "losses.aux"),
    (T, "training.max_train_steps=300000", "training.max_train_steps"),
    (T, "experiment.stage1_checkpoint=run", "experiment.stage1_checkpoint"),
    (T, "model.decoder_init=scratch", "model.decoder_init"),
    (T, "model.critic_init=stage1", "model.critic_init"),
]


@pytest.mark.parametrize("schema, arguments, name", REFUSED)
def test_a_refusal_names_the_option(schema, arguments, name):
    config = B if schema is GeneratorRun else STAGE1
    error = refused(schema, config, *arguments.split(" & "))
    assert error.option == name and name in str(error)


@pytest.mark.parametrize("head", ["prefix_head", "clustering"])
def test_stage_2_with_a_part_of_stage_1_is_refused(head):
    config = f"config={CONFIGS}/tokenizer_stage2.yaml"
    name = f"model.vq_model.{head}"
    assert refused(TokenizerRun, config, f"{name}=True").option == name


def test_initial_weights_leave_nothing_for_stage_1_to_bring():
    config = f"config={CONFIGS}/finetune_decoder.yaml"
    assert (
        refused(TokenizerRun, config, "model.decoder_init=scratch").option == "model.decoder_init"
    )
    assert load(TokenizerRun, [config, "model.critic_init=stage1"])  # a discriminator may lie there


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("expriment", "experiment"),
        ("experiment.output", "experiment.output_dir"),
        ("model.generator.hiden_size", "model.generator.hidden_size"),
    ],
)
def test_misspelt_option_is_answered_with_the_nearest(tmp_path, wrong, right):
    message = refusal(GeneratorRun, B, f"{wrong}=1")
    assert message == f"the command line: there is no option {wrong}; did you mean {right}?"
    keys = wrong.split(".")
    config = written(tmp_path, "{" + ": {".join(keys) + ": 1" + "}" * len(keys))
    assert f"own.yaml, line 1: there is no option {wrong}; did" in refusal(GeneratorRun, config)


def test_misspelt_option_of_a_phase_is_answered_with_the_nearest(tmp_path):
    phases = "phases: [{steps: 3}, {steps: 3, lpips_wieght: 1.0}]"
    message = refusal(TokenizerRun, written(tmp_path, phases))
    assert "no option phases[1].lpips_wieght; did you mean phases[1].lpips_weight?" in message


def test_an_option_of_a_phase_without_its_number_is_refused():
    message = refusal(TokenizerRun, "config=configs/tokenizer_stage1.yaml", "phases.steps=3")
    assert message.endswith("no option phases.steps; did you mean phases[0].steps?")


# ---------------------------------------------------------------------- values
@pytest.mark.parametrize(
    "schema, program", [(GeneratorRun, "train_ar"), (TokenizerRun, "train_tokenizer")]
)
def test_help_lists_all_options_with_their_defaults(schema, program, capsys):
    with pytest.raises(SystemExit) as ended:
        load(schema, ["--help"], program)
    said = capsys.readouterr().out
    assert not ended.value.code and "config=FILE" in said
    assert "per_gpu_batch_size: " in said and "keep_checkpoints: 2" in said


def test_one_option_of_a_phase_may_be_set():
    phases = load(TokenizerRun, [STAGE1, "phases[1].steps=3"]).phases
    assert [p.steps for p in phases] == [50_000, 3, 100_000]


def test_phases_of_the_command_line_replace_those_of_the_file():
    options = load(TokenizerRun, [STAGE1, "phases=[{name: only, steps: 3}]"])
    assert [(p.name, p.steps) for p in options.phases] == [("only", 3)]


def test_tokenizer_run_without_phases_is_refused():
    assert "phases=[]: list at least one" in refusal(TokenizerRun, STAGE1, "phases=[]")


def test_finetuning_presets_are_of_the_published_models():
    ours, published = (
        load(GeneratorRun, [f"config={CONFIGS}/{name}.yaml"]).model.generator
        for name in ("finetune_generator", "alitok_b")
    )
    assert ours == published
    ours, published = (
        load(TokenizerRun, [f"config={CONFIGS}/{name}.yaml"])
        for name in ("finetune_decoder", "tokenizer_stage2")
    )
    assert (ours.model.vq_model, ours.losses) == (published.model.vq_model, published.losses)


def test_tokenizers_without_prefix_tokens_and_their_generators_are_configured_by_their_length():
    alone = "model.vq_model.num_latent_tokens=256"
    vq = load(TokenizerRun, [STAGE1, alone, "model.vq_model.prefix_head=false"]).model.vq_model
    assert (vq.num_tokens, vq.num_prefix_tokens, vq.causal) == (256, 0, True)
    both = load(GeneratorRun, [B, alone, "model.generator.image_seq_len=256"]).model
    assert both.generator.image_seq_len == both.vq_model.num_tokens == 256


@pytest.mark.parametrize(
    "text, value", [("False", False), ("true", True), ("output/run", "output/run")]
)
def test_resume_is_a_flag_or_a_path(text, value):
    resume = load(GeneratorRun, [B, f"experiment.resume={text}"]).experiment.resume
    assert resume == value and type(resume) is type(value)


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("False", False), ("true", True)])
def test_compile_is_a_flag_or_auto(text, value):
    compile_ = load(GeneratorRun, [B, f"training.compile={text}"]).training.compile
    assert compile_ == value and type(compile_) is type(value)


# ---------------------------------------------------------------------- defaults that follow others
def test_scheduler_learning_rate_follows_the_optimizers():
    options = load(GeneratorRun, [B, "optimizer.params.learning_rate=1e-3"])
    assert options.lr_scheduler.params.learning_rate == 1e-3


def test_scheduler_learning_rate_may_be_given():
    options = load(GeneratorRun, [B, "lr_scheduler.params.learning_rate=1e-3"])
    assert options.lr_scheduler.params.learning_rate == 1e-3
    assert options.optimizer.params.learning_rate == 4e-4


def test_generator_predicts_as_many_codes_as_the_tokenizer_has():
    options = load(GeneratorRun, [B, "model.vq_model.codebook_size=64"])
    assert options.model.generator.codebook_size == 64


def test_command_line_overrules_the_file_which_overrules_the_defaults(tmp_path):
    config = written(tmp_path, "training: {seed: 5, max_train_steps: 7}")
    training = load(GeneratorRun, [config, "training.seed=6"]).training
    assert (training.seed, training.max_train_steps, training.max_grad_norm) == (6, 7, 1.0)


# ---------------------------------------------------------------------- arguments and files
def test_argument_without_equals_sign_is_refused():
    assert "'experiment.name' is not option=value" in refusal(GeneratorRun, B, "experiment.name")


def test_value_may_contain_an_equals_sign():
    assert load(GeneratorRun, [B, "experiment.name=a=b"]).experiment.name == "a=b"


def test_leading_dashes_are_accepted():
    assert load(GeneratorRun, [f"--{B}", "--training.seed=6"]).training.seed == 6


@pytest.mark.parametrize("argv", [[], [B, B]])
def test_not_exactly_one_config_is_refused_with_an_example(argv):
    assert "set one config=FILE, for example config=configs/" in refusal(GeneratorRun, *argv)


def test_missing_config_is_named(tmp_path):
    message = refusal(GeneratorRun, f"config={tmp_path}/none.yaml")
    assert f"no config file {tmp_path}/none.yaml" in message and "configs/" in message


@pytest.mark.parametrize("text", ["a: [1\nb: }", b"\x80\x02weights", "5", "- a\n- b\n", "hello"])
def test_file_that_is_no_config_is_named(tmp_path, text):
    assert f"{tmp_path}/own.yaml" in refusal(GeneratorRun, written(tmp_path, text))


# ---------------------------------------------------------------------- saving
@pytest.mark.parametrize("preset", PRESETS)
def test_saved_options_load_again_as_they_were(tmp_path, preset):
    argv = [f"config={CONFIGS / preset}", "experiment.resume=False", "experiment.name=other"]
    options = load(schema_of(preset), argv)
    save(options, tmp_path / "config.yaml")
    assert load(schema_of(preset), [f"config={tmp_path}/config.yaml"]) == options


def test_options_as_dict_are_plain_and_resolved():
    plain = asdict(load(GeneratorRun, [B]))
    assert type(plain["lr_scheduler"]["params"]) is dict
    assert plain["lr_scheduler"]["params"]["learning_rate"] == 4e-4


# ---------------------------------------------------------------------- after loading
@pytest.mark.parametrize("name", ["experiment", "training.seed", "model.generator.seed"])
def test_options_do_not_change_after_loading(name):
    options = load(GeneratorRun, [B])
    section, _, field = f"options.{name}".rpartition(".")
    section = attrgetter(section)(SimpleNamespace(options=options))
    with pytest.raises(FrozenInstanceError, match=rf"{field} is set once"):
        setattr(section, field, getattr(section, field))
    assert replace(options, training=replace(options.training, seed=5)).training.seed == 5
