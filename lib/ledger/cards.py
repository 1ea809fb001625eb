"""How a verdict looks on the page: a card for one claim, a compact table for a family, an overview for a chapter.

Plain HTML with inline colours, so that it reads the same in the book (light and dark) and in JupyterLab.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from lib.ledger.evidence import (
    CORRECTED,
    HOLDS,
    NOT_REPRODUCED,
    OPEN,
    PARTLY,
    REFUTED,
    REPRODUCED,
    UNDECIDED,
    VERDICTS,
)
from lib.ledger.registry import Claim

# White text on each of these has a contrast of at least 4.5 to 1.
COLOURS = {
    HOLDS: "#1a7f4b",
    REPRODUCED: "#1a7f4b",
    CORRECTED: "#9a5b00",
    PARTLY: "#9a5b00",
    REFUTED: "#b3261e",
    NOT_REPRODUCED: "#b3261e",
    UNDECIDED: "#5b6770",
    OPEN: "#5b6770",
}
MATH = "tex2jax_process mathjax_process"


def badge(verdict: str) -> str:
    """The verdict as a coloured label."""
    return (
        f'<span class="verdict-badge" style="background:{COLOURS[verdict]};color:#fff;border-radius:4px;'
        f'padding:1px 8px;font-weight:600;white-space:nowrap">{verdict}</span>'
    )


def text(words: str) -> str:
    """Text of the registry as HTML, with its ``$...$`` as MathJax's ``\\(...\\)`` (a lone dollar sign stays one)."""
    return re.sub(r"\$([^$]+)\$", r"\\(\1\\)", html.escape(words))


def anchor(claim_id: str) -> str:
    """The id of a claim's card on its chapter's page."""
    return f"claim-{claim_id}"


def card(claim: Claim, record: dict[str, Any]) -> str:
    """One claim: verdict, place in the paper, every check with its outcome; statement and erratum unfold."""
    checks = "".join(_check_item(check) for check in record["checks"])
    unfold = [
        f"<p><b>Claim.</b> {text(claim.statement)}</p>",
        f"<p><b>Check.</b> {text(claim.check)}</p>",
    ]
    if claim.reported:
        unfold.append(f"<p><b>The paper reports.</b> {text(claim.reported)}</p>")
    facts = (
        f"profile {record['profile']}, seed {record['seed']}, data {record['data']}, code {record['version']}, "
        f"{record['seconds']:.1f} s"
    )
    return (
        f'<div class="verdict-card {MATH}" id="{anchor(claim.id)}" style="border-left:5px solid '
        f'{COLOURS[record["verdict"]]};padding:.35em .9em;margin:.6em 0">'
        f"<div>{badge(record['verdict'])} <b>{text(claim.where)}</b> "
        f'<code style="font-size:85%;opacity:.8">{claim.id}</code></div>'
        f'<ul style="margin:.35em 0 .2em 1.1em;padding:0">{checks}</ul>'
        f"{_notes(claim, record)}{_erratum(claim, record)}"
        f'<details style="font-size:92%"><summary>what is claimed and how it is checked</summary>{"".join(unfold)}'
        f'<p style="opacity:.8">{html.escape(facts)}</p></details></div>'
    )


def family(title: str, pairs: Iterable[tuple[Claim, dict[str, Any]]]) -> str:
    """A compact table of several claims: verdict and place, then the claim and its checks."""
    rows = []
    for claim, record in pairs:
        checks = "".join(_check_item(check) for check in record["checks"])
        below = f"{_notes(claim, record)}{_erratum(claim, record)}"
        rows.append(
            f'<tr id="{anchor(claim.id)}"><td>{badge(record["verdict"])}<br><b>{text(claim.where)}</b>'
            f'<br><code style="font-size:80%;opacity:.8">{claim.id}</code></td>'
            f'<td style="text-align:left">{text(claim.statement)}'
            f'<ul style="margin:.3em 0 0 .6em;padding:0">{checks}</ul>{below}</td></tr>'
        )
    return _table(title, {"verdict": "11em", "claim and evidence": "auto"}, rows)


def overview(title: str, pairs: Iterable[tuple[Claim, dict[str, Any] | None]]) -> str:
    """Every claim of a chapter with its verdict; a claim that no cell decides reads *open*."""
    rows = []
    for claim, record in pairs:
        verdict = record["verdict"] if record else OPEN
        name = f'<a href="#{anchor(claim.id)}">{claim.id}</a>' if record else claim.id
        rows.append(
            f"<tr><td>{badge(verdict)}<br>{text(claim.where)}<br><small>weight {claim.weight}</small></td>"
            f'<td style="text-align:left">{text(claim.statement)}<br><code style="font-size:80%">{name}</code></td></tr>'
        )
    return _table(title, {"verdict and place": "11em", "statement": "auto"}, rows)


def counts_line(counts: dict[str, int]) -> str:
    """The number of claims by verdict, as labels in a row."""
    return " ".join(
        f'<span style="white-space:nowrap">{badge(v)} {counts[v]}</span>' for v in VERDICTS if counts.get(v)
    )


def _table(title: str, head: dict[str, str], rows: list[str]) -> str:
    """A table with these columns (name -> width) and rows."""
    cells = "".join(
        f'<th scope="col" style="text-align:left;width:{width}">{name}</th>' for name, width in head.items()
    )
    return (
        f'<div class="{MATH}" style="overflow-x:auto"><table class="claims-table"><caption style="text-align:left;'
        f'caption-side:top;font-weight:600">{html.escape(title)}</caption><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _check_item(check: dict[str, Any]) -> str:
    mark = "✓" if check["passed"] else "✗"
    role = "" if check["role"] in ("printed", "finding") else f" <i>({check['role']})</i>"
    exact = ' <span title="integers, rationals or interval arithmetic">[exact]</span>' if check["exact"] else ""
    return f'<li style="list-style:none"><b>{mark}</b> {text(check["text"])}{role}{exact}</li>'


def _notes(claim: Claim, record: dict[str, Any]) -> str:
    """Why the claim is undecided, and why its verdict may differ between machines."""
    notes = []
    if record["verdict"] == UNDECIDED:
        notes.append(f"<b>Undecided:</b> {text(record['reason'])}")
    if claim.varies:
        notes.append(f"<b>May differ between machines:</b> {text(claim.varies)}")
    return "".join(f'<div style="font-size:92%">{note}</div>' for note in notes)


def _erratum(claim: Claim, record: dict[str, Any]) -> str:
    """The erratum, printed only where the evidence bears it out (or where nothing but reading can: a typo)."""
    erratum = claim.erratum
    borne_out = record["verdict"] in (CORRECTED, REFUTED, NOT_REPRODUCED, PARTLY)
    if erratum is None or not (borne_out or erratum.severity == "typo" and record["verdict"] == HOLDS):
        return ""
    caveat = f" <i>{text(erratum.caveat)}</i>" if erratum.caveat else ""
    return (
        f'<div class="erratum" style="font-size:95%;margin:.25em 0"><b>Erratum ({erratum.severity}).</b> '
        f"{text(erratum.printed)} <b>Instead:</b> {text(erratum.corrected)}{caveat}</div>"
    )
