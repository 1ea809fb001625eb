"""Claims, checks, verdicts: what each paper says, what code measured, and what follows from it.

The registry (``book/claims/<chapter>.yml``) lists the claims. A notebook cell hands evidence to
:meth:`Ledger.decide`, which computes the verdict, appends a record and shows a card. Nothing here takes a verdict as
input.
"""

from lib.ledger import pages
from lib.ledger.aggregate import (
    COLUMNS,
    collect,
    compare,
    published,
    read_table,
    summarize,
    verdict_counts,
    write_table,
)
from lib.ledger.evidence import (
    VERDICTS,
    Check,
    above,
    at_least,
    at_most,
    below,
    between,
    equals,
    verdict_of_experiment,
    verdict_of_statement,
)
from lib.ledger.notebook import Ledger, open_ledger
from lib.ledger.records import append, read
from lib.ledger.registry import Claim, load_registry, registry_folder

__all__ = [
    "COLUMNS",
    "VERDICTS",
    "Check",
    "Claim",
    "Ledger",
    "above",
    "append",
    "at_least",
    "at_most",
    "below",
    "between",
    "collect",
    "compare",
    "equals",
    "load_registry",
    "open_ledger",
    "pages",
    "published",
    "read",
    "read_table",
    "registry_folder",
    "summarize",
    "verdict_counts",
    "verdict_of_experiment",
    "verdict_of_statement",
    "write_table",
]
