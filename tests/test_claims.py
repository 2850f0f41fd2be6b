"""Docs name parameters that exist, print the numbers that they say, and deny nothing that is there."""

from __future__ import annotations

import ast
import inspect
import re
import sys

import pytest
import torch

import anynorm
from test_docs import PAGES, README, cut_blocks, every_page, find_blocks, find_python, name_page

NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
SAID = re.compile(rf"#\s*({NUMBER}(?:(?: and |, ){NUMBER})*)\s*$")


def find_calls(text: str) -> list[ast.Call]:
    """Calls of the library in code spans and in blocks that are not run, also written without ``anynorm.``."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", cut_blocks(text))
    spans += [block.text for block in find_blocks(text) if block.text.lstrip().startswith("# not run")]
    calls = []
    for span in spans:
        try:
            tree = ast.parse(span.strip())
        except SyntaxError:
            continue
        calls += [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return calls


def find_public(node: ast.expr):
    """The public function or class that an expression names, or None."""
    names = ast.unparse(node).split(".")
    if not all(name.isidentifier() for name in names) or (len(names) > 1 and names[0] not in ("anynorm", "functional")):
        return None
    room = anynorm.functional if "functional" in names else anynorm
    found = getattr(room, names[-1], None)
    return found if callable(found) and names[-1] in getattr(room, "__all__", dir(room)) else None


def check_call(call: ast.Call) -> str:
    """What is wrong with the names of a call, or nothing: keywords exist, and plain names stand at their own place."""
    found = find_public(call.func)
    if found is None:
        return ""
    parameters = list(inspect.signature(found).parameters.values())
    known = {parameter.name for parameter in parameters}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in known:
                return f"{ast.unparse(call)}: there is no parameter {keyword.arg!r}"
    for given, parameter in zip(call.args, parameters):
        size = isinstance(given, ast.Name) and len(given.id) == 1 and given.id.isupper()  # as in GroupNorm(1, C)
        if isinstance(given, ast.Name) and not size and parameter.kind is not parameter.VAR_POSITIONAL:
            if given.id != parameter.name and given.id not in STANDS_FOR.get(parameter.name, ()):
                return f"{ast.unparse(call)}: the parameter is called {parameter.name!r}, not {given.id!r}"
    return ""


# What a reader has at hand under another name than the parameter's.
STANDS_FOR = {"input": ("x",), "data": ("loader",)}


@every_page
def test_calls_use_the_parameters_that_exist(page):
    faults = [fault for call in find_calls(page.read_text()) if (fault := check_call(call))]
    assert not faults, f"{page.name}: {'; '.join(faults)}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`anynorm.accumulate(model, parts, loss)`", "is called 'batches', not 'parts'"),
        ("`accumulate(model, batches, loss)`", ""),
        ("`accelerate(model, fused=True)`", "no parameter 'fused'"),
        ("`anynorm.accelerate(model, fuse=True).model`", ""),
        ("`torch.nn.functional.layer_norm(model, nothing=1)`", ""),
    ],
)
def test_a_wrong_name_is_found(text, fault):
    (call, *_) = find_calls(text)
    assert fault in check_call(call)
    assert bool(fault) == bool(check_call(call))


DENIALS = re.compile(r"not yet in this release|masks? (?:is|are|do) not|there (?:is|are) no masks?\b", re.IGNORECASE)


@every_page
def test_nothing_is_denied_for_now(page):
    """A page says what is there; a sentence on what is missing for now is forgotten when it comes."""
    found = DENIALS.search(" ".join(cut_blocks(page.read_text()).split()))
    assert not found, f"{page.name} says {found[0]!r}"  # type: ignore[index]


def find_denied(sentence: str) -> list[str]:
    """Public names that a list of what is missing seems to speak of, by their first six letters."""
    return [name for name in anynorm.__all__ if len(name) > 4 and name.lower()[:6] in sentence.lower()]


@every_page
def test_what_is_called_missing_is_missing(page):
    for sentence in re.findall(r"Not there yet:\W*(.*?)\.(?:\s|$)", page.read_text(), re.DOTALL):
        assert find_denied(sentence) == [], f"{page.name} says that {sentence!r} is not there"


def test_a_stale_denial_is_found():
    assert find_denied("gradient accumulation, sharding") == ["accumulate"]
    assert DENIALS.search("one sample at a time; masks are not yet in this release")
    assert not DENIALS.search("Every norm takes masks.")


def find_said(text: str, before: int = 0) -> dict[int, list[str]]:
    """By line, the numbers in a comment behind ``print``, where it holds nothing else."""
    found = {}
    for line, code in enumerate(text.splitlines(), 1 + before):
        match = SAID.search(code)
        if match and code.lstrip().startswith("print("):
            found[line] = re.findall(NUMBER, match[1])
    return found


def agree(said: list[str], printed: str) -> bool:
    """Whether the printed numbers, rounded as the comment is, are those of the comment."""
    numbers = [float(number) for number in re.findall(rf"(?<![\w.]){NUMBER}", printed)]
    if len(numbers) != len(said):
        return False
    digits = [len(number.partition(".")[2]) for number in said]
    return all(abs(n - float(s)) <= 0.5 * 10.0**-d + 1e-12 for n, s, d in zip(numbers, said, digits))


SPEAKING = [
    page for page in PAGES if any(">>>" not in block.text and find_said(block.text) for block in find_python(page))
]


def test_the_readmes_surprise_is_among_them():
    assert README in SPEAKING


@pytest.mark.parametrize("page", SPEAKING, ids=name_page)
def test_blocks_print_the_numbers_that_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed: dict[int, str] = {}

    def record(*values, **_):
        printed[sys._getframe(1).f_lineno] = " ".join(map(str, values))

    names: dict = {"__name__": "__main__", "print": record}
    threads, said = torch.get_num_threads(), {}
    try:
        with torch.random.fork_rng():
            for block in find_python(page):
                if ">>>" not in block.text:
                    said |= find_said(block.text, block.before)
                    exec(compile("\n" * block.before + block.text, str(page), "exec"), names)
    finally:
        torch.set_num_threads(threads)
    wrong = {line: (numbers, printed.get(line)) for line, numbers in said.items() if not agree(numbers, printed[line])}
    assert said
    assert not wrong, f"{page.name}, by line: {wrong}"


def test_a_wrong_number_is_found():
    assert find_said("print(x)  # 1.0 and 256\nprint(y)  # about 3") == {1: ["1.0", "256"]}
    assert agree(["1.0", "256"], "tensor(1.0312) tensor(256.4)")
    assert not agree(["1.0", "256"], "tensor(1.0312) tensor(257.4)")
    assert not agree(["2.7"], "2.63")
    assert not agree(["2.7"], "")


FILE = re.compile(r"[`\s/(]((?:\w+/)*\w+\.(?:py|h|cpp))\b")
STAND_INS = ("file.py", "utils.py", "helpers.py")  # a name for any file, and those that there are not
TOLD = ("", "engine")  # whose every file architecture.md names; of the others it names the folder


@every_page
def test_files_that_a_page_names_exist(page):
    """By the end of their path, as pages shorten it; blocks hold files of the reader's own."""
    files = [path for path in README.parent.rglob("*.*") if ".venv" not in path.parts]
    there = [f"/{path.relative_to(README.parent)}" for path in files]
    for name in FILE.findall(cut_blocks(page.read_text())):
        assert name in STAND_INS or any(path.endswith(f"/{name}") for path in there), f"{page.name} names {name}"


def test_every_file_of_the_engine_has_its_place_on_the_page():
    named = {name.rsplit("/", 1)[-1] for name in FILE.findall((README.parent / "docs/architecture.md").read_text())}
    files = {path.name for folder in TOLD for path in (README.parent / "src/anynorm" / folder).glob("*.py")}
    missing = files - named - {"__init__.py"}
    assert not missing, f"docs/architecture.md names no {', '.join(sorted(missing))}"
    page = (README.parent / "docs/architecture.md").read_text()
    folders = {path.parent.name for path in (README.parent / "src/anynorm").glob("*/__init__.py")}
    assert not {folder for folder in folders if f"{folder}/" not in page}
