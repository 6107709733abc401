#!/usr/bin/env bash
# Run every op once under each of compute-sanitizer's tools, side by side; the exit code is 1 if any
# found an error, 2 if nothing could be checked. Tools can be named: sanitize.sh memcheck racecheck
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
cd "$here" || exit 1
LIMIT=${LIMIT:-80}
sanitizer=$(program compute-sanitizer) || exit 2
need_gpu
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
"$PYTHON" profile_target.py --once || exit 1  # compiles the Triton kernels, once for all tools
# Each tensor its own allocation, so that a step past its end is a step into nothing.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
tools=("$@")
((${#tools[@]})) || tools=(memcheck racecheck synccheck initcheck)
for tool in "${tools[@]}"; do
  (
    timeout "$LIMIT" "$sanitizer" --tool "$tool" --error-exitcode 1 --print-limit 20 \
      "$PYTHON" profile_target.py --once >"$logs/$tool.log" 2>&1
    echo $? >"$logs/$tool.rc"
  ) &
done
wait
failed=0
for tool in "${tools[@]}"; do
  code=$(cat "$logs/$tool.rc")
  echo "--- $tool: exit code $code$([ "$code" = 124 ] && echo " (over $LIMIT s)")"
  tail -n 40 "$logs/$tool.log"
  [ "$code" = 0 ] || failed=1
done
exit $failed
