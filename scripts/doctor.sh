#!/usr/bin/env bash
# Is all right on this machine, and what will it cost? Checks before anything is paid for, in a few
# minutes.
#
#   bash scripts/doctor.sh [beam_model=qwen2.5_vl_3B] [gpus=0] [dataset=auto]
#
# Versions, GPUs, memory, data, images, model folder, the prompt as text, the fast path against
# transformers' own, speed, prices. Writes results/<data set>/doctor.json; exit code 0: all is well.
#   -n, --dry-run.   -h, --help: every setting.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 3 lever_plus.doctor -- "$@"
export BEAM_MODEL="$(arg 1 "${BEAM_MODEL:-qwen2.5_vl_3B}")" GPU_ID="$(arg 2 "${GPU_ID:-0}")" DATASET="$(arg 3 "${DATASET:-auto}")"
setup_python
exec "$PYTHON" -m lever_plus.doctor ${DRY_RUN[@]+"${DRY_RUN[@]}"}
