#!/usr/bin/env bash
# A few minutes of a GPU, in one command: renders scenes on all cores, then trains the generator from the
# weights that ship until the time is over. It leaves its averaged weights and a sheet of samples every minute.
#
#   bash training/gpu.sh OUT [MINUTES]      from the repository's root; MINUTES of training, 6.5 by default
#
# OUT then holds `unet` and `text_encoder`, in files of less than 16 MB, for `training.export`. Needs torch,
# diffusers, transformers, scipy, pillow and matplotlib; nothing is fetched. On a machine without a GPU,
# DEVICE=cpu CHUNKS=1 BATCH=8 bash training/gpu.sh OUT 0.5 tries that it runs.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?where to write}
minutes=${2:-6.5}
device=${DEVICE:-cuda}
chunks=${CHUNKS:-32}
work=$(mktemp -d)
cores=$(nproc) # which OMP_NUM_THREADS would make one
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
model=src/attend_excite/models/stickers

seq 0 $((chunks - 1)) | xargs -P "$cores" -I{} \
  python3 -m training.latents --init $model --vae $model/vae --latents "$work" --first {} --chunks 1 --device "$device" ||
  echo "not all scenes are rendered: training renders what it lacks" >&2
python3 -m training.generator --init $model --vae $model/vae --latents "$work" --chunks "$chunks" --runs "$work" \
  --device "$device" --batch "${BATCH:-1024}" --rate "${RATE:-2e-3}" --minutes "$minutes" --save-seconds 60 &
trainer=$!

keep() { # the last averaged weights and the last sheet
  [ -d "$work/generator/text_encoder" ] || return 0
  mkdir -p "$out"
  cp -r "$work/generator/unet" "$work/generator/text_encoder" "$out"
  find "$work/generator" -name 'sheet-*.png' | sort | tail -1 | xargs -I{} cp {} "$out/sheet.png"
}

while kill -0 $trainer 2>/dev/null; do # should the machine go before the time is over
  sleep 20
  keep
done
wait $trainer
keep
