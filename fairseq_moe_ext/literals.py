"""Read Python expressions of numbers, strings, lists and dictionaries without running them."""

import ast
import operator
from typing import Any, Dict, Optional

from .errors import UserError
from .wording import short

_LONGEST = 10_000  # characters of an expression, and items of a list that `*` makes
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def literal(text: str) -> Any:
    """The value of an expression made of literals: `[(512, 3)] * 20`.

    Raises UserError for any other expression, and TypeError, as eval does, for what is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected a string, not {type(text).__name__}")
    try:
        if len(text) > _LONGEST:
            raise ValueError("too long")
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError):
        raise UserError(
            f"the setting {short(text)!r} is rejected: use only numbers, strings, lists, tuples "
            "and dictionaries, and + - * / of them; nothing in it was run"
        ) from None


def plain(text: Any) -> Any:
    """The value of a literal without operators. Raises ValueError for anything else."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("no literal") from error


def overrides(text: str, flag: str) -> Dict[str, Any]:
    """The dictionary of --model-overrides and its like. Raises UserError for anything else."""
    try:
        value = plain(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(
            f"{flag} {text!r}: use a Python dictionary of setting names and plain values, such as "
            "\"{'dropout': 0.1}\""
        )
    return value


def _value(node: Optional[ast.AST]) -> Any:
    """node: None is the key of {**other}, which is refused."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(_value(item) for item in node.elts)
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _number(_value(node.operand))
        return -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        _check_size(type(node.op), left, right)
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError("no value")


def _number(value: Any) -> Any:
    if not isinstance(value, (int, float, complex)):
        raise ValueError("no number")
    return value


def _check_size(kind: type, left: Any, right: Any) -> None:
    """Raise ValueError for an operation whose result could fill the memory."""
    if kind is ast.Pow and (abs(_number(left)) > 1e6 or abs(_number(right)) > 1000):
        raise ValueError("too large")
    if kind is ast.Mod:  # a string would be formatted
        _number(left)
    if kind is ast.Mult:
        for sequence, times in ((left, right), (right, left)):
            if hasattr(sequence, "__len__") and len(sequence) * _number(times) > _LONGEST:
                raise ValueError("too long")
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() > 1 << 20:
        raise ValueError("too large")
