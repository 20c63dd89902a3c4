#!/usr/bin/env bash
# Lambda: an on-demand instance (1x, 2x, 4x or 8x) with a persistent filesystem attached, which appears below /lambda/nfs
# (older instances: in the home folder). On the instance, over ssh:
#
#   git clone THE-REPOSITORY jaxtp && HF_TOKEN=... bash jaxtp/scripts/pods/lambda.sh FILESYSTEM meta-llama/Llama-3.1-70B
#
# The environment lies on the instance's own disk (fast imports), weights and compiled programs on the filesystem.
set -euo pipefail
name=${1:?the name of the attached filesystem}; model=${2:?the hub id or folder of a model}; shift 2
cd "$(dirname "$0")/../.."
store=/lambda/nfs/$name
[ -d "$store" ] || store=$HOME/$name
[ -d "$store" ] || { echo "no filesystem $name: neither /lambda/nfs/$name nor $HOME/$name is there" >&2; exit 1; }
export HF_HOME=$store/huggingface JAX_COMPILATION_CACHE_DIR=$store/jax-compiled
[ -x .venv/bin/jaxtp ] || bash scripts/pods/setup.sh
exec .venv/bin/python scripts/generate.py "$model" "$@"
