"""A guard against regressions is worth its rates of false alarms and of misses, and that it compares like with like."""

import json
import os
import random
from pathlib import Path

import pytest

from llm_jax.settings import BadInput
from scaling import cli
from scaling.bench import baseline
from scaling.parsing import parse

REPO = Path(__file__).resolve().parents[3]
VERBS = ["train", "moe"]
TRAIN = {"bench": "train", "arguments": ["--model.num_layers", "2"], "ratio": "mfu"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Path:
    """A baseline of one bench at 0.5, made on this machine, which is "here"."""
    monkeypatch.setattr(baseline, "device", lambda: "here")
    path = tmp_path / "baseline.json"
    done = TRAIN | {"value": 0.5, "spread": 0.01, "passes": 7}
    path.write_text(json.dumps({"device": "here", "benches": [done]}))
    return path


def measures(monkeypatch, values) -> None:
    """Has the benches find these ratios, one after the other, and the last one ever after."""
    left = list(values)
    monkeypatch.setattr(baseline, "_run", lambda *a: {"mfu": left.pop(0) if len(left) > 1 else left[0]})


@pytest.mark.parametrize(("now", "status"), [(0.5, 0), (0.6, 0), (0.48, 0), (0.47, 1), (0.25, 1)])
def test_more_than_five_percent_below_is_a_regression(now, status, file, monkeypatch, capsys):
    measures(monkeypatch, [now])
    assert cli.main(["bench", "compare", str(file)]) == status
    assert ("SLOWER" in capsys.readouterr().out) == bool(status)


def test_one_bad_pass_is_no_regression(file, monkeypatch):
    measures(monkeypatch, [0.5, 0.3, 0.5])
    assert baseline.compare(file, VERBS)["regressed"] == 0


def test_rates_of_false_alarms_and_misses(file, monkeypatch):
    """With the noise of a busy machine: 2.5 % from pass to pass, in the baseline too."""
    rng = random.Random(0)

    def alarms(truth: float) -> float:
        found = 0
        for _ in range(200):
            monkeypatch.setattr(baseline, "_run", lambda *a: {"mfu": rng.gauss(0.5, 0.0125)})
            baseline.compare(file, VERBS, write=True)
            monkeypatch.setattr(baseline, "_run", lambda *a: {"mfu": truth * rng.gauss(0.5, 0.0125)})
            found += baseline.compare(file, VERBS)["regressed"]
        return found / 200

    assert alarms(1.0) <= 0.02
    assert alarms(0.9) >= 0.97


def test_noise_asks_for_more_passes(file, monkeypatch):
    """Three where all is clear; more, and the end of them, where the median lies at the limit."""
    measures(monkeypatch, [0.5])
    assert len(baseline.compare(file, VERBS)["benches"][0]["passes"]) == baseline.FEWEST
    measures(monkeypatch, [0.475])
    assert len(baseline.compare(file, VERBS)["benches"][0]["passes"]) == baseline.MOST


def test_writing_keeps_the_list_and_gives_it_values(tmp_path, file, monkeypatch):
    """Also of a list that has none yet."""
    file.write_text(json.dumps({"cores": 1, "benches": [TRAIN]}))
    with pytest.raises(BadInput, match='"None" and this is "here"'):
        baseline.compare(file, VERBS)
    measures(monkeypatch, [0.4, 0.42, 0.41])
    assert cli.main(["bench", "compare", str(file), "--write"]) == 0
    tree = json.loads(file.read_text())
    assert (tree["device"], tree["cores"]) == ("here", 1)
    assert tree["benches"][0] | TRAIN == tree["benches"][0]
    assert tree["benches"][0]["value"] == 0.41
    measures(monkeypatch, [0.41])
    assert cli.main(["bench", "compare", str(file)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "another"}, 'was made on "another" and this is "here"'),
        ({"benches": []}, 'needs "benches"'),
        ({"benches": [{"bench": "train"}]}, r'benches\[0\] lacks "arguments"'),
        ({"benches": [TRAIN | {"bench": "trian"}]}, 'did you mean "train"'),
        ({"benches": [TRAIN]}, "has no value for"),
        ({"benches": [TRAIN | {"ratios": 1}]}, 'did you mean "[^"]*ratio"'),
        ({"benches": [TRAIN | {"value": 1.0, "ratio": "mfuu"}]}, 'did you mean "mfu"'),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused_in_one_line(change, message, file, monkeypatch):
    measures(monkeypatch, [0.5])
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before = file.read_text()
    with pytest.raises(BadInput, match=message) as refused:
        baseline.compare(file, VERBS)
    assert "\n" not in str(refused.value)
    assert file.read_text() == before


def test_a_bench_that_fails_is_told_by_its_own_line(file):
    one = baseline.Bench("train", ("--model.num_heads", "3"), "mfu")
    with pytest.raises(BadInput, match=r"bench train --model\.num_heads 3: .*does not divide"):
        baseline._run(one, 1, 0, str(file.parent))


def test_benches_are_kept_to_cores_and_take_turns_on_them():
    """What a bench may use decides how its CPU time is spent; and one busy core must not have all its passes."""
    usable = os.sched_getaffinity(0)
    kept = []
    for number in range(2 * len(usable)):
        with baseline._kept_to(1, number):
            kept.append(os.sched_getaffinity(0))
    assert [len(cores) for cores in kept] == [1] * len(kept)
    assert set().union(*kept) == usable == os.sched_getaffinity(0)


def test_baselines_of_this_repository_can_be_run():
    """Their arguments are those of the verbs, and they have values: a field that was renamed shows here and not in a year."""
    verbs = {name.removeprefix("bench "): one[0] for name, one in cli.VERBS.items() if name.startswith("bench ")}
    paths = sorted((REPO / "experiments").glob("baseline_*.json"))
    assert paths
    for path in paths:
        read = baseline.read(path, list(verbs))
        assert read.device
        for one in read.benches:
            parse(verbs[one.bench], [*one.arguments, "--json"], f"bench {one.bench}")
            assert one.value
            assert one.passes


@pytest.mark.slow
def test_written_and_compared_with_real_benches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baseline, "FEWEST", 1)
    monkeypatch.setattr(baseline, "MOST", 1)
    arguments = (
        "--model.num_layers 1 --model.d_model 16 --data.context 16 --train.tokens_per_step 64 --train.steps_per_call 2"
    )
    one = {"bench": "train", "arguments": arguments.split(), "ratio": "cpu_mfu"}
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"cores": 1, "benches": [one]}))
    assert cli.main(["bench", "compare", str(path), "--write"]) == 0
    value = json.loads(path.read_text())["benches"][0]["value"]
    assert 0 < value < 1
    capsys.readouterr()
    assert cli.main(["bench", "compare", str(path), "--json"]) in (0, 1)  # one pass of a machine that others use
    row = json.loads(capsys.readouterr().out)["benches"][0]
    assert row["baseline"] == value
    assert len(row["passes"]) == 1
