"""Commands that run as processes of their own for one output folder: one job at a time works on the
folder, it resumes only with the settings that it started with, and all its processes end with it.

    runner = Runner(out, f"--out {out}")
    try:
        runner.open()
        runner.call(command, out / "train.log")
    finally:
        runner.stop()
"""

import contextlib
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, TypeVar

from .. import data_bin, files, outputs
from ..errors import UserError
from ..locks import Lock
from . import child as children

Result = TypeVar("Result")


class Ended(Exception):
    """The runner has ended its commands: no more are started."""


class Runner:
    """`what`: the flag and the folder, as a message names them."""

    def __init__(self, out: Path, what: str) -> None:
        self.out = out
        self.what = what
        self.children: List[subprocess.Popen] = []
        self.lock: Optional[Lock] = None
        self._ended = False
        self._mutex = threading.Lock()  # of children and _ended
        self._on_terminate: Any = None  # what SIGTERM did before

    def open(self) -> None:
        """Make the folder and hold it; SIGTERM now raises KeyboardInterrupt, until `stop`. Raises
        UserError if another works on it."""
        data_bin.check_is_one(self.out, self.what)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.what}: a file, not a folder: name another")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.what} cannot be written ({error.strerror}): name another folder"
            ) from None
        self.lock = Lock(self.out / "lock", self.what)
        if threading.current_thread() is threading.main_thread():
            self._on_terminate = signal.signal(signal.SIGTERM, _interrupt)

    def check_settings(self, settings: Dict[str, Any], job: str, kind: str) -> None:
        """Note what the result depends on, or raise UserError unless the folder is empty or began
        with the same. `job`, `kind`: what to call a job, with and without its article."""
        path = self.out / "settings.json"
        if not path.exists():
            if any(entry.name != "lock" for entry in self.out.iterdir()):
                raise UserError(f"{self.what} is not empty and holds no {kind}: name a new folder")
            outputs.write_json(path, settings)
            return
        begun = files.read_json(path)
        for key, value in settings.items():
            if begun.get(key) != value:
                raise UserError(
                    f"{self.what} holds {job} with {key} {begun.get(key)}, not {value}: name "
                    "another folder, or delete this one to start over"
                )

    def start(self, command: Sequence[str], log: Path, threads: int = 0) -> subprocess.Popen:
        """Start a command; what it prints is appended to the log. It inherits the lock, so that a
        command left behind by a killed job still locks the folder."""
        with self._mutex:
            if self._ended:
                raise Ended
            keep = () if self.lock is None else (self.lock.descriptor,)
            child = children.start(command, log, threads, keep)
            self.children.append(child)
        return child

    def finish(self, child: subprocess.Popen, command: Sequence[str], log: Path) -> None:
        """Wait for a command. Raises UserError with its last output if it failed."""
        status = child.wait()
        with self._mutex, contextlib.suppress(ValueError):
            self.children.remove(child)
        if status != 0:
            raise children.failure(command, status, log)

    def call(
        self,
        command: Sequence[str],
        log: Path,
        threads: int = 0,
        watch: Callable[[], Any] = lambda: None,
        every: float = 60.0,
    ) -> None:
        """Start a command and wait for it; meanwhile `watch` is called `every` so many seconds."""
        child = self.start(command, log, threads)
        while True:
            try:
                child.wait(timeout=every)
                break
            except subprocess.TimeoutExpired:
                watch()
        self.finish(child, command, log)

    def in_parallel(self, works: Sequence[Callable[[], Result]], at_once: int) -> Iterator[Result]:
        """Run the works in threads, and yield their results in order. As soon as one fails, all
        commands are ended, no other is started, and its exception is raised."""
        failed: List[BaseException] = []

        def guarded(work: Callable[[], Result]) -> Result:
            if self._ended:
                raise Ended
            try:
                return work()
            except BaseException as error:
                failed.append(error)
                self.end()
                raise

        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(guarded, work) for work in works]
            try:
                for future in futures:
                    yield future.result()
            except BaseException as error:
                for future in futures:
                    future.cancel()
                self.end()
                interrupted = isinstance(error, (KeyboardInterrupt, GeneratorExit))
                if failed and not interrupted:
                    raise failed[0] from None
                raise

    def end(self) -> None:
        """End the commands that still run, and start no more."""
        with self._mutex:
            self._ended = True
            running = list(self.children)
        for child in running:
            if child.poll() is None:
                child.terminate()
        for child in running:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def stop(self) -> None:
        """End the commands, and let others have the folder."""
        self.end()
        if self.lock is not None:
            self.lock.release()
        if self._on_terminate is not None:
            signal.signal(signal.SIGTERM, self._on_terminate)
            self._on_terminate = None


def _interrupt(number: int, frame: Any) -> None:
    """SIGTERM, by which `kill` and queues end a job, does what Ctrl-C does."""
    raise KeyboardInterrupt
