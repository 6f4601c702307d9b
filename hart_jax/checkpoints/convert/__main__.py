"""Released weights to a model folder: `python -m hart_jax.checkpoints.convert --source DIR --out DIR`.

The folder holds tokenizer/ and transformer/, and text_encoder/ if one is given; sampling needs nothing beside it.
"""

import argparse
import dataclasses

import jax

from hart_jax.checkpoints.convert.released import TRANSFORMER, read_released
from hart_jax.checkpoints.model_folder import write_model
from hart_jax.errors import UserError, run_cli
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import check_can_write
from hart_jax.io.paths import as_path
from hart_jax.io.tensor_files import weight_file
from hart_jax.text.system_prompt import read_system_prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hart_jax.checkpoints.convert",
        description="Convert a released PyTorch checkpoint into a model folder.",
    )
    parser.add_argument("--source", required=True, help="folder with tokenizer/ and llm/, as released")
    parser.add_argument("--out", required=True, help="model folder to write; it must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the stored weights"
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="ema: the EMA's where there are any (default)"
    )
    parser.add_argument("--text_encoder", help="text encoder folder to copy in, so that the model is complete")
    parser.add_argument(
        "--system_prompt", help="file of its system prompt, or a clone of the public code, to copy in, too"
    )
    args = parser.parse_args()
    source, out = local_copy(args.source, "--source"), as_path(args.out, "--out")
    text_encoder = local_copy(args.text_encoder, "--text_encoder") if args.text_encoder else None
    system_prompt = local_copy(args.system_prompt, "--system_prompt") if args.system_prompt else None
    # All before the minutes that reading takes.
    if out.exists():
        raise UserError(f"--out={args.out}: already exists; give a new folder or remove it")
    check_can_write(out)
    if text_encoder is not None and not (text_encoder / "config.json").is_file():
        raise UserError(f"--text_encoder={args.text_encoder}: not a text encoder's folder, it has no config.json")
    if system_prompt is not None:
        if text_encoder is None:
            raise UserError(f"--system_prompt={args.system_prompt}: is stored with a text encoder; give --text_encoder")
        read_system_prompt(system_prompt)
    model = read_released(source, args.weights)
    model = dataclasses.replace(model, text_encoder=text_encoder, system_prompt=system_prompt)
    write_model(out, model, args.dtype)
    sizes = {"tokenizer": model.tokenizer, "transformer": model.transformer}
    for name, params in sizes.items():
        print(f"{name}: {sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.2f}M parameters")
    print(f"{args.out}: written as {args.dtype} from {weight_file(source / TRANSFORMER, args.weights)}")


if __name__ == "__main__":
    run_cli(main)
