"""`make study`: the quickstart's text, then `fairseq-moe study` on a file; resumable.

The quickstart makes text and data-bins, once, in the folder --out.
"""

import subprocess
import sys
from pathlib import Path
from typing import Sequence

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import OneLineParser

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart" / "run.py"


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=HERE / "two_cores.yaml")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study-text"), help="folder for text and data"
    )
    parser.add_argument(
        "--text-bytes",
        type=int,
        default=1_500_000,
        help="bytes of training text per domain (default: 1500000, as for the committed results)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    args = parser.parse_args(argv)
    command = [sys.executable, str(QUICKSTART), "--out", str(args.out), "--data-only"]
    command += ["--text-bytes", str(args.text_bytes)]
    try:
        status = subprocess.call(command)
    except KeyboardInterrupt:
        return 130
    return status or cli.main(["study", str(args.file), "--jobs", str(args.jobs)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
