"""The page of `anynorm doctor --html`: one file, every name escaped, a cell for every norm, and links that lead."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from browser import look, needs_chromium

from anynorm.doctor.check import Effect, Finding, Repair, find_checks
from anynorm.doctor.diagnosis import Diagnosis

pytest.importorskip("matplotlib", reason="the page needs matplotlib: pip install '.[compare]'")
from anynorm.apps.doctor.groups import make_groups
from anynorm.apps.doctor.page import write_page
from anynorm.doctor.diagnosis import Repairs

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a'b",
    "tab\tline\nescape\x1b[31m",
    "left\u202eright\u2066",
    "中文",
    "$x_1$",
    "_hidden",
    "&amp;",
    "n" * 200,
]


def make_finding(check: str, layer: str, severity: str = "error", code: str = "", **options) -> Finding:
    kind = find_checks()[check]
    repair = Repair(code, lambda: None) if code else None
    return Finding(check, kind.title, severity, layer, f"{layer}: found", advice=kind.cure, repair=repair, **options)


def make_sick() -> Diagnosis:
    """120 norms in six parts, and what may be found in them; names that a page must not take for its own."""
    layers = {f"stage{s}.{EVIL[i % len(EVIL)]}.{i}": "BatchNorm2d" for s in range(6) for i in range(20)}
    names = list(layers)
    findings = [
        make_finding(
            "momentum-inverted",
            name,
            code=f"model.get_submodule({name!r}).momentum = 0.01",
            evidence={"momentum": 0.99, "of": 3, "said": EVIL[0]},
        )
        for name in names[::3]
    ]
    gap = {"gap": 1.5, "loss_of_this_layer": 0.25, "cause": EVIL[1], "ruled_out": f"{EVIL[0]}: no; padding: none"}
    gap |= {"others": f"{names[1]} 0.1; the model 0.02; {names[2]} x"}
    effects = [Effect("loss", 3.0, 0.1), Effect("accuracy", 0.4, 0.9, "higher")]
    findings.append(make_finding("train-eval-gap", names[0], evidence=gap, effects=effects))
    findings += [
        make_finding("gamma-zero", name, "warning", evidence={"channels": place, "share": float("nan")})
        for place, name in enumerate(names[1:40:2])
    ]
    findings += [make_finding("left-by-accelerate", f"other.{EVIL[0]}", "note"), make_finding("eps-zero", "", "note")]
    return Diagnosis(findings, layers, list(find_checks()), {"norms-decayed": EVIL[0]}, {"batches": 2})


def make_healthy() -> Diagnosis:
    return Diagnosis([], {"": "LayerNorm"}, list(find_checks())[:5], {"norms-decayed": "it needs the optimizer"}, {})


class Reader(HTMLParser):
    """Elements, their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.ids, self.links, self.cells, self.text = [], [], [], [], ""
        self.drawn = False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.drawn |= tag == "svg"
        self.ids += [given["id"]] if "id" in given and not self.drawn else []  # matplotlib's name parts of each picture
        self.links += [given["href"]] if tag == "a" else []
        self.cells += [given] if "cell" in given.get("class", "").split() else []
        assert not any(name.startswith("on") for name in given)

    def handle_endtag(self, tag):
        self.drawn &= tag != "svg"

    def handle_data(self, data):
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.fixture(scope="module")
def sick():
    return write_page(f"{EVIL[0]}.py:make", make_sick())


def test_names_are_text(sick):
    reader = read(sick)
    assert not {"script", "img"} & set(reader.tags)
    assert (
        EVIL[0] in reader.text and "left\\u202eright\\u2066" in reader.text and "tab\\tline\\nescape\\x1b[31m" in sick
    )
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", sick)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"|"http://www.w3.org[^"]*"', "", sick)


def test_every_norm_has_a_cell_with_its_worst_severity_in_words(sick):
    diagnosis, cells = make_sick(), read(sick).cells
    assert len(cells) == len(diagnosis.layers) == 120
    worst = {}
    for finding in diagnosis.findings:
        worst.setdefault(finding.layer, finding.severity)
    for cell, layer in zip(cells, diagnosis.layers, strict=True):
        assert (worst.get(layer) or "nothing found") in cell["title"] and "(BatchNorm2d)" in cell["title"]
        assert ("href" in cell) == (layer in worst)


def test_links_lead_to_the_finding_of_the_norm(sick):
    reader = read(sick)
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    own = [id for id in reader.ids if id.startswith("momentum-inverted-error-")]
    assert len(own) == 40


def test_a_finding_has_numbers_pictures_advice_and_code(sick):
    reader = read(sick)
    for said in ("Ruled out", "padding: none", "Code to paste", "for name in (", "What to do", "loss 3 -> 0.1, better"):
        assert said in reader.text
    assert reader.tags.count("figure") == 4  # two effects, what each layer costs, and zero gammas by layer
    assert 'aria-label="loss: 3 as it is, 0.1 without it."' in sick
    code = re.search(r"for name in \(.*?\n\):\n.*?\n", reader.text, re.DOTALL)
    compile(code[0], "code", "exec")  # quotes and line ends of names do not break it


def test_checks_that_did_not_run_have_their_reason():
    assert "it needs the optimizer" in read(write_page("m", make_healthy())).text


def test_a_model_without_norms_has_a_page():
    assert "The model has no norms" in read(write_page("m", Diagnosis([], {}, ["eps-zero"], {}, {}))).text


def test_repairs_are_told():
    diagnosis = make_sick()
    first, other = diagnosis.findings[:2]
    repairs = Repairs([first], [(other, f"{EVIL[0]} moved")], [other], make_healthy())
    text = read(write_page("m", diagnosis, repairs)).text
    assert "moved" in text and "1 finding with the repair of another" in text and "nothing found" in text


def test_code_for_many_norms_is_one_loop_and_the_whole_model_comes_last():
    tail = "\nmodel.eval()\nanynorm.recalibrate(model, loader)"
    codes = {name: f"norm = model.get_submodule({name!r})\nnorm.eps = 1e-5{tail}" for name in ("a", "b'c")}
    (group,) = make_groups(make_finding("eps-zero", name, code=code) for name, code in codes.items())
    assert group.code == (
        "for name in (\n    'a', \"b'c\",\n):\n    norm = model.get_submodule(name)\n    norm.eps = 1e-5" + tail
    )
    codes["name"] = codes["a"].replace("'a'", "'name'")  # a layer of the variable's name: no loop
    (group,) = make_groups(make_finding("eps-zero", name, code=code) for name, code in codes.items())
    assert group.code.splitlines()[0] == "norm = model.get_submodule('a')" and "for " not in group.code


@needs_chromium
@pytest.mark.parametrize("width", [1100, 500])
def test_the_page_in_a_browser(sick, tmp_path, width):
    answer = look(sick, tmp_path, width)
    assert len(answer["plots"]) == 4
    assert answer["verdict"].startswith("41 errors")


@needs_chromium
def test_the_page_of_a_healthy_model_in_a_browser(tmp_path):
    assert look(write_page("m", make_healthy()), tmp_path, 500)["verdict"] == "Neither errors nor warnings"
