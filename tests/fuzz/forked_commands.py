"""Runs command lines one by one, each in a fork of a process that has imported all: a hundredth of
the time that starting Python takes. `python forked_commands.py` reads a request a line and writes
an answer a line, both JSON; `Commands` is the other end."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fairseq_moe_ext"
LIMIT = float(os.environ.get("FUZZ_LIMIT", 60))  # seconds; a busy machine is slow
MODULES = {
    "fairseq-train": "fairseq_cli.train",
    "fairseq-eval-lm": "fairseq_cli.eval_lm",
    "fairseq-validate": "fairseq_cli.validate",
    "fairseq-generate": "fairseq_cli.generate",
    "fairseq-interactive": "fairseq_cli.interactive",
    "fairseq-hydra-train": "fairseq_cli.hydra_train",
}


class Commands:
    """Use as a context; run(argv, folder) -> (status or None if it hangs, stdout, stderr)."""

    def __enter__(self):
        environment = {**os.environ, "PYTHONPATH": f"{PACKAGE.parent}:{os.getenv('PYTHONPATH')}"}
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *exception):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, argv, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self._server.stdin.write(json.dumps([argv, str(folder)]) + "\n")
        self._server.stdin.flush()
        status = json.loads(self._server.stdout.readline())
        return (
            status,
            (folder / "stdout").read_text(errors="replace"),
            (folder / "stderr").read_text(errors="replace"),
        )


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.argv = ["fairseq-train"]  # else no excepthook (patches/commands.py)
    import torch

    torch.set_num_threads(1)
    for module in ("fairseq_moe_ext", "fairseq_moe_ext.cli", *MODULES.values()):
        importlib.import_module(module)
    from fairseq_moe_command import COMMANDS

    for command in COMMANDS.values():
        importlib.import_module(f"fairseq_moe_ext.{command.module}")
    for line in sys.stdin:
        argv, folder = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(argv, folder)
        answers.write(json.dumps(_status(child)) + "\n")
        answers.flush()


def _run(argv, folder) -> None:
    """The child: as the console script would, and never return."""
    os.setsid()
    status = 70
    try:
        os.chdir(folder)
        for name, stream in (("stdout", 1), ("stderr", 2)):
            file = os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(file, stream)
            # Python's own stream would be written twice, by the parent, too
            raw = os.fdopen(os.dup(stream), "wb", 0)
            errors = "backslashreplace" if name == "stderr" else "strict"
            setattr(sys, name, io.TextIOWrapper(raw, errors=errors, write_through=True))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = io.TextIOWrapper(os.fdopen(0, "rb", closefd=False))
        import logging

        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.stream = sys.stdout
        sys.argv = argv
        try:
            if argv[0] == "fairseq-moe":
                sys.exit(importlib.import_module("fairseq_moe_ext.cli").main())
            module = importlib.import_module(MODULES[argv[0]])
            sys.exit(module.cli_main())
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status(child):
    """Exit status, minus the signal, or None of one that hangs, and is ended with all its own."""
    end = time.monotonic() + LIMIT
    done = status = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            time.sleep(0.02)
    try:
        os.killpg(child, signal.SIGKILL)  # its workers, too
    except ProcessLookupError:
        pass
    if not done:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    serve()
