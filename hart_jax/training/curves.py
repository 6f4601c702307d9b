"""Curves of a run as one PNG: `python -m hart_jax.training.curves WORKDIR`. Needs the extra `curves` (matplotlib).

One look at a run without TensorBoard: losses, loss and accuracy of every scale, norms, learning rate, speed, waits.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hart_jax.errors import UserError, run_cli
from hart_jax.io.images import save_png
from hart_jax.io.paths import as_path
from hart_jax.training.metrics import METRICS_FILE, TIMINGS_FILE, read_metrics

CURVES_FILE = "curves.png"
_POINTS = 400
# Of each panel: its title, which metrics it shows (a pattern of the whole name), and whether its axis is logarithmic.
_PANELS = (
    ("losses", r"loss(_token|_diffusion)?|diffusion_mse|mse.*|vq|l1|perceptual", True),
    ("loss of each list of scales", r"loss_\d+_scales", False),
    ("adversarial losses", r"generator|discriminator", False),
    ("loss of each scale", r"loss_scale_\d+", False),
    ("accuracy of each scale", r"accuracy_scale_\d+", False),
    ("norms", r".*_norm", True),
    ("learning rate", r"learning_rate", False),
    ("share of codes in use", r"codes_used", False),
    ("skipped steps, where there were any", r"skipped_steps", True),
    ("images per second", r"images_per_second", False),
    ("FLOPs utilisation: of the model, of the hardware", r"[mh]fu", False),
    ("seconds per step, and waiting in them", r"(step|.*_wait)_seconds", True),
    ("device memory, bytes", r"device_memory.*", False),
)


def plot_curves(workdir: str | os.PathLike, names: Sequence[str] | None = None, log_y: bool = True) -> Path:
    """Plots metrics over steps into <workdir>/curves.png, long runs as means over stretches of steps.

    Args:
      workdir: a training workdir with metrics.jsonl and, as a rule, timings.jsonl.
      names: metrics to plot in one panel; None plots all that are known, by subject.
      log_y: logarithmic vertical axis of `names`. Values that are not positive are left out on such an axis.

    Returns:
      the file's path.

    Raises:
      UserError: nothing to plot, an unknown name, or matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("curves need matplotlib; install it with: pip install 'hart_jax[curves]'") from error
    workdir = as_path(workdir)
    curves = _read(workdir)
    if unknown := sorted(set(names or ()) - set(curves)):
        file, known = workdir / METRICS_FILE, ", ".join(sorted(curves))
        raise UserError(f"{file} has no metric {', '.join(unknown)}; it has {known}")
    wanted = (("", "|".join(map(re.escape, names)), log_y),) if names else _PANELS
    panels = []
    for title, pattern, log in wanted:
        shown = {name: _visible(points, log) for name, points in curves.items() if re.fullmatch(pattern, name)}
        if shown := {name: points for name, points in shown.items() if len(points)}:
            panels.append((title, shown, log))
    if not panels:
        raise UserError(f"{workdir / METRICS_FILE} has nothing to plot")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8 * columns, 3.6 * rows), dpi=100, layout="constrained")
    for number, (title, shown, log) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number, title=title, xlabel="step", yscale="log" if log else "linear")
        # Scales go from one end of the rainbow to the other.
        many = len(shown) > 10 or any("_scale_" in name for name in shown)
        colours = colormaps["turbo"](np.linspace(0, 1, len(shown))) if many else colormaps["tab10"](range(10))
        for (name, points), colour in zip(shown.items(), colours, strict=False):
            axes.plot(*points.T, color=colour, label=name, marker="o" if len(points) == 1 else "")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.4)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(workdir / CURVES_FILE, np.asarray(canvas.buffer_rgba())[..., :3], overwrite=True)
    return workdir / CURVES_FILE


def _read(workdir: Path) -> dict[str, np.ndarray]:
    """(step, value) rows (N, 2) of every metric, in the order in which they are logged."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for file in (METRICS_FILE, TIMINGS_FILE):
        for record in read_metrics(workdir, file):
            step = record.pop("step")
            for name, value in record.items():
                curves.setdefault(name, []).append((step, value))
    return {name: np.array(points, np.float64) for name, points in curves.items()}


def _visible(points: np.ndarray, log_y: bool) -> np.ndarray:
    """At most 400 of the points (N, 2) that have a place on the axis: means over equal stretches."""
    points = points[np.isfinite(points[:, 1]) & ((points[:, 1] > 0) | (not log_y))]
    parts = np.array_split(points, min(len(points), _POINTS)) if len(points) else []
    return np.array([part.mean(0) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hart_jax.training.curves", description="Plot a run's curves into WORKDIR/curves.png."
    )
    parser.add_argument("workdir", help="workdir of a training")
    parser.add_argument("--names", nargs="+", help="metrics to plot in one panel; all of them, by subject, without")
    parser.add_argument("--linear", action="store_true", help="linear vertical axis for --names")
    arguments = parser.parse_args()
    print(plot_curves(arguments.workdir, arguments.names, not arguments.linear))


if __name__ == "__main__":
    run_cli(main)
