"""The published 0.7B text-to-image model at 256 px, first of its curriculum of 256, 512 and 1024 px.

python train.py --config=configs/hart_0p7b_256.py --workdir=runs/hart_0p7b_256

Learning rate, its decay, weight decay, clipping and batch are VAR's recipe for depth 24; the weights of the two losses
and the number of steps are not published. The mesh is for a pod or several hosts of GPUs, in groups of 16 chips; on
fewer chips set --config.mesh.fsdp to their number. `python -m hart_jax.planning.plan` says what fits.
"""

from ml_collections import ConfigDict

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
BATCH_SIZE = 1024


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
                "context_tokens": 300,
                "context_dim": 1536,
                "depth": 24,
                "width": 1536,
                "heads": 24,
                "diffusion": {"width": 1024, "depth": 6, "sampling_steps": 8, "batch_mul": 4},
            },
            "tokenizer_from": "runs/hart_tokenizer",
            "text_encoder": "data/qwen2-vl-1.5b-instruct",
            # A text file, or a clone of the public code, which has the release's.
            "system_prompt": "data/hart",
            # 300 states of 1536 floats for each caption would outgrow the images.
            "precompute_text": False,
            "loss": {
                "token": 1.0,
                "diffusion": 1.0,
                "condition_top_k": 600,
                "condition_top_p": 0.96,
                "drop_text": 0.1,
                # Token subsampling: the share of the last scale that a step leaves out is a truncated normal.
                "drop_mean": 1.0,
                "drop_std": 0.25,
                "drop_min": 0.5,
                "min_kept": 32,
                "keep_counts": 4,
            },
            "optimizer": {
                "learning_rate": 8e-5 * BATCH_SIZE / 256,
                "warmup_steps": 5000,
                "schedule": "linear",
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.05,
                "clip_norm": 2.0,
                "ema_decay": 0.9999,
            },
            "mesh": {"data": -1, "fsdp": 16},
            "data": {"train": "data/captioned/train", "test": "data/captioned/test"},
            "train": {"steps": 200_000, "batch_size": BATCH_SIZE, "remat": "full"},
            "sample": {"cfg": 4.5, "top_k": 600, "top_k_late": 300},
            "sample_prompts": (
                "a photograph of an astronaut riding a horse on the moon",
                "a watercolour of a lighthouse in a storm",
                "a bowl of ramen on a wooden table, seen from above",
                "a red fox asleep in fresh snow",
            ),
        }
    )
