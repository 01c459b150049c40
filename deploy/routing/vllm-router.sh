#!/bin/sh
# vLLM's own router (vllm-router on PyPI): requests with one X-Session-ID go to one server.
#     deploy/routing/vllm-router.sh PORT http://server-1:8000 http://server-2:8000
set -eu
port=$1
shift
exec vllm-router --host 127.0.0.1 --port "$port" --policy consistent_hash --worker-urls "$@"
