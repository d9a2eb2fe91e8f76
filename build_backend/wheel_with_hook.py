"""setuptools, plus what it has no simple way to put into a wheel.

- Into every wheel (PEP 427), editable (PEP 660) or not: the .pth line that starts
  fairseq_moe_ext_hook.
- Into a wheel that is not editable: hydra_conf/, which lies beside the package in the repository
  and inside the package where it is installed.
"""

import base64
import csv
import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (PEP 517: the backend's other functions)
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# site-packages' .pth files are read in alphabetical order: after __editable__.*.pth.
HOOK = {"fairseq_moe_ext.pth": b"import fairseq_moe_ext_hook\n"}


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel with the hook and hydra_conf/; return its file name."""
    shutil.rmtree("build/lib", ignore_errors=True)  # setuptools keeps modules that are gone there
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    configs = {f"fairseq_moe_ext/{path}": path.read_bytes() for path in _configs()}
    add_files(os.path.join(wheel_directory, name), {**configs, **HOOK})
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build an editable wheel with the hook; return its file name."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    add_files(os.path.join(wheel_directory, name), HOOK)
    return name


def _configs():
    return sorted(Path("hydra_conf").rglob("*.yaml"))


def add_files(wheel, files):
    """Add files, name -> content, to the wheel at this path, and their rows to its RECORD."""
    rows = io.StringIO()
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        row = [name, f"sha256={digest}", len(content)]
        csv.writer(rows, lineterminator="\n").writerow(row)
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(wheel + ".tmp", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content = rows.getvalue().encode() + content
            new.writestr(item, content)
        for name, content in files.items():
            new.writestr(name, content)
    os.replace(wheel + ".tmp", wheel)
