"""How well a tokenizer keeps images, without and with the continuous residual: what `--what=reconstruction` does."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import TokenizerConfig
from hart_jax.evaluation.concept_retrieval.recall import attributes_of, concept_recall
from hart_jax.evaluation.feature_cache import DataParallel, FeatureRows, compute_features
from hart_jax.evaluation.features import FeatureExtractor
from hart_jax.evaluation.images import ImageSet, decode
from hart_jax.evaluation.metrics.codebook import Usage
from hart_jax.evaluation.metrics.gather import gather_rows
from hart_jax.evaluation.metrics.ssim import SIDE, ssim
from hart_jax.evaluation.networks.base import FeatureNetwork
from hart_jax.evaluation.scores import (
    COLUMNS,
    FeatureSet,
    compare,
    distance_name,
    feature_columns,
    real_vs_real,
    warnings_of,
)
from hart_jax.io.fingerprint import json_digest, weights_digest
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
    """Of uint8 images: their tokens, and for each mode the scores and features of their reconstructions.

    `params` are {"tokenizer", "lpips" (None: not measured), "networks"}. What is compared are 8-bit images, as they
    would be stored, but for LPIPS and PSNR, whose inputs are not rounded.
    """
    variables, image = {"params": params["tokenizer"]}, from_uint8(images_BHWC)
    tokens = tokenizer.apply(variables, image, method="tokens")
    columns = {"tokens": jnp.concatenate(tokens.indices, axis=1)}
    for mode, continuous in MODES.items():
        output = tokenizer.apply(variables, image, continuous=continuous, method="reconstruct")
        columns[f"{mode} psnr"] = psnr(output, image)
        if min(image.shape[1:3]) >= SIDE:
            columns[f"{mode} ssim"] = ssim(output, image)
        if params["lpips"] is not None:
            columns[f"{mode} lpips"] = lpips(params["lpips"], output, image)
        stored = jnp.rint((output + 1) * 127.5).astype(jnp.uint8)
        for number, network in enumerate(networks):
            found = feature_columns(network, params["networks"][number], stored)
            columns |= {f"{mode} {number} {name}": column for name, column in found.items()}
    return columns


def score_reconstructions(
    config: TokenizerConfig,
    tokenizer_params: Any,
    image_set: ImageSet,
    extractors: Sequence[FeatureExtractor],
    lpips_params: Any = None,
    *,
    gallery: tuple[ImageSet, np.ndarray],
    keep: Path,
    batch_size: int = 32,
) -> dict[str, Any]:
    """PSNR (dB, of [0, 1] images), SSIM, LPIPS and distances of both modes, and the use of the codebook per scale.

    SSIM is left out of images that are smaller than its window.

    Args:
      extractors: compare the sets of originals and reconstructions; at `config.image_size`.
      gallery: real images among which reconstructions are sought (`concept_recall`), and the places of `image_set`
        there: what a transformer that makes no mistake would score.
      keep: folder for what was computed of the images.
    """
    networks = [one.network for one in extractors]
    params = {
        "tokenizer": tokenizer_params,
        "lpips": lpips_params,
        "networks": [network.params for network in networks],
    }
    compute = DataParallel("reconstructions", functools.partial(columns_of, Tokenizer(config), networks), params)
    weights = [network.digest for network in networks]
    known = [image_set.digest, weights_digest(tokenizer_params), weights, lpips_params is None, COLUMNS]
    folder = keep / json_digest(known)[:16]
    rows = compute_features(
        image_set, config.image_size, compute, folder, batch_size=batch_size, title="reconstructions"
    )

    def everywhere(name: str) -> np.ndarray:
        return gather_rows(rows.columns[name], rows.places_N)

    usage = Usage.empty(len(config.patch_nums), config.vocab_size).add(everywhere("tokens"), config.sizes)
    result: dict[str, Any] = {"pictures": len(image_set.infos), "reference_digest": image_set.digest, "modes": {}}
    originals = [one.extract(image_set, "real images") for one in extractors]
    rebuilt: list[FeatureSet] = []  # of each mode, by the first network
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
            feature_set = FeatureSet.of(FeatureRows(rows.places_N, columns), image_set.infos)
            scores[network.name] = {"distance": f"r{distance_name(network)}", **compare(real, feature_set)}
            if number == 0:
                rebuilt.append(feature_set)
        result["modes"][mode] = scores
    if extractors and (found := _recalls_of_reconstructions(extractors[0], gallery, rebuilt)):
        for mode, recalls in zip(MODES, found, strict=True):
            result["modes"][mode][networks[0].name]["alignment"] = recalls
    halves = zip(networks, originals, strict=True)
    result["floor"] = {network.name: real_vs_real(real, len(image_set.infos)) for network, real in halves}
    result["codebook"] = {
        "scales": list(config.patch_nums),
        "used_of_codebook": usage.fraction_used.of_codebook_S.tolist(),
        "used_of_possible": usage.fraction_used.of_possible_S.tolist(),
        "perplexity": usage.perplexity_S.tolist(),
    }
    result["warnings"] = warnings_of({"real": len(image_set.infos)}) if extractors else []
    return result


def _recalls_of_reconstructions(
    extractor: FeatureExtractor, gallery: tuple[ImageSet, np.ndarray], sets: Sequence[FeatureSet]
) -> list[dict[str, Any]] | None:
    """The `concept_recall` of each set of reconstructions; None where nothing is known of the images to ask for."""
    image_set, places_N = gallery
    real = extractor.extract(image_set, "real images")
    names = attributes_of(real)
    if not names:
        return None
    return concept_recall(real, extractor.extract(image_set, "real images", blurred=True), sets, places_N, names)


def make_rebuild(config: TokenizerConfig) -> Program:
    """The program (params, images in [-1, 1]) -> their reconstructions, of each of `MODES`."""
    tokenizer = Tokenizer(config)

    def rebuild(params: Any, image: jax.Array) -> list[jax.Array]:
        variables = {"params": params}
        return [tokenizer.apply(variables, image, continuous=on, method="reconstruct") for on in MODES.values()]

    return Program("reconstructions shown", rebuild)


def save_reconstruction_grid(config: TokenizerConfig, params: Any, image_set: ImageSet, out: Path) -> None:
    """Writes the first images, then their discrete and their hybrid reconstructions, as rows of a PNG."""
    count = min(SHOWN, len(image_set.infos))
    images = np.stack(
        [decode(image_set.read(index), config.image_size, image_set.infos[index].name) for index in range(count)]
    )
    rows = map(to_uint8, make_rebuild(config)(params, from_uint8(images)))
    save_png(out, grid(np.concatenate([images, *rows]), columns=count), overwrite=True)
