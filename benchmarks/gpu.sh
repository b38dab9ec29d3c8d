#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# gpu.sh: make the tables of one GPU in under ten minutes, in benchmarks/results/<name of the card>.
# A table that fails or takes too long is named; what was measured of it is kept, and the next is
# made. `gpu.sh dry` takes the same way with a tiny model on a CPU, without captured graphs.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
factors="lokr-full-4 lokr-full-8 lokr-full-16"
methods="lora vblora lokr poly mhr"
if [ "$1" = dry ]; then
  card=dry-run graph= turns="--rounds 1 --repeat 3"
  size="--device cpu --layers 1 --width 128 --batch 2 --tokens 4 --decode-batch 2"
else
  card=$("$python" -c "import torch; print(torch.cuda.get_device_name())") || exit 1
  card=$(tr -cs 'a-z0-9\n' - <<<"${card,,}") graph=--graph turns="--rounds 3 --repeat 5"
  size="--device cuda --layers 1 --width 4096 --batch 4 --tokens 1024 --decode-batch 32"
fi
folder=${FOLDER:-benchmarks/results}/$card
missing=()

measure() { # SECONDS WHAT OPTIONS…
  timeout -k 5 "$1" "$python" -m benchmarks "${@:2}" $size --dtype bfloat16 --output "$folder" --add ||
    missing+=("${*:2}")
}

measure 170 steps --mode train prefill --method $methods $turns
measure 90 steps --mode train prefill --method $factors $turns --model stack
measure 70 steps --mode decode --method $methods $factors $turns $graph
measure 90 first-step --rounds 1 --library ours
measure 170 steps --mode train prefill decode --method $methods lokr-full-8 $turns --compile

[ ${#missing[@]} = 0 ] || { printf 'Incomplete: %s\n' "${missing[@]}"; exit 1; }
