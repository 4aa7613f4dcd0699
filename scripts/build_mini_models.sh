#!/usr/bin/env bash
# Trains the embedded benchmark's tiny models from nothing into lever_plus/mini/weights, by steps and fixed seeds.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'HELP'
usage: bash scripts/build_mini_models.sh [-h] [-n] [all|clip|lvlm|gates]

Trains the tiny CLIP (about 2 minutes) and the tiny Qwen2.5-VL (about an hour) on one CPU thread each, then
measures the gates of the benchmark. Logs go beside the weights.

  OUT       folder for the weights     (lever_plus/mini/weights)
  SEED      seed of both models        (0)
  STEPS     language-model steps       (the module's default)
  -n        print the commands only
HELP
}

part=all
dry_run=0
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit 0 ;;
    -n | --dry-run) dry_run=1 ;;
    all | clip | lvlm | gates) part="$argument" ;;
    *) echo "error: unknown argument '$argument'; see --help" >&2; exit 2 ;;
  esac
done

out="${OUT:-lever_plus/mini/weights}"
seed="${SEED:-0}"
steps=(${STEPS:+--steps "$STEPS"})
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

run() {
  echo "+ $*"
  if [[ "$dry_run" == 0 ]]; then "$@"; fi
}

if [[ "$part" == all || "$part" == clip ]]; then
  run python -m lever_plus.mini.train_clip --out "$out/clip" --seed "$seed"
fi
if [[ "$part" == all || "$part" == lvlm ]]; then
  run python -m lever_plus.mini.train_lvlm --out "$out/lvlm" --seed "$seed" "${steps[@]}"
fi
if [[ "$part" == all || "$part" == gates ]]; then
  run python -m lever_plus.mini.gates --n 1000 --lvlm "$out/lvlm" --clip "$out/clip"
fi
