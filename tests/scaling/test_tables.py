"""Tables: what is read is what was written, and a filter is data, never code."""

import math

import numpy as np
import pytest

from llm_jax.settings import BadInput
from scaling import tables

CSV = """N_params,D_tokens,loss,status,note
100,2000,3.5,done,first
200,1000,3.0,done,
400,4000,,failed,"a, b"
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "table.csv").write_text(CSV)
    return tables.read(tmp_path)


def test_reads_a_run_directory_and_the_csv_itself_alike(table, tmp_path):
    """A published CSV and a run of ours go through the same verbs."""
    again = tables.read(tmp_path / "table.csv")
    assert list(again.columns) == list(table.columns)
    np.testing.assert_array_equal(again.column("loss"), table.column("loss"))
    assert len(table) == 3
    assert table.column("note").tolist() == ["first", "", "a, b"]
    assert np.isnan(table.column("loss")[2])
    assert table.column("row").tolist() == [1, 2, 3]


def test_compute_does_not_overflow(tmp_path):
    """6 N D of a 70B model on 14T tokens is 5.9e24, past int64 (9.2e18): it must not wrap around."""
    path = tmp_path / "large.csv"
    path.write_text("N_params,D_tokens,loss\n70000000000,14000000000000,1.9\n")
    assert tables.read(path).column("C_flops")[0] == pytest.approx(5.88e24, rel=1e-12)


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("", [1, 2, 3]),
        ("N_params >= 200", [2, 3]),
        ("100 < N_params < 400", [2]),
        ('status == "done" and loss < 3.2', [2]),
        ('not status == "done" or N_params == 100', [1, 3]),
        ("D_tokens / N_params > 4 + 2 ** 2", [1, 3]),
        ("-loss > -3.2", [2]),
        ("C_flops <= 6 * 100 * 2000", [1, 2]),
        ("N_params / (D_tokens - 2000) > 0", [1, 3]),
        ("1 < 2", [1, 2, 3]),
    ],
)
def test_where_keeps_the_rows_for_which_it_holds(table, expression, rows):
    """A wrong selection is a wrong law, silently; a missing loss (row 3) satisfies no comparison."""
    assert table.where(expression).column("row").tolist() == rows


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('touch HACKED')",
        "loss.__class__",
        "(lambda: 1)()",
        "[loss for loss in (1, 2)]",
        "loss[0] > 1",
        "f'{loss}' == '3'",
        "(loss := 3) > 1",
        "loss > 1; loss",
        "loss >",
        "loss",
        "True",
        "loss + 1",
        "not N_params",
        "loss and status == 'done'",
        "status > 3",
        "status + 1 > 3",
        "loss is 3",
        "loss in (1, 2)",
        "-status == 'done'",
        "b'x' == status",
        "\0",
        "(" * 400 + "loss" + ")" * 400,
    ],
)
def test_where_runs_nothing_and_says_what_it_cannot_read(table, expression, tmp_path, monkeypatch):
    """Expressions come from command lines and shared files: they are data, never code."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        table.where(expression)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "HACKED").exists()


def test_where_does_not_hang_on_large_powers(table):
    """With Python's integers this would fill the memory."""
    assert len(table.where("N_params < 9**9**9**9")) == 3


def test_unknown_columns_are_answered_with_the_nearest(table):
    """The names of published tables differ by a letter or two."""
    with pytest.raises(BadInput, match='no column "N_param"; did you mean "N_params"'):
        table.where("N_param > 3")
    with pytest.raises(BadInput, match='did you mean "D_tokens"'):
        table.column("D_token")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("a,a\n1,2\n", "twice: a"),
        ("a,b\n1,2\n3\n", "row 2: 1 cells"),
        ("N_params,D_tokens,loss\n1e6,many,3\n", 'D_tokens must hold numbers, got "many"'),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, text, message):
    """A truncated upload must not become a shorter table."""
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(BadInput, match=message):
        tables.read(tmp_path / "x.csv")


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    """One line, not a traceback."""
    (tmp_path / "results.csv").write_text("a\n1\n")
    with pytest.raises(BadInput, match=r'did you mean "results\.csv"'):
        tables.read(tmp_path / "result.csv")


def test_select_takes_masks_and_positions(table):
    """Bootstraps pick by position, filters by mask."""
    assert table.select(table.column("N_params") > 100).column("row").tolist() == [2, 3]
    assert table.select(np.array([2, 0, 0])).column("row").tolist() == [3, 1, 1]


def test_what_is_written_is_read_to_the_last_bit(tmp_path):
    """A fit to RUN/table.csv is a fit to the ledger."""
    rows = [{"loss": 0.1 + 0.2, "D_tokens": 3}, {"loss": np.float64(1 / 3), "D_tokens": None, "note": 'a, "b"'}]
    (tmp_path / "table.csv").write_text(tables.csv_text(rows))
    again = tables.read(tmp_path)
    assert again.column("loss").tolist() == [0.1 + 0.2, 1 / 3]
    assert again.column("note").tolist() == ["", 'a, "b"']
    assert again.column("D_tokens")[0] == 3
    assert np.isnan(again.column("D_tokens")[1])


def test_a_terminal_shows_what_there_is_in_columns():
    """Columns that nothing fills are left out; a loss that is not there yet is blank, not nan."""
    rows = [
        {"id": "a", "status": "done", "N_params": 12_345, "loss": 2.5, "reason": ""},
        {"id": "b", "status": "running", "N_params": 1, "loss": math.nan, "reason": ""},
    ]
    assert tables.terminal_text(rows).splitlines() == [
        "id  status   N_params    loss",
        "a   done       12,345  2.5000",
        "b   running         1",
    ]
