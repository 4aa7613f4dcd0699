#!/usr/bin/env bash
# Trains the embedded benchmark's tiny models from nothing, by steps and fixed seeds, then measures
# its gates.
#
#   bash scripts/build_mini_models.sh [all|clip|lvlm|gates=all]
#
# The tiny CLIP takes about 2 minutes, the tiny Qwen2.5-VL about an hour, on one CPU thread. Logs go
# beside the weights.
#   OUT    folder for the weights  (lever_plus/mini/weights)
#   SEED   seed of both models     (0)
#   STEPS  language-model steps    (the module's default)
# -n, --dry-run: print the commands only.   -h, --help: this text.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 1 "" -- "$@"
part="$(arg 1 all)"
case "$part" in all | clip | lvlm | gates) ;; *) fail 2 "unknown part $part: all | clip | lvlm | gates" ;; esac
out="${OUT:-lever_plus/mini/weights}"
seed="${SEED:-0}"
steps=(${STEPS:+--steps "$STEPS"})

commands=()
run() {
  echo "+ $*"
  commands+=(-- "$@")
}

[ "${#DRY_RUN[@]}" -gt 0 ] && PYTHON=python || setup_python
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
case "$part" in all | clip) run "$PYTHON" -m lever_plus.mini.train_clip --out "$out/clip" --seed "$seed" ;; esac
case "$part" in all | lvlm) run "$PYTHON" -m lever_plus.mini.train_lvlm --out "$out/lvlm" --seed "$seed" ${steps[@]+"${steps[@]}"} ;; esac
case "$part" in all | gates) run "$PYTHON" -m lever_plus.mini.gates --n 1000 --lvlm "$out/lvlm" --clip "$out/clip" ;; esac
[ "${#DRY_RUN[@]}" -gt 0 ] || exec "$PYTHON" -m lever_plus.in_turn "${commands[@]}"
