"""The gates, tested by breaking something: a build that cannot fail proves nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lib import ledger

pytestmark = pytest.mark.gate

CHAPTERS = {"dbn", "autorate", "bngd", "bsum", "dsgd", "synthesis"}
AFTER = {"ledger", "7_scoreboard", "8_errata", "render"}


def with_cell(text, source, tags=()):
    notebook = json.loads(text)
    cell = {"cell_type": "code", "execution_count": None, "id": "added", "metadata": {"tags": list(tags)},
            "outputs": [], "source": source}  # fmt: skip
    notebook["cells"].append(cell)
    return json.dumps(notebook)


def test_the_clean_build_rendered_every_page(built):
    pages = {path.stem for path in (built.folder / "_build/html/book").glob("*.html")}
    assert pages >= {"index", "3_bngd", "7_scoreboard", "8_errata", "library", "reproduce", "notation"}


def test_nothing_changed_nothing_runs(built):
    assert built.planned() == set()
    begun = time.monotonic()
    assert built.snakemake().returncode == 0
    assert time.monotonic() - begun < 60  # an order of magnitude, on a shared machine


def test_a_changed_notebook_executes_that_chapter(built, change):
    change("book/6_synthesis.ipynb", lambda text: with_cell(text, "1 + 1"))
    assert built.planned() == {"synthesis"} | AFTER


@pytest.mark.parametrize(
    ("name", "executed"),
    [
        ("lib/runtime.py", CHAPTERS),
        ("lib/ledger/evidence.py", CHAPTERS - {"synthesis"}),
        ("lib/least_squares.py", {"bngd"}),
        ("requirements.lock", CHAPTERS),
        ("book/claims/dsgd.yml", {"dsgd"}),
    ],
)
def test_a_changed_input_executes_what_lists_it(built, change, name, executed):
    change(name, lambda text: text + "\n# changed\n")
    assert built.planned() & CHAPTERS == executed


def test_a_touched_file_with_the_same_content_executes_nothing(built):
    os.utime(built.folder / "lib/least_squares.py")
    assert not built.planned() & CHAPTERS


def test_changed_data_executes_the_chapter_that_lists_it(built, change, tmp_path):
    change("workflow/chapters.yml", lambda text: text.replace("6_synthesis, data: []", "6_synthesis, data: [toy]"))
    without = built.planned(data_dir=tmp_path) & CHAPTERS
    (tmp_path / "toy.csv").write_text("1\n")
    assert built.planned(data_dir=tmp_path) & CHAPTERS - without == {"synthesis"}


def test_a_failing_cell_fails_the_build_and_is_named(built, change):
    change(
        "book/6_synthesis.ipynb", lambda text: with_cell(text, "raise RuntimeError('broken on purpose')", ["my-tag"])
    )
    before = (built.folder / "_build/html/book/6_synthesis.html").read_bytes()
    done = built.snakemake()
    assert done.returncode != 0
    assert "book/6_synthesis.ipynb: the cell [my-tag] in section" in done.stdout
    assert "RuntimeError: broken on purpose" in done.stdout
    assert (built.folder / "_build/html/book/6_synthesis.html").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("book/index.md", "\nSee [](nowhere.md).\n"),
        ("book/index.md", "\n{glue:text}`7_scoreboard.ipynb::no_such_number:.0f`\n"),
        ("book/notation.md", "\n{cite}`nobody1900`\n"),
    ],
)
def test_a_warning_fails_the_render(built, change, name, broken):
    change(name, lambda text: text + broken)
    done = built.snakemake()
    assert done.returncode != 0
    assert "rendering failed with" in done.stdout


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"profile": "big"}, "profile must be one of smoke, quick, full, paper"),
        ({"seeds": "0 x"}, "--config seeds"),
        ({"seeds": "1 1"}, "different seeds"),
        ({"device": "gpu"}, "device must be auto or one of"),
        ({"porfile": "smoke"}, "unknown --config setting porfile=smoke; allowed: profile, seeds"),
    ],
)
def test_a_bad_setting_is_refused_before_any_job(built, config, message):
    done = built.snakemake(**config)
    assert done.returncode != 0
    assert message in done.stdout
    assert "Job stats" not in done.stdout


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["-p", "profil", "smoke"], "unknown parameter profil='smoke'; allowed: profile, seed"),
        (["-p", "seed", "-3"], "seed must be an integer from 0"),
        (["-p", "profile", "tiny"], "profile must be one of"),
    ],
)
def test_papermill_refuses_a_bad_parameter(built, tmp_path, parameters, message):
    done = built.command("papermill", built.folder / "book/6_synthesis.ipynb", tmp_path / "out.ipynb", *parameters,
                         cwd=tmp_path)  # fmt: skip
    assert done.returncode != 0
    assert message in done.stdout


def test_papermill_runs_a_chapter_from_elsewhere(built, tmp_path):
    done = built.command("papermill", built.folder / "book/6_synthesis.ipynb", "out.ipynb", "-p", "profile", "smoke",
                         "-p", "ledger_dir", "here", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out.ipynb").exists()


def test_a_verdict_that_differs_from_the_published_one_fails(built, tmp_path):
    fresh = built.folder / "_build/ledger/smoke/ledger.csv"
    table = ledger.read_table(fresh)
    ledger.write_table(table, tmp_path / "same.csv")
    decided = table.index[table["verdict"] == "holds"]
    table.loc[decided[0], "verdict"] = "refuted"
    ledger.write_table(table, tmp_path / "other.csv")

    def compare(name):
        return built.command(sys.executable, "-m", "workflow.scripts.ledger", "compare", fresh,
                             "--published", tmp_path / name)  # fmt: skip

    assert compare("same.csv").returncode == 0
    done = compare("other.csv")
    assert done.returncode == 1
    assert "published as 'refuted'" in done.stdout


def test_publishing_one_chapter_keeps_the_published_rows_of_the_others(built, tmp_path):
    published, fresh = tmp_path / "published.csv", tmp_path / "fresh.csv"
    table = ledger.read_table(built.folder / "_build/ledger/smoke/ledger.csv")
    ledger.write_table(table, published)
    one = table.copy()
    elsewhere = ~one["claim"].str.startswith("dsgd-")
    one.loc[elsewhere, "verdict"] = "open"
    one.loc[~elsewhere & (one["verdict"] == "holds"), "verdict"] = "refuted"
    ledger.write_table(one, fresh)
    done = built.command(sys.executable, "-m", "workflow.scripts.ledger", "publish", fresh, "--published", published)
    assert done.returncode == 0, done.stdout
    result = ledger.read_table(published)
    assert result["claim"].tolist() == table["claim"].tolist()
    assert result["verdict"].where(elsewhere).equals(table["verdict"].where(elsewhere))
    assert result["verdict"].where(~elsewhere).equals(one["verdict"].where(~elsewhere))


def test_a_killed_run_loses_no_record_and_the_next_one_finishes(built, change):
    """SIGKILL to the whole process group while chapter 3 decides claims."""
    change("book/3_bngd.ipynb", lambda text: with_cell(text, "run"))
    live = built.folder / "_build/live/smoke/seed-0/bngd.jsonl"
    environment = os.environ | {"PYTHONPATH": str(built.folder)}
    environment.pop("BOOK_LEDGER", None)
    live.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=smoke"], cwd=built.folder,
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (live.exists() and live.read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-KILL", "-f", str(built.folder)], check=False)  # the kernel has a session of its own
    kept = ledger.read(live)
    assert len(kept) >= 3
    built.snakemake("--unlock")
    done = built.snakemake("--rerun-incomplete")
    assert done.returncode == 0, done.stdout[-3000:]
    assert [r["claim"] for r in ledger.read(live.with_suffix(".previous.jsonl"))][: len(kept)] == [
        r["claim"] for r in kept
    ]
    again = {r["claim"]: r["verdict"] for r in ledger.read(built.folder / "_build/ledger/smoke/seed-0/bngd.jsonl")}
    assert all(again[r["claim"]] == r["verdict"] for r in kept)
