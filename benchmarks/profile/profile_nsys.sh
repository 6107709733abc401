#!/usr/bin/env bash
# The timeline of one op at one shape, or of a patched model's prefill (Nsight Systems): kernels,
# launches, gaps, and which NVTX range they belong to.
#   profile_nsys.sh --op select_merge --tokens 576 --batch 1
#   profile_nsys.sh --model llava-1.5-7b --keep 64 --batch 8
# --out FOLDER: the report, a CSV file for each table and all tables as text (build/profile).
# Other options are those of profile_target.py or profile_model.py.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
nsys=${NSYS:-$(program nsys)}
need_gpu
read_options "$@"
[ -z "$full$range" ] || missing "--full and --range are options of profile_ncu.sh"
export CDROP_NVTX=1

report="$out/$(label)"
tables=(--report cuda_gpu_kern_sum --report nvtx_gpu_proj_sum --report cuda_api_sum)
# The program goes on after the capture and must end by itself.
"$nsys" profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --kill=none \
  --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true \
  --output="$report" "$PYTHON" "${command[@]}" >"$report.log" 2>&1 || {
  tail -n 20 "$report.log" >&2
  exit 1
}
"$nsys" stats "${tables[@]}" --force-export=true --force-overwrite=true --format csv \
  --output "$report" "$report.nsys-rep" >>"$report.log" 2>&1
"$nsys" stats "${tables[@]}" --format column --output - "$report.nsys-rep" | tee "$report.txt"
echo "written to $report*"
