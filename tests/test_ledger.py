"""The ledger: verdicts from evidence, records that survive, tables that compare."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import ledger, runtime
from lib.ledger import above, at_least, at_most, below, between, equals

PASS, FAIL = at_most("x", 0.5, 1.0), at_most("x", 2.0, 1.0)
EXACT = equals("y", Fraction(1, 3), Fraction(1, 3))

REGISTRY = """
- id: toy-statement
  kind: lemma
  where: Lemma 1
  statement: s
  check: c
  weight: 3
- id: toy-wrong
  kind: theorem
  where: Theorem 2
  statement: s
  check: c
  weight: 5
  erratum: {severity: wrong constant, printed: a 2, corrected: a 3}
- id: toy-figure
  kind: figure
  where: Figure 1
  statement: s
  check: c
  weight: 4
  experiment: true
  reported: it falls
"""


@pytest.fixture
def registry(tmp_path):
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / "toy.yml").write_text(REGISTRY)
    return ledger.load_registry(folder)


@pytest.fixture
def book(tmp_path, registry):
    return ledger.open_ledger(runtime.start("toy", profile="smoke", ledger_dir=tmp_path / "ledger"), registry)


@pytest.mark.parametrize(
    ("printed", "corrected", "counterexample", "verdict"),
    [
        ([PASS], [], [], "holds"),
        ([PASS, PASS], [FAIL], [], "holds"),
        ([PASS, FAIL], [PASS], [], "holds as corrected"),
        ([FAIL], [PASS, FAIL], [], "undecided"),
        ([FAIL], [], [EXACT], "refuted"),
        ([FAIL], [], [PASS], "undecided"),  # a float is not an exact counterexample
        ([FAIL], [], [equals("y", 1, 2)], "undecided"),
        ([FAIL], [], [], "undecided"),
        ([PASS], [], [EXACT], "holds"),
    ],
)
def test_verdict_of_a_statement(printed, corrected, counterexample, verdict):
    assert ledger.verdict_of_statement(printed, corrected, counterexample)[0] == verdict


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [([PASS], "reproduced"), ([PASS, FAIL], "partly reproduced"), ([FAIL, FAIL], "not reproduced")],
)
def test_verdict_of_an_experiment(findings, verdict):
    assert ledger.verdict_of_experiment(findings)[0] == verdict


def test_no_evidence_is_no_verdict():
    with pytest.raises(ValueError, match="at least one check"):
        ledger.verdict_of_statement([])
    with pytest.raises(ValueError, match="at least one check"):
        ledger.verdict_of_experiment([])


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_a_comparison_passes_only_if_it_is_true(value, limit):
    assert at_most("x", value, limit).passed == (value <= limit)
    assert above("x", value, limit).passed == (value > limit)
    assert not (below("x", value, limit).passed and at_least("x", value, limit).passed)


@pytest.mark.parametrize("make", [at_most, at_least, below, above, equals])
def test_nan_never_passes(make):
    assert not make("x", math.nan, 1.0).passed
    assert not make("x", 1.0, math.nan).passed
    assert not between("x", math.nan, 0, 1).passed


def test_an_interval_passes_only_as_a_whole(monkeypatch):
    monkeypatch.setattr(mpmath.iv, "prec", 80)
    tenth = mpmath.iv.mpf(1) / 10
    assert below("x", tenth, Fraction(1, 2)).passed
    assert not at_most("x", tenth, Fraction(1, 10)).passed  # the enclosure of 1/10 reaches above it
    assert at_most("x", tenth, Fraction(1, 10) + Fraction(1, 10**20)).passed
    assert not below("x", mpmath.iv.mpf([0, 1]), 0.5).passed
    assert at_least("x", mpmath.iv.mpf([1, 2]), 1).passed
    assert at_least("x", mpmath.iv.mpf([1, 2]), 1).exact


def test_a_statistical_interval_can_be_made_to_decide():
    assert above("slope", 0.9, 0.5, interval=(0.4, 1.4)).passed
    assert not above("slope", 0.9, 0.5, interval=(0.4, 1.4), by_interval=True).passed
    with pytest.raises(ValueError, match="needs an interval"):
        above("slope", 0.9, 0.5, by_interval=True)


@pytest.mark.parametrize(("value", "exact"), [(3, True), (Fraction(1, 3), True), (np.int64(3), True), (0.5, False),
                                              (np.float64(0.5), False), (torch.tensor(2), True)])  # fmt: skip
def test_exactness_is_read_off_the_value(value, exact):
    assert at_most("x", value, 5).exact is exact


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), "1", None, torch.ones(2)])
def test_what_is_not_a_number_is_no_evidence(value):
    with pytest.raises(TypeError, match="measured must be"):
        at_most("x", value, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {id: toy-a, kind: lemma, where: w, statement: s, check: c}", "weight"),
        ("- {id: toy-a, kind: riddle, where: w, statement: s, check: c, weight: 1}", "toy-a: kind: 'riddle'"),
        ("- {id: toy-a, kind: lemma, where: w, statement: s, check: c, weight: 1, expected: holds}", "expected"),
        ("- {id: other-a, kind: lemma, where: w, statement: s, check: c, weight: 1}", "must begin with toy-"),
        ("- {id: toy-a, kind: lemma, where: w, statement: s, check: c, weight: 9}", "toy-a: weight: 9"),
        ("- &x {id: toy-a, kind: lemma, where: w, statement: s, check: c, weight: 1}\n- *x", "stands twice"),
    ],
)
def test_a_wrong_registry_is_named(tmp_path, text, message):
    (tmp_path / "toy.yml").write_text(text)
    with pytest.raises(ValueError, match="toy.yml.*" + message):
        ledger.load_registry(tmp_path)


def test_an_unknown_claim_gets_a_hint(registry):
    with pytest.raises(KeyError, match="did you mean toy-statement"):
        registry["toy-statment"]


def test_a_decision_is_recorded_and_counted(book):
    record = book.decide("toy-statement", printed=[PASS])
    assert record["verdict"] == "holds"
    assert [r["claim"] for r in ledger.read(book.path)] == ["toy-statement"]
    assert book.counts() == {"holds": 1, "open": 2}


def test_seconds_are_those_of_the_cells_since_the_last_decision(book, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lib.ledger.notebook.time.perf_counter", lambda: now[0])

    def cell(seconds, claim=None, idle=1000.0):
        book.start_clock()
        now[0] += seconds
        record = book.decide(claim, printed=[PASS]) if claim else None
        book.stop_clock()
        now[0] += idle  # between cells nobody computes
        return record

    cell(0.5, "toy-wrong")
    cell(3.0)
    assert cell(2.0, "toy-statement")["seconds"] == 5.0
    assert cell(1.0, "toy-wrong")["seconds"] == 1.0


def test_evidence_must_fit_the_claim(book):
    with pytest.raises(ValueError, match="toy-figure is an experiment"):
        book.decide("toy-figure", printed=[PASS])
    with pytest.raises(ValueError, match="toy-statement is a statement"):
        book.decide("toy-statement", findings=[PASS])
    with pytest.raises(ValueError, match="no erratum"):
        book.decide("toy-statement", printed=[FAIL], corrected=[PASS])
    with pytest.raises(KeyError):
        book.decide("toy-nothing", printed=[PASS])
    assert not book.path.exists()


def test_a_small_profile_leaves_a_claim_undecided_with_the_profile_that_decides(book):
    record = book.decide("toy-figure", findings=[PASS], needs="full")
    assert record["verdict"] == "undecided"
    assert "full decides" in record["reason"]
    assert record["checks"][0]["passed"]


@pytest.mark.parametrize(("claim", "checks"), [("toy-figure", {}), ("toy-figure", {"findings": [PASS]}),
                                               ("toy-statement", {}), ("toy-statement", {"printed": [PASS]})])  # fmt: skip
def test_what_cannot_be_had_leaves_a_claim_undecided_for_that_reason(book, claim, checks):
    record = book.decide(claim, needs="full", unavailable="no source has the data set", **checks)
    assert (record["verdict"], record["reason"]) == ("undecided", "no source has the data set")
    assert len(record["checks"]) == len(checks)
    assert ledger.read(book.path)[0]["reason"] == "no source has the data set"


def test_a_missing_data_set_needs_a_reason_and_excuses_no_wrong_kind_of_check(book):
    with pytest.raises(ValueError, match="unavailable must say"):
        book.decide("toy-figure", findings=[PASS], unavailable=" ")
    with pytest.raises(ValueError, match="toy-figure is an experiment"):
        book.decide("toy-figure", printed=[PASS], unavailable="no data")
    with pytest.raises(ValueError, match="toy-figure is an experiment"):
        book.decide("toy-figure", unavailable=None)


def test_cards_show_the_erratum_only_where_evidence_bears_it_out(book, registry):
    shown = ledger.cards.card(registry["toy-wrong"], book.decide("toy-wrong", printed=[FAIL], corrected=[PASS]))
    assert "Erratum (wrong constant)" in shown
    assert 'id="claim-toy-wrong"' in shown
    unshown = ledger.cards.card(registry["toy-wrong"], book.decide("toy-wrong", printed=[PASS], corrected=[PASS]))
    assert "Erratum" not in unshown


def test_records_are_plain_json_even_for_infinities_and_intervals(book):
    book.decide("toy-statement", printed=[at_most("x", math.inf, 1.0), at_most("y", mpmath.iv.mpf([0, 1]), 2)])
    record = json.loads(book.path.read_text())
    assert record["checks"][0]["measured"] == "inf"
    assert record["checks"][1]["measured"] == ["0.0", "1.0"]


def test_a_torn_line_is_reported_and_the_rest_is_read(book):
    book.decide("toy-statement", printed=[PASS])
    with book.path.open("a") as stream:
        stream.write('{"claim": "toy-wr')
    with pytest.warns(UserWarning, match="line 2 is not a whole record"):
        assert len(ledger.read(book.path)) == 1
    book.decide("toy-wrong", printed=[PASS])
    with pytest.warns(UserWarning, match="line 2"):
        assert [r["claim"] for r in ledger.read(book.path)] == ["toy-statement", "toy-wrong"]


def test_records_survive_a_killed_process(tmp_path):
    """A process that is killed with SIGKILL between decisions leaves every record it made."""
    path = tmp_path / "r.jsonl"
    code = (
        "import itertools, sys, time\nfrom lib import ledger\n"
        "for i in itertools.count():\n"
        f"    ledger.append({str(path)!r}, dict(claim=f'c{{i}}', profile='smoke', seed=0, filler='x' * 20000))\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 20:
            break
    os.kill(process.pid, signal.SIGKILL)
    last = [line, *process.stdout.read().splitlines()][-1]
    process.wait()
    lines = path.read_text().splitlines()
    whole = [json.loads(text)["claim"] for text in lines[: int(last) + 1]]
    assert whole == [f"c{i}" for i in range(int(last) + 1)]


def test_the_latest_record_of_a_claim_counts(book):
    book.decide("toy-statement", printed=[FAIL])
    book.decide("toy-statement", printed=[PASS])
    assert [r["verdict"] for r in ledger.read(book.path)] == ["holds"]


def run_seeds(tmp_path, registry, outcomes):
    for seed, check in enumerate(outcomes):
        run = runtime.start("toy", profile="smoke", seed=seed, ledger_dir=tmp_path / "ledger")
        ledger.open_ledger(run, registry).decide("toy-figure", findings=[check])
    return ledger.summarize(ledger.collect(tmp_path / "ledger"), registry, "smoke").set_index("claim")


def test_seeds_that_agree_pool_and_seeds_that_differ_are_shown(tmp_path, registry):
    table = run_seeds(tmp_path, registry, [PASS, PASS])
    assert table.loc["toy-figure", ["verdict", "seeds"]].tolist() == ["reproduced", "0 1"]
    assert table.loc["toy-statement", "verdict"] == "open"
    table = run_seeds(tmp_path, registry, [PASS, PASS, FAIL])
    assert table.loc["toy-figure", "verdict"] == "depends on seed (reproduced: 2, not reproduced: 1)"


def table_of(book, registry):
    return ledger.summarize(ledger.collect(book.path.parents[2]), registry, "smoke")


def test_a_table_survives_the_disk_and_agrees_with_itself(book, registry, tmp_path):
    book.decide("toy-statement", printed=[PASS])
    book.decide("toy-wrong", printed=[FAIL], corrected=[at_most("z", 0.25, 1.0)])
    table = table_of(book, registry)
    ledger.write_table(table, tmp_path / "ledger.csv")
    again = ledger.read_table(tmp_path / "ledger.csv")
    assert again["measured"].tolist() == ["x: 0.5", "z: 0.25", ""]
    assert again["threshold"].tolist() == ["≤ 1", "≤ 1", ""]
    assert ledger.compare(table, again, registry) == ([], 2)


@pytest.mark.parametrize(
    ("decide", "problem"),
    [
        (lambda b: b.decide("toy-statement", printed=[FAIL]), "published as 'holds' at smoke, now 'undecided'"),
        (lambda b: None, "now 'open'"),
        (lambda b: b.decide("toy-statement", printed=[FAIL], needs="full"), "now 'undecided'"),
    ],
)
def test_an_exact_claim_that_is_no_longer_decided_disagrees(tmp_path, registry, decide, problem):
    first = ledger.open_ledger(runtime.start("toy", profile="smoke", ledger_dir=tmp_path / "a"), registry)
    first.decide("toy-statement", printed=[PASS])
    second = ledger.open_ledger(runtime.start("toy", profile="smoke", ledger_dir=tmp_path / "b"), registry)
    second.decide("toy-figure", findings=[PASS])
    decide(second)
    problems, _ = ledger.compare(table_of(second, registry), table_of(first, registry), registry)
    assert len(problems) == 1
    assert problem in problems[0]


def test_rows_of_other_data_or_profile_are_not_compared(tmp_path, registry):
    one = runtime.start("toy", profile="smoke", ledger_dir=tmp_path / "a")
    one.note_data("complete set")
    first = ledger.open_ledger(one, registry)
    first.decide("toy-figure", findings=[PASS])
    second = ledger.open_ledger(runtime.start("toy", profile="smoke", ledger_dir=tmp_path / "b"), registry)
    second.decide("toy-figure", findings=[FAIL])
    assert ledger.compare(table_of(second, registry), table_of(first, registry), registry) == ([], 0)
    changed = table_of(first, registry).assign(profile="full")
    assert ledger.compare(table_of(second, registry), changed, registry) == ([], 0)


def test_an_experiment_with_another_verdict_on_the_same_data_disagrees(tmp_path, registry):
    tables = []
    for name, check in (("a", PASS), ("b", FAIL)):
        book = ledger.open_ledger(runtime.start("toy", profile="smoke", ledger_dir=tmp_path / name), registry)
        book.decide("toy-figure", findings=[check])
        tables.append(table_of(book, registry))
    problems, compared = ledger.compare(tables[1], tables[0], registry)
    assert compared == 1
    assert "published as 'reproduced' at smoke, now 'not reproduced'" in problems[0]


def test_what_varies_is_not_compared_with_another_machine(tmp_path, registry):
    registry = ledger.registry.Registry(
        [replace(registry[name], varies="by timing" * (name == "toy-figure")) for name in registry]
    )
    tables = []
    for name, check in (("a", PASS), ("b", FAIL)):
        book = ledger.open_ledger(runtime.start("toy", profile="smoke", ledger_dir=tmp_path / name), registry)
        book.decide("toy-figure", findings=[check])
        tables.append(table_of(book, registry))
    assert ledger.compare(tables[1], tables[0], registry) == ([], 0)


def test_the_errata_page_prints_only_what_the_records_bear_out(book, registry):
    def page():
        return ledger.pages.errata(ledger.read(book.path) if book.path.exists() else [], registry, "toy")

    assert "No erratum yet" in page()
    book.decide("toy-wrong", printed=[FAIL], corrected=[PASS])
    assert "a 3" in page()
    assert "Fails as printed:</b> x: 2 ≤ 1" in page()
    book.decide("toy-wrong", printed=[PASS], corrected=[PASS])
    assert "No erratum yet" in page()


def test_an_erratum_that_depends_on_the_seed_is_not_printed(book, registry):
    one = book.decide("toy-wrong", printed=[FAIL], corrected=[PASS])
    other = book.decide("toy-wrong", printed=[PASS], corrected=[PASS])
    assert "No erratum yet" in ledger.pages.errata([one, other], registry, "toy")
