import json
from dataclasses import replace

import pytest

from anynorm.apps.studies.compare.compare import identify
from anynorm.apps.studies.compare.train import Run
from anynorm.apps.studies.journal import JOURNAL, REPORT, RESULTS, Journal, set_aside, write_atomically
from anynorm.errors import UserError

RUN = Run("mlp", "batch", "8", 0.1, 0, 64, True)
CONTEXT = {"data": "d", "models": {"mlp": "m"}, "versions": {"anynorm": "1", "torch": "2", "python": "3"}}


def make(path, context=CONTEXT):
    return Journal(path, lambda run: identify(run, context))


def test_runs_come_back_and_a_torn_line_does_not_hurt(tmp_path):
    journal = make(tmp_path / "deep" / "out")
    journal.add(RUN, {**vars(RUN), "status": "finished"})
    journal.close()
    path = tmp_path / "deep" / "out" / JOURNAL
    path.write_bytes(path.read_bytes() + b'{"key": "torn", "sta')
    journal = make(path.parent)
    assert journal.find(RUN)["status"] == "finished"
    other = replace(RUN, seed=1)
    journal.add(other, {**vars(other), "status": "diverged"})
    journal.close()
    journal = make(path.parent)
    assert journal.find(RUN)
    assert journal.find(other)
    journal.close()


@pytest.mark.parametrize("junk", [b"[1]\n", b"3\n", b"\xff\xfe\n", b"{}\n", b"\n\n"])
def test_junk_lines_are_skipped(tmp_path, junk):
    (tmp_path / JOURNAL).write_bytes(junk)
    journal = make(tmp_path)
    assert journal.records == {}
    journal.close()


def test_a_run_is_found_only_where_everything_is_equal(tmp_path):
    journal = make(tmp_path)
    keys = {journal.key(RUN)}
    for change in ({"seed": 1}, {"rate": 0.2}, {"norm": "none"}, {"batch": "4"}, {"images": 32}, {"final": False}):
        keys.add(journal.key(replace(RUN, **change)))
    for name, value in (("data", "e"), ("models", {"mlp": "n"}), ("versions", {"anynorm": "1", "torch": "3"})):
        other = make(tmp_path / name, {**CONTEXT, name: value})
        keys.add(other.key(RUN))
        other.close()
    assert len(keys) == 10
    journal.close()


def test_failed_runs_are_tried_again_next_time(tmp_path):
    journal = make(tmp_path)
    journal.add(RUN, {**vars(RUN), "status": "failed", "reason": "r"})
    assert journal.find(RUN)
    journal.close()
    journal = make(tmp_path)
    assert journal.find(RUN) is None
    journal.close()


def test_one_process_at_a_time(tmp_path):
    journal = make(tmp_path)
    with pytest.raises(UserError, match="one process at a time"):
        make(tmp_path)
    journal.close()
    make(tmp_path).close()


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--out: takes a directory"):
            make(out)


def test_results_of_other_options_are_kept(tmp_path):
    for configuration in ("a" * 64, "b" * 64, "a" * 64, "c" * 64):
        set_aside(tmp_path, configuration)
        write_atomically(tmp_path / RESULTS, json.dumps({"configuration": configuration}))
        write_atomically(tmp_path / REPORT, configuration[:1])
    assert set_aside(tmp_path, "c" * 64) == []
    names = {path.name: path.read_text() for path in tmp_path.glob("report*")}
    assert names == {
        "report.html": "c",
        "report-aaaaaaaa.html": "a",
        "report-bbbbbbbb.html": "b",
        "report-aaaaaaaa-2.html": "a",
    }


def test_a_report_of_unknown_origin_is_kept(tmp_path):
    (tmp_path / REPORT).write_text("mine")
    assert set_aside(tmp_path, "a" * 64) == ["report-earlier.html"]
