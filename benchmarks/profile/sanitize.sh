#!/usr/bin/env bash
# Run every op once under each of compute-sanitizer's tools; the exit code is 1 if any found an error.
# Tools can be named: sanitize.sh memcheck racecheck
set -uo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer is not on the PATH: nothing was checked"
  exit 3
fi
# Each tensor its own allocation, so that a step past its end is a step into nothing.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
failed=0
for tool in ${*:-memcheck racecheck synccheck initcheck}; do
  echo "--- $tool"
  timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 \
    "$PYTHON" profile_target.py --once || failed=1
done
exit $failed
