#!/usr/bin/env bash
# Exports the demonstrations that a run picked as a few-shot task for lmms-eval: a file keyed by
# question_id, and the task (YAML, utils.py) that reads it.
#
#   bash scripts/export_lmms_eval.sh RUN[:METHOD] [FOLDER]
#
# RUN: its EXP_NAME, a folder under results/<data set>/icl_inference, or a path. METHOD: whose
# picks; else v3. FOLDER: where it goes; else results/<data set>/lmms_eval/<run>_<method>.
# -n, --dry-run: say what would be written.   -h, --help: this text and every setting.
#
# Example:
#   bash scripts/export_lmms_eval.sh exp1 my_task
#   python -m lmms_eval --include_path my_task --tasks lever_plus_okvqa_v3_4shot --model qwen2_5_vl
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 2 lever_plus.release.lmms_eval -- "$@"
setup_python
exec "$PYTHON" -m lever_plus.release.lmms_eval ${ARGS[@]+"${ARGS[@]}"} ${DRY_RUN[@]+"${DRY_RUN[@]}"}
