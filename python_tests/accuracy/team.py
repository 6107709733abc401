"""Run by several processes: an examination in blocks so small that each has some."""

from __future__ import annotations

import sys

from benchmarks.accuracy import answers, evaluate

if __name__ == "__main__":
    answers.BLOCK = 8
    sys.exit(evaluate.main(sys.argv[1:]))
