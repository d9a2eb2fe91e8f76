"""A study's YAML file -> the runs it names and their commands."""

import fnmatch
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from .. import data_bin, ranges
from ..errors import UserError
from ..wording import did_you_mean
from . import command_line, yaml_file
from .child import console_script
from .flags import COUNTED, as_words, blocks_per_update, check_flag

FAMILIES = ("dense", "moe")
ARM = "arm"  # the family of every arm
PACKAGE = Path(__file__).resolve().parents[1]

Keys = Mapping[str, Tuple[type, Any]]

# key -> (type, what a missing one is; None: it must be there)
_TOP: Keys = {
    "title": (str, "A study"),
    "data": (str, None),
    "out": (str, None),
    "test": (list, []),
    "context": (int, None),
    "updates": (int, None),
    "seeds": (list, None),
    "train": (dict, {}),
    "evaluate": (dict, {}),
    "priming": (dict, {}),
    "dense": (dict, {}),
    "moe": (dict, {}),
    "arms": (dict, {}),
    "reference": (str, ""),
}
_FAMILY: Keys = {"arch": (str, None), "flags": (dict, {}), "sizes": (dict, None)}
_ARM: Keys = {"arch": (str, None), "flags": (dict, {})}
_EVALUATE: Keys = {"stride": (int, 0), "batch-size": (int, 16), "bootstrap": (int, 1000)}
# of `fairseq-moe priming`; no folder: no priming
_PRIMING: Keys = {"folder": (str, ""), "tasks": (str, ""), "shots": (list, [0]), "draws": (int, 25)}
_AT_MOST_THE_UPDATES = {
    "validate-after-updates": "never validate and have no checkpoint_best.pt",
    "log-interval": "log none of them, nor the experts that its routers take",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # a part of a folder's name
_KINDS = {
    bool: "true or false; write one of them",
    str: "text; write some, in quotes if it is a number",
    int: "a whole number; write one",
    float: "a number; write one",
    list: "a list; write [one, another]",
    dict: "a mapping; write {key: value}",
}


class Run(NamedTuple):
    """One training and its evaluation."""

    family: str
    size: str
    seed: int
    updates: int
    folder: Path
    train: List[str]  # commands
    evaluate: List[str]
    prime: List[str]  # [] for none

    @property
    def name(self) -> str:
        return f"{self.family} {self.size} seed {self.seed}"

    @property
    def data(self) -> Path:
        """The folder that it is trained on."""
        return Path(self.train[1])

    @property
    def commands(self) -> List[List[str]]:
        return [command for command in (self.train, self.evaluate, self.prime) if command]


class Plan(NamedTuple):
    """What a study's file asks for."""

    title: str
    out: Path
    context: int
    tokens_per_update: int
    runs: List[Run]  # the first seed of every size first
    reference: str  # the arm that others are compared with; "" in a study of two families
    sets: Collection[str] = ()  # names of the test sets; empty: not looked for


def read(path: Path) -> Plan:
    """Read and check a study's file; paths in it are relative to the current folder. Raises
    UserError, before any work, for an unknown or missing key, an invalid value, or a corpus that is
    not there."""
    content = yaml_file.read(path)
    plan = planned(content, path)
    folders: List[Path] = []
    sets: Dict[str, Path] = {}
    for key, names in (("data", [content["data"]]), ("test", content.get("test", []))):
        folders += map(Path, names)
        try:
            sets = data_bin.sets_of(folders, "test") if names else sets
        except UserError as error:
            raise UserError(f"{path}: {key}: {error}") from None
    return plan._replace(sets={*sets})


def planned(content: Any, path: Path) -> Plan:
    """Check what a study's file holds. Raises UserError as `read`, but does not look for data."""
    asked = checked(content, _TOP, str(path))
    check_seeds(asked["seeds"], str(path))
    ranges.require(ranges.SIZE, asked["context"], f"{path}: context")
    ranges.require(ranges.POSITIVE_COUNT, asked["updates"], f"{path}: updates")
    blocks = blocks_per_update(asked["train"], f"{path}: train")
    if not all(isinstance(folder, str) for folder in asked["test"]):
        raise UserError(f"{path}: test {asked['test']}: not a list of folders; write [folder, ...]")
    evaluation, priming = _evaluations(asked, path)
    sizes = _arms(asked, path) if asked["arms"] else _sizes(asked, path)
    out = Path(asked["out"])
    for size in sizes:
        words = training_words(_train(asked, out, size, 1))
        where = f"{path}: {size.family} {size.name}"
        command_line.check_training(words, where)
    if asked["priming"]:
        command_line.check_priming(_prime(asked, priming, out)[4:], f"{path}: priming")
    runs = []
    for seed in asked["seeds"]:
        for size in sizes:
            folder = out / f"{size.family}-{size.name}-{seed}"
            train = _train(asked, folder, size, seed)
            test = _evaluate(asked, evaluation, folder)
            prime = _prime(asked, priming, folder)
            runs.append(Run(size.family, size.name, seed, size.updates, folder, train, test, prime))
    return Plan(
        asked["title"], out, asked["context"], asked["context"] * blocks, runs, asked["reference"]
    )


def check_seeds(seeds: List[Any], where: str) -> None:
    """Raise UserError, which begins with `where`, unless these are different whole numbers."""
    if not seeds or not all(isinstance(s, int) for s in seeds) or len({*seeds}) < len(seeds):
        raise UserError(f"{where}: seeds {seeds}: give different whole numbers, such as [1, 2, 3]")
    ranges.require(ranges.SEED._replace(items=None), seeds, f"{where}: seeds")


def _evaluations(asked: Dict[str, Any], path: Path) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """The settings of `fairseq-moe evaluate` and of `fairseq-moe priming`."""
    evaluation = checked(asked["evaluate"], _EVALUATE, f"{path}: evaluate")
    for key in _EVALUATE:
        allowed = ranges.COUNT if key == "stride" else ranges.POSITIVE_COUNT  # 0: as the context
        ranges.require(allowed, evaluation[key], f"{path}: evaluate: {key}")
    if evaluation["stride"] > asked["context"]:
        raise UserError(
            f"{path}: evaluate: stride {evaluation['stride']}: is more than the context, "
            f"{asked['context']}; lower it"
        )
    priming = checked(asked["priming"], _PRIMING, f"{path}: priming")
    ranges.require(ranges.POSITIVE_COUNT, priming["draws"], f"{path}: priming: draws")
    shots = ranges.COUNT._replace(items=None)
    ranges.require(shots, priming["shots"], f"{path}: priming: shots")
    if asked["priming"] and not (priming["folder"] and Path(priming["folder"]).is_dir()):
        raise UserError(
            f"{path}: priming: folder {priming['folder'] or 'missing'}: name a folder that holds "
            "a folder for each task, as `fairseq-moe priming` takes it"
        )
    return evaluation, priming


class _Size(NamedTuple):
    """A model of a family."""

    family: str
    name: str
    arch: str
    flags: Dict[str, Any]
    updates: int


def _arms(asked: Dict[str, Any], path: Path) -> List[_Size]:
    """One model an arm; one of them is the reference."""
    for key in FAMILIES:
        if asked[key]:
            raise UserError(
                f"{path}: arms and {key}: a study has either arms or two families; remove one"
            )
    arms = []
    for name, arm in asked["arms"].items():
        where = f"{path}: arms: {name}"
        asked_arm = checked(arm, _ARM, where)
        arms.append(_size(asked, ARM, name, asked_arm["arch"], asked_arm["flags"], where))
    if asked["reference"] not in map(str, asked["arms"]):
        raise UserError(
            f"{path}: reference {asked['reference'] or 'missing'}: name the arm that the others "
            f"are compared with, one of {', '.join(map(str, asked['arms']))}"
            + did_you_mean(asked["reference"], asked["arms"])
        )
    return arms


def _sizes(asked: Dict[str, Any], path: Path) -> List[_Size]:
    if asked["reference"]:
        raise UserError(
            f"{path}: reference {asked['reference']}: is for a study of arms; remove it"
        )
    sizes: List[_Size] = []
    for family in FAMILIES:
        if not asked[family]:
            raise UserError(f"{path}: the key {family!r} is missing; add it")
        asked_family = checked(asked[family], _FAMILY, f"{path}: {family}")
        if not asked_family["sizes"]:
            raise UserError(f"{path}: {family}: sizes is empty; name a size")
        for name, flags in asked_family["sizes"].items():
            where = f"{path}: {family}: sizes: {name}"
            if not isinstance(flags, dict):
                raise UserError(f"{where}: {flags!r} is not a mapping of flags to values")
            flags = {**asked_family["flags"], **flags}
            sizes.append(_size(asked, family, name, asked_family["arch"], flags, where))
    return sizes


def _size(
    asked: Dict[str, Any], family: str, name: Any, arch: str, flags: Dict[str, Any], where: str
) -> _Size:
    """A model with the flags of all and its own. Raises UserError for invalid ones."""
    for flag in COUNTED:
        if flag in flags:
            raise UserError(
                f"{where}: {flag}: move it to train: all runs have the same tokens per update"
            )
    flags = {**asked["train"], **flags}
    updates = flags.pop("updates", asked["updates"])
    if type(updates) is not int or updates not in ranges.POSITIVE_COUNT:
        raise UserError(
            f"{where}: updates {updates!r} is out of range: use {ranges.POSITIVE_COUNT}"
        )
    for flag, value in flags.items():
        check_flag(flag, value, where)
    for flag, harm in _AT_MOST_THE_UPDATES.items():
        value = str(flags.get(flag, 0))
        if value.isdigit() and int(value) > updates:
            raise UserError(
                f"{where}: {flag} {value}: is more than the {updates} updates, so the run would "
                f"{harm}; lower it"
            )
    check_name(name, where)
    return _Size(family, str(name), arch, flags, updates)


def matching(names: Sequence[str], patterns: Sequence[str], where: str, kind: str) -> List[str]:
    """The names that one of the patterns (d0, d0-*) matches. Raises UserError for a pattern that
    matches none; kind: of what the names are."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{where} {pattern}: there is no such {kind}; use {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def check_name(name: Any, where: str) -> None:
    """Raise UserError unless the name can be part of a folder's name. YAML reads some, such as
    `on`, as values."""
    if name is None or isinstance(name, bool):
        raise UserError(f"{where}: YAML reads this name as a value; write it in quotes")
    if not NAME.fullmatch(str(name)):
        raise UserError(
            f"{where}: use letters, digits, '_', '-' and '.' in its name, 100 at most, and first a "
            "letter or a digit"
        )


def checked(mapping: Any, keys: Keys, where: str) -> Dict[str, Any]:
    """The mapping with its defaults. Raises UserError, which begins with `where`, for a key or a
    value that it cannot have, or lacks."""
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: not a mapping with the keys {', '.join(keys)}")
    for key in mapping:
        if key not in keys:
            known = f"the keys are {', '.join(keys)}{did_you_mean(key, keys)}"
            raise UserError(f"{where}: unknown key {key!r}; {known}")
    values: Dict[str, Any] = {}
    for key, (kind, default) in keys.items():
        if key not in mapping and default is None:
            raise UserError(f"{where}: the key {key!r} is missing; add it")
        value: Any = mapping.get(key, default)
        if not _is(kind, value):
            raise UserError(f"{where}: {key}: {repr(value)[:60]} is not {_KINDS[kind]}")
        if value == "" and default is None:
            raise UserError(f"{where}: {key} is empty; write some text")
        values[key] = float(value) if kind is float else value
    return values


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # nor NaN
    return isinstance(value, kind)


def _train(asked: Dict[str, Any], folder: Path, size: _Size, seed: int) -> List[str]:
    flags, updates = size.flags, size.updates
    every = max(1, updates // 5)
    scheduler = flags.get("lr-scheduler")  # the only scheduler of fairseq that needs the end
    return [
        console_script("fairseq-train"),
        asked["data"],
        *("--user-dir", str(PACKAGE), "--task", "mixture_language_modeling", "--arch", size.arch),
        *("--tokens-per-sample", str(asked["context"]), "--criterion", "moe_cross_entropy"),
        *("--max-update", str(updates), "--seed", str(seed)),
        *(["--total-num-update", str(updates)] if scheduler == "polynomial_decay" else []),
        *("--save-dir", str(folder), "--save-interval-updates", str(every)),
        *("--keep-interval-updates", "1", "--no-epoch-checkpoints"),
        *("--best-checkpoint-metric", "in_domain_ppl", "--distributed-world-size", "1"),
        *("--log-format", "json", "--log-interval", str(min(10, every))),
        *as_words(flags),
    ]


def training_words(command: Sequence[str]) -> List[str]:
    """The words of a training's command, without the program and --user-dir."""
    return [command[1], *command[4:]]


def _evaluate(asked: Dict[str, Any], settings: Dict[str, Any], folder: Path) -> List[str]:
    stride = ["--stride", str(settings["stride"])] if settings["stride"] else []
    cpu = ["--cpu"] if asked["train"].get("cpu") else []
    return [
        *(sys.executable, "-m", "fairseq_moe_ext.cli", "evaluate", asked["data"], *asked["test"]),
        *("--path", str(folder / "checkpoint_best.pt"), "--context", str(asked["context"])),
        *("--batch-size", str(settings["batch-size"])),
        *("--bootstrap", str(settings["bootstrap"])),
        *("--json", str(folder / "evaluation.json"), "--overwrite"),
        *("--unit-losses", str(folder / "unit_losses.json"), *stride, *cpu),
    ]


def _prime(asked: Dict[str, Any], settings: Dict[str, Any], folder: Path) -> List[str]:
    if not settings["folder"]:
        return []
    return [
        *(sys.executable, "-m", "fairseq_moe_ext.cli", "priming", settings["folder"]),
        *("--path", str(folder / "checkpoint_best.pt"), "--data", asked["data"]),
        *(["--tasks", settings["tasks"]] if settings["tasks"] else []),
        *("--shots", ",".join(map(str, settings["shots"])), "--draws", str(settings["draws"])),
        *("--json", str(folder / "priming.json")),
        *(["--cpu"] if asked["train"].get("cpu") else []),
    ]


def typed(command: Sequence[str]) -> str:
    """A command as one would type it: without the folders of this installation."""
    words = [Path(command[0]).name, *command[1:]]
    if list(command[1:3]) == ["-m", "fairseq_moe_ext.cli"]:
        words = ["fairseq-moe", *command[3:]]
    user_dir = '"$(fairseq-moe user-dir)"'
    return " ".join(user_dir if word == str(PACKAGE) else shlex.quote(word) for word in words)
