"""The long description; all other settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
# A package index shows the README away from the repository, where relative links lead nowhere:
# a picture goes, and of a link the text stays.
readme = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
readme = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", readme)

setup(long_description=readme, long_description_content_type="text/markdown")
