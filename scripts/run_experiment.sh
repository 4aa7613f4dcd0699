#!/usr/bin/env bash
# The plan's experiments, each with its record and report under results/<data set>/experiments/.
#
#   bash scripts/run_experiment.sh 1|2|3|4a|4b|5|plan|NAME [gpu_id=0]
#
# NAME: an experiment of your own, the settings of configs/experiments/exp<NAME>.env (or
# EXPERIMENT_DIR's). 1-4b train and evaluate every seed of SEEDS ("1 2 3"); 5 audits the RL data,
# without the LVLM; plan walks the decision tree, runs the fair rival and writes the verdict on
# GRPO. Interrupted, the same command resumes.
# -n, --dry-run: the steps and what they cost.   -h, --help: this text and every setting.
#
# Example:
#   SEEDS="1 2 3" bash scripts/run_experiment.sh 3 0
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
parse_args 2 lever_plus.experiments.run -- "$@"
[ "${#ARGS[@]}" -ge 1 ] || fail 2 "$SCRIPT: which experiment? 1, 2, 3, 4a, 4b, 5, plan, or one of your own (see --help)"
export GPU_ID="$(arg 2 "${GPU_ID:-0}")"
setup_python
exec "$PYTHON" -m lever_plus.experiments.run "$(arg 1 "")" ${DRY_RUN[@]+"${DRY_RUN[@]}"}
