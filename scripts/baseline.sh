#!/usr/bin/env bash
# The baselines alone: random, similarity and zero-shot, shots 1 to MAX_EVAL_SHOT.
#
#   bash scripts/baseline.sh [task=vqa] [dataset=auto] [gpu_ids=0] [sampler=rand_sampler] [beam_model=qwen2.5_vl_3B]
#
# TEST_DATA_NUM queries (-1: all). -n, --dry-run: prompts and hours.   -h, --help: this text and every setting.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 5 lever_plus.stages.inference -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")" METHODS="${METHODS:-random similarity zero_shot}"
export SAMPLER="$(arg 4 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 5 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
pipeline baseline
