"""The command line as a user meets it."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling import cli, parsing

EXPERIMENT = '''"""Small models on a small corpus.

Что даёт больше данных?
"""
from llm_jax.config import Data, Mesh, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, Target, isoflop

experiment = Experiment(
    model=Model(),
    data=Data(source="files", files=("{corpus}/*",), context=32, eval_tokens=1024, val_fraction=0.2),
    train=Train(steps_per_call=16),
    mesh=Mesh(data=1),
    ladder=Ladder(aspect=8),
    axes=isoflop([3e8, 6e8, 1.2e9], [1.0, 2.0, 3.0]),
    forecast=Target(compute=2.4e9),
)
'''


@pytest.fixture
def experiment(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.py"
    path.write_text(EXPERIMENT.replace("{corpus}", str(corpus)), encoding="utf-8")
    return path


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")
def test_the_main_job(experiment, capsys, tmp_path):
    """Sweep, fit, forecast, verify, report: each verb on what the one before left, with --json one object and nothing else."""
    status, out, _ = run(capsys, "sweep", experiment, "--json")
    assert status == 0
    trials = json.loads(out)["trials"]
    assert len(trials) == 9
    assert {row["status"] for row in trials} == {"done"}
    folder = tmp_path / "runs" / "tiny"

    status, out, _ = run(capsys, "fit", folder, "--json", "--ci", "bootstrap:100")
    fitted = json.loads(out)
    assert status == 0
    assert fitted["law"] == "chinchilla"
    assert fitted["n"] == 9
    assert set(fitted["objective"]) == {"name", "value"}
    assert set(fitted["parameters"]) == {"A", "B", "E", "alpha", "beta"}
    assert all(set(value) == {"value", "interval", "unbounded"} for value in fitted["parameters"].values())

    status, out, err = run(capsys, "verify", folder)
    assert status == 2
    assert "holds no forecast" in err

    status, out, _ = run(capsys, "forecast", folder, "--json")
    registered = json.loads(out)
    assert registered == json.loads((folder / "forecast.json").read_text())
    assert set(registered["target"]) == {"N", "D", "C"}
    assert {"loss", "interval", "level"} <= set(registered["prediction"])
    assert not (folder / "target").exists(), "the forecast is there before the run that it is of"
    assert json.loads(run(capsys, "forecast", folder, "--json")[1]) == registered, "the same forecast again is the same"
    status, _, err = run(capsys, "forecast", folder, "--compute", 5e9)
    assert status == 2
    assert "a forecast does not change" in err

    status, out, _ = run(capsys, "verify", folder, "--json")
    verdict = json.loads(out)
    low, high = registered["prediction"]["interval"]
    assert verdict["inside"] == (low <= verdict["measured"] <= high)
    predicted = registered["prediction"]["loss"]
    assert verdict["error_relative"] == pytest.approx((verdict["measured"] - predicted) / predicted)
    assert json.loads((folder / "verify.json").read_text()) == verdict

    status, out, err = run(capsys, "report", folder)
    assert status == 0, err
    assert "L = E + A / N^alpha" in out
    assert "measured" in out
    assert out.strip().splitlines()[-1] == str(folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Что даёт больше данных?" in page

    status, out, _ = run(capsys, "generate", folder, "--prompt", "9 bottles", "--tokens", 20, "--json")
    assert status == 0
    assert isinstance(json.loads(out)["text"], str)
    status, out, _ = run(capsys, "attention", folder, "--prompt", "9 бутылок", "--json")
    assert status == 0
    drawn = json.loads(out)["maps"]["self"]
    assert "".join(drawn["queries"]) == "<s>9␣бутылок"
    assert {round(sum(row), 4) for layer in drawn["weights"] for head in layer for row in head} == {1.0}
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")
    for words, message in [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "x" * 300), "--prompt has 301 tokens"),
        (("--prompt", "x", "--out", tmp_path / "x.pdf"), "must end in .png or .svg"),
        (("--prompt", "x", "--out", tmp_path / "no" / "x.svg"), "--out: there is no folder"),
        (("--prompt", "x", "--trial", "zzz"), '--trial "zzz" names 0 finished trials'),
    ]:
        status, out, err = run(capsys, "attention", folder, *words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
    status, out, _ = run(capsys, "status", folder)
    assert out.splitlines()[-2] == "9 done"
    assert re.fullmatch(r"goodput \d+ % of \d+ s: .*compilation \d+ %.*", out.splitlines()[-1])

    status, _, err = run(capsys, "sweep", experiment, "--model.dropout", 0.1)
    assert status == 2
    assert "model.dropout is 0.0 there and 0.1 here" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swep", "x.py"], 'did you mean "sweep"'),
        (["sweep", "tin.py"], 'did you mean "tiny.py"'),
        (["sweep", "tiny.py", "--model.d_modl", "3"], 'did you mean "--model.d_model"'),
        (["sweep", "tiny.py", "--model.num_heads", "abc"], "abc"),
        (["sweep", "tiny.py", "--model.mlp", "gel"], "gelu"),
        (["sweep", "tiny.py", "--axis", "dept", "2"], 'did you mean "depth"'),
        (["sweep", "tiny.py", "--axis", "model.num_heads", "3"], "does not divide"),
        (["sweep", "tiny.py", "--model.d_model", "64"], "is set by an axis"),
        (["sweep", "tiny.py", "--workers", "0"], "at least 1"),
        (["sweep", "tiny.py", "--dry-ru"], 'did you mean "--dry_run"'),
        (["sweep", "tiny.py", "--experimen", "x"], "is no option of sweep"),
        (["train", "--data.files"], "--data.files needs at least one value"),
        (["train", "--data.files", "--model.d_model", "64"], "--data.files needs at least one value"),
        (["sweep"], "EXPERIMENT.py"),
        (["fit"], "needs a RUN or a TABLE.csv"),
        (["fit", "x.csv", "--ci", "bootstrap:x"], "no table"),
        (["train", "--model.d_model", "30", "--model.num_heads", "4"], "nearest that does"),
        (["train", "--data.source", "file"], 'did you mean "files"'),
        (["status", "nowhere"], "is no run directory"),
        (["fit", "nowhere.csv"], "no table"),
        (["generate", "nowhere"], "is no run directory"),
        (["attention", "nowhere", "--prompt", "x"], "is no run directory"),
        (["attention", "nowhere"], "--prompt"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(experiment, capsys, tmp_path, words, message):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(capsys, *words)
    assert status == 2
    assert out == ""
    assert err.startswith("llm-jax: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in str(path)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--model.num_heads", "3"], "llm-jax: model.num_heads=3 does not divide"),
        (["train", "--model.num_heads", "abc"], "llm-jax: Error parsing --model.num_heads: invalid literal"),
        (["sweep"], "llm-jax: Missing from llm-jax sweep: EXPERIMENT.py"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_messages_are_the_same_whatever_the_terminal_can_draw(capsys, monkeypatch, encoding, words, message):
    """The parser frames its messages with other characters where there is no UTF-8."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert "---" not in err


def test_options_that_are_offered_are_those_that_help_shows(capsys):
    """A suggestion that help does not know, or that is a positional, sends the user in a circle."""
    for verb, (kind, _) in cli.VERBS.items():
        with pytest.raises(SystemExit):
            parsing.parse(kind, ["--help"], verb)
        shown = capsys.readouterr().out
        for flag in parsing._flags(kind):
            assert re.search(rf"{re.escape(flag)}[ ,\n]", shown), (verb, flag)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["fit", "--list"]])
def test_an_ascii_terminal_gets_its_text(words):
    """Containers often have no locale; an arrow in the help must not end in a traceback there."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-m", "scaling.cli", *words], capture_output=True, text=True, env=env)
    assert found.returncode == 0
    assert found.stderr == ""
    assert len(found.stdout) > 200
    assert found.stdout.isascii()


def test_overrides_and_axes_from_the_command_line(experiment, capsys):
    """1e5 is a number of tokens; an axis of the command line replaces those of the file."""
    words = [
        "--axis",
        "train.seed",
        1,
        2,
        "--axis",
        "model.mlp",
        "gelu",
        "swiglu",
        "--train.tokens",
        "1e5",
        "--dry_run",
        "--json",
    ]
    status, out, _ = run(capsys, "sweep", experiment, *words)
    rows = json.loads(out)["trials"]
    assert status == 0
    assert [(row["train.seed"], row["model.mlp"]) for row in rows] == [
        (1, "gelu"),
        (1, "swiglu"),
        (2, "gelu"),
        (2, "swiglu"),
    ]
    assert all(row["D_tokens"] == pytest.approx(1e5, rel=0.01) for row in rows)


def test_help_is_instant_and_imports_no_jax():
    """JAX alone takes half a second; a shell is not to wait for it."""
    code = "import sys; from scaling import cli; cli.main(sys.argv[1:]); print(sorted({'jax', 'numpy', 'matplotlib'} & set(sys.modules)))"
    for words in (["--help"], ["sweep", "--help"]):
        found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert "usage" in found.stdout
        if words == ["--help"]:
            assert found.stdout.strip().endswith("[]")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "scaling.cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    verb = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "scaling.cli", "fit", "--help"], capture_output=True, text=True
    )
    assert "--objective" in verb.stdout
    assert not any(line.endswith((" jax", " numpy", " flax")) for line in verb.stderr.splitlines())


def test_a_closed_pipe_is_no_traceback(experiment):
    """llm-jax status | head"""
    for words in (f"sweep {experiment} --dry_run", "--help"):
        command = f"{sys.executable} -m scaling.cli {words} | true"
        found = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert "Traceback" not in found.stderr


def test_the_benches_are_listed(capsys):
    for words, status in ((["bench"], 2), (["bench", "--help"], 0)):
        assert cli.main(words) == status
        said = capsys.readouterr().out
        assert "bench sweep " in said
        assert "  train " not in said


def test_data_says_what_it_holds(experiment, capsys):
    status, out, _ = run(capsys, "data", experiment, "--check", "--json")
    assert status == 0
    values = json.loads(out)
    assert values["tokens"]["train"] > values["tokens"]["validation"] > 0
    assert Path(values["folder"]).is_dir()
    status, out, _ = run(capsys, "data", experiment)
    assert "tokenizer  bytes" in out


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")
def test_two_workers_share_a_sweep(experiment, capsys, tmp_path):
    status, out, _ = run(
        capsys, "sweep", experiment, "--workers", 2, "--axis", "depth", 1, 2, "--axis", "compute", 3e8, 6e8, "--json"
    )
    assert status == 0
    assert [row["status"] for row in json.loads(out)["trials"]] == ["done"] * 4
    assert "Traceback" not in (tmp_path / "runs" / "tiny" / "worker-1.log").read_text()
