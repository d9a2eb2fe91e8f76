"""Locks: one owner, whatever happened to the last one."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from fairseq_moe_ext import locks
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.locks import Lock, beside


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def owner(path, **changes):
    """Leave a lock as another process would, with something else about it."""
    with Lock(path, "it"):
        found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **changes}))


def test_the_second_is_told_who_has_it_and_the_third_gets_it(path):
    with Lock(path, "--save-dir x"):
        with pytest.raises(UserError) as error:
            Lock(path, "--save-dir x")
        line = str(error.value)
        assert line.startswith(f"--save-dir x is being worked on by PID {os.getpid()} on ")
        assert line.count("\n") == 0 and f"since {time.strftime('%Y-')}" in line
        assert f"delete {path}" in line
    assert not path.exists()
    with Lock(path, "it"):
        pass


def test_it_goes_after_an_error_and_at_the_end_of_a_process(path):
    with pytest.raises(KeyError):
        with Lock(path, "it"):
            raise KeyError
    assert not path.exists()
    script = "import sys; from fairseq_moe_ext.locks import Lock; Lock(sys.argv[1], 'it')"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert not path.exists()


@pytest.mark.parametrize(
    "changes", [{"pid": 2**22 + 1}, {"start": "1"}, {"boot": "before"}], ids=str
)
def test_a_stale_one_is_taken_over(path, changes):
    """Its process is gone, its PID is another's now, the machine was started again."""
    owner(path, **changes)
    with Lock(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_one_of_a_process_that_nobody_waited_for_is_stale(path):
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on
    owner(path, pid=child.pid)
    with Lock(path, "it"):
        pass
    child.wait()


def test_one_of_a_container_that_was_ended_is_stale(path):
    """Its next start has another host name and the same kernel, which has let go of the lock."""
    owner(path, host="elsewhere", pid=1)
    with Lock(path, "it"):
        pass


@pytest.mark.parametrize(
    "job, restarts, taken",
    [
        (("c", "7", "0"), "1", True),
        (("c", "7", "9"), "10", True),
        (("c", "7", "0"), None, False),  # another step of this job
        (("c", "7", "2"), "1", False),
        (("c", "7", "1"), "2", False),
        (("c", "8", "0"), "1", False),
        (("d", "7", "0"), "1", False),
        (None, "1", False),
    ],
)
def test_a_requeued_job_takes_its_own_over_on_another_machine(
    path, monkeypatch, job, restarts, taken
):
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    owner(path, **ELSEWHERE, job=job)
    if job == ("c", "7", "1"):  # where locks are not shared, its first run may still be there
        monkeypatch.setattr(fcntl, "flock", no_locks)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if not taken:
        with pytest.raises(UserError, match="is being worked on by PID"):
            Lock(path, "it")
        return
    with Lock(path, "it"):
        assert json.loads(path.read_text())["job"] == ["c", "7", restarts]
    with Lock(path, "it"):  # while it is held, nobody else gets it
        with pytest.raises(UserError):
            Lock(path, "it")


def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


ELSEWHERE = {"host": "elsewhere", "boot": "another", "pid": 2**22 + 1}


@pytest.mark.parametrize("changes, locking", [(ELSEWHERE, True), ({}, False)], ids=str)
def test_another_machine_s_or_a_living_one_is_kept(path, changes, locking, monkeypatch):
    """The second on a file system without locks."""
    owner(path, **changes)
    if not locking:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    before = path.read_bytes()
    with pytest.raises(UserError, match="is being worked on by PID"):
        Lock(path, "it")
    assert path.read_bytes() == before


def test_an_empty_file_of_an_older_version_is_taken_over_when_nobody_has_it(path):
    path.touch()
    os.utime(path, (1, 1))
    with Lock(path, "it"):
        assert path.stat().st_size > 0


@pytest.mark.parametrize("left", [b"\0" * 200, b'{"pi', b'{"pid": 3, "host"'], ids=str)
def test_what_a_crash_leaves_of_one_is_taken_over(path, left):
    path.write_bytes(left)
    os.utime(path, (1, 1))
    with Lock(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("age", [0, 100], ids=str)
@pytest.mark.parametrize("content", ["[[package]]\n", "{}", '{"host": 1}', "1234\n"])
def test_a_user_s_file_is_kept(path, content, age):
    path.write_text(content)
    os.utime(path, (time.time() - age - 3,) * 2)
    with pytest.raises(
        UserError, match=f"^{path}: is not a lock, but has the name of the lock for it"
    ):
        Lock(path, "it")
    assert path.read_text() == content


def test_what_is_no_file_is_refused(path, tmp_path):
    os.symlink(tmp_path / "nowhere", path)
    with pytest.raises(UserError, match="it: cannot be written"):
        Lock(path, "it")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="it: cannot be written"):
        Lock(path, "it")
    with pytest.raises(UserError, match="it: cannot be written"):
        Lock(tmp_path / "no folder" / "lock", "it")


def test_all_names_of_an_output_have_one_lock(tmp_path):
    (tmp_path / "a").mkdir()
    os.symlink(tmp_path / "a", tmp_path / "b")
    assert beside(tmp_path / "b" / "one.pt") == beside(tmp_path / "a" / "." / "one.pt")
    assert beside(tmp_path / "b") == tmp_path / "a.lock"


def another(script, path):
    """A process with locks and errors alone, without fairseq."""
    package = os.path.dirname(locks.__file__)
    prelude = "import sys, types; p = types.ModuleType('fairseq_moe_ext');"
    prelude += f"p.__path__ = [{package!r}]; sys.modules['fairseq_moe_ext'] = p\n"
    prelude += "from fairseq_moe_ext.locks import Lock\n"
    command = [sys.executable, "-c", prelude + script, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_many_at_once_on_a_stale_lock_one_gets_it(path):
    """Each notes when it had the lock; no two of these times overlap, and all get it in the end."""
    owner(path, pid=2**22 + 1)
    script = """
import sys, time
from fairseq_moe_ext.errors import UserError
while True:
    try:
        with Lock(sys.argv[1], "it"):
            start = time.monotonic()
            time.sleep(0.02)
            print(start, time.monotonic())
        break
    except UserError:
        time.sleep(0.005)
"""
    children = [another(script, path) for _ in range(6)]
    spans = sorted(tuple(map(float, c.communicate(timeout=60)[0].split())) for c in children)
    assert len(spans) == 6 and all(len(span) == 2 for span in spans)
    assert all(one[1] <= two[0] for one, two in zip(spans, spans[1:]))
    assert not path.exists()


def test_a_forked_child_does_not_hold_it_when_its_parent_was_killed(path):
    script = """
import os, time
lock = Lock(sys.argv[1], "it")
child = os.fork()
if child == 0:  # what a fork does in the child is done
    print(os.getpid(), flush=True)
    time.sleep(30)
    os._exit(0)
os.waitpid(child, 0)
"""
    parent = another(script, path)
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"is being worked on by PID {parent.pid}"):
            Lock(path, "it")
        parent.kill()
        parent.wait()
        with Lock(path, "it"):
            pass
    finally:
        os.kill(child, 9)
        parent.stdout.close()
