"""Every seeded defect is flagged by the check that its entry names; every survivor is listed with its reason."""

from __future__ import annotations

import pytest
from kernels.support import needs_emulator

from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.mutations import EQUIVALENT, MUTANTS, RUNS, Mutant, outcome

pytestmark = needs_emulator


@pytest.mark.parametrize("name", RUNS)
def test_without_a_defect_nothing_is_flagged(name: str) -> None:
    RUNS[name](Emulator())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.run}: {m.old.strip()[:40]} -> {m.new.strip()[:40]}")
def test_a_defect_is_flagged(mutant: Mutant) -> None:
    assert outcome(mutant) == mutant.flagged


@pytest.mark.parametrize(("mutant", "reason"), EQUIVALENT, ids=lambda value: value if isinstance(value, str) else "")
def test_a_survivor_is_equivalent(mutant: Mutant, reason: str) -> None:
    assert outcome(mutant) == "nothing", reason


def test_there_are_enough_of_them_in_every_kernel() -> None:
    assert len(MUTANTS) >= 30
    files = {mutant.run.split(",")[0] for mutant in MUTANTS}
    assert files == {"step 0", "step 1", "step 2", "step 3", "step 4", "step 5", "prefill 0", "prefill 1", "store_kv",
                     "copy_slots", "rope_store", "add_norm", "silu_mul"}


def test_a_defect_whose_place_is_gone_is_an_error() -> None:
    with pytest.raises(LookupError, match="0 times"):
        outcome(Mutant("store_kv", "store_kv.cu", "no such text", "", "race"))
