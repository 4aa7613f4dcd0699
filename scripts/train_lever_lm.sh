#!/usr/bin/env bash
# The supervised pointer selector (v2; v1 is the same without cross-attention).
#
#   bash scripts/train_lever_lm.sh [task=vqa] [dataset=auto] [gpu_id=0]
#                                  [lever_lm=query_img_text_icd_img_text]
#                                  [sampler=rand_sampler] [beam_model=qwen2.5_vl_3B] [version=v2]
#
# version: v1, v2, v2_lora (CLIP trained by LoRA, too), or v3 (as train_v3.sh). inference.sh
# evaluates each by the same name.
# -n, --dry-run: say what would be done.   -h, --help: this text and every setting.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 7 lever_plus.stages.train_v2 -- "$@"
check_task "$(arg 1 vqa)"
export DATASET="$(arg 2 "${DATASET:-auto}")" GPU_ID="$(arg 3 "${GPU_ID:-0}")" LEVER_LM="$(arg 4 "${LEVER_LM:-query_img_text_icd_img_text}")"
export SAMPLER="$(arg 5 "${SAMPLER:-rand_sampler}")" BEAM_MODEL="$(arg 6 "${BEAM_MODEL:-qwen2.5_vl_3B}")"
target=v2
case "$(arg 7 v2)" in
  v1) export V2_MODE=v1 ;;
  v2) ;;
  v2_lora) export V2_MODE=lora ;;
  v3) target=v3 ;;
  *) fail 2 "version $(arg 7 v2) is not supported: v1 | v2 | v2_lora | v3 (v0 and v4 of the original: docs/migration.md)" ;;
esac
pipeline "$target"
