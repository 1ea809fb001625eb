"""The mutation harness: every listed mutation still applies, a patch is undone, and an exception is not a verdict."""

import json

import pytest

from lib import least_squares, ledger
from workflow.scripts import mutations
from workflow.scripts.inputs import ROOT, chapter_table

REGISTRY = ledger.load_registry()
FILES = sorted((ROOT / "book" / "mutations").glob("*.yml"))
ROW = {"claim": "bngd-eq-5", "weight": 3, "profile": "smoke", "mutation": "why"}


def check_cells(chapter):
    """Claims -> source of the cell that decides them."""
    notebook = ROOT / "book" / f"{chapter_table()['chapters'][chapter]['notebook']}.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    return {
        claim: "".join(cell["source"])
        for cell in cells
        for claim in cell["metadata"].get("tags", [])
        if claim in REGISTRY
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_mutation_applies_exactly_once(path):
    cells = check_cells(path.stem)
    for mutation in mutations.load(path, REGISTRY):
        assert mutation.replace != mutation.by
        if mutation.function:
            with mutations.patched(mutation):
                pass
        else:
            assert len({cells[claim] for claim in mutation.claims}) == 1, f"{mutation.claims} stand in different cells"
            mutations.replaced(cells[mutation.claims[0]], mutation, "the cell")


def test_a_patch_changes_the_function_everywhere_and_is_undone():
    from lib.least_squares import log_spectrum  # a name bound before the patch

    mutation = mutations.Mutation(
        ("bngd-eq-5",),
        "least_squares.log_spectrum",
        "condition_number**exponents",
        "2 * condition_number**exponents",
        "w",
    )
    before = log_spectrum(3, 4.0).tolist()
    with mutations.patched(mutation):
        assert log_spectrum(3, 4.0).tolist() == [2 * x for x in before]
        assert least_squares.log_spectrum(3, 4.0).tolist() == [2 * x for x in before]
    assert log_spectrum(3, 4.0).tolist() == before


def test_a_property_can_be_patched():
    mutation = mutations.Mutation(("bngd-eq-5",), "least_squares.LeastSquares.optimal_step", "2 / (", "1 / (", "w")
    problem = least_squares.LeastSquares(least_squares.log_spectrum(2, 3.0), least_squares.log_spectrum(2, 3.0))
    assert problem.optimal_step == 0.5
    with mutations.patched(mutation):
        assert problem.optimal_step == 0.25
    assert problem.optimal_step == 0.5


def test_a_mutation_that_no_longer_applies_is_named():
    mutation = mutations.Mutation(("bngd-eq-5",), "least_squares.log_spectrum", "no such text", "x", "w")
    with (
        pytest.raises(ValueError, match="'no such text' occurs 0 times in least_squares.log_spectrum"),
        mutations.patched(mutation),
    ):
        pass


@pytest.mark.parametrize(
    ("verdict", "mutated", "counts"),
    [
        ("holds", "undecided", True),
        ("reproduced", "partly reproduced", True),
        ("holds", "holds", False),
        ("holds", "error: ZeroDivisionError: division by zero", False),
        ("holds", "no decision", False),
    ],
)
def test_only_another_verdict_counts(verdict, mutated, counts):
    row = ROW | {"verdict": verdict, "mutated": mutated}
    assert mutations.flips(row) is counts
    assert mutations.unprotected([row]) == ([] if counts else ["bngd-eq-5"])


def test_light_or_undecided_claims_need_no_mutation():
    assert mutations.unprotected([ROW | {"weight": 2, "verdict": "holds", "mutated": "", "mutation": ""}]) == []
    assert mutations.unprotected([ROW | {"verdict": "undecided", "mutated": "", "mutation": ""}]) == []
