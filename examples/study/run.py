"""`make study`: the quickstart's text, then `fairseq-moe study` on a file; resumable.

The quickstart makes text and data-bins, once, where the file's `data` is.
"""

import subprocess
import sys
from pathlib import Path
from typing import Sequence

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import OneLineParser, UserError, program_status, require_positive
from fairseq_moe_ext.study import plan, yaml_file

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart" / "run.py"


def text_folder(file: Path) -> Path:
    """Where the quickstart must put its text, for its data-bins to be where the study looks for
    them. Raises UserError for a file that the study would refuse."""
    content = yaml_file.read(file)
    plan.planned(content, file)
    data = Path(content["data"])
    if data.name != "data":
        raise UserError(f"{file}: data {data}: use a folder called data, as the quickstart does")
    return data.parent


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=HERE / "two_cores.yaml")
    parser.add_argument(
        "--text-bytes",
        type=int,
        default=1_500_000,
        help="bytes of training text per domain (default: 1500000)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    args = parser.parse_args(argv)

    def work() -> int:
        require_positive(args, "jobs")
        text = text_folder(args.file)
        command = [sys.executable, str(QUICKSTART), "--out", str(text), "--data-only"]
        status = subprocess.call([*command, "--text-bytes", str(args.text_bytes)])
        return status or cli.main(["study", str(args.file), "--jobs", str(args.jobs)])

    return program_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
