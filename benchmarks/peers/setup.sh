#!/bin/sh
# Environments of the engines that graphopt is compared with, under one folder:
#   benchmarks/peers/setup.sh FOLDER [openvino] [litert] [deepsparse] [web]     all of them by default
# FOLDER may also stand in GRAPHOPT_PEERS, where `python -m benchmarks.sparse` looks for them. Python 3.11 and Node 20;
# some 5 GB and five minutes. onnxruntime and inductor run in graphopt's own environment: pip install 'graphopt[onnx]'.
set -eu

folder=${1:-${GRAPHOPT_PEERS:?name a folder, or set GRAPHOPT_PEERS}}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- openvino litert deepsparse web
mkdir -p "$folder"
cd "$folder"

environment() { # NAME REQUIREMENT...
    name=$1
    shift
    [ -d "$name" ] || "${PYTHON:-python3}" -m venv "$name"
    "$name/bin/python" -m pip install --quiet --no-cache-dir "$@"
}

for peer in "$@"; do
    case $peer in
        openvino) environment openvino openvino==2026.4.1 numpy ;;
        # torch in the very version that saved the program, and from wherever pip is told to take CPU builds.
        litert) environment litert torch==2.13.0 ai-edge-litert==2.3.0 litert-torch==0.10.0 ;;
        # 1.9.0 is an end-of-life stub that refuses to build.
        deepsparse) environment deepsparse deepsparse==1.8.0 numpy==1.26.4 ;;
        web)
            mkdir -p web
            (cd web && npm install --silent --no-audit --no-fund --ignore-scripts \
                onnxruntime-web@1.30.0 @litertjs/core@2.5.3 @tensorflow/tfjs@4.22.0 @tensorflow/tfjs-backend-wasm@4.22.0)
            ;;
        *)
            echo "no such peer: $peer" >&2
            exit 2
            ;;
    esac
done
