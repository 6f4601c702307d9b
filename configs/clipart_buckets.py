"""The bundled model, trained on for a while on drawings of five shapes: an example of aspect buckets.

The drawings are Openclipart's, which are not square. It starts from assets/emoji, which needs no other input:

python -m hart_jax.data.emoji --out data/clipart --styles=clipart --keep_shape
python -m hart_jax.data.shards --source data/clipart/train --out data/shards/clipart
python train.py --config=configs/clipart_buckets.py --workdir=runs/clipart_buckets
python sample.py --config=configs/clipart_buckets.py --checkpoint=runs/clipart_buckets --aspect_ratio=2:3 \\
    --prompt="a clip art drawing of a tree"
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("emoji_hart.py")))["get_config"]("stage=2")
    config.tokenizer_from = "assets/emoji"
    config.init_from = "assets/emoji"
    config.text_encoder = "assets/emoji/text_encoder"
    config.data.train = "data/shards/clipart"
    config.data.test = "data/shards/clipart"
    config.data.buckets = ("1:1", "2:3", "3:2", "1:2", "2:1")
    config.optimizer.learning_rate = 3e-4
    config.optimizer.muon_learning_rate = 1.2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.ema_decay = 0.99
    config.train.steps = 800
    config.train.save_every = 100
    config.train.sample_every = 400
    config.sample_prompts = (
        "a clip art drawing of a tree",
        "a clip art drawing of a house",
        "a clip art drawing of a fish",
        "a clip art drawing of a dog",
        "a clip art drawing of a car",
        "a clip art drawing of a bottle",
        "a clip art drawing of a flower",
        "a clip art drawing of a guitar",
    )
    return config
