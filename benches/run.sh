#!/usr/bin/env bash
# Runs the benchmarks with a release binary and records the results, with the machine, in benches/results/.
# usage: benches/run.sh PORTOLAN-BINARY
set -euo pipefail
cd "$(dirname "$0")"
binary=$(realpath "${1:?usage: run.sh PORTOLAN-BINARY}" 2>/dev/null || realpath "../$1")
mkdir -p results
cargo bench --locked -p portolan-dataplane --bench scale | tee results/dataplane.md
python3 standalone.py "$binary" | tee results/standalone.md
