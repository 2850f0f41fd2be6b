"""What may not move a bit of a result: calling again, threads, padding, batch mates, constants, a fused activation."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from fuzz import bits
from fuzz.cases import NORMS, PER_SAMPLE, Case, cases, is_allowed, shapes
from fuzz.drive import drive
from fuzz.families import constant, normal

pytestmark = pytest.mark.filterwarnings("ignore:.*one value per")
LAYOUTS = ("contiguous", "channels_last")


def test_repeats():
    """Sizes from where the kernels take a second thread, too."""
    drive(bits.check_repeats, cases(path="kernels", shape=shapes(largest=300_000)).filter(is_allowed))


def can_be_padded(case: Case) -> bool:
    """There is an axis of positions, and features do not lie along it."""
    return is_allowed(case) and (case.norm not in ("layer", "rms") or len(case.positions) > 1)


@pytest.mark.parametrize("norm", NORMS)
def test_padding(norm):
    layouts = LAYOUTS if norm not in ("layer", "rms") else LAYOUTS[:1]
    padded = cases(
        (norm,),
        shape=shapes((3, 4, 5), 4000),
        path="kernels",
        mask=st.sampled_from(("prefix", "holes", "full", "empty sample")),
        layout=st.sampled_from(layouts),
    )
    drive(bits.check_padding, padded.filter(can_be_padded))


def has_own_statistics(case: Case) -> bool:
    return is_allowed(case) and (case.given or case.norm in PER_SAMPLE) and case.shape[0] > 1


def test_mates():
    drive(bits.check_mates, cases(layout=st.sampled_from(LAYOUTS), path="kernels").filter(has_own_statistics))


def is_centred(case: Case) -> bool:
    return is_allowed(case) and case.norm not in ("rms", "renorm") and not case.given


def test_constant():
    same = {"data": constant, "activation": None, "residual": False, "eps": st.sampled_from((1e-5, 1e-12, 1.0))}
    drive(bits.check_constant, cases(**same).filter(is_centred))


def is_ordinary(case: Case) -> bool:
    return case.given and is_allowed(case)


def test_fused_evaluation():

    fused = cases(("batch", "instance"), mask="", gradient=normal, path="kernels")
    drive(bits.check_fused, fused.filter(is_ordinary))
