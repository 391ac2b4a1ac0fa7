"""The schema as text: `--help` of the programs, and `docs/options.md`.

python -m configs.help > docs/options.md
"""

import json
from textwrap import fill

from configs.schema import GeneratorRun, TokenizerRun
from modeling.fields import Declared, declared, type_name

# {program: (schema, first line, examples)}
PROGRAMS = {
    "train_tokenizer": (
        TokenizerRun,
        "Train the tokenizer, one of its two stages.",
        (
            "accelerate launch -m train_tokenizer config=configs/tokenizer_stage1.yaml "
            "dataset.params.train_dir=imagenet/train",
            "accelerate launch -m train_tokenizer config=configs/tokenizer_stage2.yaml "
            "experiment.stage1_checkpoint=output/tokenizer_stage1",
        ),
    ),
    "train_ar": (
        GeneratorRun,
        "Train the generator on a token cache.",
        (
            "accelerate launch train_ar.py config=configs/alitok_b.yaml "
            "dataset.params.pretokenization=cache_alitok",
            "python train_ar.py config=configs/alitok_b.yaml training.per_gpu_batch_size=32 "
            "training.gradient_accumulation_steps=4",
        ),
    ),
    "sample_imagenet": (
        GeneratorRun,
        "Sample images from the generator.",
        (
            "torchrun --nproc_per_node=8 sample_imagenet.py config=configs/alitok_b.yaml "
            "experiment.generator_checkpoint=weights/alitok_b.bin "
            "experiment.output_dir=output/alitok_b",
            "python sample_imagenet.py config=configs/alitok_b.yaml "
            "experiment.generator_checkpoint=weights/alitok_b.bin 'experiment.classes=[207]' "
            "experiment.num_fid_samples=16 experiment.grid=4",
        ),
    ),
}
READING = (
    "config=FILE is a YAML file (presets are in configs/) or a run's folder; option=value "
    "overrides an option of it. Text is taken literally; ~ is the home folder; null switches an "
    "option off if its description says so."
)

HEAD = ("| option | default | values | meaning |", "| --- | --- | --- | --- |")
DRY_RUN = (
    "--dry-run builds and checks everything, runs a few steps, prints memory, speed and the expected "
    "hours, and writes nothing."
)


def used_by(option: Declared, program: str) -> bool:
    """Whether a program uses an option; the empty name stands for any."""
    return not program or program.startswith(option.rule.only)


def options_of(program: str) -> list[Declared]:
    """The options and sections that a program uses; options inherit the `only` of their section."""
    schema = PROGRAMS[program][0]
    return [option for option in declared(schema).values() if used_by(option, program)]


def default_of(option: Declared) -> str:
    """A default as written in YAML or on the command line."""
    default = option.default
    if default is None or isinstance(default, bool):
        return json.dumps(default)
    return "required" if option.rule.complaint(default) else str(default)


def values_of(option: Declared) -> str:
    """The values that an option takes."""
    kind, rule = type_name(option.kind), option.rule
    if rule.choices:
        kind = "choice"
    elif rule.path:
        kind = kind.replace("text", "path")
    if option.optional or rule.null is not None:
        kind += " or null"
    return f"{kind}: {rule.limits()}" if rule.limits() else kind


# ---------------------------------------------------------------------- the command line's help
def describe(program: str) -> str:
    """The text of `--help`."""
    _, title, examples = PROGRAMS[program]
    reading = f"{READING} {DRY_RUN}" if program.startswith("train") else READING
    lines = [title, "", "usage: config=FILE option=value …", ""]
    lines += [f"  {example}" for example in examples]
    lines += ["", fill(reading, 96), "", "options with their defaults:"]
    for option in options_of(program):
        name, sentence = option.name, option.rule.sentence
        if option.section:
            lines += ["", fill(f"{name}: {sentence}", 96)]
        else:
            lines += [f"  {name}: {default_of(option)}  ({values_of(option)})"]
            lines += [fill(sentence, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


# ---------------------------------------------------------------------- docs/options.md
def markdown() -> str:
    """`docs/options.md`: a table per section, for both schemas."""
    lines = [
        "# Options",
        "",
        "Made by `python -m configs.help > docs/options.md`; edit `configs/schema.py`, not this file.",
        "",
        READING.replace("option=value", "`option=value`").replace("config=FILE", "`config=FILE`"),
    ]
    for heading, programs in (
        ("Generator", ("train_ar", "sample_imagenet")),
        ("Tokenizer", ("train_tokenizer",)),
    ):
        schema = PROGRAMS[programs[0]][0]
        names = " and ".join(f"`{program}`" for program in programs)
        lines += ["", f"## {heading}: {names}", ""]
        for program in programs:
            lines += [PROGRAMS[program][1], "", "```"]
            lines += [*PROGRAMS[program][2], "```", ""]
        for option in declared(schema).values():
            if option.section:
                lines += ["", f"### {option.name}", "", option.rule.sentence, "", *HEAD]
            else:
                lines.append(row(option, programs))
    return "\n".join(lines) + "\n"


def row(option: Declared, programs: tuple[str, ...]) -> str:
    """A table's row; it names the programs that use the option, if not all do."""
    users = [program for program in programs if used_by(option, program)]
    only = "" if len(users) == len(programs) else f" *Only {', '.join(users)}.*"
    default = default_of(option).replace("|", "\\|")
    return f"| `{option.name}` | `{default}` | {values_of(option)} | {option.rule.sentence}{only} |"


if __name__ == "__main__":
    print(markdown(), end="")
