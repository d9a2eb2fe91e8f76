"""The cells of examples/inspect.ipynb, one after another, as a notebook runs them."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "inspect.ipynb"


def test_the_notebook_runs(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "moe").symlink_to(trained / "moe")
    (tmp_path / "data").symlink_to(trained / "data")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (tmp_path / "my.txt").write_text("a text of the reader")
    names = {}
    for source in code[:-1]:
        exec(source, names)
    assert "expert 3" in capsys.readouterr().out
    assert (tmp_path / "my.txt").read_text() == "a text of the reader"
    assert eval(code[-1], names)._repr_html_().startswith("<iframe")
