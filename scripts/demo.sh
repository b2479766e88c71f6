#!/bin/sh
# The whole main job, offline, on the built-in tiny model: convert, train, generate, evaluate, fuse.
set -eu
export MLX_FISH_BACKEND=mlx # on Linux `auto` would take torch
# On a CPU MLX compiles its fused operations with g++ the first time: 40 s, more than this small model needs for everything
[ "$(uname)" = Darwin ] || export MLX_DISABLE_COMPILE=1
rm -rf demo_output
mkdir demo_output
step() { printf '\n$ %s\n' "$*" >&2; "$@"; }
step mlx-fish convert --model tiny --out demo_output/tiny-mlx
step mlx-fish train --model demo_output/tiny-mlx --iters 60 --learning-rate 2e-3 --output-dir demo_output/adapter
step mlx-fish generate --adapter demo_output/adapter -p "金鱼为什么容易浮头？" --compare --max-tokens 80 --repetition-penalty 1.1
step mlx-fish evaluate --adapter demo_output/adapter
step mlx-fish fuse --adapter demo_output/adapter --to-hf --out demo_output/fused
step mlx-fish fuse --adapter demo_output/adapter --to-gguf q8_0 --to-ollama fish --out demo_output/exports
