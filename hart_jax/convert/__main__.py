"""Released weights to a model folder: `python -m hart_jax.convert --source DIR --out DIR`.

The folder holds tokenizer/ and transformer/, and text_encoder/ if one is given; sampling needs nothing beside it.
"""

import argparse
import dataclasses
from pathlib import Path

import jax

from hart_jax.convert.released import TRANSFORMER, read_released, weight_file
from hart_jax.errors import UserError, run_cli
from hart_jax.model_folder import write_model
from hart_jax.text.system_prompt import read_system_prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hart_jax.convert", description="Convert a released PyTorch checkpoint into a model folder."
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with tokenizer/ and llm/, as released")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write; it must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the stored weights"
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="ema: the EMA's where there are any (default)"
    )
    parser.add_argument(
        "--text_encoder", type=Path, help="text encoder folder to copy in, so that the model is complete"
    )
    parser.add_argument(
        "--system_prompt", type=Path, help="file of its system prompt, or a clone of the public code, to copy in, too"
    )
    args = parser.parse_args()
    # All before the minutes that reading takes.
    if args.out.exists():
        raise UserError(f"--out={args.out}: already exists; give a new folder or remove it")
    if args.text_encoder is not None and not (args.text_encoder / "config.json").is_file():
        raise UserError(f"--text_encoder={args.text_encoder}: not a text encoder's folder, it has no config.json")
    if args.system_prompt is not None:
        if args.text_encoder is None:
            raise UserError(f"--system_prompt={args.system_prompt}: is stored with a text encoder; give --text_encoder")
        read_system_prompt(args.system_prompt)
    model = read_released(args.source, args.weights)
    model = dataclasses.replace(model, text_encoder=args.text_encoder, system_prompt=args.system_prompt)
    write_model(args.out, model, args.dtype)
    sizes = {"tokenizer": model.tokenizer, "transformer": model.transformer}
    for name, params in sizes.items():
        print(f"{name}: {sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M parameters")
    print(f"{args.out}: written as {args.dtype} from {weight_file(args.source / TRANSFORMER, args.weights)}")


if __name__ == "__main__":
    run_cli(main)
