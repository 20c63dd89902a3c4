#!/usr/bin/env bash
# Sets up jaxtp on a machine with NVIDIA GPUs: a virtual environment beside the clone, with the CUDA that the driver takes.
#
#   bash scripts/pods/setup.sh [FOLDER OF THE ENVIRONMENT]        default .venv
set -euo pipefail
cd "$(dirname "$0")/../.."

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1 | cut -d. -f1)
if [ "$driver" -ge 580 ]; then cuda=cuda13
elif [ "$driver" -ge 525 ]; then cuda=cuda12
else echo "the driver $driver is too old: CUDA 12 needs 525 or newer" >&2; exit 1; fi

# JAX needs Python 3.11 or newer; uv brings one where the system's is older
venv=${1:-.venv}
if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python3 -m venv "$venv"
else pip install -q uv && uv venv --seed --python 3.12 "$venv"; fi
"$venv/bin/pip" install -q -e ".[$cuda,serve]"
"$venv/bin/python" - <<'PY'
import jax
print(f"jax {jax.__version__} sees", ", ".join(f"{d.device_kind} ({d.id})" for d in jax.devices()))
PY
