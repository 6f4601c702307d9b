"""Curves of a run as one PNG, drawn with Pillow: `python -m hart_jax.training.curves WORKDIR`.

One look at a run without TensorBoard: losses, loss and accuracy of every scale, norms, learning rate, speed, waits.
"""

import argparse
import colorsys
import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hart_jax.errors import UserError, run_cli
from hart_jax.io.images import save_png
from hart_jax.io.paths import as_path
from hart_jax.training.metrics import METRICS_FILE, TIMINGS_FILE, read_metrics

CURVES_FILE = "curves.png"
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
_WIDTH, _HEIGHT, _COLUMNS = 800, 360, 2
_LEFT, _TOP, _RIGHT, _BOTTOM = 72, 34, 580, 316
_POINTS = 400


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A title, which metrics it shows (a pattern of the whole name), and whether its axis is logarithmic."""

    title: str
    pattern: str
    log_y: bool


_PANELS = (
    _Panel("losses", r"loss(_token|_diffusion)?|diffusion_mse|mse.*|vq|l1|perceptual", True),
    _Panel("adversarial losses", r"generator|discriminator", False),
    _Panel("loss of each scale", r"loss_scale_\d+", False),
    _Panel("accuracy of each scale", r"accuracy_scale_\d+", False),
    _Panel("norms", r".*_norm", True),
    _Panel("learning rate", r"learning_rate", False),
    _Panel("share of codes in use", r"codes_used", False),
    _Panel("skipped steps, where there were any", r"skipped_steps", True),
    _Panel("images per second", r"images_per_second", False),
    _Panel("FLOPs utilisation: of the model, of the hardware", r"[mh]fu", False),
    _Panel("seconds per step, and waiting in them", r"(step|.*_wait)_seconds", True),
    _Panel("device memory, bytes", r"device_memory.*", False),
)


def draw_curves(workdir: str | os.PathLike, names: Sequence[str] | None = None, log_y: bool = True) -> Path:
    """Draws metrics over steps into <workdir>/curves.png, long runs as means over stretches of steps.

    Args:
      workdir: a training workdir with metrics.jsonl and, as a rule, timings.jsonl.
      names: metrics to draw in one panel; None draws all that are known, by subject.
      log_y: logarithmic vertical axis of `names`. Values that are not positive are left out on such an axis.

    Returns:
      the file's path.

    Raises:
      UserError: nothing to draw, or an unknown name.
    """
    curves = _read(workdir)
    unknown = sorted(set(names or ()) - set(curves))
    if unknown:
        file, known = as_path(workdir) / METRICS_FILE, ", ".join(sorted(curves))
        raise UserError(f"{file} has no metric {', '.join(unknown)}; it has {known}")
    panels: Sequence[_Panel] = _PANELS
    if names:
        panels = (_Panel("", "|".join(map(re.escape, names)), log_y),)
    drawn = []
    for panel in panels:
        chosen = {name: _visible(curves[name], panel) for name in curves if re.fullmatch(panel.pattern, name)}
        chosen = {name: _thin(points) for name, points in chosen.items() if len(points)}
        if chosen:
            drawn.append(_draw(panel, chosen))
    if not drawn:
        raise UserError(f"{as_path(workdir) / METRICS_FILE} has nothing to draw")
    path = as_path(workdir) / CURVES_FILE
    save_png(path, _side_by_side(drawn), overwrite=True)
    return path


def _read(workdir: str | os.PathLike) -> dict[str, np.ndarray]:
    """(step, value) rows (N, 2) of every metric, in the order in which they are logged."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for file in (METRICS_FILE, TIMINGS_FILE):
        for record in read_metrics(workdir, file):
            step = record.pop("step")
            for name, value in record.items():
                curves.setdefault(name, []).append((step, value))
    return {name: np.array(points, np.float64) for name, points in curves.items()}


def _visible(points: np.ndarray, panel: _Panel) -> np.ndarray:
    return points[np.isfinite(points[:, 1]) & ((points[:, 1] > 0) | (not panel.log_y))]


def _thin(points: np.ndarray) -> np.ndarray:
    """At most 400 points: means over equal stretches of [N, 2]."""
    return np.stack([part.mean(0) for part in np.array_split(points, min(len(points), _POINTS))])


def _side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    columns = min(_COLUMNS, len(panels))
    blank = np.full_like(panels[0], 255)
    filled = [*panels, *[blank] * (-len(panels) % columns)]
    rows = [np.concatenate(filled[start : start + columns], axis=1) for start in range(0, len(filled), columns)]
    return np.concatenate(rows)


def _colours(names: Sequence[str]) -> list[str]:
    """Distinct ones; a few more curves than that are the scales, which go from red to violet."""
    if len(names) <= len(_COLOURS) and not any("_scale_" in name for name in names):
        return list(_COLOURS[: len(names)])
    hues = [0.8 * number / max(1, len(names) - 1) for number in range(len(names))]
    shades = ([round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.8)] for hue in hues)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in shades]


def _draw(panel: _Panel, curves: Mapping[str, np.ndarray]) -> np.ndarray:
    log_y = panel.log_y
    values = np.concatenate(list(curves.values()))
    x_low, y_low = values.min(0)
    x_high, y_high = values.max(0)
    x_ticks = _linear_ticks(x_low, x_high)
    y_ticks = _log_ticks(y_low, y_high) if log_y else _linear_ticks(y_low, y_high)
    x_low, x_high = min(x_low, x_ticks[0]), max(x_high, x_ticks[-1])
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def pixel(step: float, value: float) -> tuple[float, float]:
        low, high, at = (math.log(v) if log_y else v for v in (y_low, y_high, value))
        x = _LEFT + (step - x_low) / (x_high - x_low) * (_RIGHT - _LEFT)
        return x, _BOTTOM - (at - low) / (high - low) * (_BOTTOM - _TOP)

    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    draw.text((_LEFT, _TOP - 8), panel.title, fill="black", font=ImageFont.load_default(15), anchor="lb")
    for tick in x_ticks:
        x, _ = pixel(tick, y_low)
        draw.line([(x, _TOP), (x, _BOTTOM)], fill="#e4e4e4")
        draw.text((x, _BOTTOM + 6), f"{tick:g}", fill="black", font=font, anchor="mt")
    for tick in y_ticks:
        _, y = pixel(x_low, tick)
        draw.line([(_LEFT, y), (_RIGHT, y)], fill="#e4e4e4")
        draw.text((_LEFT - 6, y), f"{tick:.4g}", fill="black", font=font, anchor="rm")
    draw.rectangle([_LEFT, _TOP, _RIGHT, _BOTTOM], outline="black")
    draw.text(((_LEFT + _RIGHT) / 2, _HEIGHT - 6), "step", fill="black", font=font, anchor="mb")
    for number, (colour, (name, points)) in enumerate(zip(_colours(list(curves)), curves.items(), strict=True)):
        line = [pixel(*point) for point in points]
        draw.line(line if len(line) > 1 else [line[0], line[0]], fill=colour, width=2)
        y = _TOP + 10 + 18 * number
        draw.line([(_RIGHT + 8, y), (_RIGHT + 24, y)], fill=colour, width=3)
        draw.text((_RIGHT + 28, y), name, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


def _linear_ticks(low: float, high: float) -> list[float]:
    """Four to nine multiples of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 7)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Values of the form 1, 2, 5 times 10^n that enclose [low, high]; powers of ten alone for a wide range."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    factors = (1,) if high / low > 1e4 else (1, 2, 5)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    first = max(number for number, tick in enumerate(ticks) if tick <= low)
    last = min(number for number, tick in enumerate(ticks) if tick >= high)
    return ticks[first : max(last, first + 1) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hart_jax.training.curves", description="Draw a run's curves into WORKDIR/curves.png."
    )
    parser.add_argument("workdir", help="workdir of a training")
    parser.add_argument("--names", nargs="+", help="metrics to draw in one panel; all of them, by subject, without")
    parser.add_argument("--linear", action="store_true", help="linear vertical axis for --names")
    arguments = parser.parse_args()
    print(draw_curves(arguments.workdir, arguments.names, not arguments.linear))


if __name__ == "__main__":
    run_cli(main)
