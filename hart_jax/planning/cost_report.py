"""What sampling one batch of images takes, by part and by step, and the least time that it takes on a chip.

    python -m hart_jax.planning.cost_report --config=configs/hart_0p7b_1024.py --batch_size=1
    python -m hart_jax.planning.cost_report --config=configs/hart_0p7b_1024.py --batch_size=1,8,32 --chips=h200,v5e
    python -m hart_jax.planning.cost_report --config=configs/hart_0p7b_1024.py --size=768x1360

Nothing is compiled: `hart_jax.planning.cost_model` counts what is traced. --config.text_encoder names the folder whose
config.json says how large the text encoder is. docs/performance.md says how the published MACs come about.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable

from absl import flags

from hart_jax import flags as hart_flags
from hart_jax.config import HartExperiment
from hart_jax.config.sizes import image_shape_of, one_size, size_text
from hart_jax.errors import UserError, run_cli
from hart_jax.parallel.chips import CHIPS, Chip
from hart_jax.planning.cost_model import (
    ATTENTION,
    BFLOAT16,
    MLP,
    OUT,
    PARTS,
    QKV,
    OpCost,
    full_cache_bytes,
    params,
    read_text_config,
    sampling_costs,
    savings,
)
from hart_jax.planning.jobs import at_image_shape
from hart_jax.text.program import EncoderConfig

PART_COLUMNS = (
    "part",
    "parameters",
    "MACs without guidance",
    "added by guidance",
    "MACs with it",
    "FLOPs with it",
    "weights read, B",
    "cache moved, B",
    "largest array, B",
)
STEP_COLUMNS = (
    "step",
    "blocks' matrices, FLOPs",
    "attention",
    "the rest",
    "all",
    "weights and cache, B",
    "FLOPs per byte",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds of some work on a chip, as if products and memory traffic overlapped perfectly.

    Memory traffic is weights and cache; activations count as if they never left the chip.
    """

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory)

    @property
    def bound(self) -> str:
        return "compute" if self.compute >= self.memory else "memory"


def roofline(costs: Iterable[OpCost], chip: Chip) -> Roofline:
    """Of what is done at the same time."""
    costs = list(costs)
    moved = sum(cost.weights + cost.cache for cost in costs)
    return Roofline(2 * sum(cost.macs for cost in costs) / chip.flops, moved / chip.bandwidth)


def grouped(costs: Iterable[OpCost], key: Callable[[OpCost], str]) -> dict[str, list[OpCost]]:
    """Costs by step or by part, in the order of first appearance."""
    groups: dict[str, list[OpCost]] = {}
    for cost in costs:
        groups.setdefault(key(cost), []).append(cost)
    return groups


def least_seconds(costs: Iterable[OpCost], chip: Chip) -> float:
    """Of steps one after the other."""
    return sum(roofline(group, chip).seconds for group in grouped(costs, lambda cost: cost.step).values())


def _si(value: float, digits: int = 4) -> str:
    """1.234T, 12.34G, ...: so many digits."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def _ms(seconds: float) -> str:
    """Three digits, four where the last is before the point."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    return [_row(*header), "|---" * len(header) + "|", *(_row(*row) for row in rows)]


def _title(experiment: HartExperiment, batch: int) -> str:
    config = experiment.transformer
    return (
        f"{size_text(experiment.tokenizer.image_shape)} px, batch {batch}: {config.context_tokens} context positions "
        f"and {config.num_tokens} tokens in {len(config.patch_nums)} scales"
    )


def _sum(costs: Iterable[OpCost], field: str) -> int:
    return sum(getattr(cost, field) for cost in costs)


def work_report(experiment: HartExperiment, batch: int, text: EncoderConfig | None) -> str:
    """Tables by part and by step, what memory holds, what can be saved."""
    count = params(experiment, text)
    conditional, both = (sampling_costs(experiment, batch, guided=guided, text=text) for guided in (False, True))

    def by_part(part: str, costs: list[OpCost]) -> list[OpCost]:
        return costs if part == "all" else [cost for cost in costs if cost.part == part]

    def part_row(part: str) -> tuple[object, ...]:
        one, two = by_part(part, conditional), by_part(part, both)
        macs, doubled = _sum(one, "macs"), _sum(two, "macs")
        parameters = sum(count.values()) if part == "all" else count.get(part, 0)
        figures = (parameters, macs, doubled - macs, doubled, 2 * doubled, _sum(two, "weights"), _sum(two, "cache"))
        return part, *map(_si, figures), _si(max(cost.largest for cost in two))

    def step_row(step: str, costs: list[OpCost]) -> tuple[object, ...]:
        flops = [2 * _sum((w for w in costs if w.part in parts), "macs") for parts in ((QKV, OUT, MLP), (ATTENTION,))]
        total, moved = 2 * _sum(costs, "macs"), _sum(costs, "weights") + _sum(costs, "cache")
        return step, *map(_si, (*flops, total - sum(flops), total, moved)), f"{total / moved:.0f}"

    text_missing = text is None and not experiment.transformer.num_classes
    folder = experiment.text_encoder or "(text_encoder is not set)"
    held = BFLOAT16 * sum(count.values())
    cache = [_si(full_cache_bytes(experiment, batch, guided=guided)) for guided in (True, False)]
    parts = [part for part in PARTS if by_part(part, both)]
    steps = {**grouped(both, lambda cost: cost.step), "all": both}
    total = 2 * _sum(both, "macs")
    saved = [(name, _si(2 * macs), f"{2 * macs / total:.2%}") for name, macs in savings(experiment, batch).items()]
    lines = [
        _title(experiment, batch),
        "",
        *_table(PART_COLUMNS, [part_row(part) for part in (*parts, "all")]),
        "",
        *([f"text encoder not counted: no folder {folder}", ""] if text_missing else []),
        f"memory: weights {_si(held)}B, key-value cache {cache[0]}B with guidance, {cache[1]}B without",
        "",
        *_table(STEP_COLUMNS, [step_row(*group) for group in steps.items()]),
        "",
        *_table(("could be saved", "FLOPs", "of all"), saved),
    ]
    return "\n".join(lines)


def roofline_report(experiment: HartExperiment, batch: int, chips: dict[str, Chip], text: EncoderConfig | None) -> str:
    """The least milliseconds on each chip by step and by part, "c" where FLOPs and "m" where memory takes longest."""
    costs = sampling_costs(experiment, batch, text=text)
    count = params(experiment, text)
    held = BFLOAT16 * sum(count.values()) + full_cache_bytes(experiment, batch)

    def cell(costs: list[OpCost], chip: Chip) -> str:
        least = roofline(costs, chip)
        return f"{_ms(least.seconds)} {least.bound[0]}"

    def part_cell(costs: list[OpCost], chip: Chip) -> str:
        """Steps come one after the other; the letter is what takes longest in most of the time."""
        rooflines = [roofline(group, chip) for group in grouped(costs, lambda cost: cost.step).values()]
        total, compute = sum(f.seconds for f in rooflines), sum(f.seconds for f in rooflines if f.bound == "compute")
        return f"{_ms(total)} {'c' if compute >= total / 2 else 'm'}"

    rows: list[tuple[object, ...]] = []
    for step, group in grouped(costs, lambda cost: cost.step).items():
        rows.append((step, *(cell(group, chip) for chip in chips.values())))
    least = {name: least_seconds(costs, chip) for name, chip in chips.items()}
    rows.append(("all steps, ms", *(_ms(seconds) for seconds in least.values())))
    rows.append(("images/s at most", *(f"{batch / seconds:.3g}" for seconds in least.values())))
    fits = ("yes" if held <= chip.memory else f"no: {chip.memory / 1e9:.0f} GB" for chip in chips.values())
    rows.append((f"weights and cache fit ({held / 1e9:.1f} GB)", *fits))
    lines = [_title(experiment, batch), "", *_table(("step, ms", *chips), rows), ""]
    by_part = grouped(costs, lambda cost: cost.part).items()
    rows = [(part, *(part_cell(group, chip) for chip in chips.values())) for part, group in by_part]
    return "\n".join([*lines, *_table(("part, ms", *chips), rows)])


def as_dict(
    experiment: HartExperiment, batch: int, chips: dict[str, Chip], text: EncoderConfig | None
) -> dict[str, object]:
    """Everything for a program: MACs, bytes and seconds."""
    both = sampling_costs(experiment, batch, text=text)
    return {
        "image_size": experiment.tokenizer.image_size,
        "batch_size": batch,
        "params": params(experiment, text),
        "work": [dataclasses.asdict(cost) for cost in both],
        "work_without_guidance": [
            dataclasses.asdict(cost) for cost in sampling_costs(experiment, batch, guided=False, text=text)
        ],
        "text_encoder_counted": text is not None,
        "cache_bytes": full_cache_bytes(experiment, batch),
        "savings": savings(experiment, batch),
        "least_seconds": {name: least_seconds(both, chip) for name, chip in chips.items()},
    }


def _batch_sizes(texts: list[str]) -> list[int]:
    sizes = [int(text) if text.isdecimal() else 0 for text in texts]
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch_size={','.join(texts)}: give sizes of 1 or more, like --batch_size=1,8")
    return sizes


def _chips(names: list[str]) -> dict[str, Chip]:
    unknown = [name for name in names if name not in CHIPS]
    if unknown:
        raise UserError(f"--chips={','.join(names)}: {unknown[0]!r} is unknown; known are {', '.join(CHIPS)}")
    return {name: CHIPS[name] for name in names}


def main() -> None:
    # Here, because other commands have flags of these names and tests import them all.
    batch_size = flags.DEFINE_list("batch_size", ["1"], "Images sampled at a time; several sizes: a report for each.")
    chip_names = flags.DEFINE_list("chips", [], f"Prints the least time on these instead: some of {', '.join(CHIPS)}.")
    size = flags.DEFINE_string("size", None, "Width x height of the images in pixels; else the model's own.")
    aspect_ratio = flags.DEFINE_string("aspect_ratio", None, "Or their width to height, like 2:3.")
    as_json = flags.DEFINE_bool("json", False, "Prints one JSON object instead of tables.")
    hart_flags.parse()
    experiment = hart_flags.experiment()
    if not isinstance(experiment, HartExperiment):
        raise UserError("--config: this config trains a tokenizer; give one with a transformer")
    experiment = experiment.sampled()
    experiment = at_image_shape(
        experiment, image_shape_of(one_size(size.value, aspect_ratio.value), experiment.tokenizer)
    )
    batches, chips = _batch_sizes(batch_size.value), _chips(chip_names.value)
    text = None if experiment.transformer.num_classes else read_text_config(experiment.text_encoder)
    if as_json.value:
        print(json.dumps({"batches": [as_dict(experiment, batch, chips, text) for batch in batches]}))
        return
    make_report = functools.partial(roofline_report, chips=chips) if chips else work_report
    print("\n\n".join(make_report(experiment, batch, text=text) for batch in batches))


if __name__ == "__main__":
    run_cli(main)
