"""Run directories in a bucket: the same results as in a folder, whoever is killed, and one worker a trial.

The real clients, gcsfs and TensorStore, against a server on this machine (fake_gcs.py).
"""

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fake_gcs import FakeGcs, environment
from simulated import runs

from llm_jax import files
from llm_jax.data import prepare
from llm_jax.settings import BadInput
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.metrics import Metrics, read_metrics
from llm_jax.training.watch import behind
from scaling import cli, experiment, launch, leases, ledger, report, tables
from scaling.experiment import Experiment, axis

pytestmark = pytest.mark.usefixtures("mixed_dtypes", "quick_compilation")


@pytest.fixture(scope="module")
def server():
    if importlib.util.find_spec("gcsfs") is None:  # llm_jax.files imports it, with settings of its own
        pytest.skip("gcsfs is not installed: run directories in buckets need llm_jax[gs]")
    import fsspec

    fake = FakeGcs().start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(fake.server_port).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # which is read from the environment once
        yield fake
    fake.stop()


@pytest.fixture
def bucket(server, request):
    """A folder of its own in the fake bucket."""
    return files.as_path(f"gs://bucket/{request.node.name}")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("gcs://bucket/run", "gs://bucket/run"), ("s3://bucket/run", "gs://bucket/run"), ("gs:/b/run", "gs://b/run")],
)
def test_another_scheme_is_told_the_nearest(given, nearest, capsys):
    """pathlib would take s3://bucket/run for a folder and train for days into it."""
    assert cli.main(["status", given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert given in line and f'did you mean "{nearest}"?' in line


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for words in (["status", "gs://bucket/run"], ["train", "--run", "gs://bucket/run"], ["fit", "gs://bucket/run"]):
        assert cli.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'pip install "llm_jax[gs]"' in line


def test_local_paths_stay_those_of_pathlib():
    """Nothing of a local run goes through another library."""
    for text in ("runs/x", "/tmp/a:b", "C:/x", "."):
        assert files.as_path(text) == Path(text) and type(files.as_path(text)) is type(Path(text))


def test_a_bucket_that_is_not_there_is_one_line(server, tmp_path, capsys):
    path = files.as_path("gs://absent/run/x.json")
    assert files.find_json(path) is None
    with pytest.raises(BadInput, match=r"gs://absent/run/x\.json: there is no such bucket"):
        files.write_json(path, {})
    assert cli.main(["status", "gs://absent/run"]) == 2
    assert "gs://absent/run is no run directory" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 403])
def test_a_user_without_rights_is_told_to_log_in(server, status, capfd):
    """The first thing that goes wrong for everybody: one line, not a page of gcsfs's log and traceback."""
    for verb in ("status", "fit", "report"):
        assert cli.main([verb, f"gs://refused-{status}/run"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"gs://refused-{status}/run" in line and "gcloud auth application-default login" in line


def test_of_all_who_create_an_object_one_does(bucket):
    """The precondition that leases stand on."""
    won, together = [], threading.Barrier(16)

    def race(i):
        together.wait()
        if files.create(bucket / "attempt-1.json", f"{i}"):
            won.append(i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert files.read_json(bucket / "attempt-1.json") == won[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_creation_whose_answer_is_lost_is_known_to_be_ours(server, bucket, when):
    """gcsfs tries again and is told that the object is there; a lease that its holder does not know of would hold for ever."""
    name = f"{bucket.name}/attempt-1.json"
    getattr(server, when).add(name)
    assert files.create(bucket / "attempt-1.json", "mine")
    assert not files.create(bucket / "attempt-1.json", "another's")
    assert server.read("bucket", name) == b"mine"


HOLD = """
import sys, time
from llm_jax import files
from scaling import leases
folder = files.as_path(sys.argv[1])
files.exists(folder)  # connected
time.sleep(max(0, float(sys.argv[2]) - time.time()))
with leases.take(folder) as lease:
    print(bool(lease), flush=True)
    if lease: time.sleep(60)
"""


def test_of_workers_that_race_for_a_lease_one_wins_and_a_dead_one_loses_it(bucket):
    """Two that hold one trial would write over each other's checkpoints."""
    at = str(time.time() + 3)
    command = [sys.executable, "-c", HOLD, str(bucket), at]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [worker.stdout.readline() for worker in workers]
    assert sorted(said) == ["False\n"] * 3 + ["True\n"]
    with leases.take(bucket) as lease:
        assert lease is None
    workers[said.index("True\n")].send_signal(signal.SIGKILL)
    for worker in workers:
        worker.communicate()
    with leases.take(bucket) as lease:
        assert lease is not None
    assert [one["number"] for one in leases.attempts(bucket)] == [1, 2]
    assert "ended" in leases.attempts(bucket)[1] and "ended" not in leases.attempts(bucket)[0]


@pytest.mark.parametrize("hours", [-1, 1])
def test_silence_is_measured_by_the_buckets_clock(bucket, monkeypatch, hours):
    """Hosts whose clocks are off must neither take a trial that is being trained nor wait for ever for a dead one."""
    monkeypatch.setattr(leases, "SILENT_SECONDS", 2.0)
    path, now = bucket / "attempt-1.json", time.time
    files.write_json(path, {"machine": "elsewhere"})
    monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
    assert leases.held(leases.attempts(bucket)[0])
    time.sleep(2.2)
    assert not leases.held(leases.attempts(bucket)[0])
    assert [one.name for one in bucket.iterdir()] == ["attempt-1.json"], "asking for the time leaves nothing behind"


def test_two_experiments_do_not_share_a_folder(bucket, small):
    """Two hosts that begin different sweeps in one moment: no lock keeps them apart, so one of them must be refused."""
    prepared = prepare.prepare(small.config)
    other = replace(small, train=replace(small.train, weight_decay=0.2))
    ended, together = [], threading.Barrier(2)

    def begin(one):
        together.wait()
        try:
            ledger.create(bucket, "x", "", one, experiment.trials(one), prepared)
            ended.append("made")
        except BadInput as error:
            ended.append(str(error))

    threads = [threading.Thread(target=begin, args=(one,)) for one in (small, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended.remove("made")
    (refused,) = ended
    assert "is the run of another config: train.weight_decay" in refused
    assert len(ledger.trials(bucket)) == 2, "the refused one has left no trial"


def test_lines_reach_a_bucket_when_they_are_flushed(server, bucket, tiny):
    """An object cannot grow: each flush writes it anew, and nothing else may, as a bucket takes a write a second."""
    name = f"{bucket.name}/metrics.jsonl"

    def write(metrics, steps):
        for step in steps:
            metrics.write(tiny, step, 1, {"nll": np.ones(1)})

    with closing(Metrics(bucket, 0)) as metrics:
        write(metrics, range(5))
        assert read_metrics(bucket) == []
        metrics.flush()
        metrics.flush()
        assert [line["step"] for line in read_metrics(bucket)] == [1, 2, 3, 4, 5]
        assert server.writes[name] == 2
        write(metrics, range(5, 7))
    assert [line["step"] for line in read_metrics(bucket)] == [1, 2, 3, 4, 5, 6, 7]
    with closing(Metrics(bucket, 5)) as metrics:
        write(metrics, range(5, 6))
    assert [line["step"] for line in read_metrics(bucket)] == [1, 2, 3, 4, 5, 6], (
        "a restart at 5 dropped what came after"
    )
    assert any("tfevents" in one for one in server.names("bucket") if one.startswith(f"{bucket.name}/tensorboard/"))


def test_a_checkpoint_that_a_kill_left_half_written_does_not_count(server, bucket):
    """In a bucket nothing is renamed: a step's folder is there before it is whole, and must neither be restored nor be in the way."""
    states = [{"x": jnp.full((8,), value)} for value in (1.0, 2.0, 3.0)]
    with closing(Checkpoints(bucket, keep=None)) as checkpoints:
        checkpoints.save(1, states[0])
        checkpoints.save(2, states[1])
    whole = f"{bucket.name}/2/commit_success.txt"
    del server.objects["bucket", whole]
    with closing(Checkpoints(bucket, keep=None)) as checkpoints:
        assert checkpoints.steps() == [1]
        assert np.array_equal(checkpoints.restore(1, states[0])["x"], states[0]["x"])
        checkpoints.save(2, states[2])
    with closing(Checkpoints(bucket, keep=1)) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert np.array_equal(checkpoints.restore(2, states[0])["x"], states[2]["x"])
        checkpoints.save(3, states[0])
    assert {name.split("/")[1] for name in server.names("bucket") if name.startswith(f"{bucket.name}/")} == {"3"}


def test_a_folder_made_by_hand_is_no_file_of_itself(server, bucket):
    """The console makes an object NAME/ for a folder."""
    server.put("bucket", f"{bucket.name}/", b"", {})
    assert files.children(bucket) == []
    files.write_json(bucket / "x.json", {})
    server.put("bucket", f"{bucket.name}/y/", b"", {})
    assert files.children(bucket) == [bucket / "x.json", bucket / "y"]


def test_processes_that_are_behind_are_found(bucket):
    for process, step in enumerate((7, 3)):
        files.write_json(bucket / f"{process}.json", {"host": f"host{process}", "step": step, "phase": "step"})
    assert behind(bucket, 0, 7) == ["process 1 on host1 is behind, at step 3 in step"]


def test_tables_are_read_from_a_bucket(bucket, tmp_path, capsys):
    """fit and plan say of a bucket's table what they say of the same table here."""
    columns = runs(noise=0.01).columns
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    said = []
    for path in (tmp_path / "table.csv", bucket / "table.csv"):
        files.write_atomic(path, tables.csv_text(rows))
        assert cli.main(["fit", str(path), "--ci", "none", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]


@pytest.fixture
def small(tiny):
    return Experiment(
        model=tiny.model,
        data=tiny.data,
        train=replace(tiny.train, warmup_steps=2, checkpoint_every=16),
        mesh=tiny.mesh,
        axes=axis("train.tokens", [1280, 2560]),
    )


def make(folder, small):
    prepared = prepare.prepare(small.config)
    ledger.create(folder, "small", "", small, experiment.trials(small), prepared)
    return prepared


def test_a_sweep_in_a_bucket_is_the_sweep_in_a_folder(server, bucket, small, tmp_path):
    """To the bit, with its table; and a second sweep trains nothing."""
    for folder in (tmp_path / "run", bucket):
        launch.work(folder, make(folder, small))
    assert ledger.sha256(bucket) == ledger.sha256(tmp_path / "run")
    assert files.read_bytes(bucket / "table.csv") == (tmp_path / "run" / "table.csv").read_bytes()
    rows = ledger.rows(bucket)
    assert [row["status"] for row in rows] == ["done", "done"]
    for row in rows:
        trial, local = (ledger.trial_folder(folder, row["id"]) for folder in (bucket, tmp_path / "run"))
        assert read_metrics(trial) == read_metrics(local)
        # 20 or 40 steps with a checkpoint each 16 and in the end; the first write is empty, the last with the evaluation.
        assert server.writes[str(trial / "metrics.jsonl").removeprefix("gs://bucket/")] <= 2 + 3
    before = server.names("bucket")
    launch.work(bucket, make(bucket, small))
    assert server.names("bucket") == before


def test_a_report_in_a_bucket_has_its_page_and_figures(bucket, tmp_path):
    """The same files with the same bytes as those of a folder."""
    common = {"status": "done", "loss_se": 0.01, "reason": "", "first_step": 0, "bits_per_byte": 1.0, "seconds": 1.0}
    common |= {
        "tokens_per_step": 64,
        "peak_lr": 1e-3,
        "num_steps": 10,
        "tokens_per_second": 1.0,
        "depth": 1,
        "epochs": 1.0,
    }
    trials = [
        common | {"id": f"{i}", "N_params": n, "D_tokens": 1e6, "C_flops": 6e6 * n, "budget": None, "loss": 4.0 - i / 2}
        for i, n in enumerate((1000, 2000))
    ]
    nothing = {"fit": None, "bands": None, "forecast": None, "verify": None, "entropy": None}
    shown = report.Content("x", "", trials, {}, isoflop=[], warnings=[], facts={}, **nothing)
    made = []
    for folder in (bucket, tmp_path):
        page = report.write(shown, folder)
        made.append({path.name: files.read_bytes(path) for path in (page, *(folder / "figures").iterdir())})
    assert made[0] == made[1]
    assert {name.rpartition(".")[2] for name in made[0]} == {"html", "png", "svg", "csv"}


def test_counts_are_kept_in_a_bucket(bucket, small, tmp_path):
    """A model that is counted has no checkpoints, but a file of arrays."""
    from llm_jax.training import loop

    counted = replace(small, model=replace(small.model, family="ngram", ngram_order=3), axes=({},))
    counted = replace(counted, train=replace(counted.train, tokens=1280))
    for folder in (tmp_path / "run", bucket):
        launch.work(folder, make(folder, counted))
    (trial,) = ledger.trials(bucket)
    assert ledger.sha256(bucket) == ledger.sha256(tmp_path / "run")
    there, here = (loop.load_params(trial.config, ledger.trial_folder(f, trial.id)) for f in (bucket, tmp_path / "run"))
    assert all(np.array_equal(a, b) for x, y in zip(there, here, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.slow
def test_a_worker_killed_in_a_trial_goes_on_from_its_checkpoint(server, bucket, small, tmp_path):
    """Not from the start, and to the same bits as one that nobody killed."""
    long = replace(small, axes=axis("train.tokens", [1280, 32_000]))
    trials = sorted(experiment.trials(long), key=lambda trial: trial.config.num_steps)
    make(bucket, long)
    checkpoints = f"{bucket.name}/trials/{trials[1].id}/checkpoints/"

    def worker_of(folder):
        return subprocess.Popen([sys.executable, "-m", "scaling.cli", "work", str(folder), "0", "1"])

    with worker_of(bucket) as worker:
        while not any(
            name.startswith(checkpoints) and name.endswith("commit_success.txt") for name in server.names("bucket")
        ):
            assert worker.poll() is None
            time.sleep(0.05)
        worker.send_signal(signal.SIGKILL)
    states = [ledger.status(bucket, trial.id) for trial in trials]
    assert states == ["done", "stopped"], "killed in the second trial, before its end"
    make(tmp_path / "run", long)
    for folder in (bucket, tmp_path / "run"):
        assert worker_of(folder).wait() == 0
    attempts = leases.attempts(ledger.trial_folder(bucket, trials[1].id))
    assert len(attempts) == 2 and attempts[1]["from_step"] >= 16
    assert ledger.sha256(bucket) == ledger.sha256(tmp_path / "run")
    lines, undisturbed = (
        read_metrics(ledger.trial_folder(folder, trials[1].id)) for folder in (bucket, tmp_path / "run")
    )
    assert lines == undisturbed
