#!/usr/bin/env bash
# RL data: the v2 selector's pointers and random ones, each answered by the LVLM and scored.
#
#   bash scripts/generate_rl_data.sh [task=vqa] [dataset=auto] [gpu_ids=0] [sampler=rand_sampler] [beam_model=qwen2.5_vl_3B]
#
# -n, --dry-run [--assume okvqa|vqav2]: prompts, images, tokens, hours (in their sizes).   -h, --help: every setting.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 5 lever_plus.stages.generate_rl_data -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")"
export SAMPLER="$(arg 4 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 5 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
pipeline rl_data
