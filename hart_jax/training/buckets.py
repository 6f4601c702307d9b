"""The aspect buckets that a run trains on (`data.buckets`): found, known again when it goes on, and told."""

from hart_jax.config import DataConfig, TokenizerConfig
from hart_jax.config.buckets import bucket_shapes
from hart_jax.config.scales import Shape
from hart_jax.config.sizes import size_text
from hart_jax.data.aspect_buckets import AspectBuckets
from hart_jax.data.record_sizes import record_sizes
from hart_jax.errors import UserError
from hart_jax.io.fingerprint import sha256
from hart_jax.parallel.agree import gather_texts
from hart_jax.parallel.mesh import first_process_first

DIGEST = "data.buckets"


def find_buckets(data: DataConfig, config: TokenizerConfig, batch_size: int) -> AspectBuckets | None:
    """The buckets of the training images; None without `data.buckets`. All processes call it together.

    Raises:
      UserError: a bucket has fewer images than a batch, or the processes see other images; and as `bucket_shapes` and
        `record_sizes`.
    """
    shapes = bucket_shapes(data.buckets, config)
    if not shapes:
        return None
    sizes = first_process_first(lambda: record_sizes(data.train_folders))
    buckets = AspectBuckets.nearest(data.buckets, shapes, sizes)
    if len(set(gather_texts(digest_of(buckets)))) > 1:
        raise UserError(
            "data.buckets: the processes see images of other sizes in the training shards; give all of them the same"
        )
    buckets.check_full(batch_size)
    return buckets


def digest_of(buckets: AspectBuckets) -> str:
    """Of the shapes, and of which image lies in which bucket."""
    return sha256(str(buckets.shapes), buckets.of_record)[:16]


def bucket_digests(buckets: AspectBuckets | None) -> dict[str, str]:
    """What a workdir keeps of the buckets beside the digests of the data, and a resumed run compares."""
    return {} if buckets is None else {DIGEST: digest_of(buckets)}


def shapes_of(data: DataConfig, config: TokenizerConfig) -> dict[str, Shape]:
    """Of each bucket's name the height and width of its images in pixels; without buckets one, without a name."""
    return dict(zip(data.buckets, bucket_shapes(data.buckets, config), strict=True)) or {"": config.image_shape}


def grid_name(name: str, bucket: str) -> str:
    """What the grid of a bucket is called: "samples_2x3" of "2:3", and as without buckets where it has no name."""
    return f"{name}_{bucket.replace(':', 'x')}" if bucket else name


def told(buckets: AspectBuckets | None, programs: int) -> str:
    """One line: each bucket with its size in pixels (width first) and how many images it has, and how many training
    steps are compiled at most."""
    compiled = f"at most {programs} training steps are compiled"
    if buckets is None:
        return compiled
    parts = [
        f"{name} {size_text(shape)} px, {count} images"
        for name, shape, count in zip(buckets.names, buckets.shapes, buckets.counts, strict=True)
    ]
    return f"buckets: {'; '.join(parts)}; {compiled}"
