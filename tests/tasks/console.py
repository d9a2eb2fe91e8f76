"""fairseq's console scripts in processes of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fairseq_moe_ext"


def fairseq(command, *flags, check=True, processes=1):
    """Run a fairseq console script, with `torchrun` if in several processes; its output."""
    run = [sys.executable, "-W", "ignore"]
    if processes > 1:
        run += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        flags += ("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp")
    flags = [*map(str, flags), "--user-dir", str(PACKAGE), "--cpu"]
    done = subprocess.run(
        [*run, "-m", f"fairseq_cli.{command}", *flags], capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def records(done, tag):
    found = re.findall(rf"\| {re.escape(tag)} \| (\{{.*\}})", done.stdout)
    return [json.loads(record) for record in found]
