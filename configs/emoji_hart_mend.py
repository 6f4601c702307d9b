"""The bundled model's second stage: from where `emoji_hart` ends, on tokens of which some are wrong, and which it
learns to correct.

python train.py --config=configs/emoji_hart_mend.py --workdir=runs/emoji_hart_mend
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("emoji_hart.py")))["get_config"]()
    config.init_from = "runs/emoji_hart"
    config.loss.mistakes = 0.6
    config.optimizer.learning_rate = 8e-4
    config.optimizer.muon_learning_rate = 3.2e-3
    config.train.steps = 2000
    return config
