#!/bin/sh
# Packages a bundle that train.py wrote into a TorchServe model archive: ./build_mar.sh --help
set -eu
root=$(cd "$(dirname "$0")" && pwd)
export HF_HUB_OFFLINE=1 PYTHONPATH="$root"
exec "$root/.venv/bin/python" -m archiver "$@"
