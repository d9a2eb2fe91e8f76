"""The quickstart from text to report with very few updates, killed once and started again."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fairseq import options
from markupsafe import escape

from fairseq_moe_ext import cores, cost
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation import loading, specialisation
from fairseq_moe_ext.shape import shape_of

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import corpora  # noqa: E402
import page  # noqa: E402
import progress  # noqa: E402
import recipe  # noqa: E402
import results  # noqa: E402
import run as quickstart  # noqa: E402
import table  # noqa: E402

from fairseq_moe_ext.study import logs, plan  # noqa: E402
from fairseq_moe_ext.study.plan import FAMILIES  # noqa: E402

# The whole pipeline: a minute of two idle cores, several on a busy machine.
pytestmark = pytest.mark.timeout(1200)

UPDATES = 6
ROUTING = recipe.ROUTERS[recipe.ROUTER]
ARGUMENTS = ["--updates", str(UPDATES), "--text-bytes", "20000"]


def start(out):
    # A session of its own, so that a signal can go to all its processes, as Ctrl-C does.
    return subprocess.Popen(
        [sys.executable, str(QUICKSTART / "run.py"), "--out", str(out), *ARGUMENTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell's background jobs ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was stopped in the trainings and started again: (folder, two outputs)."""
    for _ in range(5):  # six updates are quick: the signal may come behind them
        out = tmp_path_factory.mktemp("quickstart") / "run"
        first = start(out)
        try:
            while not (out / "dense" / "checkpoint_last.pt").exists():
                assert first.poll() is None, first.stdout.read()
                time.sleep(0.05)
        finally:
            os.killpg(first.pid, signal.SIGINT)
        said = first.communicate(timeout=60)[0]
        stages = json.loads((out / "stages.json").read_text())
        if not stages["train"]["done"]:
            break
    assert first.returncode == 130, said
    assert "Start the same command again" in said and "Traceback" not in said
    stages = json.loads((out / "stages.json").read_text())
    assert stages["prepare"]["done"] and not stages["train"]["done"]
    assert not (out / "report.html").exists()

    second = start(out)
    try:
        said_again = second.communicate()[0]
    except BaseException:
        os.killpg(second.pid, signal.SIGINT)
        raise
    assert second.returncode == 0, said_again
    return out, said, said_again


def test_it_goes_on_from_the_checkpoint_and_repeats_no_finished_step(finished):
    out, _, said = finished
    assert "1/6 Gather text from this Python installation: done before" in said
    assert "2/6 Train a tokenizer and binarise: done before" in said
    assert "3/6 Train a dense and an MoE model: going on" in said
    assert "4/6 Evaluate both on every domain ..." in said
    log = (out / "dense" / "train.log").read_text()
    assert "Loaded checkpoint" in log, "the second process started from the first one's work"
    for model in FAMILIES:
        updates = [point["update"] for point in results.validations(out / model / "train.log")]
        assert updates == list(range(1, UPDATES + 1)), "every validation once"
    assert all(stage["done"] for stage in json.loads((out / "stages.json").read_text()).values())
    assert not list(out.rglob("*.partial"))


def test_the_table_and_the_page_show_the_measured_numbers(finished):
    out, _, said = finished
    result = json.loads((out / "result.json").read_text())
    html = (out / "report.html").read_text()
    for row in table.rows(result):
        for cell in row:
            assert cell in said
            assert escape(cell) in html
    for model in FAMILIES:
        for domain in corpora.DOMAINS:
            log = (out / "evaluation" / f"{model}.{domain.name}.log").read_text()
            printed = float(re.search(r"Perplexity: ([\d.]+)", log).group(1))
            measured = result["models"][model]["perplexity"][domain.name]
            assert measured == pytest.approx(printed, rel=1e-4, abs=0.01)
            assert f"<td>{measured:.2f}</td>" in html
    assert not re.search(r"https?:|<script|<link|<img|@import|url\((?!#)|src=", html)


def test_the_models_are_what_the_report_says(finished):
    out, _, _ = finished
    result = json.loads((out / "result.json").read_text())
    dense, moe = (result["models"][model] for model in FAMILIES)
    assert dense["flops_per_token"] == moe["flops_per_token"]
    html = (out / "report.html").read_text()
    assert dense["precision"] in ("bfloat16", "float32"), "as this processor gains from it"
    assert f"Training computed in {dense['precision']}, evaluation in float32." in html
    assert moe["parameters"] > 2 * dense["parameters"]
    counts = json.loads((out / "data" / "counts.json").read_text())["corpora"]
    for model in FAMILIES:
        log = (out / model / "train.log").read_text()
        kinds = re.findall(r"num\. (?:shared|expert) model params: ([\d,]+)", log)[:2]
        assert (
            sum(int(count.replace(",", "")) for count in kinds)
            == (result["models"][model]["parameters"])
        )
        for name, tokens in result["models"][model]["test_tokens"].items():
            assert tokens == counts[name]["test"]["tokens"], "every test token is scored once"
        assert "in_domain" not in result["models"][model]["perplexity"]


def test_training_flops_are_those_of_the_products(finished):
    """6 for each weight that a token meets in a product, and for each position it attends to, in
    scores and in sums, of a context that is full."""
    out, _, _ = finished
    result = json.loads((out / "result.json").read_text())
    dim, layers = recipe.DIM, recipe.LAYERS
    layer = 4 * dim**2 + 2 * dim * recipe.FFN + 2 * dim * recipe.CONTEXT
    flops = 6 * (layers * layer + dim * result["settings"]["dictionary"])
    for model in FAMILIES:
        assert result["models"][model]["flops_per_token"] == flops
        tokens = UPDATES * recipe.BLOCKS * recipe.CONTEXT
        assert result["models"][model]["training_flops"] == flops * tokens


@pytest.mark.parametrize("model, router, parameters, active", [
    ("dense", "hash", 1_318_656, 1_318_656),
    ("moe", "hash", 34_608_384, 1_320_192),
    ("moe", "topk", 2_905_344, 1_323_264),
])  # fmt: skip
def test_the_models_of_the_recipe_are_of_the_published_sizes(model, router, parameters, active):
    """By the flags that train them; README.md has the first two."""
    flags = recipe.train_command(Path("runs"), model, 440, router)[1:]
    args = options.parse_args_and_arch(options.get_training_parser(), flags)
    shape = shape_of(args, 4104)
    counted = cost.parameters(shape)
    assert (counted.total, counted.active) == (parameters, active)
    assert cost.training_flops_per_token(shape, recipe.CONTEXT) == 9_443_328


def test_expert_use_counts_every_choice(finished):
    import torch
    from fairseq import checkpoint_utils

    out, _, _ = finished
    found = json.loads((out / "expert_use.json").read_text())
    assert [layer["layer"] for layer in found] == list(range(recipe.LAYERS))
    for layer in found:
        for name, share in layer["share"].items():
            assert len(share) == ROUTING.experts
            assert sum(share) == pytest.approx(1)
            assert layer["tokens"][name] > 0
    # Again for one domain, block by block.
    task = loading.language_modeling_task(out / "data" / "maths", recipe.CONTEXT)
    task.load_dataset("test")
    checkpoint = str(out / "moe" / "checkpoint_best.pt")
    (model,), _ = checkpoint_utils.load_model_ensemble([checkpoint], task=task)
    model.eval()
    counts = torch.zeros(recipe.LAYERS, ROUTING.experts)
    tokens = 0
    for block in task.dataset("test"):
        with torch.no_grad():
            _, extra = model(block["source"].unsqueeze(0))
        tokens += len(block["source"])
        for record in extra["moe"]:
            counts[record.layer] += record.expert_counts.sum(0)
    assert counts.sum(1).tolist() == [ROUTING.top_k * tokens] * recipe.LAYERS
    assert found[0]["tokens"]["maths"] == tokens
    for layer in found:
        assert layer["among"] == [d.name for d in corpora.DOMAINS if not d.held_out]
        for one in (layer["information"]["domain"], layer["information"]["token"]):
            left = one["bits"] - one["bias"] - sum(one["random"]) / 5
            assert one["left"] == pytest.approx(left) and len(one["random"]) == 5
        # all of the text is looked at: the shares' own information is that of the choices
        inside = [layer["share"][name] for name in layer["among"]]
        told = specialisation.mutual_information(inside)
        assert layer["information"]["domain"]["bits"] == pytest.approx(told)
    html = (out / "report.html").read_text()
    for by, words in (("domain", "domain"), ("token", "token")):
        said = specialisation.verdict(found, by, words)
        assert escape(said) in html and "random gates of equal scale" in said
    for layer in found:
        share = counts[layer["layer"]] / (ROUTING.top_k * tokens)
        torch.testing.assert_close(torch.tensor(layer["share"]["maths"]), share)


def test_both_models_write_after_each_prompt(finished):
    """The page and the terminal show what `fairseq-moe generate` wrote, of the right model."""
    out, _, said = finished
    written = json.loads((out / "samples.json").read_text())
    html = (out / "report.html").read_text()
    models = [str(out / model / "checkpoint_best.pt") for model in table.MODELS]
    assert [(one["model"], one["prompt"]) for one in written] == [
        (model, prompt) for model in models for prompt in recipe.PROMPTS
    ]
    shown = page.samples({"samples": written})
    assert [prompt for prompt, _ in shown] == list(recipe.PROMPTS)
    for i, (prompt, texts) in enumerate(shown):
        assert texts == [written[i]["texts"][0], written[i + len(recipe.PROMPTS)]["texts"][0]]
        assert all(texts)
        for text in texts:
            assert f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>" in html
    assert page.terminal_samples({"samples": written}).split("\n")[2] in said


def test_a_third_start_measures_nothing_and_says_the_same(finished):
    out, _, said = finished
    before = (out / "result.json").read_bytes()
    third = start(out)
    output = third.communicate(timeout=120)[0]
    assert third.returncode == 0, output
    assert output.count("done before") == 6
    assert (out / "result.json").read_bytes() == before
    assert output.split("─" * 20)[-1] == said.split("─" * 20)[-1]


def test_another_recipe_or_a_foreign_folder_is_refused(finished, tmp_path, capsys):
    out, _, _ = finished
    before = (out / "result.json").read_bytes()
    assert quickstart.main(["--out", str(out), "--updates", "7", "--text-bytes", "20000"]) == 1
    assert f"error: --out {out} holds a run with updates 6, not 7" in capsys.readouterr().err
    assert (out / "result.json").read_bytes() == before

    (tmp_path / "mine.txt").write_text("mine")
    assert quickstart.main(["--out", str(tmp_path), *ARGUMENTS]) == 1
    assert "is not empty and holds no quickstart run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    one, two = (quickstart.Run(tmp_path / "a", 6, 20000, progress.Screen()) for _ in range(2))
    one.open()
    with pytest.raises(UserError, match=f"is being worked on by PID {os.getpid()} on"):
        two.open()
    # A command that a killed run left behind (its PID has another process now) holds the folder.
    child = one.start([sys.executable, "-c", "input()"], tmp_path / "log")
    sleeper = one.start([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    lock = tmp_path / "a" / "lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "start": "0"}))
    os.close(one.lock.descriptor)
    one.lock = None
    child.wait()
    with pytest.raises(UserError, match="left behind by PID"):
        two.open()
    one.stop()
    assert sleeper.poll() is not None
    two.open()
    two.stop()
    assert not lock.exists()


def test_the_readme_gives_the_same_commands(tmp_path, monkeypatch):
    """Its shell blocks are run with stand-ins for the programs that note their arguments."""
    noted = tmp_path / "noted"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("fairseq-train", "fairseq-eval-lm", "fairseq-moe", "python"):
        program = programs / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "" >> "{noted}"\n')
        program.chmod(0o755)
    blocks = re.findall(r"```bash\n(.*?)```", (QUICKSTART / "README.md").read_text(), re.DOTALL)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-eu"], input="\n".join(blocks), text=True, check=True,
                   env={**os.environ, "PATH": path})  # fmt: skip
    # (program, its arguments in any order)
    found = [sorted(words.split("\n")) for words in noted.read_text().split("\n\n")[:-1]]

    monkeypatch.chdir(QUICKSTART.parents[1])
    monkeypatch.setattr(cores, "usable", lambda: 2)
    monkeypatch.setattr(recipe, "console_script", lambda name: name)
    args = quickstart.arguments([])
    held_out = {domain.name: domain.held_out for domain in corpora.DOMAINS}
    expected = [
        ["python", "examples/quickstart/corpora.py", f"{args.out}/text"]
        + ["--train-bytes", str(args.text_bytes), "--valid-bytes", str(recipe.VALID_BYTES)]
        + ["--test-bytes", str(recipe.TEST_BYTES)],
        recipe.prepare_command(args.out, held_out),
        *(recipe.train_command(args.out, model, args.updates) for model in FAMILIES),
        *(recipe.eval_command(args.out, m, name) for m in FAMILIES for name in held_out),
        recipe.expert_use_command(args.out, held_out),
        recipe.samples_command(args.out),
    ]
    user_dir = '"$(fairseq-moe user-dir)"'
    typed = [shlex.split(plan.typed(c).replace(user_dir, "fairseq_moe_ext")) for c in expected]
    for words in typed:
        words[0] = "python" if words[0].startswith("python") else words[0]
    assert found == [sorted(words) for words in typed]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--updates", "1"], "--updates 1 is too few"),
        (["--text-bytes", "5"], "--text-bytes 5 is too little"),
        (["--out", "/dev/null/x"], "--out /dev/null/x cannot be written"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert quickstart.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.fixture
def run(tmp_path):
    made = quickstart.Run(tmp_path / "a", 6, 20000, progress.Screen())
    made.open()
    yield made
    made.stop()


def test_a_failing_command_is_reported_with_its_last_words(run, tmp_path):
    command = [sys.executable, "-c", "import sys; print('so it was'); sys.exit(3)"]
    child = run.start(command, tmp_path / "log")
    with pytest.raises(UserError, match=r"ended with status 3: so it was \(all of it in .*log\)"):
        run.finish(child, command, tmp_path / "log")
    (tmp_path / "log").write_text("Traceback")
    with pytest.raises(UserError, match="no result of fairseq-eval-lm"):
        results.eval_result(tmp_path / "log")


def test_a_step_that_fails_is_not_done(run, capsys):

    def fail():
        raise UserError("no")

    with pytest.raises(UserError):
        run.stage("s", "Step", fail)
    assert run.stages()["s"].done is False
    run.stage("s", "Step", lambda: "fine")
    run.stage("s", "Step", fail)
    assert "Step: done before. fine" in capsys.readouterr().out


def test_logs_cut_off_by_a_kill_are_read(tmp_path):
    log = tmp_path / "train.log"
    names = [domain.name for domain in corpora.DOMAINS]

    def valid(update, ppl):
        figures = {
            f"valid_{name}_ppl": str(ppl) for name in [*names, "in_domain", "best_in_domain"]
        }
        figures.update(epoch=1, valid_num_updates=str(update), valid_ppl="9")
        return f"2026-01-01 00:00:00 | INFO | valid | {json.dumps(figures)}\n"

    wall = '2026 | INFO | train | {"epoch": %d, "train_train_wall": "%d"}\n'
    log.write_text(
        valid(10, 50.0)
        + valid(20, 40.0)
        + valid(20, 40.0)[:50]
        + "\n"
        + valid(20, 41.0)
        + valid(30, 30.0)
        + wall % (1, 7)
        + wall % (1, 9)
        + wall % (2, 5)
    )
    points = results.validations(log)
    assert [(point["update"], point["in_domain"]) for point in points] == [
        (10, 50.0),
        (20, 41.0),
        (30, 30.0),
    ]
    assert set(points[0]["perplexity"]) == set(names)
    assert logs.training_seconds(log) == 14


def test_an_epoch_without_its_line_counts_what_was_logged_within_it(tmp_path):
    """A kill between the last checkpoint and the epoch's line leaves the line out."""
    log = tmp_path / "train.log"
    inner = '2026 | INFO | train_inner | {"epoch": %d, "train_wall": "%d", "num_updates": "%d"}\n'
    log.write_text(inner % (1, 3, 10) + inner % (1, 9, 20) + inner % (1, 4, 20))
    assert logs.training_seconds(log) == 7, "of update 20 the last"
    with open(log, "a") as file:
        file.write('2026 | INFO | train | {"epoch": 1, "train_train_wall": "8"}\n')
        file.write(inner % (2, 5, 30))
    assert logs.training_seconds(log) == 13
    log.write_text("nothing left to train\n")
    with pytest.raises(UserError, match="train.log: logs no training; .* delete"):
        logs.training_seconds(log)


def test_the_live_line_says_how_far_how_good_how_fast(monkeypatch):
    now = iter([100.0, 109.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    shown = progress.TrainingProgress("dense", 100)
    line = (
        '2026 | INFO | train_inner | {"num_updates": "%d", "inner_loss": "5.25", "wps": "9000.1"}'
    )
    assert str(shown) == "dense starts" and shown.left == 0
    shown.read(line % 10)
    shown.read(line % 20)
    assert str(shown) == "dense 20/100 perplexity 38.05 9,000 tokens/s"
    assert shown.left == pytest.approx(72.0)
    shown.read("not a measurement | {")
    assert "20/100" in str(shown)


def test_a_live_line_elsewhere_is_not_repeated(monkeypatch, capsys):
    now = iter(range(100, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    screen = progress.Screen()
    for text in ("  stalled", "  stalled", "  stalled", "  goes on"):
        screen.show(text)
    screen.line("done")
    assert capsys.readouterr().out == "  stalled\n  goes on\ndone\n"


def test_what_the_report_says_follows_the_numbers(finished):
    out, _, _ = finished
    result = json.loads((out / "result.json").read_text())
    for factor, word in ((0.5, "lower"), (2.0, "higher")):
        moe = {k: v * factor for k, v in result["models"]["dense"]["perplexity"].items()}
        result["models"]["moe"]["perplexity"] = moe
        amount = "50.0" if factor < 1 else "100.0"
        assert f"its dense twin: {amount} % {word}" in page.sentence(result)
        ahead = 4 if factor < 1 else 0
        assert f"ahead on {ahead} of 4 training domains" in page.findings(result)[0]
        assert page.sentence(result) in page.html(result)


def test_the_page_fits_a_telephone_and_a_desk(finished, tmp_path):
    """The page is asked for its own width, in headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("Chromium is not installed")
    out, _, _ = finished
    html = (out / "report.html").read_text()
    ask = (
        "<script>parent.postMessage([document.documentElement.scrollWidth, innerWidth, "
        "Math.min(...[...document.querySelectorAll('.grid svg.chart')].map(e => "
        "e.getBoundingClientRect().width))].join(), '*')</script>"
    )
    asking = tmp_path / "asking.html"
    asking.write_text(html.replace("</body>", ask + "</body>"))
    for width in (1200, 400):
        # In a frame, because the browser's window is never narrower than 500 pixels.
        frame = tmp_path / f"{width}.html"
        frame.write_text(
            "<script>onmessage = e => document.title = e.data</script>"
            f'<iframe src="asking.html" width="{width}" height="900" style="border:0"></iframe>'
        )
        with tempfile.TemporaryDirectory() as profile:
            dom = subprocess.run(
                [
                    browser,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-quic",
                    "--no-first-run",
                    "--disable-background-networking",
                    "--disable-component-update",
                    "--disable-sync",
                    f"--user-data-dir={profile}",
                    "--window-size=1300,1000",
                    "--virtual-time-budget=5000",
                    "--dump-dom",
                    frame.as_uri(),
                ],
                capture_output=True,
                text=True,
                timeout=120,
            ).stdout
        found = re.search(r"<title>([\d.,]+)</title>", dom)
        assert found, dom[:300]
        scroll, inner, chart = map(float, found[1].split(","))
        assert inner == width
        assert scroll <= inner, "no scrolling sideways"
        assert chart >= 300, "text in charts is at least 0.83 of its nominal size"
