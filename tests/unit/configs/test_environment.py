import pytest

from configs.environment import check_environment
from configs.schema import TokenizerTraining, Training
from tests.refusals import refusal

# What `accelerate launch` sets where nothing was asked for, and this project's FSDP config.
LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "RANK": "0",
    "WORLD_SIZE": "1",
}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        LAUNCHED,
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
        {"NVIDIA_TF32_OVERRIDE": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"},
    ],
)
def test_an_environment_that_agrees_with_the_config_is_accepted(variables):
    check_environment(Training(gradient_accumulation_steps=2), "bf16", variables)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.gradient_accumulation_steps=2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x", "training.gradient_accumulation_steps=2"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "training.mixed_precision=auto (bf16)"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "training.mixed_precision=auto (bf16)"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "training.compile=True"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "without DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "without Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "without a parallelism config"),
        ("NVIDIA_TF32_OVERRIDE", "0", "training.numerics=auto"),
        ("FSDP_VERSION", "1", "only FSDP 2"),
    ],
)
def test_a_contradiction_is_refused_by_the_names_of_both(name, value, words):
    training = Training(gradient_accumulation_steps=2)
    environment = {**LAUNCHED, name: value}
    refusal(lambda: check_environment(training, "bf16", environment), f"{name}={value}", words)


@pytest.mark.parametrize(
    "training, name, value, option",
    [
        (Training(enable_tf32=False), "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "training.enable_tf32=False"),
        # Its numerics want TF32 in convolutions only.
        (TokenizerTraining(numerics="published"), "NVIDIA_TF32_OVERRIDE", "0", "training.numerics=published"),
        (TokenizerTraining(numerics="published"), "NVIDIA_TF32_OVERRIDE", "1", "training.numerics=published"),
    ],
)  # fmt: skip
def test_tf32_that_the_environment_overrides_is_refused(training, name, value, option):
    refusal(lambda: check_environment(training, "no", {name: value}), f"{name}={value}", option)


def test_the_trainers_accelerator_checks_the_environment(monkeypatch):
    from training.accelerator import start_training

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    refusal(lambda: start_training(Training()), "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4")
