"""Make .venv beside this file: the project (editable), its dependencies, stock fairseq 0.12.2.

`make install` runs it with the interpreter that .venv shall have. Run again, it finds its stamp
and is done at once; after a change of interpreter it makes .venv anew, after a change of
pyproject.toml or constraints.txt it installs again into the same .venv.
"""

import compileall
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.json"
INPUTS = (
    "pyproject.toml",
    "constraints.txt",
    "build_backend/wheel_with_hook.py",
    "install_venv.py",
)
FAIRSEQ = "fairseq==0.12.2"


def main() -> int:
    """Install what is missing; return the exit status."""
    if sys.version_info < (3, 9):  # noqa: UP036  (whoever has an older one shall read this)
        return fail(
            f"Python {sys.version.split()[0]} is too old; set PYTHON=python3.x, 3.9 or later"
        )
    wanted = {"interpreter": interpreter(), "inputs": digest()}
    stamp = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    if stamp == wanted:
        print(f".venv is up to date (Python {sys.version.split()[0]})")
        return 0
    if shutil.which("g++") is None and shutil.which("c++") is None:
        return fail("no C++ compiler (g++) on PATH; fairseq compiles its extensions with one")
    if VENV.exists() and not stamp:
        return fail(f"{VENV} was not made by `make install`; move it away or run `make clean`")
    start = time.monotonic()
    if stamp.get("interpreter", wanted["interpreter"]) != wanted["interpreter"]:
        print("[0/3] removing the .venv of another interpreter", flush=True)
        shutil.rmtree(VENV)
    if not VENV.exists():
        step(1, "making .venv", [sys.executable, "-m", "venv", str(VENV)])
    STAMP.write_text(json.dumps({**wanted, "inputs": "unfinished"}))
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["-c", str(ROOT / "constraints.txt")]
    ours = "this project and its dependencies; torch is the large one"
    step(2, ours, [*pip, "-e", f"{ROOT}[test]"])
    step(3, f"{FAIRSEQ}, compiled here in about a minute", [*pip, "--no-deps", FAIRSEQ])
    # Under PYTHONDONTWRITEBYTECODE the start-up hook would be compiled anew at every start.
    compileall.compile_file(ROOT / "fairseq_moe_ext_hook.py", quiet=2)
    STAMP.write_text(json.dumps(wanted))
    print(f"installed into .venv in {time.monotonic() - start:.0f} s")
    return 0


def fail(message: str) -> int:
    """Print one line about what is wrong; return the exit status for it."""
    print(f"error: {message}", file=sys.stderr)
    return 1


def step(number: int, what: str, command: list) -> None:
    """Announce and run one command; end the program if it fails."""
    print(f"[{number}/3] {what}", flush=True)
    status = subprocess.call(command, cwd=ROOT)
    if status:
        raise SystemExit(fail(f"step {number} ended with status {status}: {' '.join(command)}"))


def interpreter() -> str:
    """What must stay the same for a .venv to be of use: interpreter and place of the project."""
    return f"{os.path.realpath(sys.base_prefix)} {sys.version} {ROOT}"


def digest() -> str:
    """One hash over the files that say what is installed."""
    content = hashlib.sha256()
    for name in INPUTS:
        content.update((ROOT / name).read_bytes())
    return content.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
