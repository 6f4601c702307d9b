"""The bundled model's decoder, trained on: sharper pictures of the same codes, so that its transformer stays valid.

python train.py --config=configs/emoji_decoder.py --workdir=runs/emoji_decoder
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("emoji_tokenizer.py")))["get_config"]()
    config.init_from = "runs/emoji_tokenizer"
    config.freeze = ("encoder", "quant_conv", "quantizer")
    config.loss.vq = 0.0
    config.loss.restart_below = 0.0
    config.loss.perceptual_layers = 3
    config.loss.adversarial = 0.03
    config.loss.adversarial_start = 0
    config.optimizer.learning_rate = 5e-4
    return config
