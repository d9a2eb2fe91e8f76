"""Compare routers at equal FLOPs: the quickstart's text, then `fairseq-moe study`; resumable."""

import subprocess
import sys
from pathlib import Path
from typing import Sequence

from fairseq_moe_ext import outputs
from fairseq_moe_ext.errors import OneLineParser, program_status

HERE = Path(__file__).resolve().parent
STUDY = HERE.parent / "study" / "run.py"
FULL = HERE / "two_cores.yaml"
# What --short has instead, and writes beside its runs.
SHORT = {
    "out: runs/routers": "out: {out}",
    "updates: 450": "updates: 20",
    "warmup-updates: 45": "warmup-updates: 5",
    "seeds: [1, 2, 3]": "seeds: [1, 2]",
}


def short(folder: Path) -> Path:
    """The comparison with few updates and two seeds, as a file in the folder: a try."""
    text = FULL.read_text(encoding="utf-8")
    for full, shorter in SHORT.items():
        assert full in text, full
        text = text.replace(full, shorter.format(out=folder))
    folder.mkdir(parents=True, exist_ok=True)
    outputs.write_text(folder / "short.yaml", text)
    return folder / "short.yaml"


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-bytes", type=int, help="bytes of training text per domain")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument(
        "--short",
        action="store_true",
        help="20 updates and two seeds, in runs/routers-short: a trial of a few minutes",
    )
    args = parser.parse_args(argv)

    def work() -> int:
        file = short(Path("runs/routers-short")) if args.short else FULL
        command = [sys.executable, str(STUDY), "--file", str(file), "--jobs", str(args.jobs)]
        if args.text_bytes is not None:
            command += ["--text-bytes", str(args.text_bytes)]
        return subprocess.call(command)

    return program_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
