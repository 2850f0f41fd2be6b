"""Files of the monitor, and `anynorm monitor` that reads them: whole, broken off, foreign, and hostile."""

from __future__ import annotations

import csv
import re
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from browser import look, needs_chromium
from typer.testing import CliRunner

import anynorm
from anynorm.apps import cli
from anynorm.apps.monitor.read import read_history
from anynorm.doctor.monitor.alarms import PROBLEMS
from anynorm.doctor.monitor.files import SqliteFile, list_values
from anynorm.doctor.monitor.record import COLUMNS, VERSION, Record
from anynorm.errors import UserError
from doctor.monitored import keep, make_net, train

pytestmark = pytest.mark.usefixtures("one_thread")
EVIL = "<script>alert('x')</script>\x1b[31m & $x$"


def print_monitor(*arguments):
    return CliRunner().invoke(cli.app, ["monitor", *map(str, arguments)])


@pytest.fixture(params=["run.sqlite", "run.csv"])
def written(request, tmp_path):
    """A file of three measured steps, and the records that it holds."""
    model = make_net()
    with anynorm.Monitor(model, tmp_path / request.param, every=2) as monitor:
        records = keep(monitor)
        train(model, 5)
    return tmp_path / request.param, records


@pytest.fixture
def sick(tmp_path):
    """A file of made-up records, with names that steer terminals and pages."""
    records = []
    for step in range(0, 500, 50):
        for number in range(8):
            warned = "noise" if number == 3 and step > 100 else ""
            gap = 0.1 * number + 0.01
            name = EVIL if number == 3 else f"_layer{number}"
            record = Record(step, name, "torch.nn.BatchNorm2d", 1, 0.5, 1.0 + number, gap, 2 * gap, number, 1.5, 0.2)
            record.gamma_min, record.gamma_max, record.gradient, record.warned = -0.5, 1.5, 10.0**-number, warned
            records.append(record)
    output = SqliteFile(tmp_path / "sick.db", {"model": EVIL})
    output.write(records)
    output.close()
    return tmp_path / "sick.db"


def test_a_file_is_read_as_it_was_written(written):
    file, records = written
    assert len(records) == 6
    history = read_history(file)
    assert [*history.records] == ["1", "5"]
    found = [record for own in history.records.values() for record in own]
    key = lambda record: (record.layer, record.step)  # noqa: E731
    for one, other in zip(sorted(found, key=key), sorted(records, key=key), strict=True):
        assert list_values(one) == list_values(other)


def test_the_file_is_written_while_training(tmp_path):
    model = make_net()
    with anynorm.Monitor(model, tmp_path / "run.sqlite", every=2):
        train(model, 4)
        assert read_history(tmp_path / "run.sqlite").steps == [0, 2]


def test_plain_readers_find_what_is_documented(written):
    file, records = written
    if file.suffix == ".csv":
        with file.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [*rows[0]] == ["version", *COLUMNS]
        assert (rows[0]["version"], rows[0]["layer"], float(rows[0]["gap"])) == ("1", "1", records[0].gap)
        assert rows[1]["gap"] == ""
    else:
        connection = sqlite3.connect(file)
        facts = dict(connection.execute("SELECT key, value FROM meta"))
        assert (facts["format"], facts["version"], facts["every"]) == ("anynorm-monitor", "1", "2")
        assert facts["model"] == "torch.nn.Sequential"
        first = connection.execute("SELECT step, layer, gap FROM records ORDER BY rowid LIMIT 2").fetchall()
        assert first == [(0, "1", records[0].gap), (0, "5", None)]
        connection.close()


def test_a_file_is_not_written_over(tmp_path):
    file = tmp_path / "run.csv"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already; choose another name, or pass overwrite=True"):
        anynorm.Monitor(make_net(), file)
    assert file.read_text() == "mine"
    model = make_net()
    with anynorm.Monitor(model, file, overwrite=True):
        train(model, 1)
    assert read_history(file).steps == [0]
    with pytest.raises(ValueError, match=r"file must end in \.sqlite, \.sqlite3, \.db or \.csv"):
        anynorm.Monitor(make_net(), tmp_path / "run.txt")


def test_a_disk_that_is_full_ends_no_training(tmp_path):
    model = make_net()
    with anynorm.Monitor(model, tmp_path / "run.sqlite", every=1) as monitor:
        train(model, 1)
        monitor._outputs[0].close()
        with pytest.warns(UserWarning, match="the file could not be written, and is no more: .*closed"):
            train(model, 3)
    assert monitor.step == 4


def test_the_table_fits_80_columns_and_names_the_worst(written):
    printed = print_monitor(written[0])
    assert printed.exit_code == 0, printed.exception
    assert max(map(len, printed.stdout.splitlines())) <= 80
    assert "2 norms, 3 measured steps from 0 to 4" in printed.stdout
    assert "largest gap of the median channel: 1, " in printed.stdout
    assert "Warned of" not in printed.stdout


def test_one_layer_over_the_steps(written):
    printed = print_monitor(written[0], "--layer", "5")
    rows = [line.split()[0] for line in printed.stdout.splitlines() if line[:1].isdigit() and "norm" not in line]
    assert rows == ["0", "2", "4"]
    with pytest.raises(UserError, match="there is no layer 'x' in the file; it has 1, 5"):
        read_history(written[0]).choose("x")


def test_what_was_warned_of_is_listed_and_names_do_not_steer_the_terminal(sick):
    printed = print_monitor(sick).stdout
    assert "step 150: the batch's mean is noisy: <script>" in " ".join(printed.split())
    assert "\x1b" not in printed and "\\x1b[31m" in printed
    assert "Worst in the second half" in printed and "_layer7" in printed


def test_the_page_holds_it_and_escapes_names(sick, tmp_path):
    pytest.importorskip("matplotlib", reason="the page needs matplotlib: pip install '.[compare]'")
    out = tmp_path / "page.html"
    printed = print_monitor(sick, "--html", out)
    assert printed.exit_code == 0, printed.exception
    text = out.read_text()
    assert "<script" not in text and "\x1b" not in text
    assert text.count("<figure>") == 7
    assert "1 problem warned of" in text
    assert "&lt;script&gt;" in text
    assert "_layer7" in text and "_layer0</text>" in text.replace(" ", "")  # the least gradient, the least gap
    assert "var(--c0)" in text and "#d55e00" not in text.split("</style>")[1]


def test_a_layer_alone_is_drawn_alone(sick):
    page = pytest.importorskip("anynorm.apps.monitor.page", reason="the page needs matplotlib")
    plot = page.draw_panel(read_history(sick).choose("_layer2"), page.PANELS[0])
    assert "_layer2" in plot.svg and "_layer7" not in plot.svg
    assert plot.alt_text.endswith("Last: _layer2 0.21.")
    nothing = {"1": [Record(0, "1", "torch.nn.GroupNorm")]}
    assert page.draw_panel(page.History({}, nothing), page.PANELS[0]) is None
    assert "Nothing was warned of" in page.write_page(page.History({}, nothing))


@needs_chromium
def test_chromium_draws_it(sick, tmp_path):
    pytest.importorskip("matplotlib", reason="the page needs matplotlib: pip install '.[compare]'")
    out = tmp_path / "out.html"
    print_monitor(sick, "--html", out)
    assert len(look(out.read_text(), tmp_path, 480)["plots"]) == 7


def spoil_table(file):
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE records SET gap = 'wide'")


def spoil_format(file):
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE meta SET value = 'other' WHERE key = 'format'")


def spoil_version(file):
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'version'")


def spoil_columns(file):
    with sqlite3.connect(file) as connection:
        connection.execute("ALTER TABLE records DROP COLUMN noise")


def empty_table(file):
    with sqlite3.connect(file) as connection:
        connection.execute("DELETE FROM records")


DAMAGES = {
    "a number that is none": (spoil_table, "is damaged: could not convert string to float"),
    "another program's tables": (spoil_format, "its table meta says no format"),
    "another version": (spoil_version, "is of version 2 of the format, and this anynorm reads 1"),
    "a column less": (spoil_columns, "no such column: noise|could not convert"),
    "no records": (empty_table, "has no records yet"),
    "half a file": (lambda file: file.write_bytes(file.read_bytes()[:5000]), "is damaged"),
    "an empty file": (lambda file: file.write_bytes(b""), "its first line is not that of a file of anynorm.Monitor"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe\x00" * 99), "is no file of anynorm.Monitor"),
    "another table": (lambda file: file.write_text("a,b\n1,2\n"), "its first line is not"),
    "a CSV of other columns": (lambda file: file.write_text("version,b\n1,2\n"), "its columns are others"),
    "a directory": (lambda file: (file.unlink(), file.mkdir()), "cannot be read"),
    "nothing": (lambda file: file.unlink(), "cannot be read: No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_file_of_ours_ends_in_one_sentence(sick, damage, monkeypatch, capsys):
    spoil, words = DAMAGES[damage]
    spoil(sick)
    with pytest.raises(UserError, match=words):
        read_history(sick)
    monkeypatch.setattr(sys, "argv", ["anynorm", "monitor", str(sick)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("anynorm: monitor: ")


def test_a_csv_that_was_broken_off_is_read_up_to_there(tmp_path):
    model = make_net()
    with anynorm.Monitor(model, tmp_path / "run.csv", every=1):
        train(model, 3)
    text = (tmp_path / "run.csv").read_text()
    (tmp_path / "run.csv").write_text(text[:-20])
    history = read_history(tmp_path / "run.csv")
    assert [len(own) for own in history.records.values()] == [3, 2]
    (tmp_path / "run.csv").write_text(text.replace(",5,", ",", 1))
    with pytest.raises(UserError, match="line 3 has 19 values, and 20 columns"):
        read_history(tmp_path / "run.csv")


def test_a_file_in_a_folder_with_signs_of_addresses_is_found(sick, tmp_path):
    folder = tmp_path / "a?b#c%20"
    folder.mkdir()
    shutil.move(sick, folder / "run.db")
    assert read_history(folder / "run.db").steps[0] == 0


def test_a_page_that_cannot_be_written_is_refused_first(sick, tmp_path):
    from anynorm.apps.monitor.show import print_monitor as show

    with pytest.raises(UserError, match=r"a page ends in \.html"):
        show(sick, tmp_path / "page.txt")


def test_the_page_of_the_docs_names_every_column_and_problem():
    text = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text()
    named = set(re.findall(r"`([\w-]+)`", text))
    assert named >= {*COLUMNS, *PROBLEMS}
    assert f"`version` is {VERSION};" in text
