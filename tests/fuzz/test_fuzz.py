"""Wrong command lines, of every command: each ends with one line that says what is wrong, status 1
(2 for a flag that argparse refuses), no traceback and nothing lost; none hangs or does its work."""

import os
import shutil

import command_lines
import pytest
import workplace
from command_lines import GOOD, filled
from forked_commands import Commands

SEED = int(os.environ.get("FUZZ_SEED", 13))


@pytest.fixture(scope="module")
def commands():
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "place"


@pytest.fixture(scope="module")
def places(commands, root, device):
    return workplace.make(root, commands, device)


def complaint(mutation, status, err):
    """What is wrong with how a command ended; "" if nothing is."""
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    if status is None:
        return "hangs"
    if "Traceback (most recent call last)" in err:
        return "traceback: " + err.strip().splitlines()[-1]
    if status == 0:
        return "" if mutation.harmless else "accepted"
    if status not in (1, 2):
        return f"status {status}"
    if len(errors) != 1:
        return f"{len(errors)} lines of error: {errors or err[-200:]!r}"
    return ""


def run(commands, root, places, mutation, number):
    folder = root / "runs" / str(number)
    found = commands.run(filled(mutation.argv, {**places, "out": folder}), folder)
    return found


def failures(commands, root, places, mutations):
    found = []
    before = workplace.digest(root)
    for number, mutation in enumerate(mutations):
        status, out, err = run(commands, root, places, mutation, number)
        wrong = complaint(mutation, status, err)
        after = workplace.digest(root)
        if after != before:
            wrong, before = f"{wrong}; an input was changed", after
        if wrong:
            found.append(f"{mutation.name}: {wrong}")
        shutil.rmtree(root / "runs" / str(number))
    return found


def test_a_sample_of_wrong_command_lines(commands, root, places):
    assert not failures(commands, root, places, command_lines.sample(25, SEED))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", GOOD)
def test_every_wrong_command_line(commands, root, places, name):
    mine = [m for m in command_lines.mutations() if m.command == name]
    assert not failures(commands, root, places, mine)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_the_good_command_lines_are_good(commands, root, places, name):
    good = command_lines.Mutation(name, "none", command_lines.words_of(name), True)
    assert run(commands, root, places, good, name)[0] == 0


def test_there_are_at_least_500():
    assert len(list(command_lines.mutations())) >= 500
