"""The TFDS builder of a folder of captioned images; `hart_jax.data.tfds_builder` runs it."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from hart_jax.data.image_files import is_plain, rgb_image
from hart_jax.data.mjhq import Example, read_folder


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
