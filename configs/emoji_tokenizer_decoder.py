"""The bundled tokenizer's second stage: its decoding alone, without a discriminator; its tokens stay as they are.

python train.py --config=configs/emoji_tokenizer_decoder.py --workdir=runs/emoji_tokenizer_decoder
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("emoji_tokenizer.py")))["get_config"]()
    config.init_from = "runs/emoji_tokenizer"
    config.freeze = ("encoder", "quant_conv", "quantizer")
    config.loss.restart_below = 0.0
    config.loss.perceptual = 1.0
    config.loss.adversarial = 0.0
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 200
    config.optimizer.final_fraction = 0.03
    config.optimizer.ema_decay = 0.998
    config.train.steps = 4000
    return config
