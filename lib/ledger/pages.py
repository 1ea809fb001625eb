"""The scoreboard and the errata list, as HTML, from ledger tables (one row a claim)."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import pandas as pd

from lib.ledger.cards import MATH, anchor, badge, text
from lib.ledger.evidence import CORRECTED, HOLDS, NOT_REPRODUCED, OPEN, PARTLY, REFUTED, VERDICTS
from lib.ledger.registry import SEVERITIES, Claim, Registry

CHAPTER_PAGES = {
    "dbn": "1_dbn", "autorate": "2_autorate", "bngd": "3_bngd", "bsum": "4_bsum", "dsgd": "5_dsgd",
}  # fmt: skip


def link(claim: Claim, label: str | None = None) -> str:
    """A link to the claim's card on its chapter's page."""
    page = CHAPTER_PAGES.get(claim.chapter, claim.chapter)
    return f'<a href="{page}.html#{anchor(claim.id)}">{text(label or claim.id)}</a>'


def verdict_label(verdict: str) -> str:
    """A badge; a verdict that depends on the seed is shown in words, under the label of what is not settled."""
    return badge(verdict) if verdict in VERDICTS else f"{badge('undecided')} {html.escape(verdict)}"


def counts_table(table: pd.DataFrame, registry: Registry) -> str:
    """Claims by chapter and verdict."""
    head = [v for v in VERDICTS if (table["verdict"] == v).any()]
    other = table[~table["verdict"].isin(VERDICTS)]
    rows = []
    for chapter in registry.chapters:
        own = table[table["chapter"] == chapter]
        cells = "".join(f"<td>{(own['verdict'] == v).sum() or ''}</td>" for v in head)
        cells += f"<td>{(own.index.isin(other.index)).sum()}</td>" if len(other) else ""
        page = CHAPTER_PAGES.get(chapter, chapter)
        rows.append(
            f'<tr><th scope="row"><a href="{page}.html">{page.replace("_", " ")}</a></th>{cells}'
            f"<td>{len(own)}</td></tr>"
        )
    names = "".join(f'<th scope="col">{badge(v)}</th>' for v in head)
    names += '<th scope="col">depends on seed</th>' if len(other) else ""
    return (
        f'<div style="overflow-x:auto"><table><thead><tr><th scope="col">chapter</th>{names}'
        f'<th scope="col">claims</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def scoreboard(table: pd.DataFrame, reference: pd.DataFrame, registry: Registry) -> str:
    """Every claim: this build's verdict above the published one of the largest profile, with a link to the evidence."""
    published = {row.claim: row for row in reference.itertuples() if row.verdict != OPEN}
    rows = []
    for row in table.itertuples():
        claim = registry[row.claim]
        old = published.get(row.claim)
        other = f"<br><small>published ({old.profile}): {html.escape(old.verdict)}</small>" if old else ""
        name = link(claim) if row.verdict != OPEN else claim.id
        evidence = f"<p><small>{text(row.measured)} {html.escape(row.threshold)}</small></p>" if row.measured else ""
        rows.append(
            f'<tr data-chapter="{claim.chapter}" data-verdict="{html.escape(row.verdict)}">'
            f"<td>{verdict_label(row.verdict)}{other}</td>"
            f"<td>{text(claim.where)}<br><code>{name}</code><br><small>weight {claim.weight}</small></td>"
            f'<td style="text-align:left">{text(claim.statement)}{evidence}</td></tr>'
        )
    head = "".join(
        f'<th scope="col" style="width:{width}">{name}</th>'
        for name, width in (("verdict", "9em"), ("claim", "11em"), ("statement and evidence", "auto"))
    )
    return (
        f'<div class="{MATH}" style="overflow-x:auto"><table class="claims-table filterable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def errata(found: Iterable[dict[str, Any]], registry: Registry, chapter: str) -> str:
    """The errata of one paper that the records ``found`` bear out, worst first, then those that only reading can show.

    An erratum whose claim is open or undecided, or whose verdict depends on the seed, is not printed.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        records.setdefault(record["claim"], []).append(record)
    proved, read = [], []
    for claim in sorted(registry.of(chapter), key=lambda c: SEVERITIES.index(c.erratum.severity) if c.erratum else -1):
        verdicts = {record["verdict"] for record in records.get(claim.id, ())}
        if claim.erratum is None or len(verdicts) != 1:
            continue
        if verdicts <= {CORRECTED, REFUTED, NOT_REPRODUCED, PARTLY}:
            proved.append((claim, records[claim.id][0]))
        elif verdicts == {HOLDS} and claim.erratum.severity == "typo":
            read.append((claim, records[claim.id][0]))
    if not proved and not read:
        return "<p>No erratum yet: none of this paper's suspected slips has been checked by this build.</p>"
    return _errata_table("Shown by evidence", proved) + _errata_table("Shown by reading (the statement holds)", read)


def _errata_table(title: str, pairs: list) -> str:
    if not pairs:
        return ""
    rows = []
    for claim, record in pairs:
        erratum = claim.erratum
        failed = [text(check["text"]) for check in record["checks"] if not check["passed"]]
        shown = f"<br><b>Fails as printed:</b> {'; '.join(failed)}" if failed else ""
        caveat = f" <i>{text(erratum.caveat)}</i>" if erratum.caveat else ""
        rows.append(
            f"<tr><td><b>{html.escape(erratum.severity)}</b><br>{link(claim, claim.where)}</td>"
            f'<td style="text-align:left">{text(erratum.printed)}{caveat}<br><b>Instead:</b> {text(erratum.corrected)}'
            f"{shown}</td></tr>"
        )
    return (
        f'<div class="{MATH}" style="overflow-x:auto"><table class="claims-table"><caption style="caption-side:top;'
        f'text-align:left;font-weight:600">{title}</caption><thead><tr><th scope="col" style="width:11em">kind and place'
        f'</th><th scope="col">what is printed, what is right, and the number that shows it</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
