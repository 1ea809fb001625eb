"""The registry of claims: ``book/claims/<chapter>.yml``, one entry for each numbered statement, figure or finding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lib import runtime

KINDS = (
    "algorithm",
    "assumption",
    "claim",
    "corollary",
    "definition",
    "equation",
    "figure",
    "lemma",
    "proposition",
    "remark",
    "table",
    "theorem",
)
CHAPTERS = ("dbn", "autorate", "bngd", "bsum", "dsgd")
SEVERITIES = ("false", "missing hypothesis", "wrong constant", "typo")  # worst first

SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "required": ["id", "kind", "where", "statement", "check", "weight"],
        "properties": {
            "id": {"type": "string", "pattern": "^[a-z]+(-[a-z0-9]+)+$"},
            "kind": {"enum": list(KINDS)},
            "where": {"type": "string", "minLength": 1},
            "statement": {"type": "string", "minLength": 1},
            "check": {"type": "string", "minLength": 1},
            "weight": {"type": "integer", "minimum": 1, "maximum": 5},
            "experiment": {"type": "boolean"},
            "varies": {"type": "string", "minLength": 1},
            "reported": {"type": "string"},
            "settings": {"type": ["string", "object"]},
            "cost": {"type": "string"},
            "erratum": {
                "type": "object",
                "additionalProperties": False,
                "required": ["severity", "printed", "corrected"],
                "properties": {
                    "severity": {"enum": list(SEVERITIES)},
                    "printed": {"type": "string", "minLength": 1},
                    "corrected": {"type": "string", "minLength": 1},
                    "caveat": {"type": "string", "minLength": 1},
                },
            },
        },
    },
}


@dataclass(frozen=True)
class Erratum:
    """A slip of a paper: how bad (``severity``), what is printed, what is right, and what could excuse it."""

    severity: str
    printed: str
    corrected: str
    caveat: str = ""


@dataclass(frozen=True)
class Claim:
    """One entry of the registry. An ``experiment`` is judged by its findings, a statement by its checks.

    ``varies`` says why the verdict of an experiment may differ between machines, by running time or by rounding that a
    training run amplifies: it is not compared with the published one.
    """

    id: str
    chapter: str
    kind: str
    where: str
    statement: str
    check: str
    weight: int
    experiment: bool = False
    varies: str = ""
    reported: str = ""
    settings: Any = None
    cost: str = ""
    erratum: Erratum | None = None


class Registry(Mapping[str, Claim]):
    """The claims by id, in the order of the papers."""

    def __init__(self, claims: list[Claim]):
        self._claims = {claim.id: claim for claim in claims}

    def __getitem__(self, claim_id: str) -> Claim:
        try:
            return self._claims[claim_id]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(claim_id, self._claims, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise KeyError(f"claim {claim_id!r} is not in the registry{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._claims)

    def __len__(self) -> int:
        return len(self._claims)

    @property
    def chapters(self) -> list[str]:
        return list(dict.fromkeys(claim.chapter for claim in self._claims.values()))

    def of(self, chapter: str) -> list[Claim]:
        """The claims of one chapter."""
        return [claim for claim in self._claims.values() if claim.chapter == chapter]


def registry_folder() -> Path:
    """Where this project keeps its registry."""
    return runtime.project_root() / "book" / "claims"


def load_registry(folder: str | Path | None = None) -> Registry:
    """Read and validate ``<folder>/*.yml`` (default: the project's).

    Raises ``ValueError`` naming the file, the claim and the field that is wrong; a duplicate id or an id that does not
    begin with its file's name counts as wrong.
    """
    folder = registry_folder() if folder is None else Path(folder)
    files = sorted(folder.glob("*.yml"), key=_chapter_order)
    if not files:
        raise ValueError(f"no claims (*.yml) in {str(folder)!r}")
    claims: dict[str, Claim] = {}
    for path in files:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        validator = jsonschema.Draft202012Validator(SCHEMA)
        for error in validator.iter_errors(entries):
            position = list(error.absolute_path)
            entry = entries[position[0]] if position else {}
            name = entry.get("id", f"entry {position[0]}") if position and isinstance(entry, dict) else "the file"
            place = ".".join(str(p) for p in position[1:])
            raise ValueError(f"{path.name}: {name}{': ' + place if place else ''}: {error.message}")
        for entry in entries:
            claim_id = entry["id"]
            if not claim_id.startswith(path.stem + "-"):
                raise ValueError(f"{path.name}: {claim_id}: an id must begin with {path.stem}-")
            if claim_id in claims:
                raise ValueError(f"{path.name}: {claim_id}: this id stands twice")
            erratum = Erratum(**entry.pop("erratum")) if "erratum" in entry else None
            claims[claim_id] = Claim(chapter=path.stem, erratum=erratum, **entry)
    return Registry(list(claims.values()))


def _chapter_order(path: Path) -> tuple[int, str]:
    """Chapters in the order of the book, others after them by name."""
    return (CHAPTERS.index(path.stem) if path.stem in CHAPTERS else len(CHAPTERS), path.stem)
