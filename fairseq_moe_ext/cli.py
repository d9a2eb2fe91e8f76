"""`fairseq-moe`: a thin front; every subcommand is one call into the package."""

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from fairseq_moe_ext.errors import UserError


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit status (0, 1 for a user's mistake, 130 for Ctrl-C).

    argparse itself exits with 2 for flags it does not know.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairseq-moe", description="Mixture-of-experts language models for fairseq 0.12.2."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    user_dir = commands.add_parser("user-dir", help="print the folder for fairseq's --user-dir")
    user_dir.set_defaults(run=lambda args: print(Path(__file__).resolve().parent))

    from fairseq_moe_ext.prepare import command as prepare

    sub = commands.add_parser("prepare", help="turn your own text into data-bins")
    prepare.add_arguments(sub)
    sub.set_defaults(run=prepare.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
