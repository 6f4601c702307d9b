"""The published 0.7B text-to-image model at 512 px: `hart_0p7b_256` with other scales, in the curriculum after 256 px.

python train.py --config=configs/hart_0p7b_512.py --workdir=runs/hart_0p7b_512
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

PATCH_NUMS = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("hart_0p7b_256.py")))["get_config"]()
    config.tokenizer.image_size = 512
    config.tokenizer.patch_nums = config.transformer.patch_nums = PATCH_NUMS
    config.init_from = "runs/hart_0p7b_256"
    config.train.steps = 50_000
    config.optimizer.warmup_steps = 2500
    return config
