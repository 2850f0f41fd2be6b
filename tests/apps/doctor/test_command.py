"""`anynorm doctor`, as a user types it: exit codes, what is printed, files, repairs, and bad input.

Keeps invariants: the exit code is the health, and a model that is named with control characters steers no terminal.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

import anynorm
from anynorm.cli import main
from anynorm.doctor.check import find_checks


def flatten(text):
    return " ".join(text.split())


def find_error(result):
    """The one sentence that ends the command with exit code 2."""
    assert isinstance(result.exception, anynorm.UserError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_a_healthy_model_ends_in_0(run):
    result = run("sick.py:healthy", "--data", "sick.py:load")
    assert result.exit_code == 0, result.output
    said = flatten(result.output)
    assert "0 checks" not in said and "8 batches: loss" in said and "accuracy" in said
    assert "checks need the optimizer: anynorm.diagnose" in said


def test_notes_alone_end_in_0(run):
    result = run("sick.py:notes")
    assert result.exit_code == 0
    assert "1 note" in result.output and "bias-useless" in result.output


def test_findings_end_in_1_with_numbers_cause_and_code(run):
    result = run("sick.py:shifted", "--data", "sick.py:load")
    assert result.exit_code == 1
    said = flatten(result.output)
    assert "error: train-eval-gap" in said
    assert "1 (BatchNorm1d) is 3" in said  # std
    assert "ruled out never updated" in said and "without loss" in said
    assert "anynorm.recalibrate(model, loader" in said
    assert max(map(len, result.output.splitlines())) <= 80
    assert "\x1b" not in result.output


def test_the_same_at_many_norms_is_one_entry(run):
    result = run("sick.py:several", "--check", "momentum-inverted")
    assert result.output.count("error: momentum-inverted") == 1
    assert "3 norms: 0, 1 and 2" in result.output
    assert "for name in (\n        '0', '1', '2'," in result.output


def test_only_the_chosen_checks_run(run):
    assert run("sick.py:inverted", "--check", "eps-zero").exit_code == 0
    assert run("sick.py:inverted", "--check", "eps-zero", "--check", "momentum-inverted").exit_code == 1


def test_built_in_models_can_be_named(run):
    result = run("mlp")
    assert result.exit_code == 0 and "mlp: 3 norms" in result.output


def test_the_model_keeps_the_mode_of_its_factory(run, tmp_path):
    """Also with weights, which are tensors."""
    (tmp_path / "modes.py").write_text(
        "from torch import nn\n"
        "def make():\n    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()\n"
        "    model[0].train()\n    return model\n"
    )
    assert "training-in-evaluation" in run("modes.py:make").output
    torch.save(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)).state_dict(), "w.pt")
    assert "training-in-evaluation" in run("modes.py:make", "--weights", "w.pt").output


def test_weights_with_impossible_values_are_loaded_and_found(run):
    state = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4)).state_dict()
    state["1.running_var"][2] = -1.0
    torch.save(state, "w.pt")
    result = run("sick.py:notes", "--weights", "w.pt")
    assert result.exit_code == 1 and "averages-impossible" in result.output
    del state["1.running_var"]
    torch.save(state, "w.pt")
    assert "1.running_var is missing" in find_error(run("sick.py:notes", "--weights", "w.pt"))


@pytest.mark.parametrize("loss", ["sick.py:half", "torch.nn:CrossEntropyLoss", "torch.nn.functional:cross_entropy"])
def test_a_loss_may_be_a_function_or_a_class(run, loss):
    result = run("sick.py:healthy", "--data", "sick.py:BATCHES", "--loss", loss, "--check", "train-eval-gap")
    assert result.exit_code == 0 and "loss" in result.output


def test_batches_are_as_many_as_asked_for(run):
    result = run("sick.py:healthy", "--data", "sick.py:load", "--batches", "2", "--check", "train-eval-gap")
    assert "2 batches: loss" in result.output


def test_fix_repairs_proves_and_writes(run):
    result = run("sick.py:shifted", "--data", "sick.py:load", "--check", "train-eval-gap", "--fix", "--out", "w.pt")
    assert result.exit_code == 0, result.output
    said = flatten(result.output)
    assert "done train-eval-gap at 1: loss" in said and "better" in said and "left nothing found" in said
    assert "wrote w.pt" in said
    again = run("sick.py:shifted", "--data", "sick.py:load", "--check", "train-eval-gap", "--weights", "w.pt")
    assert again.exit_code == 0, again.output
    assert "is there already" in find_error(run("sick.py:shifted", "--fix", "--out", "w.pt"))


def test_fix_says_what_was_refused_and_ends_in_1(run, monkeypatch):
    from anynorm.doctor import proof
    from anynorm.surgery.differences import Difference

    monkeypatch.setattr(proof, "measure", lambda one, other: Difference(1.0, 1.0))  # as if outputs had moved
    result = run("sick.py:inverted", "--data", "sick.py:load", "--check", "momentum-zero", "--fix")
    assert "nothing that was found has a repair" in flatten(result.output)
    result = run("sick.py:notes", "--data", "sick.py:load", "--check", "bias-useless", "--fix", "--out", "w.pt")
    said = flatten(result.output)
    assert "refused bias-useless at 1: it may not move outputs in evaluation" in said
    assert "did not write w.pt: nothing was repaired" in said and not os.path.exists("w.pt")


def test_fix_says_where_the_file_does_not_fit_the_factory(run):
    result = run("sick.py:notes", "--check", "bias-useless", "--fix", "--out", "w.pt")
    assert result.exit_code == 0
    assert "whose tensors are others than the factory's" in flatten(result.output)
    assert "0.bias" not in torch.load("w.pt", weights_only=True)


def test_json_alone_on_standard_output(run):
    result = run("sick.py:talks", "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["healthy"] is True
    assert "a word of the model's" in result.stderr


def test_list_shows_every_check(run):
    result = run("--list")
    assert result.exit_code == 0
    for check in find_checks().values():
        assert check.id in result.output
    assert max(map(len, result.output.splitlines())) <= 80


BAD = [
    ([], "needs a model"),
    (["sick.py:nothing"], "has no attribute 'nothing'"),
    (["nowhere:make"], "importing nowhere raised"),
    (["sick.py:number"], "returned an int where a torch.nn.Module was expected"),
    (["sick.py:lazy"], "lazy layers"),
    (["sick.py:notes", "--check", "no-such"], "got 'no-such'; anynorm doctor --list shows them"),
    (["sick.py:notes", "--data", "load"], "--data: takes an iterable of batches"),
    (["sick.py:notes", "--data", "sick.py:missing"], "has no attribute 'missing'"),
    (["sick.py:notes", "--data", "sick.py:breaks"], "raised RuntimeError: no such disk"),
    (["sick.py:notes", "--data", "sick.py:breaks_later"], "raised RuntimeError: no such file"),
    (["sick.py:notes", "--data", "sick.py:empty"], "at least 1 batch"),
    (["sick.py:notes", "--data", "sick.py:dataset"], "got a TensorDataset, which gives samples; wrap it"),
    (["sick.py:notes", "--data", "sick.py:one_batch"], "got a tuple, of tensors, which may be a batch"),
    (["sick.py:notes", "--data", "sick.py:tensor"], "got a Tensor, which may be a batch"),
    (["sick.py:notes", "--data", "sick.py:number"], "got a int, which cannot be iterated"),
    (["sick.py:notes", "--data", "sick.py:WORD"], "got a str, which may be a batch"),
    (["sick.py:notes", "--data", "sick.py:wrong_width"], "the model refuses a batch of sick.py:wrong_width"),
    (["sick.py:notes", "--data", "sick.py:load", "--loss", "sick.py:WORD"], "--loss: sick.py:WORD must be a function"),
    (["sick.py:notes", "--data", "sick.py:load", "--loss", "sick.py:bad_loss"], "no such class"),
    (["sick.py:notes", "--loss", "sick.py:half"], "there are none without --data"),
    (["sick.py:notes", "--weights", "w.pt"], "there is no file 'w.pt'"),
    (["sick.py:notes", "--out", "w.pt"], "nothing is repaired without --fix"),
    (["sick.py:notes", "--fix", "--out", "no/w.pt"], "there is no folder"),
    (["sick.py:notes", "--html", "page.txt"], "a page ends in .html"),
    (["sick.py:notes", "--json", "no/r.json"], "--json: 'no/r.json' cannot be written"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=lambda each: " ".join(each) if isinstance(each, list) else "")
def test_bad_input_is_named_in_one_sentence(run, arguments, said):
    assert said in find_error(run(*arguments))


def test_what_a_check_raises_is_no_finding(run, monkeypatch):
    """A check of another package may be wrong; its traceback would end in 1."""
    check = find_checks()["eps-zero"]
    monkeypatch.setattr(type(check), "run", lambda self, facts: 1 / 0)
    assert "a check raised ZeroDivisionError" in find_error(run("sick.py:notes"))


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("arguments", "code"), [(["notes"], 0), (["inverted"], 1), (["notes", "--data", "sick.py:wrong_width"], 2)]
)
def test_exit_codes_of_the_program(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["anynorm", "doctor", f"sick.py:{arguments[0]}", *arguments[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == code
    assert "bias-useless" in said.out  # what could be seen is printed first
    if code == 2:
        assert said.err.startswith("anynorm: doctor --data: the model refuses") and said.err.count("\n") == 1
    else:
        assert said.err == ""


def test_names_do_not_steer_the_terminal(run, tmp_path):
    (tmp_path / "evil.py").write_text(
        "from torch import nn\n"
        "def make():\n    model = nn.Module()\n"
        "    model.add_module('a\\x1b[31m\\nb\\u202e[bold]', nn.BatchNorm1d(4, momentum=0.99))\n    return model\n"
    )
    result = run("evil.py:make")
    assert result.exit_code == 1
    assert "\x1b" not in result.output and "\u202e" not in result.output
    assert "a\\x1b[31m\\nb\\u202e[bold]" in result.output
