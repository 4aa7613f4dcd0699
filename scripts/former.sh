#!/usr/bin/env bash
# Scripts of the original Lever-Plus that are gone, by symbolic links of their names: says what to
# use instead.
#
# docs/migration.md has all of them, with the settings and files.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
name="$(basename -- "$0")"
later="every command resumes where it stopped; to run one in the background: nohup"
case "$name" in
  check_gpu.sh) use="nvidia-smi; a GPU that is not there is refused by name (gpu_id, or CUDA_VISIBLE_DEVICES)" ;;
  generate_rl_data_for_sampler.sh) use="bash scripts/generate_rl_data.sh vqa ${3:-okvqa_local} ${4:-0} ${1:-rand_sampler} ${2:-qwen2.5_vl_3B}" ;;
  train_v3_background.sh) use="$later bash scripts/train_v3.sh vqa okvqa_local 0 query_img_text_icd_img_text rand_sampler & (and so for each sampler)" ;;
  run_train_background.sh) use="$later bash scripts/train_lever_lm.sh $* &" ;;
  run_inference_background.sh) use="$later bash scripts/inference.sh $* &" ;;
  run_generate_data_background.sh | generate_data_background.sh) use="$later bash scripts/generate_data.sh $* &" ;;
  batch_inference.sh) use="bash scripts/inference.sh once for each sampler" ;;
  run_single_shot.sh) use="MAX_EVAL_SHOT=${6:-8} bash scripts/inference.sh (shots 1 to MAX_EVAL_SHOT in one run)" ;;
  grpo_post_train.sh) use="RL_DATA_PATH=… SFT_CKPT=… QUERY_EMB_PATH=… OUTPUT_DIR=… bash scripts/train_v3.sh (without them: the standard files)" ;;
  grpo_inference.sh) use="LEVER_LM_CHECKPOINT_PATH=… bash scripts/inference_v3_best.sh 200" ;;
  compare_v2_v3_fair.sh) use="bash scripts/inference_v3_best.sh 200 (v3, v2 and the baselines on the same queries)" ;;
  train_lora.sh) use="bash scripts/train_lever_lm.sh ${1:-vqa} ${2:-okvqa_local} ${3:-0} ${4:-query_img_text_icd_img_text} ${5:-rand_sampler} ${6:-qwen2.5_vl_3B} v2_lora" ;;
  *) use="docs/migration.md says what" ;;
esac
fail 2 "$name is a script of the original Lever-Plus; use: $use"
