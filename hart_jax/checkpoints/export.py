"""A trained model as a folder: `python -m hart_jax.checkpoints.export --workdir runs/emoji_hart --out assets/emoji`.

Writes the averaged parameters of the latest checkpoint with the tokenizer and the text encoder that the run used.
"""

import argparse
from pathlib import Path

from hart_jax.checkpoints.model_folder import write_model
from hart_jax.checkpoints.workdir import read_workdir
from hart_jax.errors import UserError, run_cli
from hart_jax.io.files import check_can_write
from hart_jax.io.paths import as_path
from hart_jax.io.safetensors import DTYPES


def export(workdir: str | Path, out: str | Path, dtype: str = "bfloat16", params: str = "ema") -> None:
    """Writes the model folder `out` from a workdir's latest checkpoint.

    Raises:
      UserError: `out` exists, the workdir is not a transformer's, or its tokenizer or text encoder is gone.
    """
    if as_path(out, "--out").exists():
        raise UserError(f"{out}: already exists; give a new folder or remove it")
    check_can_write(as_path(out))
    model = read_workdir(workdir, params)
    if model.text_encoder is None and not model.transformer_config.num_classes:
        raise UserError(f"{workdir}: its text encoder's folder is gone; a model folder needs one")
    write_model(out, model, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="workdir of a transformer's training")
    parser.add_argument("--out", required=True, help="the model folder to write; must not exist")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="type of the stored weights")
    parser.add_argument("--params", default="ema", choices=("ema", "params"), help="averaged or latest parameters")
    arguments = parser.parse_args()
    export(arguments.workdir, arguments.out, arguments.dtype, arguments.params)
    print(arguments.out)


if __name__ == "__main__":
    run_cli(main)
