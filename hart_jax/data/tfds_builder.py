"""A folder of captioned images as a TFDS data set, in ArrayRecord files, written and read without TensorFlow.

    python -m hart_jax.data.tfds_builder --source DIR --data_dir data/tfds

writes a folder in the layout of `hart_jax.data.mjhq`, and in any program then

    tfds.data_source("captioned_images", split="train", data_dir="data/tfds")

serves {image: uint8 (H, W, 3), prompt, captions, label, id} by index, in the order of the ids, as Grain and PyTorch
take it. Texts are bytes, as TFDS has them; `decoders={"image": tfds.decode.SkipDecoding()}` gives the image files' own.
Of images that it would decode to something else (grey, transparent, turned, 16 bits), PNGs of what they show are kept.
"""

import argparse
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from hart_jax.data.check_images import check_images
from hart_jax.data.image_files import is_plain, rgb_image
from hart_jax.data.mjhq import Example, read_folder
from hart_jax.errors import UserError, run_cli
from hart_jax.io.buckets import local_copy
from hart_jax.io.paths import local_only


class CaptionedImages(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds the data set of one folder; TFDS' own keyword arguments say where.

    By shards, since TFDS sorts more than 1 GB of examples in files that it opens with TensorFlow. Not registered, so
    that `tfds.data_source` takes what it needs from the written files here as in any other program.

    Args:
      source: folder in the layout of `hart_jax.data.mjhq`.
      records_per_shard: images in each file but the last.

    Raises:
      UserError: `source` is not such a folder.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look for it by means of importlib_resources, a package that it does not require.
    code_path = epath.Path(__file__)

    def __init__(self, *, source: str | Path, records_per_shard: int = 1024, **options: Any):
        self._examples = read_folder(source)
        self._records_per_shard = records_per_shard
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(),
            "prompt": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.ClassLabel(names=sorted({example.category for example in self._examples})),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned images, with the categories of their folders.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[str, dict[str, Any]]]]]]:
        starts = range(0, len(self._examples), self._records_per_shard)
        groups = (self._examples[start : start + self._records_per_shard] for start in starts)
        return {"train": [partial(_records, group) for group in groups]}


def _records(examples: Sequence[Example]) -> Iterator[tuple[str, dict[str, Any]]]:
    for example in examples:
        record = {
            "image": _image(example),
            "prompt": example.prompt,
            "captions": list(example.captions),
            "label": example.category,
            "id": example.id,
        }
        yield example.id, record


def _image(example: Example) -> str | io.BytesIO:
    """The image file, or where TFDS would decode it to something else, a PNG of what it shows."""
    data = example.read()
    if not is_plain(data):
        png = io.BytesIO()
        rgb_image(data).save(png, format="PNG")
        png.seek(0)
        return png
    # TFDS keeps what is given here until the shard is counted: better a path than the bytes.
    return str(example.path) if example.archive is None else io.BytesIO(data)


def build(source: str | Path, data_dir: str | Path, *, records_per_shard: int = 1024, workers: int = 0) -> Path:
    """Writes the data set of a folder; returns the folder of its files, complete or not there.

    Raises:
      UserError: the source is not a folder in the layout of `hart_jax.data.mjhq`, an image does not decode, or
        `data_dir` has this data set already.
    """
    if records_per_shard < 1:
        raise UserError(f"--records_per_shard {records_per_shard} must be at least 1")
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
