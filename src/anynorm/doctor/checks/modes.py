"""What moves and what stands still: modes, and freezing that is only half done."""

from __future__ import annotations

from collections.abc import Iterator

from ...surgery.freeze import freeze
from ..check import Check, Finding, Repair
from ..facts import Facts, NormFacts


class TrainingInEvaluation(Check):
    id = "training-in-evaluation"
    title = "the model is in evaluation, and the norm in training"
    severity = "error"
    fault = (
        "The norm uses its batch and moves its averages while the rest is evaluated: outputs depend on the batch, "
        "and every evaluation changes the model."
    )
    evidence = "The mode of the norm, and of the model."
    cure = "call model.eval() on the whole model, also after parts of it were set to training"

    def run(self, facts: Facts) -> Iterator[Finding]:
        if facts.model.training:
            return
        for norm in facts.norms:
            if norm.module.training and norm.kind in ("batch", "instance") and norm.has_averages and norm.name:
                yield self.find(
                    norm.name,
                    f"{norm.said} is in training mode, the model in evaluation",
                    repair=Repair(f"{norm.path}.eval()", norm.module.eval),
                    momentum=repr(getattr(norm.module, "momentum", None)),
                )


class FrozenAffineMovingStatistics(Check):
    id = "frozen-but-moving"
    title = "gamma and beta are frozen, and the running averages move"
    fault = (
        "requires_grad=False stops gamma and beta and not the averages: every batch in training moves what a "
        "frozen layer computes, and model.train() undoes an eval() that was called on it."
    )
    evidence = "Which of gamma and beta want a gradient, and whether a batch in training would move the averages."
    cure = "freeze all of the norm: anynorm.freeze(model, where=...), which survives model.train()"
    threads = ("pytorch#66073", "lightning#15062", "pytorch#86590", "gt-pyg#112", "chemprop#952")

    def run(self, facts: Facts) -> Iterator[Finding]:
        if not any(p.requires_grad for p in facts.model.parameters()):
            return  # nothing is trained
        for norm in facts.averaging:
            own = list(norm.module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own) and norm.frozen is None and may_move(facts, norm):
                yield self.find(
                    norm.name,
                    f"{norm.said}: gamma and beta are frozen, its averages move "
                    f"{'with every batch' if norm.moves else 'once model.train() is called'}",
                    repair=make_freezing(facts, norm, affine=True),
                    moves_now=int(norm.moves),
                )


def may_move(facts: Facts, norm: NormFacts) -> bool:
    """Whether training moves averages: not of a class that never does, nor with momentum 0, nor where the model's own
    `train` keeps the norm in evaluation."""
    is_kind = norm.kind in ("batch", "instance") and getattr(norm.module, "momentum", None) != 0
    return is_kind and (norm.moves or norm.name in facts.trains)


class MovingAffineFrozenStatistics(Check):
    id = "statistics-stand-still"
    title = "the averages stand still while gamma and beta are trained"
    severity = "note"
    fault = (
        "A norm in evaluation inside a model in training normalizes by its averages. That may be meant; the next "
        "model.train() undoes it without a word."
    )
    evidence = "The modes of the model and of the norm, and that gamma or beta want a gradient."
    cure = (
        "if it is meant, anynorm.freeze(model, affine=False, where=...) survives model.train(); else call model.train()"
    )
    threads = ("pytorch#66073",)

    def run(self, facts: Facts) -> Iterator[Finding]:
        if not facts.model.training:
            return
        for norm in facts.averaging:
            wants = any(p.requires_grad for p in norm.module.parameters(recurse=False))
            stands = not norm.module.training and norm.name in facts.trains  # else the model's own `train` sees to it
            if stands and wants and norm.frozen is None and norm.kind == "batch":
                yield self.find(
                    norm.name,
                    f"{norm.said} is in evaluation, the model in training, and gamma and beta are trained",
                    repair=make_freezing(facts, norm, affine=False),
                    batches=norm.count or 0,
                )


def make_freezing(facts: Facts, norm: NormFacts, affine: bool) -> Repair:
    """Freeze the norm for good."""
    model = facts.model

    def perform() -> None:
        freeze(model, affine=affine, where=lambda name, module: module is norm.module)

    return Repair(f"anynorm.freeze(model, affine={affine}, where={norm.name!r})", perform, is_exact=True)
