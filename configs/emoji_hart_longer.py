"""The bundled model's fourth stage: more of the third, at half its rate.

python train.py --config=configs/emoji_hart_longer.py --workdir=runs/emoji_hart_longer
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("emoji_hart_more.py")))["get_config"]()
    config.init_from = "runs/emoji_hart_more"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.muon_learning_rate = 2e-3
    config.train.steps = 5500
    return config
