"""The hybrid tokenizer of the published models: VAR's, whose decoder learns to decode the continuous residual as well.

python train.py --config=configs/hart_tokenizer.py --workdir=runs/hart_tokenizer

It starts from `configs/var_tokenizer.py`, or from VAR's released file (--config.init_from=data/vae_ch160v4096z32.pth).
Encoder and codes are frozen, so that the tokens stay the same; every image is decoded from its discrete or its full
latent with equal probability. One tokenizer serves all sizes. The weights of the losses, learning rate and steps are
not published.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("var_tokenizer.py")))["get_config"]()
    config.init_from = "runs/var_tokenizer"
    config.freeze = ("encoder", "quant_conv", "quantizer")
    config.loss.continuous_fraction = 0.5
    # Nothing that it measures is trained.
    config.loss.vq = 0.0
    config.loss.adversarial_start = 5000
    config.train.steps = 100_000
    return config
