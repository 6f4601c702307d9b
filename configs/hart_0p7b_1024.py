"""The published 0.7B text-to-image model at 1024 px: `hart_0p7b_256` with other scales, in the curriculum after 512 px.

python train.py --config=configs/hart_0p7b_1024.py --workdir=runs/hart_0p7b_1024
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

PATCH_NUMS = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("hart_0p7b_256.py")))["get_config"]()
    config.tokenizer.image_size = 1024
    config.tokenizer.patch_nums = config.transformer.patch_nums = PATCH_NUMS
    config.init_from = "runs/hart_0p7b_512"
    config.train.steps = 20_000
    config.optimizer.warmup_steps = 1000
    return config
