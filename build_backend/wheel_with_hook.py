"""setuptools, plus one file in every wheel: the .pth line that starts fairseq_moe_ext_hook.

setuptools has no way to put a .pth file into an editable install, and only roundabout ways for a
wheel; so the finished wheel (PEP 427), editable (PEP 660) or not, gets it added here.
"""

import base64
import csv
import hashlib
import io
import os
import zipfile

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
PTH_NAME = "fairseq_moe_ext.pth"
PTH_LINE = b"import fairseq_moe_ext_hook\n"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel with the hook; return its file name."""
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    add_pth(os.path.join(wheel_directory, name))
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build an editable wheel with the hook; return its file name."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    add_pth(os.path.join(wheel_directory, name))
    return name


def add_pth(wheel):
    """Add the .pth file to the wheel at this path, and its row to the wheel's RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(PTH_LINE).digest()).rstrip(b"=").decode()
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow([PTH_NAME, f"sha256={digest}", len(PTH_LINE)])
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(wheel + ".tmp", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content = row.getvalue().encode() + content
            new.writestr(item, content)
        new.writestr(PTH_NAME, PTH_LINE)
    os.replace(wheel + ".tmp", wheel)
