#!/usr/bin/env bash
# Two or more machines that see one another (a Lambda 1-click cluster, a RunPod instant cluster, any two GPU machines): the
# same command on each, with its number. Both need the same clone, and a folder for the run that both see.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/pods/node.sh train configs/train/lora.yaml --parallel.pp 2 ...
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash scripts/pods/node.sh train configs/train/lora.yaml --parallel.pp 2 ...
#
#   NNODES=2 NODE_RANK=... bash scripts/pods/node.sh generate org/name -tp 8 -dp 2 --prompts-file prompts.txt
#
# MASTER_ADDR is machine 0, as the others reach it; MASTER_PORT (29500) and the port after it must be open between them.
set -euo pipefail
: "${NNODES:?how many machines}" "${NODE_RANK:?which one this is, from 0}" "${MASTER_ADDR:?the address of machine 0}"
cd "$(dirname "$0")/../.."
[ -x .venv/bin/jaxtp ] || bash scripts/pods/setup.sh
exec .venv/bin/jaxtp "$@"
