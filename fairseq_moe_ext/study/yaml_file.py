"""A YAML file that a user wrote, as data of a size that its text can account for."""

from pathlib import Path
from typing import Any, Dict

import yaml

from .. import files
from ..errors import UserError

_MOST = 100_000  # values, aliases written out
_MERGE = "tag:yaml.org,2002:merge"  # of <<


def read(path: Path) -> Any:
    """Raises UserError for a file that cannot be read, is not YAML, has a key twice or one that is
    read as another, is nested too deep, or is small only because its aliases stand for ever more
    aliases."""
    text = files.read_text(path, encoding="utf-8-sig")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, loader) > _MOST:
            raise UserError(f"{path}: more than {_MOST} values after its aliases are expanded")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}); correct it") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply, or contains itself") from None
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # a date or number that is none
        raise UserError(f"{path}: not YAML ({error}); correct it") from None


def _size(node: yaml.Node, known: Dict[int, int], loader: yaml.SafeLoader) -> int:
    """How many values a node stands for; RecursionError for one within itself."""
    if id(node) not in known:
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, loader)
            parts = [part for pair in parts for part in pair]
        known[id(node)] = -1  # at work
        known[id(node)] = 1 + sum(_size(part, known, loader) for part in parts)
    elif known[id(node)] < 0:
        raise RecursionError
    return known[id(node)]


def _check_keys(node: yaml.MappingNode, loader: yaml.SafeLoader) -> None:
    """YAML keeps the last of two equal keys. Text decides: 1 and "1" would name the same folder. A
    number's text must be its own (010 is 8, 12:30 is 750), and values must differ (1, 1.0, on)."""
    seen: Dict[Any, str] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            value = loader.construct_object(key)
            problem = ""
            if key.value in seen.values():
                problem = f"the key {key.value} appears twice"
            elif value in seen:
                problem = f"the keys {seen[value]} and {key.value} are equal; write them in quotes"
            elif not isinstance(value, (bool, type(None))) and str(value) != key.value:
                problem = f"the key {key.value} means {value}; write it in quotes"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[value] = key.value
