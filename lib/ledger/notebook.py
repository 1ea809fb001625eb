"""The ledger as a chapter uses it: evidence in, verdict out, a record on disk and a card on the page."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import runtime
from lib.ledger import cards, records
from lib.ledger.evidence import OPEN, UNDECIDED, VERDICTS, Check, verdict_of_experiment, verdict_of_statement
from lib.ledger.registry import Claim, Registry, load_registry


class Quiet(dict):
    """A record that does not repeat itself below the cell whose card already shows it."""

    def _ipython_display_(self) -> None:
        pass


class Html(str):
    """HTML that a notebook shows as such."""

    def _repr_html_(self) -> str:
        return str(self)


@dataclass
class Ledger:
    """The decisions of one run of one chapter. Made by :func:`open_ledger`."""

    run: runtime.Run
    registry: Registry
    path: Path
    decided: dict[str, dict[str, Any]] = field(default_factory=dict)
    _family: list[str] | None = None
    _clock: float = field(default_factory=time.perf_counter)
    _spent: float = 0.0

    def decide(
        self,
        claim_id: str,
        *,
        printed: Sequence[Check] = (),
        corrected: Sequence[Check] = (),
        counterexample: Sequence[Check] = (),
        findings: Sequence[Check] = (),
        needs: str | None = None,
        unavailable: str | None = None,
        seeds: int = 1,
    ) -> dict[str, Any]:
        """Compute the verdict of a claim from its evidence, append the record, show the card, return the record.

        A statement takes ``printed`` checks (the paper's own form), and ``corrected`` or ``counterexample`` checks where
        the registry has an erratum; an experiment takes ``findings``. ``needs`` is the smallest profile whose sizes
        decide the claim: below it the verdict is *undecided*, the checks are shown all the same. ``seeds`` is the number
        of independent draws the evidence pools. Raises ``KeyError`` for a claim outside the registry and ``ValueError``
        for evidence that does not fit the claim.
        """
        claim = self.registry[claim_id]
        if claim.chapter != self.run.chapter:
            raise ValueError(
                f"claim {claim_id!r} belongs to chapter {claim.chapter!r}, this run is {self.run.chapter!r}"
            )
        if unavailable is not None and not unavailable.strip():
            raise ValueError(f"unavailable must say what is missing, or be None, got {unavailable!r}")
        wrong_kind = bool(printed) if claim.experiment else bool(findings)
        none_of_its_kind = not (findings if claim.experiment else printed)
        if wrong_kind or (none_of_its_kind and unavailable is None):
            wanted = "findings" if claim.experiment else "printed"
            raise ValueError(
                f"{claim_id} is {'an experiment' if claim.experiment else 'a statement'}: give {wanted}=[...]"
            )
        if (corrected or counterexample) and claim.erratum is None:
            raise ValueError(f"{claim_id} has no erratum in the registry, so nothing of it can be corrected or refuted")
        if unavailable is not None:
            verdict, reason = UNDECIDED, unavailable
        elif claim.experiment:
            verdict, reason = verdict_of_experiment(findings)
        else:
            verdict, reason = verdict_of_statement(printed, corrected, counterexample)
        if needs is not None and not self.run.reaches(needs) and unavailable is None:
            verdict, reason = UNDECIDED, f"profile {self.run.profile} is too small; {needs} decides"
        now = time.perf_counter()
        roles = (
            ("printed", printed),
            ("corrected", corrected),
            ("counterexample", counterexample),
            ("finding", findings),
        )
        record = Quiet(
            claim=claim_id,
            chapter=claim.chapter,
            kind=claim.kind,
            verdict=verdict,
            reason=reason,
            checks=[records.check_to_json(check, role) for role, checks in roles for check in checks],
            reported=claim.reported,
            seeds=seeds,
            seconds=round(self._spent + now - self._clock, 3),
            **self._facts(),
        )
        self._clock, self._spent = now, 0.0
        records.append(self.path, record)
        self.decided[claim_id] = record
        if self._family is None:
            _show(Html(cards.card(claim, record)))
        else:
            self._family.append(claim_id)
        return record

    @contextlib.contextmanager
    def family(self, title: str) -> Iterator[None]:
        """Show the claims decided inside the ``with`` block as one compact table."""
        self._family = []
        try:
            yield
        finally:
            ids, self._family = self._family, None
            if ids:
                _show(Html(cards.family(title, [(self.registry[i], self.decided[i]) for i in ids])))

    def overview(self, title: str = "Claims of this chapter", only: str | None = None) -> Html:
        """A table of the chapter's claims with their verdicts; ``only="open"`` lists those that no cell decided."""
        pairs = [(claim, self.decided.get(claim.id)) for claim in self.registry.of(self.run.chapter)]
        if only is not None:
            pairs = [pair for pair in pairs if (pair[1]["verdict"] if pair[1] else OPEN) == only]
        return Html(cards.overview(title, pairs))

    def counts(self) -> dict[str, int]:
        """The number of this chapter's claims by verdict, open ones included."""
        claims: list[Claim] = self.registry.of(self.run.chapter)
        found = Counter(self.decided[c.id]["verdict"] if c.id in self.decided else OPEN for c in claims)
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    def summary(self) -> Html:
        """The counts by verdict and what ran, in two lines."""
        seconds = time.time() - self.run.started
        facts = ", ".join(f"{key} {value}" for key, value in self.run.provenance().items())
        return Html(
            f"<div>{cards.counts_line(self.counts())}</div>"
            f'<div style="font-size:92%;opacity:.85">{facts}, {seconds:.0f} s so far</div>'
        )

    def start_clock(self, *_: Any) -> None:
        """A cell begins; called by the notebook. A record's seconds are those of the cells since the last decision."""
        self._clock = time.perf_counter()

    def stop_clock(self, *_: Any) -> None:
        """A cell ends; called by the notebook. What it took beyond its last decision counts for the next one."""
        self._spent += time.perf_counter() - self._clock
        self._clock = time.perf_counter()

    def _facts(self) -> dict[str, Any]:
        facts = self.run.provenance()
        return {
            "profile": facts["profile"],
            "seed": self.run.seed,
            "data": facts["data"],
            "device": facts["device"],
            "version": facts["version"],
            "date": facts["date"],
            "torch": facts["torch"],
        }


def open_ledger(run: runtime.Run, registry: Registry | None = None) -> Ledger:
    """The ledger of this run: records go to ``<ledger_dir>/<profile>/seed-<seed>/<chapter>.jsonl``.

    Records of an earlier run at the same place stay until this run decides the same claim anew: nothing is lost when
    a run is interrupted. Raises ``ValueError`` if the registry does not know the chapter.
    """
    registry = load_registry() if registry is None else registry
    if run.chapter not in registry.chapters:
        raise ValueError(f"chapter must be one of {', '.join(registry.chapters)}, got {run.chapter!r}")
    path = run.ledger_dir / run.profile / f"seed-{run.seed}" / f"{run.chapter}.jsonl"
    ledger = Ledger(run, registry, path)
    try:
        from IPython import get_ipython
    except ImportError:
        return ledger
    shell = get_ipython()
    if shell is not None:
        shell.events.register("pre_run_cell", ledger.start_clock)
        shell.events.register("post_run_cell", ledger.stop_clock)
    return ledger


def _show(item: Html) -> None:
    try:
        from IPython.display import display
    except ImportError:
        return
    display(item)
