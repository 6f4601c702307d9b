"""How well a tokenizer keeps pictures, without and with the continuous residual: what `--what=reconstruction` does."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from hart_jax.config import TokenizerConfig
from hart_jax.evaluation.concept_retrieval.recall import attributes_of, concept_recall
from hart_jax.evaluation.judge import Judge
from hart_jax.evaluation.metrics.codebook import Usage
from hart_jax.evaluation.metrics.gather import gather_rows
from hart_jax.evaluation.metrics.ssim import SIDE, ssim
from hart_jax.evaluation.networks.base import FeatureNetwork, weights_digest
from hart_jax.evaluation.parts import Compiled, Rows, rows_of
from hart_jax.evaluation.pictures import Pictures, decode
from hart_jax.evaluation.scores import COLUMNS, Seen, compare, distance_name, floor, seen_by, warnings_of
from hart_jax.io.images import from_uint8, grid, save_png, to_uint8
from hart_jax.parallel.program import Program
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.perceptual import lpips

MODES = {"discrete": False, "hybrid": True}
SHOWN = 16


def psnr(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """(B,) dB of images in [-1, 1]."""
    return -10 * jnp.log10(jnp.mean(((a_BHWC - b_BHWC) / 2) ** 2, axis=(1, 2, 3)))


def columns_of(
    tokenizer: Tokenizer, networks: Sequence[FeatureNetwork], params: Any, images_BHWC: jax.Array
) -> dict[str, jax.Array]:
    """Of uint8 pictures: their tokens, and for each mode the scores and features of their reconstructions.

    `params` are {"tokenizer", "lpips" (None: not measured), "networks"}. What is compared are 8-bit pictures, as they
    would be stored, but for LPIPS and PSNR, whose inputs are not rounded.
    """
    variables, image = {"params": params["tokenizer"]}, from_uint8(images_BHWC)
    tokens = tokenizer.apply(variables, image, method="tokens")
    columns = {"tokens": jnp.concatenate(tokens.indices, axis=1)}
    for mode, continuous in MODES.items():
        output = tokenizer.apply(variables, image, continuous=continuous, method="reconstruct")
        columns[f"{mode} psnr"] = psnr(output, image)
        if image.shape[1] >= SIDE:
            columns[f"{mode} ssim"] = ssim(output, image)
        if params["lpips"] is not None:
            columns[f"{mode} lpips"] = lpips(params["lpips"], output, image)
        stored = jnp.rint((output + 1) * 127.5).astype(jnp.uint8)
        for number, network in enumerate(networks):
            seen = seen_by(network, params["networks"][number], stored)
            columns |= {f"{mode} {number} {name}": column for name, column in seen.items()}
    return columns


def judge_reconstructions(
    config: TokenizerConfig,
    tokenizer_params: Any,
    pictures: Pictures,
    judges: Sequence[Judge],
    lpips_params: Any = None,
    *,
    gallery: tuple[Pictures, np.ndarray],
    keep: Path,
    batch_size: int = 32,
) -> dict[str, Any]:
    """PSNR (dB, of [0, 1] images), SSIM, LPIPS and distances of both modes, and the use of the codebook per scale.

    SSIM is left out of pictures that are smaller than its window.

    Args:
      judges: compare the sets of originals and reconstructions; at `config.image_size`.
      gallery: real images among which reconstructions are sought (`concept_recall`), and the places of `pictures`
        there: what a transformer that makes no mistake would score.
      keep: folder for what was computed of the pictures.
    """
    networks = [one.network for one in judges]
    params = {
        "tokenizer": tokenizer_params,
        "lpips": lpips_params,
        "networks": [network.params for network in networks],
    }
    compute = Compiled("reconstructions", functools.partial(columns_of, Tokenizer(config), networks), params)
    judged = [network.digest for network in networks]
    known = [pictures.digest, digest(tokenizer_params), judged, lpips_params is None, COLUMNS]
    folder = keep / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    rows = rows_of(pictures, config.image_size, compute, folder, batch_size=batch_size, title="reconstructions")

    def everywhere(name: str) -> np.ndarray:
        return gather_rows(rows.columns[name], rows.places_N)

    usage = Usage.empty(len(config.patch_nums), config.vocab_size).add(everywhere("tokens"), config.patch_nums)
    result: dict[str, Any] = {"pictures": len(pictures.abouts), "reference_digest": pictures.digest, "modes": {}}
    originals = [one.see(pictures, "real pictures") for one in judges]
    rebuilt: list[Seen] = []  # of each mode, by the first network
    for mode in MODES:
        measured = [name for name in ("psnr", "ssim", "lpips") if f"{mode} {name}" in rows.columns]
        scores: dict[str, Any] = {
            name: float(np.mean(everywhere(f"{mode} {name}"), dtype=np.float64)) for name in measured
        }
        for number, (network, real) in enumerate(zip(networks, originals, strict=True)):
            prefix = f"{mode} {number} "
            columns = {
                name.removeprefix(prefix): rows.columns[name] for name in rows.columns if name.startswith(prefix)
            }
            seen = Seen.of(Rows(rows.places_N, columns), pictures.abouts)
            scores[network.name] = {"distance": f"r{distance_name(network)}", **compare(real, seen)}
            if number == 0:
                rebuilt.append(seen)
        result["modes"][mode] = scores
    if judges and (found := _sought(judges[0], gallery, rebuilt)):
        for mode, recalls in zip(MODES, found, strict=True):
            result["modes"][mode][networks[0].name]["alignment"] = recalls
    floors = zip(networks, originals, strict=True)
    result["floor"] = {network.name: floor(real, len(pictures.abouts)) for network, real in floors}
    result["codebook"] = {
        "scales": list(config.patch_nums),
        "used_of_codebook": usage.fraction_used.of_codebook_S.tolist(),
        "used_of_possible": usage.fraction_used.of_possible_S.tolist(),
        "perplexity": usage.perplexity_S.tolist(),
    }
    result["warnings"] = warnings_of({"real": len(pictures.abouts)}) if judges else []
    return result


def _sought(judge: Judge, gallery: tuple[Pictures, np.ndarray], sets: Sequence[Seen]) -> list[dict[str, Any]] | None:
    """The `concept_recall` of each set of reconstructions; None where nothing is known of the pictures to ask for."""
    pictures, places_N = gallery
    real = judge.see(pictures, "real pictures")
    names = attributes_of(real)
    if not names:
        return None
    return concept_recall(real, judge.see(pictures, "real pictures", blurred=True), sets, places_N, names)


def digest(params: Any) -> str:
    """Of a tree of parameters."""
    return weights_digest(flatten_dict(params, sep="/"))


def make_rebuild(config: TokenizerConfig) -> Program:
    """The program (params, images in [-1, 1]) -> their reconstructions, of each of `MODES`."""
    tokenizer = Tokenizer(config)

    def rebuild(params: Any, image: jax.Array) -> list[jax.Array]:
        variables = {"params": params}
        return [tokenizer.apply(variables, image, continuous=on, method="reconstruct") for on in MODES.values()]

    return Program("reconstructions shown", rebuild)


def show_reconstructions(config: TokenizerConfig, params: Any, pictures: Pictures, out: Path) -> None:
    """Writes the first pictures, then their discrete and their hybrid reconstructions, as rows of a PNG."""
    count = min(SHOWN, len(pictures.abouts))
    images = np.stack(
        [decode(pictures.read(index), config.image_size, pictures.abouts[index].name) for index in range(count)]
    )
    rows = map(to_uint8, make_rebuild(config)(params, from_uint8(images)))
    save_png(out, grid(np.concatenate([images, *rows]), columns=count), overwrite=True)
