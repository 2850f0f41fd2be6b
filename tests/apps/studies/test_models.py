"""A user's network is recognized again only where its sources and what it builds are equal."""

import sys

import pytest

from anynorm.apps.studies.models import find_model

FILES = {
    "project/net.py": """
import os
from torch import nn
import net_helper

def make(norm):
    import net_late
    activation = nn.ReLU()
    activation.extra_repr = lambda: repr(object())  # An address, which differs between processes.
    return nn.Sequential(nn.Flatten(), nn.Linear(64, int(os.environ["NET_WIDTH"])), activation)
""",
    "project/net_helper.py": "import net_below.part, net_installed, net_outside\n",
    "project/net_below/__init__.py": "",
    "project/net_below/part.py": "",
    "project/net_late.py": "",
    "project/net_unused.py": "",
    "project/env/net_installed.py": "",
    "net_outside.py": "",
}


@pytest.fixture
def find_print(monkeypatch, tmp_path):
    """The fingerprint of a project's network, imported afresh after some of its files have changed."""
    for folder in (tmp_path, tmp_path / "project" / "env", tmp_path / "project"):
        monkeypatch.syspath_prepend(str(folder))
    # The virtual environment lies in the project, as it often does.
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "project" / "env"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget():
        for name in [name for name in sys.modules if name == "net" or name.startswith("net_")]:
            del sys.modules[name]

    def find(changed="", width=8):
        monkeypatch.setenv("NET_WIDTH", str(width))
        for name, text in FILES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + ("# changed\n" if name == changed else ""))
        forget()
        return find_model("net:make", (1, 8, 8), 8).fingerprint

    yield find
    forget()


def test_an_unchanged_network_is_recognized(find_print):
    assert find_print() == find_print()


@pytest.mark.parametrize("name", ["net.py", "net_helper.py", "net_below/part.py", "net_late.py"])
def test_a_change_in_any_module_beside_the_factory_is_noticed(find_print, name):
    assert find_print() != find_print(f"project/{name}")


@pytest.mark.parametrize("name", ["project/net_unused.py", "project/env/net_installed.py", "net_outside.py"])
def test_files_that_are_not_the_networks_own_do_not_count(find_print, name):
    assert find_print() == find_print(name)


def test_a_network_that_is_built_differently_is_noticed(find_print):
    assert find_print() != find_print(width=9)


def test_a_factory_that_raises_is_left_to_the_check(find_print):
    assert find_print(width="wide")
