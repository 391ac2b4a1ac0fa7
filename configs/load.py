"""Reading `config=FILE option=value …` into the dataclasses of `configs.schema`, and writing them.

The type of an option decides how its text is read: the text of a text option stays as it was typed
(`2024_06_01`, `run #3`, `no`), whatever YAML would make of it. Every refusal names the option by its
path and the place that its value came from.
"""

import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Optional, TypeVar, cast, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MappingNode, Node, ScalarNode, SequenceNode, YAMLError

from configs.help import describe
from configs.schema import (
    UNUSED,
    GeneratorExperiment,
    GeneratorOptions,
    GeneratorRun,
    TokenizerRun,
)
from modeling.fields import (
    NUMBER_OR_NAME,
    TYPED,
    Rule,
    default_of,
    expectation,
    item_section_of,
    rule_of,
    section_of,
    short,
    types_of,
)
from modeling.generator import GeneratorConfig
from modeling.tokenizer import TokenizerConfig
from modeling.weights.metadata import GENERATOR, SIZES, TOKENIZER, About, about_file, about_model
from runtime.errors import InputError
from runtime.files import write_whole

T = TypeVar("T")

TRUE, FALSE = ("true", "yes", "y", "on", "1"), ("false", "no", "n", "off", "0")
COMMAND_LINE = "the command line"
# What weights were trained with: no shape of their tensors shows it.
UNSEEN_SIZES = ("encoder_heads", "decoder_heads", "causal")
# All that decides what a model computes.
SIZES_OF_TOKENIZER = SIZES[TOKENIZER]
SIZES_OF_GENERATOR = SIZES[GENERATOR]
# Of a tokenizer, those that its codes depend on.
SIZES_OF_ENCODER = tuple(
    name
    for name in SIZES_OF_TOKENIZER
    if not name.startswith(("decoder_", "num_buffer", "causal", "prefix_head"))
)


@dataclass(frozen=True)
class Place:
    """Where a value came from."""

    source: str  # the command line, or a file's path
    line: Optional[int] = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"

    @property
    def where(self) -> str:
        return f" ({self})"


@dataclass(frozen=True)
class Leaf:
    """The value of one option as it was written."""

    node: Node
    place: Place


Tree = dict[str, Any]  # {option: Leaf | Tree | list[Tree]}, as nested as the schema


# ---------------------------------------------------------------------- what programs call
def load(schema: type[T], argv: list[str], program: str = "") -> T:
    """Options of one program: schema defaults, then `config=FILE`, then `section.option=value` …

    `--help` prints them all and ends the program. `program` names a key of `configs.schema.UNUSED`.
    Raises InputError for a missing file, a misspelt option (with the nearest name), a value of the
    wrong type or out of its range, an option of another program on the command line, or a
    combination that does not hold together.
    """
    if {"-h", "--help"} & set(argv):
        print(describe(schema, program))
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
    path, root = compose_file(files[0])
    tree = read_section(schema, root, "", str(path))
    for key, text in pairs:
        if key != "config":
            read_argument(schema, tree, key, text, str(path))
    places = dict(places_of(tree, ""))
    for name, place in places.items():
        if place.source == COMMAND_LINE:
            refuse_unused(program, name)
    options = build(schema, tree, str(path))
    warnings = [
        *sizes_of_runs(options, places),
        *warmup_warning(options, places),
        *without_effect(options),
    ]
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(f"warning: {path}: {warning}", file=sys.stderr)
    return options


def tokenizer_config(path: str | Path | None, **known: Any) -> TokenizerConfig:
    """A tokenizer's sizes: what is `known`, then `model.vq_model` of a YAML file, then the defaults."""
    prefix, tree, source = "model.vq_model", {}, ""
    if path is not None:
        file, node = compose_file(path)
        source = str(file)
        for name in prefix.split("."):
            node = next((v for k, v in node.value if k.value == name), None)
            if node is None:
                break
            if not isinstance(node, MappingNode):
                raise InputError(f"config {source}: {prefix} holds no options")
        else:
            tree = read_section(TokenizerConfig, node, prefix, source)
    return build(TokenizerConfig, tree, source, prefix, known)


def read_run(schema: type[T], path: str | Path) -> T:
    """The options of a run, from its config."""
    file, root = compose_file(path)
    return build(schema, read_section(schema, root, "", str(file)), str(file))


def config_beside(path: str | Path) -> Optional[Path]:
    """The config that describes weights: of their run, or written beside them by train_tokenizer.export.

    `path` is a run's folder, a checkpoint of it (`step-…`), or a weights file. None where there is
    no config: the weights came from elsewhere.
    """
    place = Path(os.path.expanduser(path))
    runs = [place] if place.is_dir() else [place.parent]
    if runs[0].parent.name == "checkpoints":
        runs.append(runs[0].parent.parent)
    found = [run / "config.yaml" for run in runs if place == run or (run / "checkpoints").is_dir()]
    if not place.is_dir():
        found.insert(0, place.with_suffix(".yaml"))
    return next((file for file in found if file.is_file()), None)


def sizes_for(
    weights: str, config: Optional[str], names: tuple[str, ...], **known: Any
) -> TokenizerConfig:
    """`tokenizer_config` of `config` or, by default, what the weights say of themselves, else of what
    lies beside them.

    Raises InputError where the two differ in one of `names`, which no tensor's shape shows, or in a
    size of the encoder that the weights state.
    """
    about = about_file(weights)
    if about is not None:
        return sizes_stated(about, weights, config, names, known)
    beside = config_beside(weights)
    sizes = tokenizer_config(config or beside, **known)
    if config is not None and beside is not None:
        trained = tokenizer_config(beside)
        for name in names:
            here, there = getattr(sizes, name), getattr(trained, name)
            if here != there:
                raise InputError(
                    f"model.vq_model.{name}={here} ({config}) contradicts {beside}, by which "
                    f"{weights} was trained: set {there}, or leave --config out"
                )
    return sizes


def sizes_stated(
    about: About,
    weights: str,
    config: Optional[str],
    names: tuple[str, ...],
    known: dict[str, Any],
) -> TokenizerConfig:
    """A tokenizer's sizes by its weights file. Raises InputError where what is `known`, or a config
    file in one of `names` or in a size of the encoder, contradicts it."""
    stated = about.build(TokenizerConfig, TOKENIZER, weights)
    given = known
    if config is not None:
        here = about_model(TOKENIZER, tokenizer_config(config, **known)).config
        given = {name: here[name] for name in (*known, *SIZES_OF_ENCODER, *names)}
    for name, value in given.items():
        if value != about.config[name]:
            source = "the command line" if name in known else config
            raise InputError(
                f"{name}={value} ({source}) contradicts {weights}, which states "
                f"{name}={about.config[name]}: leave it out, or pass other weights"
            )
    return stated


def as_dict(config: Any) -> dict[str, Any]:
    """Options as plain nested dicts, for trackers, comparisons and files.

    Options that are only accepted for the sake of published configs are left out.
    """
    plain: dict[str, Any] = {}
    for field in fields(config):
        if rule_of(field).notes.get("recorded", True):
            value = getattr(config, field.name)
            if isinstance(value, (list, tuple)):
                value = [as_dict(v) if is_dataclass(v) else v for v in value]
            plain[field.name] = as_dict(value) if is_dataclass(value) else value
    return plain


def save(config: Any, path: str | Path) -> None:
    """Write the options of a run as YAML that `load` reads again."""
    text = yaml.safe_dump(as_dict(config), allow_unicode=True, sort_keys=False)
    write_whole(path, text.encode())


# ---------------------------------------------------------------------- YAML
def compose_file(path: str | Path) -> tuple[Path, MappingNode]:
    """A config file (or a run folder's config.yaml) as YAML nodes, which know their lines."""
    file = home(str(path), "config", "")
    if (file / "config.yaml").is_file():
        file = file / "config.yaml"
    if not file.is_file():
        raise InputError(f"no config file {file}; the presets are in configs/")
    try:
        node = compose(file.read_text(encoding="utf-8"))
    except (YAMLError, ValueError, RecursionError, OSError) as e:
        raise InputError(f"config {file}: {two_lines(e)}") from e
    if not isinstance(node, MappingNode):
        raise InputError(f"config {file} holds no options")
    return file, node


def compose(text: str) -> Optional[Node]:
    """The nodes of a YAML text, merge keys (`<<`) resolved. Raises YAMLError and ValueError."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        merge_mappings(loader, node, set())
        return node
    finally:
        loader.dispose()


def merge_mappings(loader: yaml.SafeLoader, node: Optional[Node], done: set[int]) -> None:
    """Resolve merge keys in place and refuse a key that is written twice."""
    if node is None or id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, SequenceNode):
        for item in node.value:
            merge_mappings(loader, item, done)
    if isinstance(node, MappingNode):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a name must be a text")
            if key.value in seen and key.value != "<<":
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
            seen.add(key.value)
        loader.flatten_mapping(node)
        # Merged pairs come first, so that the mapping's own follow and win.
        node.value = list({key.value: (key, value) for key, value in node.value}.values())
        for _, value in node.value:
            merge_mappings(loader, value, done)


def two_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:null"


# ---------------------------------------------------------------------- names
def refuse_name(schema: type, key: str, prefix: str, place: Place) -> None:
    """Refuse a name that the schema lacks, saying which is nearest."""
    names = [f.name for f in fields(schema)]
    if key not in names:
        near = difflib.get_close_matches(str(key), names, 1, 0.5)
        hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(names)}"
        line = "" if place.line is None else f" (line {place.line})"
        raise InputError(f"{place.source}: there is no option {prefix}{key}; {hint}{line}")


def read_section(schema: type, node: Node, path: str, source: str) -> Tree:
    """A mapping's options by the schema's names; values stay as written."""
    place = Place(source, None if source == COMMAND_LINE else node.start_mark.line + 1)
    if not isinstance(node, MappingNode):
        shown = short(node.value) if isinstance(node, ScalarNode) else "[…]"
        raise InputError(f"{path}={shown}: {path} is a section{place.where}: set its options")
    tree: Tree = {}
    prefix = f"{path}." if path else ""
    for key, value in node.value:
        line = None if source == COMMAND_LINE else key.start_mark.line + 1
        refuse_name(schema, key.value, prefix, Place(source, line))
        tree[key.value] = read_value(schema, key.value, value, prefix, Place(source, line))
    return tree


def read_value(schema: type, name: str, node: Node, prefix: str, place: Place) -> Any:
    kind, _ = types_of(schema)[name]
    section, item = section_of(kind), item_section_of(kind)
    if section:
        return read_section(section, node, prefix + name, place.source)
    if item:
        if not isinstance(node, SequenceNode):
            raise list_needed(prefix + name, place)
        return [
            read_section(item, part, f"{prefix}{name}[{i}]", place.source)
            for i, part in enumerate(node.value)
        ]
    return Leaf(node, place)


def list_needed(path: str, place: Place) -> InputError:
    return InputError(f"{place.source}: {path} is a list; set all of it: [{{…}}, …]")


def read_argument(schema: type, tree: Tree, key: str, text: str, file: str) -> None:
    """Put one `key=text` of the command line into the tree, over what is there."""
    place, prefix = Place(COMMAND_LINE), ""
    *sections, name = key.split(".")
    for section in sections:
        base, bracket, _ = section.partition("[")
        refuse_name(schema, base, prefix, place)
        kind, _ = types_of(schema)[base]
        if get_origin(kind) is list:
            raise list_needed(prefix + base, place)
        below = section_of(kind)
        if kind is dict and f"{prefix}{base}.{name}" == key:  # one entry of a mapping
            pair = (ScalarNode("tag:yaml.org,2002:str", name), argument_node(key, text))
            earlier = tree[base].node.value if base in tree else []
            kept = [(k, v) for k, v in earlier if k.value != name]
            tree[base] = Leaf(MappingNode("tag:yaml.org,2002:map", [*kept, pair]), place)
            return
        if bracket or below is None:
            raise InputError(
                f"{place}: {prefix}{base} is an option, not a section; there is no option {key}"
            )
        schema, tree, prefix = below, tree.setdefault(base, {}), f"{prefix}{base}."
    base, bracket, _ = name.partition("[")
    refuse_name(schema, base, prefix, place)
    kind, _ = types_of(schema)[base]
    if bracket:
        raise list_needed(prefix + base, place)
    if get_origin(kind) is list or is_dataclass(kind) or kind is dict:
        node = argument_node(key, text)
        if is_dataclass(kind) and not isinstance(node, MappingNode):
            raise InputError(
                f"{key}={short(text)}: {key} is a section, as {file} shows: set one of its options, "
                f"{key}.{fields(kind)[0].name}=…{place.where}"
            )
    else:
        tag = "null" if text in ("null", "~") else "str"
        node = ScalarNode(f"tag:yaml.org,2002:{tag}", text)
    value = read_value(schema, base, node, prefix, place)
    tree[base] = merged(tree.get(base, {}), value) if isinstance(value, dict) else value


def argument_node(key: str, text: str) -> Node:
    """A value of the command line as YAML, where an option takes more than a text or a number."""
    try:
        return compose(text) or ScalarNode("tag:yaml.org,2002:null", "")
    except (YAMLError, ValueError, RecursionError) as e:
        raise InputError(f"{key}={short(text)}: {two_lines(e)} ({COMMAND_LINE})") from e


def merged(below: Tree, above: Tree) -> Tree:
    both = dict(below)
    for key, value in above.items():
        both[key] = merged(both.get(key, {}), value) if isinstance(value, dict) else value
    return both


def refuse_unused(program: str, key: str) -> None:
    """Refuse an option of the command line that the program would ignore."""
    table = UNUSED.get(program, {})
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        instead = table.get(".".join(parts[:end]))
        if instead is not None:
            remedy = f"set {instead}" if instead else "leave it out"
            raise InputError(f"{program} does not use {key}: {remedy}")


# ---------------------------------------------------------------------- values
def build(
    schema: type, tree: Tree, source: str, prefix: str = "", known: Optional[dict] = None
) -> Any:
    """The dataclass of a tree, references (`${…}`) resolved."""
    values = plain_values(schema, tree, prefix)
    if refers(values):
        try:
            config = OmegaConf.create(values)
            values = cast(dict, OmegaConf.to_container(config, resolve=True))
        except (OmegaConfBaseException, RecursionError, ValueError) as e:
            raise InputError(f"config {source} and its overrides: {two_lines(e)}") from e
    places = dict(places_of(tree, prefix))
    return construct(schema, {**values, **(known or {})}, tree, prefix, places)


def refers(values: Any) -> bool:
    if isinstance(values, dict):
        return any(map(refers, values.values()))
    if isinstance(values, list):
        return any(map(refers, values))
    return isinstance(values, str) and "${" in values


def plain_values(schema: type, tree: Tree, path: str) -> dict[str, Any]:
    """Converted values of a section, defaults included; what refers to another option stays text."""
    values = {}
    for field in fields(schema):
        kind, optional = types_of(schema)[field.name]
        name = f"{path}.{field.name}" if path else field.name
        given = tree.get(field.name)
        section, item = section_of(kind), item_section_of(kind)
        if section:
            values[field.name] = plain_values(section, given or {}, name)
        elif item and given is not None:
            values[field.name] = [
                plain_values(item, part, f"{name}[{i}]") for i, part in enumerate(given)
            ]
        elif given is None:
            values[field.name] = default_of(field)
        elif isinstance(given.node, ScalarNode) and "${" in given.node.value:
            values[field.name] = given.node.value
        else:
            values[field.name] = convert(given, kind, optional, rule_of(field), name)
    return values


def convert(leaf: Leaf, kind: Any, optional: bool, rule: Rule, name: str) -> Any:
    """The value of one option from what was written, by its type alone."""
    node = leaf.node
    if is_null(node):
        if optional or rule.null is not TYPED:
            return None
        if kind is not str or leaf.place.line is not None:
            shown = node.value or "null"
            raise InputError(f"{name}={shown}: {remedy_for(kind, rule)}{leaf.place.where}")
    try:
        if kind is dict:
            return plain_mapping(node)
        if get_origin(kind) is list:
            items = node.value if isinstance(node, SequenceNode) else [node]
            return [read_scalar(item, get_args(kind)[0], rule) for item in items]
        value = read_scalar(node, kind, rule)
    except (ValueError, YAMLError) as e:
        shown = short(node.value) if isinstance(node, ScalarNode) else "…"
        raise InputError(f"{name}={shown}: {remedy_for(kind, rule)}{leaf.place.where}") from e
    if optional and rule.notes.get("path") and str(value).lower() in ("true", "false", "none"):
        raise InputError(
            f"{name}={value}: set a path (./{value} for a file of this name) or null for none"
            f"{leaf.place.where}"
        )
    if rule.notes.get("path") and isinstance(value, str):
        value = str_path(value, name, leaf.place.where)
    return value


def remedy_for(kind: Any, rule: Rule) -> str:
    """What to write for an option of this type."""
    if rule.choices:
        return f"choose {rule.limits()}"
    return rule.notes.get("expects") or expectation(kind)


def plain_mapping(node: Node) -> dict[str, Any]:
    """A mapping of scalars, as YAML reads them."""
    if not isinstance(node, MappingNode):
        raise ValueError
    return {key.value: yaml.safe_load(yaml.serialize(value)) for key, value in node.value}


def read_scalar(node: Node, kind: Any, rule: Rule) -> Any:
    """Raises ValueError where the text is not of the type."""
    if not isinstance(node, ScalarNode):
        raise ValueError
    text = node.value
    if kind is str:
        return word_of(text, rule)
    if kind == NUMBER_OR_NAME:  # a number in quotes is a name
        return text if node.style else number_or_name(text)
    if kind is bool or kind is Any:
        lower = text.lower()
        if lower in TRUE + FALSE and not (kind is Any and text.isdigit()):
            return lower in TRUE
        if kind is bool or text.isdigit() or not text or is_null(node):
            raise ValueError
        return word_of(text, rule)
    if kind is int:
        return read_integer(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def read_integer(text: str) -> int:
    """Raises ValueError for other texts."""
    try:
        return int(text)
    except ValueError:
        return int(text, 0)  # 0x10


def number_or_name(text: str) -> int | str:
    try:
        return read_integer(text)
    except ValueError:
        return text


def word_of(text: str, rule: Rule) -> str:
    """A text as it is, or the word that YAML 1.1 or an upper case made of it."""
    if text in rule.choices or not rule.choices:
        return text
    lower = text.lower()
    for meant, spellings in (("no", FALSE), ("yes", TRUE)):
        if meant in rule.choices and lower in spellings:
            return meant
    return lower if lower in rule.choices else text


def home(text: str, name: str, where: str) -> Path:
    """A path with `~` expanded."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise InputError(
            f"{name}={short(text)}: there is no such home folder{where}; write ./{short(text)} for "
            f"a file of this name"
        )
    return Path(expanded)


def str_path(text: str, name: str, where: str) -> str:
    return str(home(text, name, where)) if text.startswith("~") else text


# ---------------------------------------------------------------------- dataclasses
def places_of(tree: Tree, path: str) -> Iterator[tuple[str, Place]]:
    """(option's path, place) of every value that was written."""
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Leaf):
            yield name, value.place
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from places_of(item, f"{name}[{i}]")
        else:
            yield from places_of(value, name)


def construct(
    schema: type, values: dict[str, Any], tree: Tree, path: str, places: dict[str, Place]
) -> Any:
    """Build a section bottom up; a refusal of a class gets the option's path and its place."""
    arguments = {}
    for field in fields(schema):
        kind, optional = types_of(schema)[field.name]
        name, value = f"{path}.{field.name}" if path else field.name, values[field.name]
        given = tree.get(field.name)
        section, item = section_of(kind), item_section_of(kind)
        if section:
            value = construct(section, value, given or {}, name, places)
        elif item:
            value = [
                construct(item, part, given[i] if given else {}, f"{name}[{i}]", places)
                for i, part in enumerate(value)
            ]
        elif isinstance(given, Leaf) and isinstance(value, str) and refers(given.node.value):
            node = ScalarNode("tag:yaml.org,2002:str", value)
            value = convert(Leaf(node, given.place), kind, optional, rule_of(field), name)
        arguments[field.name] = value
    try:
        return schema(**arguments)
    except InputError as e:
        raise InputError(located(str(e), schema, path, places)) from e


def located(message: str, schema: type, path: str, places: dict[str, Place]) -> str:
    """A class's message with the options' full names, and the place of the first that has one."""
    mentions = option_names(schema)
    full = mentions.sub(lambda m: f"{path}.{m[0]}" if path else m[0], message)
    named = [f"{path}.{m[0]}" if path else m[0] for m in mentions.finditer(message)]
    # An option of a mapping came with the mapping.
    named += [name.rpartition(".")[0] for name in named]
    place = next((places[name] for name in named if name in places), None)
    return full if place is None else full + place.where


@functools.cache
def option_names(schema: type) -> re.Pattern:
    """Finds `name` or `section.name` before an equals sign."""
    names = "|".join(field.name for field in fields(schema))
    return re.compile(rf"(?<![\w.\]])(?:{names})(?:\[\d+\])?(?:\.\w+)*(?==)")


def warmup_warning(options: Any, places: dict[str, Place]) -> list[str]:
    """Refuse a warm-up longer than the run.

    A run that was shortened over its preset, to try it out, is only warned of.
    """
    if isinstance(options, GeneratorRun):
        name, warmup = "lr_scheduler.params.warmup_steps", options.lr_scheduler.params.warmup_steps
        named, steps = "training.max_train_steps", options.training.max_train_steps
    elif isinstance(options, TokenizerRun):
        name, warmup = "optimizer.params.warmup_steps", options.optimizer.params.warmup_steps
        named, steps = "phases[0].steps", sum(phase.steps for phase in options.phases)
    else:
        return []
    if warmup <= steps:
        return []
    said = f"{name}={warmup} is longer than the run of {steps} steps"
    mine, others = places.get(name), places.get(named)
    if mine is None or (others is not None and mine.source != others.source == COMMAND_LINE):
        return [f"{said}: the learning rate never reaches its peak"]
    raise InputError(f"{said}: set fewer, 0 for none{mine.where}")


def sizes_of_runs(options: Any, places: dict[str, Place]) -> list[str]:
    """Set the sizes of models to those of the runs whose weights are used, and say which changed.

    Some of them (`encoder_heads`, `causal`) no tensor's shape shows, so that other sizes would change
    codes and images without an error. Raises InputError where the command line contradicts a run.
    """
    if not isinstance(options, GeneratorRun):
        return []
    model, said = options.model, []
    experiment, sections = options.experiment, {}
    weights = experiment.generator_checkpoint
    file = config_beside(experiment.tokenizer_checkpoint)
    if file is not None:
        sections["vq_model"] = (file, tokenizer_config(file), UNSEEN_SIZES)
    trained = run_beside(GeneratorRun, weights) if weights else None
    # A generator's tensors show all its sizes but one; a folder stands for its config.
    whole = bool(weights) and Path(weights).is_dir()
    if trained is not None:
        names = SIZES_OF_GENERATOR if whole else ("image_seq_len",)
        sections["generator"] = (trained[0], trained[1].model.generator, names)
    stated = stated_sections(experiment)
    sections |= stated
    for section, (file, run, names) in sections.items():
        used = getattr(model, section)
        if section == "vq_model" and Path(experiment.tokenizer_checkpoint).is_dir():
            names = SIZES_OF_TOKENIZER
        changes = {n: getattr(run, n) for n in names if getattr(run, n) != getattr(used, n)}
        if section == "vq_model" and run.num_tokens == used.num_tokens:  # of the same grid, then
            changes.pop("num_latent_tokens", None)  # null stands for the same number
        for name, value in changes.items():
            option = f"model.{section}.{name}"
            if option in places and places[option].source == COMMAND_LINE:
                raise InputError(
                    f"{option}={getattr(used, name)} contradicts {file}, by which the weights were "
                    f"trained: leave it out, or set {value}{places[option].where}"
                )
            said.append(f"{option}={value}, from {file}, instead of {getattr(used, name)}")
        sections[section] = replace(used, **changes)
    if said:
        vq_model = sections.get("vq_model", model.vq_model)
        generator = sections.get("generator", model.generator)
        if "generator" not in stated and (trained is None or not whole):
            generator = replace(generator, codebook_size=vq_model.codebook_size)
            said += follow_tokenizer(generator, vq_model, experiment, places)
        try:
            options.model = replace(model, vq_model=vq_model, generator=generator)
        except InputError as e:  # the runs do not belong together
            raise InputError(f"{e} ({'; '.join(said)})") from e
    return said


def run_beside(schema: type[T], weights: str) -> Optional[tuple[Path, T]]:
    """The config of the run that trained weights, as a file and as options; None without a run.

    `weights` is the run's folder, a checkpoint of it, or a weights file in either.
    """
    file = config_beside(weights)
    if file is None or file.name != "config.yaml":
        return None
    return file, read_run(schema, file)


def codes_per_image(weights: str) -> tuple[Optional[int], str]:
    """The codes per image of a generator's weights, which no tensor's shape shows, and who states them:
    their file, or the config of their run. None where neither does.

    Raises InputError for a file of another kind of model.
    """
    about = about_file(weights)
    if about is not None:
        about.expect(GENERATOR, weights)
        return about.config["image_seq_len"], "as the file states"
    run = run_beside(GeneratorRun, weights)
    return (None, "") if run is None else (run[1].model.generator.image_seq_len, str(run[0]))


def stated_sections(experiment: GeneratorExperiment) -> dict[str, tuple[str, Any, tuple[str, ...]]]:
    """What weights files state of their models, {section: (file, config, names of the sizes)}.

    Raises InputError for a file of another kind of model.
    """
    tokenizer, generator = experiment.tokenizer_checkpoint, experiment.generator_checkpoint
    found: dict[str, tuple[str, Any, tuple[str, ...]]] = {}
    about = about_file(tokenizer)
    if about is not None:
        config = about.build(TokenizerConfig, TOKENIZER, tokenizer)
        found["vq_model"] = tokenizer, config, SIZES_OF_TOKENIZER
    about = None if generator is None else about_file(generator)
    if about is not None:
        config = about.build(GeneratorConfig, GENERATOR, generator)
        found["generator"] = str(generator), config, SIZES_OF_GENERATOR
    return found


def follow_tokenizer(
    generator: GeneratorOptions,
    vq_model: TokenizerConfig,
    experiment: GeneratorExperiment,
    places: dict[str, Place],
) -> list[str]:
    """Set the codes per image of a generator without weights to those of the tokenizer's weights.

    The command line's number stays (and is refused where it does not fit), and so does that of a
    generator whose weights do not state theirs.
    """
    name, before = "model.generator.image_seq_len", generator.image_seq_len
    named = name in places and places[name].source == COMMAND_LINE
    if named or experiment.generator_checkpoint is not None or before == vq_model.num_tokens:
        return []
    generator.image_seq_len = vq_model.num_tokens
    return [f"{name}={vq_model.num_tokens}, as many as the tokenizer makes, instead of {before}"]


def without_effect(options: Any) -> list[str]:
    dataset = getattr(options, "dataset", None)
    names = getattr(dataset, "preprocessing", {})
    if not names:
        return []
    return [
        f"dataset.preprocessing ({', '.join(map(str, names))}) has no effect: pretokenization.py "
        f"crops the images"
    ]
