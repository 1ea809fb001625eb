# The pipeline: execute every chapter (papermill) -> write the ledger -> render the site (Jupyter Book).
#
#   snakemake --cores all --config profile=quick seeds=0
#
# Results stand under the folder `build` (default _build): runs/, ledger/, html/.
import os
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from lib import runtime
from workflow.scripts.inputs import chapter_table, data_files, library_files, settings

SETTINGS = settings(config)
TABLE = chapter_table()
BUILD, PROFILE, SEEDS = SETTINGS["build"], SETTINGS["profile"], SETTINGS["seeds"]
CHAPTERS, PAGES = list(TABLE["chapters"]), TABLE["pages"]
RUN = BUILD + "/runs/{profile}/seed-{seed}/{chapter}.ipynb"
RECORDS = BUILD + "/ledger/{profile}/seed-{seed}/{chapter}.jsonl"
LEDGER = BUILD + "/ledger/{profile}/ledger.csv"
PAGE = BUILD + "/pages/{profile}/{page}.ipynb"
SOURCES = [str(p) for p in sorted(Path("book").glob("*.md")) + sorted(Path("book/_static").glob("*")) + sorted(Path("book/_ext").glob("*.py"))]

wildcard_constraints:
    profile="|".join(runtime.PROFILES),
    seed=r"\d+",
    chapter="|".join(CHAPTERS),
    page="|".join(PAGES),


localrules: book, ledger, render


rule book:
    input:
        BUILD + "/html/.rendered-" + PROFILE,


rule execute:
    input:
        notebook=lambda w: f"book/{TABLE['chapters'][w.chapter]['notebook']}.ipynb",
        library=lambda w: library_files(f"book/{TABLE['chapters'][w.chapter]['notebook']}.ipynb"),
        claims=lambda w: [p for p in [f"book/claims/{w.chapter}.yml"] if os.path.exists(p)],
        data=lambda w: data_files(TABLE["chapters"][w.chapter]["data"], SETTINGS["data_dir"]),
        lock="requirements.lock",
        script="workflow/scripts/execute.py",
    output:
        notebook=RUN,
        records=RECORDS,
    threads: 1
    shell:
        "{sys.executable} -m workflow.scripts.execute {input.notebook} {output.notebook} --records {output.records}"
        " --chapter {wildcards.chapter} --profile {wildcards.profile} --seed {wildcards.seed}"
        " --device {SETTINGS[device]} --data-dir {SETTINGS[data_dir]} --live {BUILD}/live"


rule ledger:
    input:
        records=lambda w: expand(RECORDS, chapter=CHAPTERS, seed=SEEDS, profile=w.profile),
        claims=sorted(str(p) for p in Path("book/claims").glob("*.yml")),
        library=sorted(str(p) for p in Path("lib/ledger").glob("*.py")),
        script="workflow/scripts/ledger.py",
    output:
        LEDGER,
    shell:
        "{sys.executable} -m workflow.scripts.ledger write --profile {wildcards.profile} --output {output} {input.records}"


rule page:
    input:
        notebook="book/{page}.ipynb",
        ledger=LEDGER,
        published=[p for p in ["results/ledger.csv"] if os.path.exists(p)],
        library=lambda w: library_files(f"book/{w.page}.ipynb"),
        lock="requirements.lock",
        script="workflow/scripts/execute.py",
    output:
        notebook=PAGE,
    threads: 1
    shell:
        "{sys.executable} -m workflow.scripts.execute {input.notebook} {output.notebook} --profile {wildcards.profile}"
        " --seed {SEEDS[0]} --ledger-dir {BUILD}/ledger"


rule render:
    input:
        chapters=lambda w: expand(RUN, chapter=CHAPTERS, seed=SEEDS[:1], profile=w.profile),
        pages=lambda w: expand(PAGE, page=PAGES, profile=w.profile),
        sources=SOURCES,
        bibliography="book/references.bib",
        config=["_config.yml", "_toc.yml"],
        library=sorted(str(p) for p in Path("lib").rglob("*.py")),
        lock="requirements.lock",
        script="workflow/scripts/render.py",
    output:
        touch(BUILD + "/html/.rendered-{profile}"),
    shell:
        "{sys.executable} -m workflow.scripts.render --build {BUILD} {input.chapters} {input.pages}"
