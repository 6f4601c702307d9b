"""The sizes of `data.buckets`."""

import pytest

from hart_jax.config import TokenizerConfig
from hart_jax.config.buckets import bucket_shapes
from hart_jax.errors import UserError
from tests.tiny import TOKENIZER


def test_each_ratio_has_about_as_many_pixels_as_the_model():
    released = TokenizerConfig()
    assert bucket_shapes((), released) == ()
    shapes = bucket_shapes(("1:1", "2:3", "3:2", "3:4", "16:9"), released)
    assert shapes == ((256, 256), (320, 208), (208, 320), (288, 224), (192, 336))


@pytest.mark.parametrize(
    ("buckets", "scales", "message"),
    [
        (("1:1", "7"), (1, 2, 4), "data.buckets: ratio '7': write it as width:height in whole numbers, like 2:3"),
        (("5:1",), (1, 2, 4), "data.buckets: ratio 5:1: at most 4:1 is possible, high or wide"),
        (("2:3", "3:4"), (1, 2, 4), "data.buckets: 2:3 and 3:4 both give 6x10; leave one of them out"),
        (
            ("1:1", "2:1"),
            (1, (1, 2), 2),
            "data.buckets: 2:1 gives 6x2, too small for the 3 scales of the model; leave it out",
        ),
    ],
)
def test_buckets_that_a_model_cannot_have(buckets, scales, message):
    with pytest.raises(UserError) as error:
        bucket_shapes(buckets, TOKENIZER.with_scales(scales))
    assert str(error.value) == message
    with pytest.raises(UserError, match=r"^--buckets: "):
        bucket_shapes(buckets, TOKENIZER.with_scales(scales), "--buckets")
