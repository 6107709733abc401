# What the profile scripts share. Sourced by them.
# shellcheck disable=SC2034  # the options are read by those that source this
# shellcheck shell=bash
PYTHON=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="${here%/benchmarks/profile}${PYTHONPATH:+:$PYTHONPATH}"

# Stop where a tool or the GPU is missing: one line, exit code 2.
missing() {
  echo "$1" >&2
  exit 2
}

# The path of a program: on the PATH, or with the CUDA toolkit.
program() {
  command -v "$1" || command -v "/usr/local/cuda/bin/$1" ||
    missing "$1 is not on the PATH and not in /usr/local/cuda/bin: nothing was run"
}

need_gpu() {
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    missing "no GPU that the torch of $PYTHON can use: nothing was run"
}

# Read the options: --out FOLDER (`out`), --range NAME (`range`), --full (`full`), --op NAME or
# --model NAME (`command`, the program to profile); the others are that program's.
read_options() {
  local name
  out=build/profile range='' full='' command=() rest=()
  while (($#)); do
    case $1 in
      --full) full=yes ;;
      --out | --range | --op | --model)
        name=${1#--}
        (($# > 1)) || missing "$1 needs a value"
        printf -v "$name" '%s' "$2"
        case $name in
          op) command=("$here/profile_target.py" --op "$2") ;;
          model) command=("$here/profile_model.py" --model "$2") ;;
        esac
        shift
        ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  ((${#command[@]})) || command=("$here/profile_target.py" --op select_merge)
  command+=("${rest[@]}")
  mkdir -p "$out"
}

# What the report is called: `select_merge-tokens576-batch1`.
label() {
  printf '%s ' "${command[@]:2}" | sed 's/ --/-/g; s/ //g' | tr -cd 'A-Za-z0-9._=-'
}
