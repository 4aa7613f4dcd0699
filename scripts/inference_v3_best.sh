#!/usr/bin/env bash
# ICL inference with the best v3 checkpoint, RCE-only or GRPO, against v2 and the baselines on the
# same queries.
#
#   bash scripts/inference_v3_best.sh [test_data_num=400] [sampler=rand_sampler]
#                                     [beam_model=qwen2.5_vl_3B] [gpu_id=7]
#
# test_data_num -1: all; its default is lowered where the data set has fewer questions.
# CHECKPOINT_PHASE=auto|rce|grpo chooses the phase, LEVER_LM_CHECKPOINT_PATH names a file. Writes
# metrics, per-sample answers, official result files and the experiment record.
# -n, --dry-run: say what would be done.   -h, --help: this text and every setting.
#
# Example:
#   EXP_NAME=try bash scripts/inference_v3_best.sh 200 rand_sampler qwen2.5_vl_3B 0
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 4 lever_plus.stages.inference -- "$@"
usual 1 TEST_DATA_NUM
export TEST_DATA_NUM="$(arg 1 "${TEST_DATA_NUM:-400}")" SAMPLER="$(arg 2 "${SAMPLER:-rand_sampler}")"
export BEAM_MODEL="$(arg 3 "${BEAM_MODEL:-qwen2.5_vl_3B}")" GPU_ID="$(arg 4 "${GPU_ID:-7}")"
pipeline record
