"""What is installed: wheels and editable installs with the start-up hook, a complete source."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import version_matrix

import fairseq_moe_command

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
HOOK = "fairseq_moe_ext.pth"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel, the editable wheel and the source, built without isolation."""
    pytest.importorskip("setuptools", minversion="77")  # knows licences by their SPDX names
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    gone = source / "build" / "lib" / "fairseq_moe_ext" / "gone.py"  # an earlier build's
    gone.parent.mkdir(parents=True)
    gone.touch()
    target = tmp_path_factory.mktemp("built")
    for name in ("build_wheel", "build_editable", "build_sdist"):
        (target / name).mkdir()
        code = (
            "import sys; sys.path.insert(0, 'build_backend'); import wheel_with_hook as backend; "
        )
        code += f"backend.{name}({str(target / name)!r})"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr[-3000:]
    return target


def only_file(folder):
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("kind", ["build_wheel", "build_editable"])
def test_every_wheel_carries_the_hook(built, kind):
    with zipfile.ZipFile(only_file(built / kind)) as wheel:
        assert wheel.testzip() is None
        assert wheel.read(HOOK) == b"import fairseq_moe_ext_hook\n"
        record = next(name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
        rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(wheel.read(record).decode()))}
        assert set(rows) == set(wheel.namelist())
        for name, (digest, size) in rows.items():
            if name != record:
                content = wheel.read(name)
                actual = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
                assert digest == "sha256=" + actual.decode(), name
                assert int(size) == len(content), name


def test_an_editable_install_is_a_plain_path_read_before_the_hook(built):
    with zipfile.ZipFile(only_file(built / "build_editable")) as wheel:
        lines = {name: wheel.read(name).decode() for name in wheel.namelist() if "/" not in name}
    assert len(lines) == 2, lines  # no import hook of setuptools, which would take 10 ms a start
    assert list(lines) != [HOOK] and sorted(lines)[-1] == HOOK  # .pth files are read in this order


def test_the_wheel_holds_the_package_its_configs_and_the_hook_alone(built):
    with zipfile.ZipFile(only_file(built / "build_wheel")) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        entry_points = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "fairseq_moe_ext/gone.py" not in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    modules = {"fairseq_moe_command.py", "fairseq_moe_ext_hook.py"}
    assert tops == {"fairseq_moe_ext", "fairseq_today", *modules, HOOK}
    for package in ("fairseq_moe_ext", "fairseq_today"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "hydra_conf").rglob("*.yaml"):
        assert f"fairseq_moe_ext/{path.relative_to(ROOT).as_posix()}" in names
    assert "fairseq_moe_ext/py.typed" in names
    required = re.findall(r"^Requires-Dist: ([\w-]+)", metadata, flags=re.M)
    assert "torch" in required and "hydra-core" in required
    assert "fairseq" not in required  # its own metadata are what new pip refuses
    assert "fairseq-moe = fairseq_moe_command:main" in entry_points
    assert re.search("^License-Expression: MIT$", metadata, flags=re.M)
    # A package index shows the README, where links into the repository lead nowhere.
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert links and all(link.startswith("https://") for link in links)


def test_config_dir_is_found_in_an_installed_package_and_in_a_checkout(built, tmp_path):
    with zipfile.ZipFile(only_file(built / "build_wheel")) as wheel:
        wheel.extractall(tmp_path)
    command = [sys.executable, "-m", "fairseq_moe_ext.cli", "config-dir"]
    for folder, expected in (
        (tmp_path, tmp_path / "fairseq_moe_ext" / "hydra_conf"),
        (ROOT, ROOT / "hydra_conf"),
    ):
        result = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.stdout.strip() == str(expected), result.stderr[-2000:]
        assert (expected / "moe_lm_15b.yaml").is_file()
    (tmp_path / "pyproject.toml").write_text('version = "9.9"\n')  # of another package
    asked = [sys.executable, "-m", "fairseq_moe_command", "--version"]
    result = subprocess.run(
        asked,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.split() == ["fairseq-moe", fairseq_moe_command.version()]


def test_the_source_archive_is_complete(built):
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(only_file(built / "build_sdist")) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name for name in tracked.stdout.split("\n") if name and (ROOT / name).exists()}
    assert expected - inside <= {".gitignore"}


def test_the_installed_environment_runs_the_hook():
    """In this environment the hook is there without an import of ours."""
    code = "import sys; print([getattr(f, '__name__', '') for f in sys.meta_path])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=os.sep, capture_output=True, text=True, timeout=60
    )
    if "FairseqFinder" not in result.stdout:
        pytest.skip("this environment uses the package from its folder alone")
    code = "import sys, fairseq; print('fairseq_today' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=os.sep, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "True", result.stderr[-2000:]


@pytest.fixture
def checkout(tmp_path):
    """The files that install_venv.py reads, in a folder of their own."""
    for name in ("install_venv.py", "pyproject.toml", "constraints.txt", "build_backend"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def install(folder):
    return subprocess.run(
        [sys.executable, "install_venv.py"], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_a_venv_of_somebody_else_is_left_alone(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").write_text("x")
    result = install(checkout)
    assert result.returncode == 1 and "error:" in result.stdout + result.stderr
    assert (checkout / ".venv" / "mine").read_text() == "x"


@pytest.fixture
def installer(checkout, monkeypatch):
    """install_venv of the checkout as a module; its steps are recorded, not run."""
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.delitem(sys.modules, "install_venv", raising=False)
    import install_venv

    def step(number, what, command):
        install_venv.steps.append(number)
        install_venv.VENV.mkdir(exist_ok=True)

    install_venv.steps = []
    monkeypatch.setattr(install_venv, "step", step)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    yield install_venv
    sys.modules.pop("install_venv")


def test_a_finished_install_has_nothing_to_do(installer, capsys):
    assert installer.main() == 0 and installer.steps == [1, 2, 3]
    (installer.VENV / "kept").write_text("x")
    assert installer.main() == 0 and installer.steps == [1, 2, 3]
    assert "up to date" in capsys.readouterr().out
    # New requirements: install again into the same .venv.
    (installer.ROOT / "constraints.txt").write_text("torch==1\n")
    assert installer.main() == 0 and installer.steps == [1, 2, 3, 2, 3]
    assert (installer.VENV / "kept").exists()


def test_another_interpreter_gets_a_new_venv(installer, monkeypatch):
    installer.main()
    (installer.VENV / "old").write_text("x")
    monkeypatch.setattr(installer, "interpreter", lambda: "another")
    assert installer.main() == 0 and installer.steps == [1, 2, 3] * 2
    assert not (installer.VENV / "old").exists()


def test_an_interrupted_install_goes_on_in_its_venv(installer, monkeypatch):
    recorded = installer.step

    def interrupted(number, what, command):
        recorded(number, what, command)
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(installer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        installer.main()
    (installer.VENV / "half").write_text("x")
    monkeypatch.setattr(installer, "step", recorded)
    assert installer.main() == 0 and installer.steps == [1, 2, 2, 3]
    assert (installer.VENV / "half").exists()


def test_without_a_compiler_nothing_is_begun(installer, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert installer.main() == 1 and installer.steps == []
    assert "g++" in capsys.readouterr().err


def test_constraints_fit_the_requirements():
    packaging = pytest.importorskip("packaging.requirements")
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.M | re.S).group(1)
    required = [packaging.Requirement(line) for line in re.findall(r'"([^"]+)"', block)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    pins = [packaging.Requirement(line) for line in lines if not line.startswith("#")]
    for version in ("3.9", "3.10", "3.11", "3.12", "3.13"):
        environment = {"python_version": version, "python_full_version": version + ".0"}
        found = {}
        for pin in pins:
            if pin.marker is None or pin.marker.evaluate(environment):
                assert pin.name not in found, f"{pin.name} is pinned twice for Python {version}"
                found[pin.name] = next(iter(pin.specifier)).version
        for requirement in required:
            assert requirement.name in found, f"{requirement.name} on Python {version}"
            assert requirement.specifier.contains(found[requirement.name])


def test_the_table_of_versions_is_that_of_its_record():
    rows = json.loads(version_matrix.RECORD.read_text(encoding="utf-8"))
    shown = version_matrix.TABLE.read_text(encoding="utf-8")
    assert shown == version_matrix.table(rows)
    for row in rows:
        assert re.search(rf"^\| {row['python']} \| .* \| {row['date']} \|$", shown, flags=re.M)
