"""A folder of captioned images as a TFDS data set, in ArrayRecord files, written and read without TensorFlow.

    python -m hart_jax.data.tfds_builder --source DIR --data_dir data/tfds      # the extra `tfds`

writes a folder in the layout of `hart_jax.data.mjhq`, and in any program then

    tfds.data_source("captioned_images", split="train", data_dir="data/tfds")

serves {image: uint8 (H, W, 3), prompt, captions, label, id} by index, in the order of the ids, as Grain and PyTorch
take it. Texts are bytes, as TFDS has them; `decoders={"image": tfds.decode.SkipDecoding()}` gives the image files' own.
Of images that it would decode to something else (grey, transparent, turned, 16 bits), PNGs of what they show are kept.
"""

import argparse
from pathlib import Path

from hart_jax.data.check_images import check_images
from hart_jax.data.mjhq import read_folder
from hart_jax.errors import UserError, run_cli
from hart_jax.io.buckets import local_copy
from hart_jax.io.paths import local_only


def build(source: str | Path, data_dir: str | Path, *, records_per_shard: int = 1024, workers: int = 0) -> Path:
    """Writes the data set of a folder; returns the folder of its files, complete or not there.

    Raises:
      UserError: the source is not a folder in the layout of `hart_jax.data.mjhq`, an image does not decode,
        `data_dir` has this data set already, or the package is not installed.
    """
    if records_per_shard < 1:
        raise UserError(f"--records_per_shard {records_per_shard} must be at least 1")
    try:
        from hart_jax.data.tfds_images import CaptionedImages
    except ImportError as error:
        raise UserError(
            f"writing TFDS data needs tensorflow-datasets ({error}); install it with: pip install 'hart_jax[tfds]'"
        ) from error
    builder = CaptionedImages(source=source, records_per_shard=records_per_shard, data_dir=str(data_dir))
    folder = Path(builder.data_path)
    if folder.exists():
        raise UserError(f"{folder} is there already; give another --data_dir, or remove it")
    check_images(read_folder(source), workers)
    builder.download_and_prepare()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder with meta_data.json and the images")
    parser.add_argument("--data_dir", required=True, help="folder of TFDS data sets, new or not")
    parser.add_argument("--records_per_shard", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=0, help="processes that check the images; 0: this one alone")
    args = parser.parse_args()
    folder = build(
        local_copy(args.source),
        local_only(args.data_dir, "--data_dir"),
        records_per_shard=args.records_per_shard,
        workers=args.workers,
    )
    print(f"data set in {folder}")


if __name__ == "__main__":
    run_cli(main)
