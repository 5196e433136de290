#!/usr/bin/env bash
# Serves MODEL; `wt_ipc` is weight-transfer's backend `ipc`. The routes for weights exist in development mode only, and
# whoever reaches them may replace the weights: so this listens on loopback.
set -euo pipefail
export VLLM_SERVER_DEV_MODE=1
exec vllm serve "${1:?usage: serve.sh MODEL}" --host 127.0.0.1 --port "${PORT:-8000}" --enable-scale-out \
  --weight-transfer-config '{"backend": "wt_ipc"}' "${@:2}"
