"""A ladder's YAML file -> its stages, each a file for `fairseq-moe study`."""

import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import yaml

from ... import ranges
from ...data_bin import DICTIONARY
from ...errors import UserError
from ...evaluation.report import FIGURES
from ...models.architectures import ARCHITECTURES
from ...wording import did_you_mean
from .. import yaml_file
from ..flags import blocks_per_update
from ..plan import ARM, FAMILIES, Keys, Run, check_name, check_seeds, checked, matching, planned
from . import checks

LR = "lr"  # the stage that tries learning rates
PROBE = "probe"  # the folder of measurements, beside those of the stages
_FILES = (".yaml", ".json", ".html", ".md")  # beside them
_DENSE_ARCH, _MOE_ARCH = "dense_lm_tiny", "moe_lm_tiny"

_TOP: Keys = {
    "title": (str, "A ladder"),
    "data": (str, None),
    "corpora": (list, []),
    "out": (str, None),
    "context": (int, None),
    "vocabulary": (int, None),
    "warmup": (float, 0.1),
    "train": (dict, None),
    "evaluate": (dict, {}),
    "dense": (dict, None),
    "moe": (dict, None),
    "learning-rate": (dict, None),
    "stages": (dict, None),
}
_MOE: Keys = {"bases": (list, None), "flags": (dict, {}), "arms": (dict, None)}
_ARM: Keys = {
    "experts": (int, None),
    "granularity": (int, 1),
    "bases": (list, []),
    "flags": (dict, {}),
}
_LEARNING_RATE: Keys = {"tokens": (int, None), "values": (dict, None)}
_STAGE: Keys = {
    "tokens": (int, None),
    "seeds": (list, [1]),
    "arms": (list, ["*"]),
    "screen": (str, ""),
    "at-least": (float, 2.0),
    "bf16": (bool, False),
}


class Arm(NamedTuple):
    """A model. `experts` of the width of the base's feed-forward network hold as many parameters as
    its experts do; `granularity` times as many of them, each as much narrower, are picked from."""

    name: str
    base: str  # the dense size that it has the FLOPs of
    arch: str
    flags: Dict[str, Any]
    experts: int = 1
    granularity: int = 1
    own: Mapping[str, Any] = {}  # of `flags`, those that its base and other sparse arms lack

    @property
    def family(self) -> str:
        return FAMILIES[self.arch == _MOE_ARCH]


class Stage(NamedTuple):
    """Trainings on one number of tokens, in a folder of their own."""

    name: str
    tokens: int
    updates: int
    seeds: List[int]
    arms: List[Arm]  # with `lr` among their flags in the stage LR alone
    screen: str = ""  # the stage by whose factors the sparse arms of this one are chosen
    at_least: float = 0.0  # the factor that they must have had in domain
    bf16: bool = False  # every arm with --bf16

    def model(self, arm: Arm) -> str:
        """The name of an arm of this stage, without its rate in the stage LR."""
        return arm.name.rpartition(f"-{LR}")[0] if self.name == LR else arm.name


class Ladder(NamedTuple):
    """What the file asks for."""

    title: str
    data: str
    out: Path
    context: int
    vocabulary: int  # of the data, for costs before there are checkpoints
    warmup: float  # share of the updates
    train: Dict[str, Any]
    evaluate: Dict[str, Any]
    forecast: Path  # beside the file
    arms: List[Arm]
    tried: Dict[str, List[Arm]]  # an arm whose learning rate is searched -> it, with each value
    stages: List[Stage]  # the first one is LR, if an arm has several rates to try
    corpora: Sequence[str] = ()  # that the text should have; the result says which are missing

    @property
    def tokens_per_update(self) -> int:
        return self.context * self.train["batch-size"] * self.train.get("update-freq", 1)

    def settings(self, arm: Arm) -> Dict[str, Any]:
        """An arm's model: its architecture, then the flags, by the names of config.py."""
        flags = {**self.train, **arm.flags}
        given = {flag.replace("-", "_"): v for flag, v in flags.items() if v is not False}
        return {"tokens_per_sample": self.context, **ARCHITECTURES[arm.arch], **given}

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def searched(self, arm: Arm) -> str:
        """The arm of `tried` whose learning rate an arm gets: itself, or else the first of its
        family with its base, or else the first of its family."""
        family = [a for a in self.arms if a.name in self.tried and a.family == arm.family]
        return min(family, key=lambda a: (a.name != arm.name, a.base != arm.base)).name

    def folder(self, stage: Stage, arm: Arm, seed: int) -> Path:
        """Of a run, as a study of arms calls it."""
        return self.out / stage.name / f"{ARM}-{arm.name}-{seed}"


def read(path: Path) -> Ladder:
    """Read and check a ladder's file. A study checks its data when a stage starts. Raises UserError
    for an unknown or missing key, an invalid value, a name of an arm or stage that does not exist,
    or another vocabulary than the data has, if they are there."""
    asked = checked(yaml_file.read(path), _TOP, str(path))
    blocks_per_update(asked["train"], f"{path}: train")
    checks.check_set_here(asked["train"], f"{path}: train")
    ranges.require(ranges.SIZE, asked["context"], f"{path}: context")
    ranges.require(ranges.SIZE, asked["vocabulary"], f"{path}: vocabulary")
    checks.check_vocabulary(asked["vocabulary"], Path(asked["data"]) / DICTIONARY, path)
    if not 0 <= asked["warmup"] < 1:
        raise UserError(f"{path}: warmup {asked['warmup']}: use a share of the updates below 1")
    arms = _arms(asked, path)
    ladder = Ladder(
        asked["title"],
        asked["data"],
        Path(asked["out"]),
        asked["context"],
        asked["vocabulary"],
        asked["warmup"],
        asked["train"],
        asked["evaluate"],
        path.with_name(f"{path.stem}_forecast.json"),
        arms,
        {},
        [],
        _names(asked["corpora"], f"{path}: corpora"),
    )
    per_update = ladder.tokens_per_update
    tokens, tried = _search(asked, arms, path)
    updates = _updates(tokens, per_update, f"{path}: learning-rate: tokens")
    tries = sum(tried.values(), [])
    search = Stage(
        LR, tokens, updates, [1], [a for of in tried.values() if len(of) > 1 for a in of]
    )
    stages = [*([search] if search.arms else []), *_stages(asked, arms, per_update, path)]
    fewest = min(stage.updates for stage in stages)
    everything = search._replace(arms=arms + tries, updates=fewest)
    planned(
        _study(ladder, everything, {arm.name: arm.flags.get(LR, 1) for arm in everything.arms}),
        path,
    )
    checks.check_whole(ladder.train, f"{path}: train")
    for arm in arms:
        checks.check_whole(arm.flags, f"{path}: {arm.name}")
    return ladder._replace(tried=tried, stages=stages)


def _names(given: List[Any], where: str) -> List[str]:
    """Raises UserError for what is no text."""
    for name in given:
        if not isinstance(name, str):
            raise UserError(f"{where}: {name}: use names, as [mail, books]")
    return given


def _arms(asked: Mapping[str, Any], path: Path) -> List[Arm]:
    """The dense sizes, then the sparse models of each."""
    dense = [
        _dense(name, flags, f"{path}: dense: {name}") for name, flags in asked["dense"].items()
    ]
    if len(dense) < 2:
        raise UserError(f"{path}: dense: name two sizes or more, to compute factors between them")
    moe = checked(asked["moe"], _MOE, f"{path}: moe")
    checks.check_set_here(moe["flags"], f"{path}: moe: flags")
    bases = {arm.name: arm for arm in dense}
    sparse: List[Arm] = []
    for name, arm in moe["arms"].items():
        where = f"{path}: moe: arms: {name}"
        check_name(name, where)
        values = checked(arm, _ARM, where)
        checks.check_set_here(values["flags"], f"{where}: flags")
        for key in ("experts", "granularity"):
            ranges.require(ranges.POSITIVE_COUNT, values[key], f"{where}: {key}")
        for base in map(str, values["bases"] or moe["bases"]):
            if base not in bases:
                there = ", ".join(bases) + did_you_mean(base, bases)
                raise UserError(f"{where}: bases: {base}: not one of {there}")
            sparse.append(_sparse(bases[base], str(name), moe["flags"], values, where))
    arms = dense + sorted(sparse, key=lambda arm: list(bases).index(arm.base))
    names = [arm.name for arm in arms]
    for arm in arms:
        if names.count(arm.name) > 1:
            raise UserError(f"{path}: moe: two arms are called {arm.name}; rename or remove one")
    return arms


def _dense(name: Any, flags: Any, where: str) -> Arm:
    check_name(name, where)
    if not isinstance(flags, dict):
        raise UserError(f"{where}: {flags!r} is not a mapping of flags to values")
    checks.check_set_here(flags, where)
    for flag in ("decoder-layers", "decoder-embed-dim", "decoder-ffn-embed-dim"):
        if type(flags.get(flag)) is not int:
            raise UserError(f"{where}: {flag} {flags.get(flag)!r}: write a whole number")
    return Arm(str(name), str(name), _DENSE_ARCH, flags)


def _sparse(
    base: Arm, name: str, common: Mapping[str, Any], asked: Dict[str, Any], where: str
) -> Arm:
    """A sparse arm with the FLOPs of its base, but for the router."""
    experts, granularity = asked["experts"], asked["granularity"]
    width, rest = divmod(base.flags["decoder-ffn-embed-dim"], granularity)
    if rest:
        raise UserError(
            f"{where}: granularity {granularity}: does not divide the decoder-ffn-embed-dim of "
            f"{base.name}, {base.flags['decoder-ffn-embed-dim']}; use one of its divisors"
        )
    flags = {
        **base.flags,
        **common,
        "moe-expert-count": experts * granularity,
        "moe-expert-ffn-dim": width,
        "moe-top-k": granularity,
        **asked["flags"],
    }
    name = f"{base.name}-{name}"
    return Arm(name, base.name, _MOE_ARCH, flags, experts, granularity, asked["flags"])


def _updates(tokens: int, per_update: int, where: str) -> int:
    ranges.require(ranges.POSITIVE_COUNT, tokens, where)
    updates = int(tokens / per_update + 0.5)
    if not updates:
        raise UserError(f"{where} {tokens}: less than an update, which has {per_update}; raise it")
    return updates


def _search(
    asked: Mapping[str, Any], arms: List[Arm], path: Path
) -> Tuple[int, Dict[str, List[Arm]]]:
    """The tokens of a try, and Ladder.tried."""
    where = f"{path}: learning-rate"
    search = checked(asked["learning-rate"], _LEARNING_RATE, where)
    tried: Dict[str, List[Arm]] = {}
    for key, values in search["values"].items():
        name = str(key)
        found = [arm for arm in arms if arm.name == name]
        if not found:
            names = ", ".join(arm.name for arm in arms)
            raise UserError(f"{where}: values: {name}: there is no such arm; use {names}")
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: values: {name}: {values!r}: list one learning rate or more")
        tried[name] = [_with_rate(found[0], value, f"{where}: values: {name}") for value in values]
        if len({arm.name for arm in tried[name]}) < len(values):
            raise UserError(f"{where}: values: {name}: {values}: a learning rate appears twice")
    for family in FAMILIES:
        if not any(tries[0].family == family for tries in tried.values()):
            raise UserError(f"{where}: values: name a {family} arm too, with its learning rates")
    return search["tokens"], tried


def _with_rate(arm: Arm, value: Any, where: str) -> Arm:
    try:
        rate = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise UserError(f"{where}: {value!r} is no learning rate; use a number above 0")
    name = f"{arm.name}-lr{1000 * rate:g}"
    return arm._replace(name=name, flags={**arm.flags, LR: value})


def _stages(asked: Mapping[str, Any], arms: List[Arm], per_update: int, path: Path) -> List[Stage]:
    stages: List[Stage] = []
    if not asked["stages"]:
        raise UserError(f"{path}: stages is empty; name one, such as 4M: {{tokens: 4_000_000}}")
    for name, stage in asked["stages"].items():
        where = f"{path}: stages: {name}"
        check_name(name, where)
        values = checked(stage, _STAGE, where)
        before = [earlier.name for earlier in stages]
        if str(name) in (LR, PROBE, FIGURES) or str(name).endswith(_FILES):
            raise UserError(
                f"{where}: is the name of a folder in {asked['out']}: do not use {LR}, {PROBE}, "
                f"{FIGURES}, or a name that ends in {', '.join(_FILES)}"
            )
        check_seeds(values["seeds"], where)
        if not values["arms"]:
            raise UserError(f"{where}: arms is empty; list names or patterns such as d0-*")
        ranges.require(ranges.WEIGHT, values["at-least"], f"{where}: at-least")
        if values["screen"] and values["screen"] not in before:
            raise UserError(
                f"{where}: screen {values['screen']}: not a stage before it: "
                f"{', '.join(before) or 'there is none'}"
            )
        if "at-least" in stage and not values["screen"]:
            raise UserError(f"{where}: at-least has no effect without screen; name a stage there")
        for earlier in stages:
            if earlier.tokens == values["tokens"] and earlier.bf16 != values["bf16"]:
                raise UserError(
                    f"{where}: bf16 {values['bf16']}: stage {earlier.name}, on as many tokens, has "
                    "another; savings compare runs of one precision"
                )
        picked = select(arms, values["arms"], f"{where}: arms")
        if values["bf16"]:  # an arm in bfloat16 would be its twin once more
            picked = [arm for arm in picked if not float32_twin(arm, picked)]
        stages.append(
            Stage(
                str(name),
                values["tokens"],
                _updates(values["tokens"], per_update, f"{where}: tokens"),
                values["seeds"],
                picked,
                values["screen"],
                values["at-least"],
                values["bf16"],
            )
        )
    return stages


def float32_twin(arm: Arm, arms: Sequence[Arm]) -> str:
    """Of an arm that computes in bfloat16, the arm with the same other flags; "" if none has."""
    flags = {name: value for name, value in arm.flags.items() if name != "bf16"}
    twins = [other.name for other in arms if (other.arch, other.flags) == (arm.arch, flags)]
    return twins[0] if arm.flags.get("bf16") and twins else ""


def select(arms: Sequence[Arm], patterns: Sequence[str], where: str) -> List[Arm]:
    """Those whose name matches one of the patterns (d0, d0-*). Raises UserError for a pattern that
    matches none."""
    names = matching([arm.name for arm in arms], [*map(str, patterns)], where, "arm")
    return [arm for arm in arms if arm.name in names]


def study_file(ladder: Ladder, stage: Stage, rates: Optional[Mapping[str, Any]]) -> str:
    """A stage as the YAML of a study of arms. `rates` has the learning rate of each arm; None in
    the stage LR, whose arms have theirs."""
    return yaml.safe_dump(_study(ladder, stage, rates), sort_keys=False, width=1000)


def runs_of(ladder: Ladder, stage: Stage, rates: Optional[Mapping[str, Any]]) -> List[Run]:
    """A stage's runs as its study makes them, in order of seeds, then arms; `rates` as above."""
    return planned(_study(ladder, stage, rates), ladder.out / f"{stage.name}.yaml").runs


def _study(ladder: Ladder, stage: Stage, rates: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    train = {**ladder.train, **({"bf16": True} if stage.bf16 else {})}
    warmup = {"warmup-updates": int(ladder.warmup * stage.updates + 0.5)}
    train = _behind(train, "lr-scheduler", warmup)
    arms = {}
    for arm in stage.arms:
        rate = {} if rates is None else {LR: rates[arm.name]}
        arms[arm.name] = {"arch": arm.arch, "flags": {**arm.flags, **rate}}
    return {
        "title": f"{ladder.title}, {stage.name}",
        "data": ladder.data,
        "out": str(ladder.out / stage.name),
        "context": ladder.context,
        "updates": stage.updates,
        "seeds": stage.seeds,
        "reference": stage.arms[0].name,
        "train": train,
        "evaluate": ladder.evaluate,
        "arms": arms,
    }


def _behind(flags: Dict[str, Any], flag: str, more: Dict[str, Any]) -> Dict[str, Any]:
    """With more flags behind a flag, or at the end."""
    if flag not in flags:
        return {**flags, **more}
    place = list(flags).index(flag) + 1
    items = list(flags.items())
    return dict(items[:place] + list(more.items()) + items[place:])
