#!/usr/bin/env bash
# RL data: the v2 selector's pointers and random ones, each answered by the LVLM and scored.
#
#   bash scripts/generate_rl_data.sh [task=vqa] [dataset=auto] [gpu_ids=0] [sampler=rand_sampler]
#                                    [beam_model=qwen2.5_vl_3B]
#
# -n, --dry-run [--assume okvqa|vqav2]: prompts, images, tokens, hours (in their sizes).
# -h, --help: every setting.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
case "${1:-}" in */* | *.ckpt | *.pt) fail 2 "this is the original's form; here: LEVER_LM_CHECKPOINT_PATH=$1 RL_DATA_PATH=${3:-FILE} bash scripts/generate_rl_data.sh vqa ${8:-okvqa_local} ${6:-0} (beam data and embeddings are found by their names)" ;; esac
parse_args 5 lever_plus.stages.generate_rl_data -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")"
export SAMPLER="$(arg 4 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 5 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
pipeline rl_data
