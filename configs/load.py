"""Reading `config=FILE option=value …` into the dataclasses of `configs.schema`, and writing them.

A value stays the text that was typed (`2024_06_01`, `run #3`, `no`) until OmegaConf converts it to its
option's type. Every refusal gives the option's full name and the place of its value.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from yaml import MappingNode, Node, SequenceNode, YAMLError

from configs.help import describe, used_by
from configs.schema import COMMAND_LINE, Experiment, GeneratorRun, Loaded, TokenizerSizes
from modeling.fields import Declared, declared, fields_of, section_of, short
from modeling.weights.metadata import SIZES, TOKENIZER
from modeling.weights.runs import all_checkpoints, is_checkpoint, named_by
from runtime.errors import InputError
from runtime.files import write_whole

T = TypeVar("T", bound=Loaded)

CLASSES = "condition_num_classes"
BROUGHT = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # by weights to start from
# Keys that the published trainer adds to the config in its run folder.
PUBLISHED_KEYS = ("config", "experiment.logging_dir")


class Written(NamedTuple):
    """The value of an option as written, and its place: COMMAND_LINE, or "FILE, line N"."""

    value: Any
    place: str


# ---------------------------------------------------------------------- what programs call
def load(schema: type[T], argv: list[str], program: str = "") -> T:
    """Options of one program: schema defaults, then `config=FILE`, then `section.option=value` …

    A config in a run's folder stands for that run, even if it was moved. `--help` prints all options and
    ends the program. Raises InputError for a missing file, a misspelt option (with the nearest name), a
    value of the wrong type or out of range, an option of another program on the command line, or
    options that contradict each other.
    """
    if {"-h", "--help"} & set(argv):
        print(describe(program))
        raise SystemExit
    pairs = []
    for argument in argv:
        key, equals, value = argument.lstrip("-").partition("=")
        if not equals:
            raise InputError(
                f"'{argument}' is not option=value: write config=FILE option=value …; --help lists "
                f"the options"
            )
        pairs.append((key, value))
    files = [value for key, value in pairs if key == "config"]
    if len(files) != 1:
        raise InputError("set one config=FILE, for example config=configs/alitok_b.yaml")
    path, written = read_file(schema, files[0])
    folder = path.parent if path.parent.name not in ("", "..") else path.parent.resolve()
    is_run = (folder / ".lock").is_file() or (folder / "checkpoints").is_dir()
    if path.name == "config.yaml" and is_run:  # it may have moved since
        written["experiment.output_dir"] = Written(str(folder), str(path))
    for key, text in pairs:
        if key != "config":
            for name, value in read_argument(schema, key, text).items():
                refuse_unused(schema, name, program)
                # A list is set as a whole.
                written = {n: w for n, w in written.items() if not n.startswith(f"{name}[")}
                written[name] = value
    options: Any = build(schema, written)
    if program.startswith("train") and (sizes := sizes_of_resumed(schema, options.experiment)):
        options = build(schema, sizes | written)
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings_of(options, program):
            print(f"warning: {path}: {warning}", file=sys.stderr)
    return options


def resumed_run(experiment: Experiment) -> Optional[Path]:
    """The folder of the run that a start resumes; None if it begins a new one."""
    own, named = Path(experiment.output_dir), experiment.resume
    if all_checkpoints(own):
        return own
    if not isinstance(named, str):
        return None
    path = named_by(named)
    return path.parent.parent if is_checkpoint(path) else path


def sizes_of_resumed(schema: type, experiment: Experiment) -> dict[str, Written]:
    """The sizes of the resumed run, from its config.yaml, so that a command need not repeat sizes that came
    from data or weights, even if those are gone."""
    folder = resumed_run(experiment)
    if folder is None or not (folder / "config.yaml").is_file():
        return {}
    names = {f"model.generator.{name}" for name in (*BROUGHT, CLASSES)}
    if schema is not GeneratorRun:
        names = {f"model.vq_model.{name}" for name in SIZES[TOKENIZER]}
    return {name: w for name, w in read_file(schema, folder)[1].items() if name in names}


def load_sizes(path: str | Path | None, **flags: Any) -> TokenizerSizes:
    """A tokenizer's sizes, from a program's flags, then `model.vq_model` of a YAML file, then defaults."""
    prefix, found = "model.vq_model.", {} if path is None else read_file(TokenizerSizes, path)[1]
    written = {name: value for name, value in found.items() if name.startswith(prefix)}
    written |= {prefix + name: Written(value, COMMAND_LINE) for name, value in flags.items()}
    return build(TokenizerSizes, written)


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options -> {"section.option": value}; sections in a list become "name[0].option"."""
    flat = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                flat |= flatten(item, f"{prefix}{name}[{i}].")
        else:
            flat[prefix + name] = value
    return flat


def lasting(options: Any) -> dict[str, Any]:
    """The options that must be the same when a run resumes, by their names."""
    kept = {n for n, option in declared(type(options)).items() if not option.rule.resumes}
    flat = flatten(asdict(options))
    return {name: flat[name] for name in flat if re.sub(r"\[\d+\]", "[i]", name) in kept}


def save(options: Any, path: str | Path) -> None:
    """Write the options of a run as YAML that `load` reads again. Leaves out options that nothing reads, and those
    equal to the option that their default names (`${…}`)."""
    values, left_out = asdict(options), set(options.unread)
    flat = flatten(values)
    for name, option in declared(type(options)).items():
        followed = str(option.default).removeprefix("${").removesuffix("}")  # if it is an option
        if followed in flat.keys() - options.unread and flat[name] == flat[followed]:
            left_out.add(name)
    for name in left_out:
        *sections, last = name.split(".")
        del reduce(dict.__getitem__, sections, values)[last]
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    write_whole(path, text.encode())


# ---------------------------------------------------------------------- YAML
class TextLoader(yaml.SafeLoader):
    """Scalars stay text, but for null, merge keys (`<<`) and integers in plain notation (`7`, not `007`),
    so that 7 and '7' differ for options that take numbers or names."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as in the parent class

    def flatten_mapping(self, node: MappingNode) -> None:
        """Refuse a key that is written twice, then resolve merge keys."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if str(key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value} is written twice", problem_mark=key.start_mark
                    )
                seen.add(str(key.value))
        super().flatten_mapping(node)
        # Merged pairs come first, so that the mapping's own follow and win.
        node.value = list({str(key.value): (key, value) for key, value in node.value}.values())


for tag, pattern in (("null", r"~|null|Null|NULL|$"), ("merge", "<<"), ("int", "0|-?[1-9][0-9]*")):
    TextLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), None
    )


def read_yaml(source: str | Path, schema: Any, name: str = "") -> dict[str, Written]:
    """The options in a YAML file, or in a YAML text of the command line.

    `schema` is the class of the section `name`, or the type of an option; None if unknown.
    """
    typed = isinstance(source, str)

    def walk(node: Node, kind: Any, name: str) -> Iterator[tuple[str, Written]]:
        place = COMMAND_LINE if typed else f"{source}, line {node.start_mark.line + 1}"
        section, is_list = section_of(kind), get_origin(kind) is list
        if section and not is_list and isinstance(node, MappingNode):
            loader.flatten_mapping(node)
            for key, value in node.value:
                field = fields_of(section).get(str(key.value))
                inner = f"{name}.{key.value}" if name else str(key.value)
                yield from walk(value, field and field.kind, inner)
        elif section and is_list and isinstance(node, SequenceNode):
            yield name, Written([{}] * len(node.value), place)
            for i, item in enumerate(node.value):
                yield from walk(item, section, f"{name}[{i}]")
        else:
            yield name, Written(loader.construct_object(node, deep=True), place)

    try:
        loader = TextLoader(source if typed else source.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        return {} if node is None else dict(walk(node, schema, name))
    except (YAMLError, ValueError, RecursionError, OSError) as e:
        reason = " ".join(line.strip() for line in str(e).splitlines()[:2])
        if typed:
            raise InputError(f"{name}={short(source)}: {reason} ({COMMAND_LINE})", name) from e
        raise InputError(f"config {source}: {reason}") from e


def read_file(schema: type, path: str | Path) -> tuple[Path, dict[str, Written]]:
    """The path of a config file, or of that in a run's folder, and the options that it sets."""
    file = Path(os.path.expanduser(path))
    if (file / "config.yaml").is_file():
        file = file / "config.yaml"
    if not file.is_file():
        raise InputError(f"no config file {file}; the presets are in configs/")
    written = read_yaml(file, schema)
    for name in PUBLISHED_KEYS:
        written.pop(name, None)
    if not written or "" in written:
        raise InputError(f"config {file} sets no options")
    return file, written


def read_argument(schema: type, key: str, text: str) -> dict[str, Written]:
    """The options that `key=text` on the command line sets; text options take it literally, others as
    YAML."""
    option = option_at(schema, key)
    kind = None if option is None else option.kind
    typed = str in (kind, *get_args(kind)) and get_origin(kind) is not list
    if typed or not text.partition("#")[0].strip():  # YAML ignores empty text and comments
        may_be_null = option and typed and (option.optional or option.rule.null is not None)
        null = may_be_null and text in ("null", "~")
        return {key: Written(None if null else text, COMMAND_LINE)}
    return read_yaml(text, kind, key)


# ---------------------------------------------------------------------- values
def option_at(schema: type, name: str) -> Optional[Declared]:
    """The declaration of an option or section; phases and phases[3] have the same."""
    known, name = declared(schema), re.sub(r"\[\d+\]", "[i]", name)
    return known.get(name) or known.get(f"{name}[i]")


def refuse_unused(schema: type, name: str, program: str) -> None:
    """Refuse an option of the command line that the program would ignore."""
    option = option_at(schema, name)
    if option is not None and not used_by(option, program):
        instead = option.rule.instead
        remedy = f"set {instead}" if instead else "leave it out"
        raise InputError(f"{program} does not use {name}: {remedy}", name)


def build(schema: type[T], written: dict[str, Written]) -> T:
    """The dataclass of the written values, with their places and with references (`${…}`) resolved."""
    config = OmegaConf.structured(schema)
    places = {name: place for name, (_, place) in written.items()}
    for name, (value, place) in written.items():
        try:
            OmegaConf.update(config, name, meant(schema, name, value))
        except (OmegaConfBaseException, RecursionError, ArithmeticError, TypeError, ValueError) as e:  # fmt: skip
            option, failed = option_at(schema, name), getattr(e, "full_key", name)
            if option is None or name.startswith(f"{failed}."):
                raise unknown(e, name, place) from e
            refusal = f"{name}={short(value)}: {option.expectation()} ({place})"
            raise InputError(refusal, name) from e
    try:
        plain: Any = OmegaConf.to_container(
            config, resolve=True, structured_config_mode=SCMode.DICT
        )
    except (OmegaConfBaseException, RecursionError) as e:
        name = getattr(e, "full_key", None) or ""
        raise InputError(f"{name}: {str(e).splitlines()[0]}{at(name, places)}", name) from e
    options = construct(schema, plain, "", places)
    options.places = places
    return options


def meant(schema: type, name: str, value: Any) -> Any:
    """A value with flags, choices, null and the home folder interpreted for its option."""
    option = option_at(schema, name)
    if option is None or option.section:
        return value
    kind, rule = option.kind, option.rule
    if value is None:
        return rule.null
    if isinstance(value, str):
        lower = value.lower()
        if bool in get_args(kind) and lower in TextLoader.bool_values:
            return TextLoader.bool_values[lower]
        if lower in rule.choices:
            return lower
        if rule.path:
            return os.path.expanduser(value)
    if get_origin(kind) is list and isinstance(value, (int, str)):
        return [value]
    return value


def unknown(error: Exception, name: str, place: str) -> InputError:
    """The refusal of an unknown name, with the nearest known one."""
    owner, hint = getattr(error, "object_type", None), ""
    if isinstance(error, (KeyError, AttributeError)) and is_dataclass(owner):
        name = getattr(error, "full_key", name)
        section, names = name[: name.rfind(".") + 1], [field.name for field in fields(owner)]
        near = difflib.get_close_matches(name.removeprefix(section), names, 1, 0.5)
        hint = f"; did you mean {section}{near[0]}?" if near else f"; there are {', '.join(names)}"
    elif type(error) is ValueError:  # of a list without an index
        hint = f"; did you mean {name.replace('.', '[0].', 1)}?"
    return InputError(f"{place}: there is no option {name}{hint}", name)


def construct(section: Any, values: Any, path: str, places: dict[str, str]) -> Any:
    """Build a section, or a list of them, from its values, inner sections first; refusals get the full name
    and place."""
    if isinstance(values, list):
        return [construct(section, v, f"{path}[{i}]", places) for i, v in enumerate(values)]
    prefix, arguments = f"{path}." if path else "", dict(values)
    for name, field in fields_of(section).items():
        if field.section:
            arguments[name] = construct(field.section, values[name], prefix + name, places)
    try:
        return section(**arguments)
    except InputError as e:
        if not e.option:
            raise
        name = prefix + e.option
        raise InputError(f"{prefix}{e}{at(name, places)}", name) from e


def at(name: str, places: dict[str, str]) -> str:
    """The place of an option, or of the list or mapping around it; empty for a default."""
    while name and name not in places:
        name = name[: max(name.rfind("."), name.rfind("["), 0)]
    return f" ({places[name]})" if name else ""


# ---------------------------------------------------------------------- warnings
def warnings_of(options: Any, program: str) -> Iterator[str]:
    """Warnings of a trainer: a warm-up longer than the run, as in a shortened trial, and options without
    effect."""
    if not program.startswith("train"):
        return
    section, steps = "lr_scheduler", options.training.max_train_steps
    if program == "train_tokenizer":
        section, steps = "optimizer", sum(phase.steps for phase in options.phases)
    warmup = getattr(options, section).params.warmup_steps
    if warmup > steps:
        yield (
            f"{section}.params.warmup_steps={warmup} is longer than the run of {steps} steps: the "
            f"learning rate never reaches its peak"
        )
    cropped = getattr(options.dataset, "preprocessing", {})  # the generator's, in published configs
    if cropped:
        yield (
            f"dataset.preprocessing ({', '.join(map(str, cropped))}) has no effect: "
            f"pretokenization.py crops the images"
        )
