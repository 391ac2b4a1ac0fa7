"""Whether a run that goes on is still the same run."""

from typing import Any

from runtime.errors import InputError


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


def check_same_run(
    earlier: dict[str, Any], now: dict[str, Any], free: tuple[str, ...], source: str, fork: bool
) -> list[str]:
    """Compare flat options with those of the checkpoint `source`; returns what to tell the user.

    Names that start with one of `free` may differ. Any other difference raises InputError that
    lists all of them, unless `fork` says that the checkpoint was named on purpose.
    """
    differing = [
        f"{name} ({earlier.get(name)} there, {now.get(name)} now)"
        for name in sorted(earlier.keys() | now.keys())
        if earlier.get(name) != now.get(name) and not name.startswith(free)
    ]
    if differing and not fork:
        raise InputError(
            f"{source} is of a run with other options: {', '.join(differing)}; give those back, or "
            f"start another run from it with another experiment.output_dir and "
            f"experiment.resume={source}"
        )
    return [f"goes on from {source} with other options: {', '.join(differing)}"] * bool(differing)
