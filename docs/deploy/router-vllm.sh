#!/usr/bin/env bash
# Replicas of task=serve behind vllm-router 0.1.17 (pip install vllm-router, in an environment of its own).
# Usage: router-vllm.sh PORT http://REPLICA-1:8000 http://REPLICA-2:8000 ...
# The same x-session-id goes to the same replica.
set -euo pipefail
port=$1
shift
exec vllm-router --host 0.0.0.0 --port "$port" --worker-urls "$@" \
  --policy consistent_hash --health-check-endpoint /health --health-check-interval-secs 1 \
  --health-failure-threshold 1 --health-success-threshold 1 --request-timeout-secs 600 \
  --max-payload-size 67108864 --request-id-headers x-request-id --log-level warning
