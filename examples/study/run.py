"""`make study`: the quickstart's text, then `fairseq-moe study` on a file; resumable.

Text and data-bins are made by the quickstart's own functions, once, in DATA's folder.
"""

import argparse
import sys
from pathlib import Path
from typing import Sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))
import corpora  # noqa: E402
import run as quickstart  # noqa: E402
from progress import Screen  # noqa: E402

from fairseq_moe_ext import cli  # noqa: E402
from fairseq_moe_ext.errors import UserError  # noqa: E402


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=HERE / "two_cores.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/study-text"), help="text and data")
    parser.add_argument("--text-bytes", type=int, default=quickstart.TEXT_BYTES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    args = parser.parse_args(argv)
    made = quickstart.Run(args.out, 0, args.text_bytes, Screen())
    try:
        made.open()
        held_out = {domain.name: domain.held_out for domain in corpora.DOMAINS}
        command = quickstart.prepare_command(made, held_out)
        made.stage("text", "Gather text", lambda: quickstart.gather_text(made))
        made.stage("prepare", "Binarise", lambda: quickstart.prepare(made, command))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        made.stop()
    return cli.main(["study", str(args.file), "--jobs", str(args.jobs)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
