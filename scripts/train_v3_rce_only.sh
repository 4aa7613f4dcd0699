#!/usr/bin/env bash
# Plan, experiment 1: v3 by RCE alone, with the plan's settings.
#
#   bash scripts/train_v3_rce_only.sh [gpu_id=7] [sampler=rand_sampler] [rce_epochs=10]
#
# Builds what is missing (beam data, v2, embeddings, RL data), then trains. What is not already
# set, the plan's learning rates, batch size and weights, comes from configs/rce_only.env.
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
load_dotenv configs/rce_only.env or-empty
pipeline v3
