"""What an evaluation leaves in its folder: `run.json` (of what), `results.json`, `results.md` (rows for a table)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hart_jax.errors import UserError
from hart_jax.io.files import read_json, write_json, write_text
from hart_jax.io.fingerprint import differences, told
from hart_jax.io.ownership import OWNER_FILE
from hart_jax.io.run_info import package_version

RUN, RESULTS, TABLE = "run.json", "results.json", "results.md"


def begin(out: Path, run: Mapping[str, Any]) -> None:
    """Makes `out` the folder of this run, or goes on with it.

    Raises:
      UserError: it is of another run, or holds something else; the message names what differs.
    """
    run = json.loads(json.dumps(run))
    path = out / RUN
    if path.is_file():
        if changed := differences(read_json(path), run):
            raise UserError(f"--out={out}: holds another evaluation ({told(changed)}); give another folder")
        return
    if out.exists() and (not out.is_dir() or any(path.name != OWNER_FILE for path in out.iterdir())):
        raise UserError(f"--out={out}: is there already and holds no evaluation; give another folder")
    write_json(path, run, indent=1)


def finish(out: Path, run: Mapping[str, Any], results: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """Writes results.json and results.md; returns the table."""
    software = {name: package_version(name) for name in ("hart_jax", "jax")}
    device = jax.devices()[0].device_kind
    report = {**run, **results, "software": software, "devices": f"{jax.device_count()} x {device}"}
    table = markdown(rows)
    write_json(out / RESULTS, report, indent=1)
    write_text(out / TABLE, table + "\n")
    return table


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of these rows, whose keys are its columns; a row need not have all of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def generation_rows(model: str, results: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for the images, and one for the real images in their place."""
    row = {"images of": model, "number": str(results["pictures"])}
    reference_row = {"images of": "the reference itself", "number": ""}
    for name, scores in results["scores"].items():
        if "clip_score" in scores:
            row[f"CLIP score, {name}"] = f"{scores['clip_score']:.2f}"
            continue
        distance = scores["distance"]
        short = name if len(results["scores"]) > 1 else ""
        suffix = f", {short}" if short else ""
        row[distance] = f"{scores['frechet_distance']:.2f}"
        row[f"KID x 1000{suffix}"] = f"{scores['kid_x1000']:.2f} ± {scores['kid_x1000_deviation']:.2f}"
        row[f"precision{suffix}"] = f"{scores['precision']:.3f}"
        row[f"recall{suffix}"] = f"{scores['recall']:.3f}"
        if "inception_score" in scores and distance == "FID":
            row[f"inception score{suffix}"] = f"{scores['inception_score']:.2f}"
        reference_row["number"] = str(scores["floor"]["pictures"])
        reference_row[distance] = f"{scores['floor']['frechet_distance']:.2f}"
        reference_row[f"KID x 1000{suffix}"] = f"{scores['floor']['kid_x1000']:.2f}"
        row |= _aligned(scores, "drawn")
        reference_row |= _aligned(scores, "real")
    return [row, reference_row]


def reconstruction_rows(model: str, results: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each mode."""
    rows = []
    for mode, scores in results["modes"].items():
        row = {"reconstructions of": model, "mode": mode, "pictures": str(results["pictures"])}
        titles = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
        digits = {"psnr": 2, "ssim": 4, "lpips": 4}
        row |= {titles[name]: f"{scores[name]:.{digits[name]}f}" for name in titles if name in scores}
        for found in scores.values():
            if isinstance(found, dict):
                row[found["distance"]] = f"{found['frechet_distance']:.2f}"
                row["KID x 1000"] = f"{found['kid_x1000']:.2f}"
                row |= _aligned(found, "drawn")
        rows.append(row)
    return rows


def _aligned(scores: Mapping[str, Any], whose: str) -> dict[str, str]:
    """Recall at 1 and 5 of every attribute, from `concept_recall`: of "drawn" (or rebuilt) or "real" images."""
    return {
        f"right {attribute} at {k}": f"{recalls[whose][f'recall_at_{k}']:.3f}"
        for attribute, recalls in scores.get("alignment", {}).items()
        if whose in recalls
        for k in (1, 5)
    }
