#!/bin/sh
# Pin all dependencies for Python 3.10 and newer: requirements.lock to train, requirements-test.lock for tests and benches.
# torch stays at the version that the kernels are tested with and brings its own CUDA packages, so those are not pinned.
set -eu
uv=$1
pin() {
    out=$1
    shift
    echo 'torch==2.13.0' >.constraints.tmp
    "$uv" pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --constraint .constraints.tmp \
        "$@" pyproject.toml -o .lock.tmp
    { echo '# Written by `make lock`.'; grep -vE '^(nvidia-|cuda-|triton)|== .emscripten' .lock.tmp; } >"$out"
    rm .constraints.tmp .lock.tmp
}
pin requirements.lock --extra plots
pin requirements-test.lock --extra plots --extra test --extra bench
