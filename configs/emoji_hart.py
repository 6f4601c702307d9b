"""The bundled model: 64 px images from prompts, small enough to train on two CPU cores, in four stages.

Each stage starts from where the one before ends:

python train.py --config=configs/emoji_hart.py --workdir=runs/emoji_hart
python train.py --config=configs/emoji_hart.py:stage=2 --workdir=runs/emoji_hart_2
python train.py --config=configs/emoji_hart.py:stage=3 --workdir=runs/emoji_hart_3
python train.py --config=configs/emoji_hart.py:stage=4 --workdir=runs/emoji_hart_4
python sample.py --config=configs/emoji_hart.py --prompt="a 3D render of a red apple"
"""

from ml_collections import ConfigDict

from hart_jax.config import stage_of

PATCH_NUMS = (1, 2, 3, 4, 6, 8)


def get_config(argument: str = "stage=1") -> ConfigDict:
    stage = stage_of(argument, 4)
    config = ConfigDict(
        {
            "tokenizer": {
                "image_size": 64,
                "patch_nums": PATCH_NUMS,
                "channels": 32,
                "channel_multipliers": (1, 1, 2, 4),
                "res_blocks": 1,
                "latent_channels": 16,
                "vocab_size": 1024,
            },
            "transformer": {
                "patch_nums": PATCH_NUMS,
                "vocab_size": 1024,
                "latent_channels": 16,
                "context_tokens": 20,
                "context_dim": 384,
                "depth": 8,
                "width": 192,
                "heads": 3,
                # Not the release's: a small model follows its prompt sooner with the mean state in every block.
                "disable_aln": False,
                "sep_aln_pooling_mode": "avg",
                "attn_l2_norm": True,
                "diffusion": {"width": 192, "depth": 3, "batch_mul": 2},
            },
            "tokenizer_from": "runs/emoji_tokenizer_3",
            "text_encoder": "data/minilm",
            "precompute_tokens": True,
            "loss": {"keep_counts": 1, "condition_top_k": 1024, "condition_top_p": 1.0},
            "optimizer": {
                "learning_rate": 1.5e-3,
                "muon_learning_rate": 6e-3,
                "warmup_steps": 100,
                "final_fraction": 0.03,
                "clip_norm": 1.0,
                "ema_decay": 0.998,
            },
            "mesh": {},
            "data": {"train": "data/shards/train", "test": "data/shards/test", "flip": False},
            "train": {
                "steps": 4900,
                "batch_size": 32,
                "log_every": 25,
                "save_every": 250,
                "sample_every": 800,
            },
            "sample": {"cfg": 1.5, "top_k": 5, "top_k_late": 5, "temperature": 0.5},
            "sample_prompts": (
                "a 3D render of a red apple",
                "a flat icon of a dog",
                "a cartoon of a house",
                "a glossy icon of a red heart",
                "a simple emoji of a grinning face",
                "a 3D render of a soccer ball",
                "a clip art drawing of a tree",
                "a 3D model of a chair",
            ),
            "model": "assets/emoji",
        }
    )
    # Self-correction: some tokens are wrong, and finer scales learn to correct them.
    if stage >= 2:
        config.init_from = "runs/emoji_hart"
        config.loss.mistakes = 0.6
        config.optimizer.learning_rate = 8e-4
        config.optimizer.muon_learning_rate = 3.2e-3
        config.train.steps = 2000
    # More of it in bfloat16, for CPUs with a matrix unit (AMX).
    if stage >= 3:
        config.init_from = "runs/emoji_hart_2"
        config.optimizer.learning_rate = 1e-3
        config.optimizer.muon_learning_rate = 4e-3
        config.train.dtype = "bfloat16"
        config.train.unroll = True
        config.train.steps = 3700
    # More of that, at half its rate.
    if stage >= 4:
        config.init_from = "runs/emoji_hart_3"
        config.optimizer.learning_rate = 5e-4
        config.optimizer.muon_learning_rate = 2e-3
        config.train.steps = 5500
    return config
