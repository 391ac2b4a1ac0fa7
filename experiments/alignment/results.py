"""What the finished runs of the study measured: figures per run, rows over seeds, differences of rows."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.alignment.neighbours import NEIGHBOURS
from experiments.alignment.rows import ROWS, Row
from runtime.errors import InputError
from training.plot import Records, curve, run_records


@dataclass(frozen=True)
class Metric:
    name: str
    title: str
    form: str  # of a value
    scale: float = 1.0


METRICS = (
    Metric("nats", "nats per code", ".3f"),
    Metric("bits", "bits per image", ".1f"),
    Metric("top1", "top-1, %", ".1f", 100),
    Metric("psnr", "PSNR, dB", ".2f"),
    Metric("fid", "Fréchet distance", ".2f"),
    Metric("recognised", "read as asked, %", ".1f", 100),
    Metric("codebook_use", "codes in use, %", ".1f", 100),
    Metric("fid_seen", "Fréchet distance to training crops", ".2f"),
    Metric("fid_decoded", "Fréchet distance to reconstructions", ".2f"),
    Metric("rfid", "Fréchet distance of reconstructions", ".2f"),
    Metric("entropy", "entropy of codes, bits", ".2f"),
    Metric("by neighbours", "bits per code by its neighbours", ".2f"),
    Metric("changed", "codes of kept rows that change, %", ".1f", 100),
    Metric("later", "effect on later rows, %", ".1f", 100),
    Metric("gained", "PSNR gained in the last third of stage 1, dB", ".2f"),
)


def metrics_of(groups: list["Group"]) -> list[Metric]:
    """The metrics that all of these runs have: only digits are classified."""
    return [m for m in METRICS if all(m.name in r.figures for g in groups for r in g.results)]


# ---------------------------------------------------------------------- one run
def folder_of(output: Path, variation: str) -> Path:
    """Where the runs of a variation are; "" is the ablation itself."""
    return output / "vary" / variation.replace("/", "_") if variation else output


@dataclass(frozen=True)
class Result:
    """One seed of one row, as its decoder shows it."""

    variation: str
    row: Row
    seed: int
    folder: Path

    @property
    def complete(self) -> bool:
        return (self.folder / f"scores_{self.row.decoder}.json").is_file()

    @cached_property
    def figures(self) -> dict[str, float]:
        """All metrics, and what else a reader may ask for, by name."""
        likelihood = json.loads((self.folder / "likelihood.json").read_text())
        scores = json.loads((self.folder / f"scores_{self.row.decoder}.json").read_text())
        generator = self.records("generator")
        best = min((r for r in generator if "val/loss" in r), key=lambda r: r["val/loss"])
        before = [r["loss"] for r in generator if "loss" in r and r["step"] <= best["step"]]
        metrics = likelihood["metrics"]
        return {
            "nats": metrics["nats_per_code"], "bits": metrics["bits_per_image"], "top1": metrics["top1"],
            "psnr": last_of(self.records(self.row.decoder), "val/psnr"),
            "codebook_use": last_of(self.records("stage1"), "val/codebook_use"),
            "perplexity": last_of(self.records("stage1"), "val/perplexity"),
            "tokens": likelihood["cache"]["codes"], "training loss": before[-1], **scores,
            "gained": gained(self.records("stage1"), "val/psnr"), **self.inside(),
        }  # fmt: skip

    def inside(self) -> dict[str, float]:
        """What `experiments.alignment.inside` found in the run's tokenizer; empty before it has run."""
        root, seed = self.folder.parent.parent, self.folder.parent.name
        file = root / "inside" / seed / "inside.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        for row in rows:
            if row["name"] == self.folder.name:
                bits, changed = row["neighbours"]["bits"], row["masked"]["another image"]["earlier"]
                return {
                    "by neighbours": min(bits[name] for name in NEIGHBOURS),
                    "changed": float(np.mean(changed)), "later": row["replaced"]["shares"].get("later", math.nan),
                }  # fmt: skip
        return {}

    def records(self, part: str) -> Records:
        return run_records(self.folder / part)


def last_of(records: Records, name: str) -> float:
    return next(record[name] for record in reversed(records) if name in record)


def gained(records: Records, name: str) -> float:
    """The last value less the one nearest to two thirds of the steps."""
    points = curve(records, name)
    last = max(points)
    return points[last] - points[min(points, key=lambda step: abs(step - last * 2 / 3))]


def collect(output: Path, variation: str = "") -> list[Result]:
    """The finished runs of a variation, row by row."""
    root = folder_of(output, variation)
    seeds = sorted(int(path.name[5:]) for path in root.glob("seed_*"))
    found = [
        Result(variation, row, s, root / f"seed_{s}" / row.folder) for row in ROWS for s in seeds
    ]
    return [result for result in found if result.complete]


# ---------------------------------------------------------------------- rows and their differences
@dataclass(frozen=True)
class Group:
    """All seeds of a row under a variation."""

    results: list[Result]

    @property
    def row(self) -> Row:
        return self.results[0].row

    @property
    def variation(self) -> str:
        return self.results[0].variation

    @property
    def title(self) -> str:
        return self.row.title + (f", {self.variation}" if self.variation else "")

    @property
    def label(self) -> str:
        """The title in short."""
        return self.row.name + (f", {self.variation}" if self.variation else "")

    def values(self, name: str) -> dict[int, float]:
        """By seed."""
        return {result.seed: result.figures[name] for result in self.results}

    def summary(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name in self.results[0].figures:
            if any(name not in result.figures for result in self.results):
                continue  # some have not been looked into yet
            values = self.values(name)
            figures[name] = {**mean_and_deviation(list(values.values())), "seeds": values}
        return {
            "row": self.row.name, "title": self.title, "variation": self.variation, "figures": figures
        }  # fmt: skip


def groups_of(results: list[Result]) -> list[Group]:
    kinds = dict.fromkeys((r.variation, r.row.name) for r in results)
    return [Group([r for r in results if (r.variation, r.row.name) == kind]) for kind in kinds]


def mean_and_deviation(values: list[float]) -> dict[str, float | None]:
    """The mean and the standard deviation of a sample; of one value, none."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation}


@dataclass(frozen=True)
class Difference:
    """What changes from one row to another, over the seeds that both have: a paired t test."""

    metric: str
    mean: float
    low: float | None  # the 95 % interval
    high: float | None
    p: float | None  # None: fewer than two seeds, or the same difference for all of them
    seeds: int


def difference(metric: str, before: dict[int, float], after: dict[int, float]) -> Difference:
    """After minus before. Raises InputError if the rows have no seed in common."""
    seeds = sorted(before.keys() & after.keys())
    if not seeds:
        raise InputError(f"two rows have no seed in common: {sorted(before)} and {sorted(after)}")
    changes = np.array([after[s] - before[s] for s in seeds])
    mean = float(changes.mean())
    if len(seeds) < 2 or np.ptp(changes) == 0:
        return Difference(metric, mean, None, None, None, len(seeds))
    test = stats.ttest_rel([after[s] for s in seeds], [before[s] for s in seeds])
    interval = test.confidence_interval(0.95)
    return Difference(
        metric, mean, float(interval.low), float(interval.high), float(test.pvalue), len(seeds)
    )


def neighbours(groups: list[Group]) -> list[tuple[Group, Group]]:
    """Pairs to compare: a row that shares codes with the row that made them, any other row with the one
    before it, and a varied row with the same row unvaried.
    """
    known = {(group.variation, group.row.name): group for group in groups}
    pairs = []
    for before, group in pairwise(groups):
        if group.row.run:
            before = known.get((group.variation, group.row.run))
        if before is not None and before.variation == group.variation:
            pairs.append((before, group))
    plain = {group.row.name: group for group in groups if not group.variation}
    pairs += [(plain[g.row.name], g) for g in groups if g.variation and g.row.name in plain]
    return [(a, b) for a, b in pairs if a.values("nats").keys() & b.values("nats").keys()]


def differences(before: Group, after: Group) -> list[Difference]:
    return [
        difference(m.name, before.values(m.name), after.values(m.name))
        for m in metrics_of([before, after])
    ]
