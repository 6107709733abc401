#!/usr/bin/env bash
# Counters of every kernel of one op at one shape, or of a patched model's prefill (Nsight Compute):
#   profile_ncu.sh --op select_merge --tokens 576 --batch 1
#   profile_ncu.sh --model mid --keep 64 --range cdrop.choose
# --range NAME: kernels inside this NVTX range alone; `cdrop@select_merge` names one of a domain.
# --full: every counter there is. --out FOLDER: the report, raw.csv and the table (build/profile).
# Other options are those of profile_target.py or profile_model.py.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
ncu=${NCU:-$(program ncu)}
need_gpu
read_options "$@"
export CDROP_NVTX=1

report="$out/$(label)"
counters=(--section WarpStateStats --metrics "$("$PYTHON" "$here/ncu_summary.py" --metrics)")
[ -z "$full" ] || counters+=(--set full)
filter=(--nvtx)
[ -z "$range" ] || filter+=(--nvtx-include "$range/")  # the slash: a range of push and pop

if ! "$ncu" --profile-from-start off "${filter[@]}" "${counters[@]}" --force-overwrite \
  --export "$report" "$PYTHON" "${command[@]}" >"$report.log" 2>&1; then
  if grep -q ERR_NVGPUCTRPERM "$report.log"; then
    missing "ncu may not read the GPU's counters (ERR_NVGPUCTRPERM): run it as root, or let the \
administrator load the driver with NVreg_RestrictProfilingToAdminUsers=0"
  fi
  tail -n 20 "$report.log" >&2
  exit 1
fi
"$ncu" --import "$report.ncu-rep" --page raw --csv --print-units base >"$report.raw.csv"
"$PYTHON" "$here/ncu_summary.py" "$report.raw.csv" | tee "$report.md"
echo "written to $report.*"
