#!/usr/bin/env bash
# ICL inference with one version of the selector and the baselines.
#
#   bash scripts/inference.sh [task=vqa] [dataset=auto] [gpu_id=0]
#                             [lever_lm=query_img_text_icd_img_text]
#                             [sampler=rand_sampler] [beam_model=qwen2.5_vl_3B] [version=v2]
#                             [test_data_num=200]
#
# version: v1, v2, v2_lora or v3 (against v2; EXP_NAME names the one trained). Without
# LEVER_LM_CHECKPOINT_PATH v3 is the best by the validation metric.
# -n, --dry-run [--assume okvqa|vqav2]: prompts, images, tokens, hours (in their sizes).
# -h, --help: every setting.
#
# Example:
#   bash scripts/inference.sh vqa okvqa_local 0 query_img_text_icd_img_text rand_sampler \
#     qwen2.5_vl_3B v2_lora 200
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 8 lever_plus.stages.inference -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")" LEVER_LM="$(arg 4 "${LEVER_LM:-query_img_text_icd_img_text}")"
export SAMPLER="$(arg 5 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 6 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
usual 8 TEST_DATA_NUM
export TEST_DATA_NUM="$(arg 8 "${TEST_DATA_NUM:-200}")"
case "$(arg 7 v2)" in
  v1 | v2 | v2_lora) METHODS="${METHODS:-$(arg 7 v2) label similarity random zero_shot}" ;;
  v3) METHODS="${METHODS:-auto}" ;;
  *) fail 2 "version $(arg 7 v2) is not supported: v1 | v2 | v2_lora | v3 (v0 and v4 of the original: docs/migration.md)" ;;
esac
export METHODS
pipeline inference
