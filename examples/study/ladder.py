"""How much compute sparsity saves: a ladder of dense models, and sparse ones, at several budgets.

Each stage of the file is a study; they run one after the other. After an interruption the same
command goes on. Text and data-bins come first: examples/study/README.md.
"""

import argparse
import sys
from pathlib import Path
from typing import List, Sequence

from fairseq_moe_ext.errors import OneLineParser, UserError, program_status
from fairseq_moe_ext.study.ladder import forecast, hours, needed, probe, running, stages
from fairseq_moe_ext.wording import flag

FILE = Path(__file__).resolve().parent / "ladder.yaml"
GPU_GFLOPS = 20_000


def words(text: str) -> List[str]:
    """Of a list with commas. Raises argparse.ArgumentTypeError for an empty one."""
    found = [word for word in text.split(",") if word]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: name one or more, or leave it out")
    return found


def numbers(text: str) -> List[int]:
    return [int(word) for word in words(text)]


def parser() -> argparse.ArgumentParser:
    found = OneLineParser(description=__doc__.splitlines()[0])
    found.add_argument("file", type=Path, nargs="?", default=FILE, help="default: ladder.yaml")
    found.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    found.add_argument("--stages", type=words, default=[], metavar="S,S", help="these alone")
    found.add_argument(
        "--arms", type=words, default=[], metavar="A,A", help="these alone; patterns as d0-*"
    )
    found.add_argument("--seeds", type=numbers, default=[], metavar="N,N", help="these alone")
    found.add_argument(
        "--gflops",
        type=float,
        default=100.0,
        help="speed for the hours of arms that were not probed (default: 100)",
    )
    instead = found.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the hours and stop")
    instead.add_argument(
        "--write", action="store_true", help="write the files of the stages and stop"
    )
    instead.add_argument(
        "--probe", action="store_true", help="time each arm's training steps and stop"
    )
    instead.add_argument(
        "--forecast", action="store_true", help="write FILE_forecast.json (.md) and stop"
    )
    instead.add_argument("--only-result", action="store_true", help="gather what is done and stop")
    instead.add_argument(
        "--needed",
        action="store_true",
        help="print what saving 4 and 8 times would need, in tokens and hours, and stop",
    )
    found.add_argument(
        "--gpu-gflops",
        type=float,
        help=f"of --needed: speed of a GPU on models so small (default: {GPU_GFLOPS}, assumed)",
    )
    found.add_argument(
        "--measured",
        type=Path,
        metavar="FOLDER",
        help="of --needed: the ladder whose savings it continues (default: the file's `out`)",
    )
    return found


def check(args: argparse.Namespace, asked: running.Chosen) -> None:
    """Raise UserError for numbers out of range, and for flags that do not go together."""
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: use 1 or more")
    for name in ("gflops", "gpu_gflops"):
        value = getattr(args, name)
        if value is not None and not 1e-3 <= value <= 1e9:
            raise UserError(f"{flag(name)} {value:g}: use a number from 0.001 to 1e9")
    for name in ("gpu_gflops", "measured"):
        value = getattr(args, name)
        if value is not None and not args.needed:
            raise UserError(f"{flag(name)} {value}: is of --needed; add it, or leave this out")
    for action in ("forecast", "only_result", "needed"):
        if getattr(args, action) and any(asked):
            raise UserError(
                f"{flag(action)} is of the whole ladder: leave out --stages, --arms and --seeds"
            )


def run(args: argparse.Namespace) -> int:
    """The exit status. Raises UserError for what cannot be."""
    asked = running.Chosen(args.stages, args.arms, args.seeds)
    check(args, asked)
    ladder = stages.read(args.file)
    if args.forecast:
        print(forecast.write(ladder))
        return 0
    if args.only_result:
        running.check_result(ladder)
        running.write_result(ladder)
        print(f"{ladder.out / 'report.html'} and {ladder.out / 'tables.md'}")
        return 0
    if args.needed:
        if args.measured and not (args.measured / "result.json").is_file():
            raise UserError(f"--measured {args.measured}: has no result.json; name another folder")
        gpu_gflops = args.gpu_gflops or GPU_GFLOPS
        needed.say(ladder, args.measured or ladder.out, args.gflops, gpu_gflops)
        return 0
    wanted = running.chosen(ladder, asked)
    if args.probe:
        named = {stage.model(arm) for stage in wanted for arm in stage.arms}
        probe.run(ladder, [arm for arm in ladder.arms if arm.name in named])
        return 0
    print("\n".join(hours.said(ladder, wanted, args.gflops)), flush=True)
    if args.write:
        for stage in wanted:
            whole = running.screened(ladder, ladder.stage(stage.name))
            print(running.write_study(ladder, whole) if whole.arms else f"{stage.name}: no arm")
    if args.dry_run or args.write:
        return 0
    return running.do(ladder, wanted, args.jobs, args.gflops)


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    return program_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
