#!/usr/bin/env bash
# RunPod: a pod with 1 to 8 GPUs, any image with a recent driver, and a network volume at /workspace, which outlives the pod.
# In the pod's terminal, or as its start command:
#
#   export HF_TOKEN=...                              # for gated models; better as a RunPod secret
#   git clone THE-REPOSITORY /workspace/jaxtp && bash /workspace/jaxtp/scripts/pods/runpod.sh meta-llama/Llama-3.1-8B
#
# The environment, the downloaded weights and the compiled programs stay on the volume: the second pod starts in seconds.
set -euo pipefail
model=${1:?the hub id or folder of a model}; shift
cd "$(dirname "$0")/../.."
volume=/workspace
export HF_HOME=$volume/huggingface JAX_COMPILATION_CACHE_DIR=$volume/jax-compiled
[ -x "$volume/venv/bin/jaxtp" ] || bash scripts/pods/setup.sh "$volume/venv"
exec "$volume/venv/bin/python" scripts/generate.py "$model" "$@"
