"""The published class-conditional d20 (649M parameters): ImageNet at 256 px, blocks with AdaLN, a table of levels.

python train.py --config=configs/hart_d20.py --workdir=runs/hart_d20

Learning rate and its decay, batch and length (250 epochs, 5 of them warm-up) are VAR's recipe for this depth.
"""

from ml_collections import ConfigDict

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
BATCH_SIZE = 768


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "tokenizer": {
                "image_size": 256,
                "patch_nums": PATCH_NUMS,
                "channels": 160,
                "channel_multipliers": (1, 1, 2, 2, 4),
                "latent_channels": 32,
                "vocab_size": 4096,
            },
            "transformer": {
                "patch_nums": PATCH_NUMS,
                "vocab_size": 4096,
                "latent_channels": 32,
                "num_classes": 1000,
                "context_tokens": 1,
                "depth": 20,
                "width": 1280,
                "heads": 20,
                "disable_aln": False,
                "use_timestep_embed": False,
                "diffusion": {"width": 1024, "depth": 6, "sampling_steps": 8, "batch_mul": 4},
            },
            "tokenizer_from": "runs/hart_tokenizer",
            "loss": {"condition_top_k": 600, "condition_top_p": 0.96, "drop_text": 0.1, "keep_counts": 4},
            "optimizer": {
                "learning_rate": 1e-4 * BATCH_SIZE / 256,
                "warmup_steps": 8300,
                "schedule": "linear",
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "clip_norm": 2.0,
                "ema_decay": 0.9999,
            },
            "mesh": {"data": 1, "fsdp": -1},
            "data": {"train": "data/imagenet/train", "test": "data/imagenet/test", "flip": False},
            "train": {"steps": 417_000, "batch_size": BATCH_SIZE},
            "sample": {"cfg": 1.5, "top_k": 600, "top_k_late": 300},
        }
    )
