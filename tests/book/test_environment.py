"""pyproject.toml, requirements.lock and environment.yml say the same."""

import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workflow.scripts.environment import environment, pins
from workflow.scripts.inputs import ROOT

LOCK = (ROOT / "requirements.lock").read_text()


def test_the_lock_satisfies_every_range_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {canonicalize_name(name): version for name, version in pins(LOCK).items()}
    wanted = [*project["dependencies"], *(d for group in project["optional-dependencies"].values() for d in group)]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is in pyproject.toml but not in requirements.lock; run make lock"
        assert requirement.specifier.contains(locked[name]), f"{name} {locked[name]} does not satisfy {requirement}"


def test_the_lock_names_exact_versions_only():
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins(LOCK)) > 100
    assert "+" not in pins(LOCK)["torch"], "a local version such as +cpu is not on the default index"


def test_environment_yml_is_made_from_the_lock():
    text = (ROOT / "environment.yml").read_text()
    assert text == environment(LOCK), "environment.yml is stale; run make lock"
    dependencies = yaml.safe_load(text)["dependencies"]
    assert f"pytorch-cpu={pins(LOCK)['torch']}" in dependencies
    assert not any(str(d).startswith("torch==") for d in dependencies[-1]["pip"])
