"""Prompts of images drawn at random from shards, for grids that nobody picked by hand.

python -m hart_jax.data.pick_prompts --shards data/shards/test --count 32 --out held_out.txt
"""

import argparse
from pathlib import Path

import numpy as np

from hart_jax.data.shards import RecordSource
from hart_jax.errors import UserError, run_cli
from hart_jax.io.files import write_text
from hart_jax.io.paths import as_path


def pick_prompts(shards: str | Path, count: int, seed: int = 0) -> list[str]:
    """`count` different prompts, in random order; depends on the shards and `seed` alone."""
    records = RecordSource(shards)
    prompts: list[str] = []
    for index in np.random.default_rng(seed).permutation(len(records)):
        prompt = records[int(index)]["prompt"]
        if prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == count:
            return prompts
    raise UserError(f"{shards}: has only {len(prompts)} different prompts, not --count={count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="text file, one prompt per line; must not exist")
    arguments = parser.parse_args()
    if as_path(arguments.out, "--out").exists():
        raise UserError(f"{arguments.out}: already exists; remove it or give another --out")
    prompts = pick_prompts(arguments.shards, arguments.count, arguments.seed)
    write_text(as_path(arguments.out), "\n".join(prompts) + "\n")


if __name__ == "__main__":
    run_cli(main)
