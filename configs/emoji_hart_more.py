"""The bundled model's third stage: more of the second, in bfloat16, for CPUs with a matrix unit (AMX).

python train.py --config=configs/emoji_hart_more.py --workdir=runs/emoji_hart_more
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("emoji_hart_mend.py")))["get_config"]()
    config.init_from = "runs/emoji_hart_mend"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.muon_learning_rate = 4e-3
    config.train.dtype = "bfloat16"
    config.train.unroll = True
    config.train.steps = 3700
    return config
