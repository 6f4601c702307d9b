"""The bundled tokenizer's third stage: more of the second, at two thirds of its rate.

python train.py --config=configs/emoji_tokenizer_longer.py --workdir=runs/emoji_tokenizer_longer
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("emoji_tokenizer_decoder.py")))["get_config"]()
    config.init_from = "runs/emoji_tokenizer_decoder"
    config.optimizer.learning_rate = 2e-4
    config.train.steps = 2900
    return config
