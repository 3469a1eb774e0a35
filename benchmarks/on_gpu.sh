#!/usr/bin/env bash
# Runs the CUDA tests and the benchmarks on this machine's GPU: `bash benchmarks/on_gpu.sh OUT`, in under ten minutes.
#
# OUT gets log.txt, summary.txt and a JSON per benchmark. Each step has a limit in seconds, and a step that fails does not
# stop the others; the exit code is 1 if any has failed, and 2 if something is missing. Nothing is downloaded, and the
# card's settings stay as they are. From the environment: PYTHON (may be several words), OPTIONS for the first three
# benchmarks, TRAIN_OPTIONS, COMMIT where git cannot say it, and the limits LIMIT_TESTS, LIMIT_KERNEL, LIMIT_SLIDE,
# LIMIT_SCORE, LIMIT_SAMPLE and LIMIT_TRAIN.
set -uo pipefail

if [ $# -ne 1 ] || [ -z "$1" ] || [[ $1 = -* ]]; then
  echo "usage: bash benchmarks/on_gpu.sh OUT, a folder for the results" >&2
  exit 2
fi
unset CDPATH
if ! { mkdir -p "$1" && out=$(cd "$1" && pwd) && touch "$out/log.txt"; } 2> /dev/null; then
  echo "benchmarks/on_gpu.sh: cannot write into $1; name another folder" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
read -ra python <<< "${PYTHON:-python}"
rm -f "$out"/{log.txt,summary.txt,steps.txt,slide.json,score.json,sample.json,train.json}

for command in timeout "${python[0]}"; do
  if ! command -v "$command" > /dev/null; then
    echo "benchmarks/on_gpu.sh: $command is missing; another Python is named by PYTHON=python3" | tee "$out/summary.txt" >&2
    exit 2
  fi
done
"${python[@]}" -m benchmarks.on_gpu check 2>&1 | tee "$out/summary.txt"
if [ "${PIPESTATUS[0]}" -ne 0 ]; then
  exit 2
fi

running=
stop() { # EXIT CODE
  if [ -n "$running" ]; then
    kill -INT "$running" # `timeout` passes it on, and kills what does not end
    wait "$running"
  fi
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP

failed=0
step() { # NAME LIMIT ARGUMENTS...
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  echo "$name: ${python[*]} $*, at most $limit s"
  printf '\n=== %s: %s\n' "$name" "$*" >> "$out/log.txt"
  # Ctrl-C's signal first: a benchmark then leaves no temporary file. With job control, that is not ignored.
  set -m
  timeout --signal=INT --kill-after=5 "$limit" "${python[@]}" "$@" >> "$out/log.txt" 2>&1 < /dev/null &
  running=$!
  set +m
  wait "$running"
  code=$?
  running=
  if [ $code -ne 0 ]; then
    failed=1
  fi
  echo "$name $code $((SECONDS - begin)) $limit" >> "$out/steps.txt"
}

benchmark() { # NAME LIMIT OPTIONS...
  local name=$1 default=$2 limit=LIMIT_${1^^}
  shift 2
  step "$name" "${!limit:-$default}" -m "benchmarks.$name" --device cuda "$@" --json "$out/$name.json"
}

tests=(-m pytest -q -p no:cacheprovider)
if "${python[@]}" -m benchmarks.on_gpu has xdist 2> /dev/null; then
  tests+=(-n 6)
fi
step tests "${LIMIT_TESTS:-140}" "${tests[@]}" tests -k cuda
step kernel "${LIMIT_KERNEL:-40}" "${tests[@]}" tests/engine -k test_kernel
read -ra options <<< "${OPTIONS---full}"
read -ra train_options <<< "${TRAIN_OPTIONS-}"
benchmark slide 80 "${options[@]}"
benchmark score 150 "${options[@]}"
benchmark sample 70 "${options[@]}"
benchmark train 60 "${train_options[@]}"

"${python[@]}" -m benchmarks.on_gpu summary "$out" 2>&1 | tee -a "$out/summary.txt"
if [ "${PIPESTATUS[0]}" -ne 0 ]; then
  failed=1
fi
rm -f "$out/steps.txt"
exit $failed
