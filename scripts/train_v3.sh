#!/usr/bin/env bash
# The whole v3 pipeline: beam data, v2, embeddings, RL data, RCE, GRPO; everything from the
# environment.
#
#   bash scripts/train_v3.sh [task=vqa] [dataset=auto] [gpu_id=0]
#                            [lever_lm=query_img_text_icd_img_text]
#                            [sampler=rand_sampler] [beam_model=qwen2.5_vl_3B]
#
# -n, --dry-run: say what would be done.   -h, --help: this text and every setting.
#
# Example:
#   RCE_EPOCHS=10 GRPO_EPOCHS=5 KL_BETA=0.05 EXP_NAME=try bash scripts/train_v3.sh vqa okvqa_local 0
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 6 "lever_plus.stages.train_v3 lever_plus.stages.generate_rl_data lever_plus.stages.train_v2 lever_plus.stages.export_embeddings" -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")" LEVER_LM="$(arg 4 "${LEVER_LM:-query_img_text_icd_img_text}")"
export SAMPLER="$(arg 5 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 6 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
pipeline v3
