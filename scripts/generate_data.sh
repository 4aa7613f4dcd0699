#!/usr/bin/env bash
# InfoScore beam search: the v2 selector's training data.
#
#   bash scripts/generate_data.sh [task=vqa] [dataset=auto] [gpu_ids=0] [sampler=rand_sampler]
#                                 [beam_model=qwen2.5_vl_3B]
#
# Several gpu_ids with commas: one process each. SAMPLE_NUM anchors, CANDIDATE_NUM candidates,
# BEAM_SIZE, MAX_SHOT.
# -n, --dry-run [--assume okvqa|vqav2]: prompts, images, tokens, hours (in their sizes).
# -h, --help: every setting.
#
# Example:
#   SAMPLE_NUM=400 bash scripts/generate_data.sh vqa okvqa_local 0,1 rand_sampler qwen2.5_vl_3B
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 5 lever_plus.stages.generate_data -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")"
export SAMPLER="$(arg 4 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 5 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
pipeline beam_data
