"""Sixteen models of timm and ten of transformers before and after `accelerate`, and the table in docs/works-with.md.

Each is built from its configuration with random weights, since nothing is downloaded. Outputs and gradients of one
training step are compared with the model's own, in float32 and in float64; then steps in float32 are timed in turn. The
largest difference of any gradient is given relative to the largest gradient in the model: gradients that are 0 but for
rounding, as that of a bias before a batch norm, have no digits to compare. Where a ReLU's input is 0 but for rounding,
float32 decides by chance whether a gradient passes; float64 tells such a case from a norm that computes something else.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import vision  # noqa: F401 # before timm

import anynorm
from anynorm.apps.timing.interleaved import time_interleaved

PAGE = Path(__file__).parents[2] / "docs" / "works-with.md"
MARKED = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- /models -->)", re.DOTALL)
HEAD = """
| model | norms changed | left | outputs | gradients | in float64 | step, ms | after, ms | times as fast | fused |
|---|---|---|---|---|---|---|---|---|---|
"""
CLOSE, CLOSE_IN_FLOAT64 = 1e-5, 1e-9
SECONDS = 8.0  # of timing for each model, and up to LONGEST for nine rounds of a slow one
LONGEST = 120.0
TIMM = ["efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224", "regnety_002", "mobilenetv3_small_100"]
TIMM += ["resnetv2_50", "repvgg_a0", "tf_efficientnet_lite0", "resnet18", "densenet121", "mixer_s16_224"]
TIMM += ["swin_tiny_patch4_window7_224", "coatnet_nano_rw_224", "edgenext_xx_small", "fastvit_t8", "poolformer_s12"]
TEXT = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 1000}
ATTENTION = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 512, "head_dim": 64}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaModel", ATTENTION),
    "mistral": ("MistralConfig", "MistralModel", ATTENTION),
    "qwen3": ("Qwen3Config", "Qwen3Model", ATTENTION),
    "gemma": ("GemmaConfig", "GemmaModel", ATTENTION),
    "t5": ("T5Config", "T5EncoderModel",
           {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 4, "num_heads": 4, "vocab_size": 1000}),
    "mamba": ("MambaConfig", "MambaModel", {**TEXT, "num_hidden_layers": 2}),
    "bert": ("BertConfig", "BertModel", {**TEXT, "num_attention_heads": 4, "intermediate_size": 512}),
    "gpt2": ("GPT2Config", "GPT2Model", {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1000}),
    "resnet": ("ResNetConfig", "ResNetModel",
               {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "layer_type": "basic"}),
    "convnext": ("ConvNextConfig", "ConvNextModel", {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2]}),
}  # fmt: skip


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model in training mode, and what it is given."""
    torch.manual_seed(0)
    library, _, model = name.partition(" ")
    if library == "timm":
        import timm

        return timm.create_model(model).train(), torch.randn(4, 3, 224, 224)
    import transformers

    config, kind, options = TRANSFORMERS[model]
    found = getattr(transformers, kind)(getattr(transformers, config)(**options)).train()
    images = model in ("resnet", "convnext")
    return found, torch.randn(4, 3, 128, 128) if images else torch.randint(0, 1000, (4, 128))


def step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Forward and backward of one training step."""
    torch.manual_seed(1)  # for dropout
    model.zero_grad(set_to_none=True)
    y = model(x)
    y = y if isinstance(y, torch.Tensor) else y.last_hidden_state
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weights).sum().backward()
    return y.detach()


def compare(one: torch.nn.Module, other: torch.nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """The largest differences of outputs and of gradients, relative to the largest of each."""
    y, own = step(one, x), step(other, x)
    pairs = [(p.grad, q.grad) for p, q in zip(one.parameters(), other.parameters(), strict=True) if p.grad is not None]
    largest = max(float(g.abs().max()) for g, _ in pairs)
    off = max(float((g - h).abs().max()) for g, h in pairs)
    return float((y - own).abs().max() / y.abs().max().clamp_min(1e-30)), off / largest


def make_row(name: str) -> tuple[str, bool]:
    """A line of the table, and whether the numbers are close."""
    theirs, x = build(name)
    ours, fused = copy.deepcopy(theirs), copy.deepcopy(theirs)
    report = anynorm.accelerate(ours)
    further = anynorm.accelerate(fused, fuse=True)
    outputs, gradients = compare(theirs, ours, x)
    exact = max(
        compare(
            copy.deepcopy(theirs).double(), copy.deepcopy(ours).double(), x.double() if x.is_floating_point() else x
        )
    )
    calls = {"theirs": lambda: step(theirs, x), "ours": lambda: step(ours, x)}
    if further.fused:
        calls["fused"] = lambda: step(further.model, x)
    timed = time_interleaved(calls, SECONDS, fewest=9, longest=LONGEST)
    low, high = timed.interval("theirs", "ours")
    kinds = Counter(entry.kind.rpartition(".")[2] for entry in report.changed)
    changed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    speed = f"{timed.ratio('theirs', 'ours'):.2f} ({low:.2f} to {high:.2f})"
    more = f"{timed.ratio('theirs', 'fused'):.2f}, {len(further.fused)} fused" if further.fused else ""
    cells = [name, changed, str(len(report.left)), f"{outputs:.0e}", f"{gradients:.0e}", f"{exact:.0e}"]
    cells += [f"{1e3 * timed.median('theirs'):.0f}", f"{1e3 * timed.median('ours'):.0f}", speed, more]
    return f"| {' | '.join(cells)} |", bool(report.changed) and outputs <= CLOSE and (
        gradients <= CLOSE or exact <= CLOSE_IN_FLOAT64
    )


def read_rows(text: str) -> dict[str, str]:
    """The table's rows, by model."""
    return {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith(("| timm", "| transformers"))}


def main() -> None:
    torch.set_num_threads(2)
    names = [f"timm {name}" for name in TIMM] + [f"transformers {name}" for name in TRANSFORMERS]
    far = []
    for name in [each for each in names if not sys.argv[1:] or any(given in each for given in sys.argv[1:])]:
        row, close = make_row(name)
        print(row, flush=True)
        far += [] if close else [name]
        page = PAGE.read_text()
        rows = read_rows(MARKED.search(page)[0]) | {name: row}
        table = HEAD + "".join(f"{rows[each]}\n" for each in names if each in rows)
        before, after = MARKED.split(page)
        PAGE.write_text(f"{before}{table}\nRun on {time.strftime('%Y-%m-%d')}, two threads.\n\n{after}")
    if far:
        sys.exit(f"further off than {CLOSE}: {', '.join(far)}")


if __name__ == "__main__":
    main()
