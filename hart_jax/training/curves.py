"""Loss curves of a run as a PNG, drawn with Pillow: one look at a run without TensorBoard."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hart_jax.errors import UserError
from hart_jax.images import save_png
from hart_jax.training.metrics import METRICS_FILE, read_metrics

CURVES_FILE = "curves.png"
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
_WIDTH, _HEIGHT = 900, 480
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 20, 880, 430
_POINTS = 400


def draw_curves(workdir: str | os.PathLike, names: Sequence[str] | None = None, log_y: bool = True) -> Path:
    """Draws metrics over steps into <workdir>/curves.png, long runs as means over stretches of steps.

    Args:
      workdir: a training workdir with metrics.jsonl.
      names: metrics to draw; None draws every one with "loss" in its name.
      log_y: logarithmic vertical axis; values that are not positive are then left out.

    Returns:
      the file's path.

    Raises:
      UserError: nothing to draw, or an unknown name.
    """
    records = read_metrics(workdir)
    known = sorted({name for record in records for name in record} - {"step"})
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise UserError(f"{Path(workdir) / METRICS_FILE} has no metric {', '.join(unknown)}; it has {', '.join(known)}")
    curves = {}
    for name in names or [name for name in known if "loss" in name]:
        points = np.array([(record["step"], record[name]) for record in records if name in record], np.float64)
        keep = np.isfinite(points[:, 1]) & ((points[:, 1] > 0) | (not log_y))
        if keep.any():
            curves[name] = _thin(points[keep])
    if not curves:
        raise UserError(f"{Path(workdir) / METRICS_FILE} has nothing to draw")
    path = Path(workdir) / CURVES_FILE
    save_png(path, _draw(curves, log_y), overwrite=True)
    return path


def _thin(points: np.ndarray) -> np.ndarray:
    """At most 400 points: means over equal stretches of [N, 2]."""
    return np.stack([part.mean(0) for part in np.array_split(points, min(len(points), _POINTS))])


def _draw(curves: dict[str, np.ndarray], log_y: bool) -> np.ndarray:
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
    for tick in x_ticks:
        x, _ = pixel(tick, y_low)
        draw.line([(x, _TOP), (x, _BOTTOM)], fill="#e4e4e4")
        draw.text((x, _BOTTOM + 6), f"{tick:g}", fill="black", font=font, anchor="mt")
    for tick in y_ticks:
        _, y = pixel(x_low, tick)
        draw.line([(_LEFT, y), (_RIGHT, y)], fill="#e4e4e4")
        draw.text((_LEFT - 6, y), f"{tick:.4g}", fill="black", font=font, anchor="rm")
    draw.rectangle([_LEFT, _TOP, _RIGHT, _BOTTOM], outline="black")
    draw.text(((_LEFT + _RIGHT) / 2, _HEIGHT - 8), "step", fill="black", font=font, anchor="mb")
    for number, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = [pixel(*point) for point in points]
        draw.line(line if len(line) > 1 else [line[0], line[0]], fill=colour, width=2)
        y = _TOP + 14 + 18 * number
        draw.line([(_RIGHT - 170, y), (_RIGHT - 150, y)], fill=colour, width=3)
        draw.text((_RIGHT - 144, y), name, fill="black", font=font, anchor="lm")
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
