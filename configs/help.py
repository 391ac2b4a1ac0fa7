"""What the schema says, for readers: `--help` of the programs, and `docs/options.md`.

python -m configs.help > docs/options.md
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from textwrap import fill
from typing import Any

from configs.schema import UNUSED, GeneratorRun, TokenizerRun
from modeling.fields import (
    TYPED,
    Rule,
    default_of,
    item_section_of,
    rule_of,
    section_of,
    type_name,
    types_of,
)

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
    "config=FILE is a YAML file (presets are in configs/) or a run's folder; option=value sets an "
    "option over it. A text is taken as it is typed; ~ is the home folder; null switches an option "
    "off where its description says so."
)

DRY_RUN = (
    "--dry-run builds and checks everything, runs a few steps, prints memory, speed and the expected "
    "hours, and writes nothing."
)


@dataclass(frozen=True)
class Entry:
    """One option, or the heading of a section (`kind` is empty)."""

    name: str  # with its path; phases[i].steps for an option of a list's sections
    kind: str
    default: str
    limits: str
    sentence: str


def entries(schema: type, path: str = "") -> Iterator[Entry]:
    """All options of a schema in their order, each section's options after its heading."""
    sections = []
    for field in fields(schema):
        rule, (kind, optional) = rule_of(field), types_of(schema)[field.name]
        name, section, item = path + field.name, section_of(kind), item_section_of(kind)
        if section:
            sections.append((section, name, rule))
        elif item:
            sections.append((item, f"{name}[i]", rule))
        else:
            default = default_of(field)
            allowed = (default is None and optional) or not rule.complaint(default)
            default = shown(default) if allowed else "required"
            text = kind_of(kind, rule, optional)
            yield Entry(name, text, default, rule.limits(), rule.sentence)
    for kind, name, rule in sections:
        yield Entry(name, "", "", "", rule.sentence)
        yield from entries(kind, f"{name}.")


def kind_of(kind: Any, rule: Rule, optional: bool) -> str:
    if rule.choices:
        name = "choice"
    elif rule.notes.get("expects"):
        name = rule.notes["expects"].removeprefix("set ")
    elif rule.notes.get("path"):
        name = "path"
    else:
        name = "mapping" if kind is dict else type_name(kind)
    return f"{name} or null" if optional or rule.null is not TYPED else name


def shown(default: Any) -> str:
    """A default as a YAML file or a command line would say it."""
    if isinstance(default, bool):
        return str(default).lower()
    return "null" if default is None else str(default)


def used(name: str, program: str) -> bool:
    parts, table = name.split("."), UNUSED.get(program, {})
    return not any(".".join(parts[:end]) in table for end in range(1, len(parts) + 1))


def described(schema: type, program: str) -> list[Entry]:
    """The entries that a program uses, without the headings that nothing follows."""
    kept = [entry for entry in entries(schema) if used(entry.name, program)]
    return [
        entry
        for entry, after in zip(kept, [*kept[1:], None])
        if entry.kind or (after is not None and after.name.startswith(f"{entry.name}."))
    ]


# ---------------------------------------------------------------------- the command line's help
def describe(schema: type, program: str = "") -> str:
    """The text of `--help`."""
    _, title, examples = PROGRAMS.get(program, (schema, "", ()))
    lines = [title, "", "usage: config=FILE option=value …", ""] if title else []
    lines = lines or ["usage: config=FILE option=value …", ""]
    lines += [f"  {example}" for example in examples]
    reading = f"{READING} {DRY_RUN}" if program.startswith("train") else READING
    lines += ["", fill(reading, 96), "", "options with their defaults:"]
    for entry in described(schema, program):
        if not entry.kind:
            lines += ["", fill(f"{entry.name}: {entry.sentence}", 96)]
            continue
        details = ": ".join(text for text in (entry.kind, entry.limits) if text)
        lines += [f"  {entry.name}: {entry.default}  ({details})"]
        lines += [fill(entry.sentence, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)]
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
        for entry in entries(schema):
            lines += section(entry) if not entry.kind else [row(entry, programs)]
    return "\n".join(lines) + "\n"


def section(entry: Entry) -> list[str]:
    return [
        "",
        f"### {entry.name}",
        "",
        entry.sentence,
        "",
        "| option | default | values | meaning |",
        "| --- | --- | --- | --- |",
    ]


def row(entry: Entry, programs: tuple[str, ...]) -> str:
    """A table's row; an option that not all of the programs use says which do."""
    users = [program for program in programs if used(entry.name, program)]
    only = "" if len(users) == len(programs) else f" *Only {', '.join(users)}.*"
    values = ": ".join(text for text in (entry.kind, entry.limits) if text)
    default = entry.default.replace("|", "\\|")
    return f"| `{entry.name}` | `{default}` | {values} | {entry.sentence}{only} |"


if __name__ == "__main__":
    print(markdown(), end="")
