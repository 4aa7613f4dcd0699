#!/usr/bin/env bash
# The baselines alone: random, similarity and zero-shot, shots 1 to MAX_EVAL_SHOT.
#
#   bash scripts/baseline.sh [task=vqa] [dataset=auto] [gpu_ids=0] [sampler=rand_sampler]
#                            [beam_model=qwen2.5_vl_3B]
#
# The original's four arguments (task, dataset, gpu, model) are understood, too.
# TEST_DATA_NUM queries (-1: all).
# -n, --dry-run: prompts and hours.
# -h, --help: this text and every setting.
#
# Example:
#   TEST_DATA_NUM=-1 bash scripts/baseline.sh vqa okvqa_local 0
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 5 lever_plus.stages.inference -- "$@"
if [ "${#ARGS[@]}" -eq 4 ] && { [ -f "configs/infer_model/${ARGS[3]}.yaml" ] || [[ "${ARGS[3]}" =~ ^(qwen2_5_vl_3B|flamingo_.*)$ ]]; }; then
  ARGS=("${ARGS[@]:0:3}" "${SAMPLER:-rand_sampler}" "${ARGS[3]}") # the original's fourth is the model
fi
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")" METHODS="${METHODS:-random similarity zero_shot}"
export SAMPLER="$(arg 4 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 5 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
pipeline baseline
