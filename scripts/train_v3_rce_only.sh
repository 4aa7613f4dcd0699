#!/usr/bin/env bash
# Plan, experiment 1: v3 by RCE alone, with the plan's settings.
#
#   bash scripts/train_v3_rce_only.sh [gpu_id=7] [sampler=rand_sampler] [rce_epochs=10]
#
# Builds what is missing (beam data, v2, embeddings, RL data), then trains. Exports, where not
# already set: GRPO_EPOCHS=0 BATCH_SIZE=4 RCE_LR=1e-5 GRPO_LR=1e-5 KL_BETA=0.1 REWARD_ALPHA=0.5
# REWARD_BETA=0.8.
# -n, --dry-run: say what would be done.   -h, --help: this text and every setting.
#
# Example:
#   bash scripts/train_v3_rce_only.sh 0,1,2,3 rand_sampler 10 -n
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 3 "lever_plus.stages.train_v3 lever_plus.stages.generate_rl_data lever_plus.stages.train_v2 lever_plus.stages.export_embeddings" -- "$@"
GPU_ID="$(arg 1 "${GPU_ID:-7}")"
SAMPLER="$(arg 2 "${SAMPLER:-rand_sampler}")"
RCE_EPOCHS="$(arg 3 "${RCE_EPOCHS:-10}")"
export GPU_ID SAMPLER RCE_EPOCHS
export GRPO_EPOCHS="${GRPO_EPOCHS:-0}" BATCH_SIZE="${BATCH_SIZE:-4}" RCE_LR="${RCE_LR:-1e-5}" GRPO_LR="${GRPO_LR:-1e-5}"
export KL_BETA="${KL_BETA:-0.1}" REWARD_ALPHA="${REWARD_ALPHA:-0.5}" REWARD_BETA="${REWARD_BETA:-0.8}"
pipeline v3
