"""Wrapping functions of other packages: a table with a row for each, and one rule for "once".

    wrap("fairseq.utils:clip_grad_norm_", function, where, ends)      calls go to
        `function(stock, *args, **kwargs)`, which calls `stock` as it sees fit
    replace("fairseq.trainer:torch", function, where, ends)           the name is to hold
        `function(stock)` from now on

Why is told by the function's docstring. `apply(table)` goes through a table from top to bottom and
puts in force each row that is needed here and is not in force yet: a row is put in force once,
however often it is asked for. Modules of fairseq are imported for it; a command (fairseq_cli.*)
waits until somebody imports it.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
import types
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Tuple, Union

NEVER = "never"


class Condition(NamedTuple):
    """Under which a row is needed."""

    text: str
    holds: Callable[[], bool]


ALWAYS = Condition("always", lambda: True)


class Patch(NamedTuple):
    """One row of a table."""

    targets: Tuple[str, ...]  # "module:name.in.it", all treated alike
    function: Callable[..., Any]
    where: str  # the lines that are wrapped, or that need it: file:line@version
    ends: str  # when the row may go
    condition: Condition
    make: Callable[[Any], Any]  # from what stands there to what shall

    @property
    def why(self) -> str:
        """The first sentence of the function's docstring."""
        text = inspect.getdoc(self.function) or ""
        return " ".join(text.split("\n\n")[0].split())


Targets = Union[str, Tuple[str, ...]]


def wrap(
    targets: Targets,
    function: Callable[..., Any],
    where: str,
    ends: str = NEVER,
    condition: Condition = ALWAYS,
) -> Patch:
    """A row: calls of the target go to function(stock, *args, **kwargs)."""

    def make(stock: Any) -> Any:
        bound = isinstance(stock, classmethod)
        inner = stock.__func__ if bound else stock

        of_class = isinstance(inner, type)

        @functools.wraps(inner, updated=() if of_class else functools.WRAPPER_UPDATES)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(inner, *args, **kwargs)

        return classmethod(wrapper) if bound else wrapper

    return Patch(_tuple(targets), function, where, ends, condition, make)


def replace(
    targets: Targets,
    function: Callable[[Any], Any],
    where: str,
    ends: str = NEVER,
    condition: Condition = ALWAYS,
) -> Patch:
    """A row: the target becomes function(what it is)."""
    return Patch(_tuple(targets), function, where, ends, condition, function)


def _tuple(targets: Targets) -> Tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else targets


class View(types.ModuleType):
    """A module as one other module sees it: some names replaced, all others passed on."""

    def __init__(self, module: types.ModuleType, **replacements: Any) -> None:
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(replacements)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_taken: List[Patch] = []  # rows that were asked for, in order
_in_force: List[Tuple[Patch, str]] = []  # with the target, in order


def apply(table: Iterable[Patch]) -> None:
    """Put in force what is needed of a table and is not in force."""
    for patch in table:
        if not any(patch is taken for taken in _taken):
            _taken.append(patch)  # first: to import a target may lead here again
            if patch.condition.holds():
                for target in patch.targets:
                    _put(patch, target)


def is_in_force(patch: Patch, target: str) -> bool:
    return any(patch is one and target == name for one, name in _in_force)


def _put(patch: Patch, target: str) -> None:
    name = target.partition(":")[0]
    if not name.startswith(("fairseq_cli.", "sacrebleu")):  # these are imported late, if at all
        _set(patch, target, importlib.import_module(name))
        return
    for module in _running(name):
        _set(patch, target, module)
    if name not in sys.modules:
        sys.meta_path.insert(0, _WhenImported(name, functools.partial(_set, patch, target)))


def _set(patch: Patch, target: str, owner: Any) -> None:
    *parents, name = target.partition(":")[2].split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    stock = vars(owner)[name] if name in vars(owner) else getattr(owner, name, None)
    setattr(owner, name, patch.make(stock))
    _in_force.append((patch, target))


def _running(command: str) -> Iterator[Any]:
    """A command's module, which `python -m` calls __main__."""
    for name in (command, "__main__"):
        module = sys.modules.get(name)
        if getattr(getattr(module, "__spec__", None), "name", "") == command:
            yield module


class _WhenImported:
    """Finds nothing itself: does something with a module, once, when it is imported."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        stock = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            stock(module)
            self.then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
