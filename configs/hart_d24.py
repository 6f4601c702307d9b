"""The published class-conditional d24 (1.0B parameters): `hart_d20`, larger, for 350 epochs.

python train.py --config=configs/hart_d24.py --workdir=runs/hart_d24
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("hart_d20.py")))["get_config"]()
    config.transformer.depth = config.transformer.heads = 24
    config.transformer.width = 1536
    config.train.steps = 584_000
    config.optimizer.learning_rate = 8e-5 * config.train.batch_size / 256
    config.optimizer.warmup_steps = 11_700
    config.optimizer.final_fraction = 0.01
    return config
