#!/usr/bin/env bash
# From a fresh clone to a result: sets up Python, then the plan's experiment 1 on the embedded
# benchmark mini_okvqa: candidates, beams, v2, RL data, RCE, inference on 200 queries, record and
# report.
#
#   bash scripts/quickstart.sh
#
# DATASET=mini_okvqa_b (or another generated world of configs/dataset, docs/mini_okvqa.md): the same
# on that world. About ten minutes on two CPU cores, besides the download of the packages. A
# second run finds everything done.
# -n, --dry-run: say what would be done.   -h, --help: this text.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 0 "" -- "$@"
case "${DATASET:-}" in mini_*) ;; *) DATASET=mini_okvqa ;; esac
export DATASET EXP_NAME="${EXP_NAME:-exp1}" GPU_ID="${GPU_ID:-0}"
setup_python
exec "$PYTHON" -m lever_plus.in_turn \
  -- bash scripts/train_v3_rce_only.sh "$GPU_ID" rand_sampler 10 ${DRY_RUN[@]+"${DRY_RUN[@]}"} \
  -- bash scripts/inference_v3_best.sh 200 rand_sampler qwen2.5_vl_3B "$GPU_ID" ${DRY_RUN[@]+"${DRY_RUN[@]}"}
