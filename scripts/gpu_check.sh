#!/usr/bin/env bash
# What to run on the day a GPU is at hand: under 9 minutes on one H100 or H200, with JAX for it and requirements.txt.
#
#   scripts/gpu_check.sh OUT          writes every part's results into OUT as it goes, and OUT/summary.tsv
#   scripts/gpu_check.sh OUT --tiny   the same at tiny sizes, to try this script on a CPU
#
# PYTHON names the interpreter. Every part has a time limit of its own; one that fails or is cut off leaves what it
# printed, and the others still run. The exit code is that of the worst part; 3 says that some part could not run here.
set -uo pipefail

out=${1:?"usage: scripts/gpu_check.sh OUT [--tiny]"}
tiny=${2:-}
case "$tiny" in "" | --tiny) ;; *) echo "error: $tiny: unknown; give --tiny or nothing" >&2; exit 2 ;; esac
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# The parts compile some of the same programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
# Seconds for all parts together, whatever their own limits add up to.
total=530
[ -n "$tiny" ] && total=$((20 * total))
worst=0
printf 'part\tresult\texit code\tseconds\n' > "$out/summary.tsv"

part() { # name seconds command...
  local name=$1 limit=$2 began=$SECONDS code result
  shift 2
  # Tiny sizes are to try the script, on whatever else the machine does meanwhile.
  [ -n "$tiny" ] && limit=$((20 * limit))
  [ $((total - SECONDS)) -lt "$limit" ] && limit=$((total > SECONDS ? total - SECONDS : 1))
  echo "== $name: at most $limit s"
  { echo "\$ $*"; timeout --kill-after=10 "$limit" "$@"; } > "$out/$name.txt" 2>&1
  code=$?
  case $code in
    0) result=done ;;
    3) result="cannot run here" ;;
    124 | 137) result="cut off after $limit s" ;;
    *) result=FAILED ;;
  esac
  [ "$code" -gt "$worst" ] && worst=$code
  printf '%s\t%s\t%s\t%s\n' "$name" "$result" "$code" "$((SECONDS - began))" | tee -a "$out/summary.tsv"
}

cannot() { # name reason
  echo "cannot run here: $2" > "$out/$1.txt"
  [ "$worst" -eq 0 ] && worst=3
  printf '%s\tcannot run here\t3\t0\n' "$1" | tee -a "$out/summary.tsv"
}

part device 20 "$python" -c '
import importlib.metadata, sys, jax
print(sys.version)
for name in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "tokamax", "flax", "optax"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
for device in jax.devices():
    print(device.platform, device.device_kind, (device.memory_stats() or {}).get("bytes_limit", "memory not reported"))
'
command -v nvidia-smi > /dev/null && part nvidia-smi 5 nvidia-smi
platform=$(sed -n 's/^\(cpu\|gpu\|tpu\) .*/\1/p' "$out/device.txt" | head -1)
if [ -z "$platform" ]; then
  echo "error: JAX finds no device; see $out/device.txt" >&2
  exit 2
fi

if [ -n "$tiny" ]; then
  attention=(--shapes "256 half" --batch 1 --heads 1 --repeats 1)
  cases=(--cases "one token each" traced)
  configs=("$out/tiny.py") batches=(2) repeats=1
  cat > "$out/tiny.py" <<'END'
import runpy


def get_config():
    config = runpy.run_path("configs/hart_0p7b_256.py")["get_config"]()
    patch_nums = (1, 2, 4)
    config.tokenizer.update({"image_size": 8, "patch_nums": patch_nums, "channels": 32, "channel_multipliers": (1, 1),
                             "latent_channels": 4, "vocab_size": 16})
    config.transformer.update({"patch_nums": patch_nums, "vocab_size": 16, "latent_channels": 4, "context_tokens": 4,
                               "context_dim": 8, "depth": 2, "width": 16, "heads": 2})
    config.transformer.diffusion.update({"width": 16, "depth": 1, "sampling_steps": 3})
    config.loss.update({"condition_top_k": 8, "min_kept": 4})
    config.sample.update({"top_k": 8, "top_k_late": 8})
    return config
END
else
  shapes=(256 "256 half" 512 "512 half" 1024 "1024 half" "1024 decode")
  attention=(--shapes "${shapes[@]}" --batch 1 --repeats 3 --write)
  cases=()
  configs=(configs/hart_0p7b_256.py configs/hart_0p7b_512.py configs/hart_0p7b_1024.py)
  batches=(64 24 4) repeats=3
fi

# Are the kernels right?
if [ "$platform" = gpu ]; then
  for name in gpu tokamax cudnn xla; do
    part "conformance-$name" 30 "$python" -m pallas_kernels.attention.conformance --implementations "$name" ${cases[@]+"${cases[@]}"}
  done
  part tuning 40 "$python" -m pallas_kernels.attention.tune --implementation gpu --shape 512 --seconds 12 --repeats 3
else
  for name in gpu tokamax cudnn; do
    cannot "conformance-$name" "$name needs an NVIDIA GPU, this is a $platform"
  done
  part conformance-xla 30 "$python" -m pallas_kernels.attention.conformance --implementations xla ${cases[@]+"${cases[@]}"}
  cannot tuning "the tiles of implementation gpu need an NVIDIA GPU, this is a $platform"
fi

# How fast?
part attention 90 "$python" benchmarks/attention.py "${attention[@]}"
for at in "${!configs[@]}"; do
  part "step-$(basename "${configs[$at]}" .py)" 55 \
    "$python" benchmarks/training_step.py --config "${configs[$at]}" --batch_size "${batches[$at]}" --steps "$repeats"
done
sampled=${configs[-1]}
sizes=(1 8)
[ -n "$tiny" ] && sizes=(2)
part sampling 45 "$python" benchmarks/sampling.py --config "$sampled" --batch_sizes "${sizes[@]}" --repeats "$repeats"
part sampling-parts 45 "$python" benchmarks/sampling.py --config "$sampled" --batch_sizes "${sizes[@]}" --parts

echo "results are in $out"
exit "$worst"
