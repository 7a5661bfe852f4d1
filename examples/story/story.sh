#!/usr/bin/env bash
# The whole story as a user lives it, with both runtimes: export, guard, a planted regression that is caught, a report,
# and the same file on devices. Every line that starts with $ is a command line to copy.
#
#   examples/story/story.sh [FOLDER]
#
#   DEVICES="host arm64:cortex-a76 ssh:me@board adb:SERIAL"   where the files are run besides (default: host)
#   RUNNER_PTE=path RUNNER_ONNX=path                          for Android: runners built with the NDK (`--runner`)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-afq-story}
devices=${DEVICES:-host}
mkdir -p "$work"

show() { # quoted, so that it can be copied
  printf '\n$'
  printf ' %q' "$@"
  printf '\n'
}

step() { # a command line that must end well
  show "$@"
  "$@"
}

fails() { # a command line that must end with exit code 1: a verdict failed
  show "$@"
  local code=0
  "$@" || code=$?
  if [ "$code" -ne 1 ]; then
    echo "story: expected exit code 1, got $code" >&2
    exit 1
  fi
  echo "(exit code 1: caught)"
}

for target in android-xnnpack linux-x64-ort; do
  run=$work/$target baseline=$work/$target.afqb regressed=$work/$target-regressed
  printf '\n=== %s\n' "$target"
  step afq-export run --target "$target" --recipe w8a8-dynamic+awq --windows 8 --out "$run"
  rm -f "$baseline" # told once more in the same folder, the story begins anew; a baseline is never overwritten
  step afq-export baseline create "$run" --out "$baseline" --windows 8
  step afq-export check "$run" --baseline "$baseline"

  # Somebody exports two layers in each other's place. Hashes, size and speed are all in order.
  rm -rf "$regressed"
  step python "$here/../ci/planted.py" "$run" "$baseline" --write wrong-layer "$regressed"
  fails afq-export check "$regressed" --baseline "$baseline"

  step afq-export report "$run" --out "$work/$target.html"
  for device in $devices; do
    runner=()
    if [[ $device == adb:* && $target == android-xnnpack ]]; then runner=(--runner "$RUNNER_PTE"); fi
    if [[ $device == adb:* && $target == linux-x64-ort ]]; then runner=(--runner "$RUNNER_ONNX"); fi
    step afq-export device check "$run" --device "$device" --windows 1 --window 32 "${runner[@]}"
  done
done
step afq-export report "$work/android-xnnpack" "$work/linux-x64-ort" --out "$work/both.html"
printf '\nThe story is told: %s\n' "$work"/*.html
