#!/usr/bin/env bash
# Speed against the naive path, both sides in one run, as JSON and a table: the LVLM engine, then
# the RL training.
#
#   bash scripts/benchmark.sh [lvlm|rl|all=all]
#                             [options of the benchmark]
#
# Example:
#   bash scripts/benchmark.sh lvlm --arch qwen2.5_vl_3B --random-weights --device cuda
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" #
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" #
case "${1:-}" in -h | --help) usage lever_plus.benchmark_lvlm lever_plus.benchmark_rl; exit 0 ;; esac
case " $* " in *" -n "* | *" --dry-run "*) echo "would run the benchmarks: $*"; exit 0 ;; esac
part=all
case "${1:-}" in lvlm | rl | all) part="$1"; shift ;; esac
setup_python
commands=()
[ "$part" = rl ] || commands+=(-- "$PYTHON" -m lever_plus.benchmark_lvlm "$@")
[ "$part" != all ] || set --
[ "$part" = lvlm ] || commands+=(-- "$PYTHON" -m lever_plus.benchmark_rl "$@")
exec "$PYTHON" -m lever_plus.in_turn "${commands[@]}"
