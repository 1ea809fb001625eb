"""The registry against the notebooks: every deciding cell is tagged, every claim has one chapter, nothing is typed in."""

import json
import re

import pytest

from lib import ledger
from workflow.scripts.inputs import ROOT, chapter_table

REGISTRY = ledger.load_registry()
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_claims_of_five_papers():
    assert REGISTRY.chapters == ["dbn", "autorate", "bngd", "bsum", "dsgd"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs_and_with_a_language(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_come_first_and_have_their_tag(path):
    first = code_cells(path)[0]
    assert first["metadata"]["tags"] == ["parameters"]
    names = re.findall(r"^(\w+) =", "".join(first["source"]), flags=re.M)
    assert names == ["profile", "seed", "device", "data_dir", "ledger_dir"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_cell_decides_exactly_the_claims_of_its_tags(path):
    decided = []
    for cell in code_cells(path):
        source = "".join(cell["source"])
        tags = [tag for tag in cell["metadata"].get("tags", []) if tag in REGISTRY]
        # An identifier may be passed on through a loop; then it stands in the cell as a string all the same.
        named = [name for name in re.findall(r'"([a-z]+(?:-[a-z0-9]+)+)"', source) if name in REGISTRY]
        if ".decide(" in source:
            assert sorted(set(named)) == sorted(tags), f"{path.name}: tags {tags}, decides {named}"
            decided += tags
        else:
            assert not tags, f"{path.name}: {tags} tag a cell that decides nothing"
    assert len(decided) == len(set(decided)), "a claim is decided in two cells"
    slug = {entry["notebook"]: chapter for chapter, entry in chapter_table()["chapters"].items()}.get(path.stem)
    assert all(REGISTRY[claim].chapter == slug for claim in decided)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_verdict_is_typed_into_code(path):
    words = "|".join(v for v in ledger.VERDICTS if v not in ("open", "holds"))
    for cell in code_cells(path):
        source = "".join(cell["source"])
        if ".decide(" in source:
            assert not re.search(rf'["\']({words})["\']', source)


def test_every_claim_of_a_notebook_chapter_is_known_to_the_pipeline():
    assert set(REGISTRY.chapters) < set(chapter_table()["chapters"])
