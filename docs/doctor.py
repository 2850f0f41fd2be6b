"""docs/doctor.md: its list of checks, from the classes, and its pictures, of a model that this file trains.

The model has a momentum of 0.99, as one that was written after Keras' documentation: its running averages are those of
the last batch, which is the loader's short one.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from rich.console import CONSOLE_SVG_FORMAT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from anynorm.doctor.check import Check, find_checks

PAGE = Path(__file__).with_suffix(".md")
PICTURE, SCREENSHOT = PAGE.with_suffix(".svg"), PAGE.with_suffix(".png")
MARKERS = re.compile(r"(<!-- checks -->\n).*(<!-- /checks -->)", re.DOTALL)
NEEDS = {"model": "the model alone", "optimizer": "the optimizer", "data": "batches"}
OWN = "anynorm.doctor.checks."
PLACES = {
    "Model-Optimizer": "NVIDIA/Model-Optimizer",
    "Multilingual_Text_to_Speech": "Tomiinek/Multilingual_Text_to_Speech",
    "NeMo": "NVIDIA/NeMo",
    "HierFL": "LuminLiu/HierFL",
    "Person_reID": "layumi/Person_reID_baseline_pytorch",
    "PyG": "pyg-team/pytorch_geometric",
    "audio": "pytorch/audio",
    "chemprop": "chemprop/chemprop",
    "ema-pytorch": "lucidrains/ema-pytorch",
    "fairscale": "facebookresearch/fairscale",
    "flax": "google/flax",
    "gt-pyg": "pgniewko/gt-pyg",
    "ignite": "pytorch/ignite",
    "keras": "keras-team/keras",
    "lightning": "Lightning-AI/pytorch-lightning",
    "mmsegmentation": "open-mmlab/mmsegmentation",
    "opacus": "pytorch/opacus",
    "pytorch": "pytorch/pytorch",
    "stable-baselines3": "DLR-RM/stable-baselines3",
    "swa": "timgaripov/swa",
    "tabnet": "dreamquark-ai/tabnet",
    "tensorflow": "tensorflow/tensorflow",
    "tianshou": "thu-ml/tianshou",
    "timm": "huggingface/pytorch-image-models",
}


def build() -> nn.Module:
    """A small network, trained on the digits of scikit-learn with a momentum of 0.99."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, channels, stride in (("stem", (1, 16), 1), ("middle", (16, 32), 2), ("last", (32, 32), 2)):
        convolution = nn.Conv2d(*channels, 3, stride, padding=1)
        model.add_module(name, nn.Sequential(convolution, nn.BatchNorm2d(channels[1], momentum=0.99), nn.ReLU()))
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        for x, y in load():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def load() -> DataLoader:
    """The digits in a fixed random order, in batches of 64; the last has 5."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return DataLoader(TensorDataset(x[order], torch.tensor(digits.target)[order]), 64)


def write_checks() -> str:
    """The list of this package's checks: a table, and then each."""
    kinds = [type(check) for check in find_checks().values() if type(check).__module__.startswith(OWN)]
    rows = [
        f"| [{kind.id}](#{kind.id}) | {kind.severity} | {NEEDS[kind.needs]} | {cell(kind.title)} |" for kind in kinds
    ]
    table = "\n".join(["| check | severity | needs | finds |", "|---|---|---|---|", *rows])
    return "\n\n".join([f"There are {len(kinds)}.", table, *map(write_check, kinds)])


def write_check(kind: type[Check]) -> str:
    """One check, under a heading that is its id."""
    repairs = "repair=" in inspect.getsource(kind)
    lines = [
        f"### {kind.id}\n",
        f"{escape(kind.title[:1].upper() + kind.title[1:])}. Severity: {kind.severity}. Needs {NEEDS[kind.needs]}.\n",
        f"- What is wrong: {escape(kind.fault)}",
        f"- What is measured: {escape(kind.evidence)}",
        f"- Cure: {escape(kind.cure)}",
        f"- Repair: {'yes, where `finding.repair` is there' if repairs else 'none; only you can make it'}",
    ]
    if kind.threads:
        lines.append(f"- Asked in: {', '.join(map(write_thread, kind.threads))}")
    return "\n".join(lines)


def write_thread(thread: str) -> str:
    """A link, where it is known which repository is meant."""
    name, _, number = thread.partition("#")
    place = PLACES.get(name)
    return thread if place is None else f"[{thread}](https://github.com/{place}/issues/{number})"


def escape(text: str) -> str:
    """Plain text as Markdown."""
    return re.sub(r"([*<])", r"\\\1", text)


def cell(text: str) -> str:
    """The same in a table."""
    return escape(text).replace("|", r"\|")


def write_page(text: str) -> str:
    """The page's text with its list made anew."""
    if not MARKERS.search(text):
        raise ValueError(f"{PAGE.name}: the list stands between <!-- checks --> and <!-- /checks -->")
    return MARKERS.sub(lambda match: f"{match[1]}\n{write_checks()}\n\n{match[2]}", text)


def draw_terminal() -> str:
    """What the command prints, as SVG that loads no font."""
    from anynorm.apps.doctor import doctor
    from anynorm.apps.terminal import open_console

    consoles = []

    def record():
        consoles.append(open_console(record=True))
        consoles[0].width = 80
        return consoles[0]

    doctor.open_console = record
    spec = f"{Path(__file__).name}:"
    chosen = ("momentum-inverted", "train-eval-gap")
    doctor.examine_model(doctor.Options(f"{spec}build", data=f"{spec}load", checks=chosen, fix=True))
    form = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return consoles[0].export_svg(title="anynorm doctor", code_format=form)


def draw_page() -> None:
    """What the page looks like, where there is a browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        print(f"{SCREENSHOT.name} stays as it is: there is no chromium")
        return
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        code = "from anynorm.cli import main; main()"
        spec = f"{Path(__file__).name}:"
        command = [sys.executable, "-c", code, "doctor", f"{spec}build", "--data", f"{spec}load", "--html", str(page)]
        command += ["--check", "train-eval-gap", "--check", "bias-useless"]
        subprocess.run(command, cwd=PAGE.parent, stdout=subprocess.DEVNULL, check=False)  # 1: something was found
        size = ["--window-size=1000,1560", f"--screenshot={SCREENSHOT}", f"--user-data-dir={folder}/user"]
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        subprocess.run([browser, *quiet, *size, page.as_uri()], stderr=subprocess.DEVNULL, check=True)
    with Image.open(SCREENSHOT) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)  # half of the bytes
    small.save(SCREENSHOT, optimize=True)


def main() -> None:
    """Write the list and the pictures; with --list the list alone."""
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if "--list" not in sys.argv:
        PICTURE.write_text(draw_terminal(), encoding="utf-8")
        draw_page()


if __name__ == "__main__":
    main()
