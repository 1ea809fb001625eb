"""Run parameters: what is allowed, and that a bad value is refused by name before anything runs."""

import pytest
import torch

from lib import runtime


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("BOOK_PROFILE", raising=False)
    monkeypatch.delenv("BOOK_LEDGER", raising=False)


def test_profile_comes_from_the_argument_then_the_environment(monkeypatch):
    assert runtime.start("bngd").profile == "quick"
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    assert runtime.start("bngd").profile == "smoke"
    assert runtime.start("bngd", profile="full").profile == "full"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"profile": "big"}, ["profile", "'big'", "smoke, quick, full, paper"]),
        ({"seed": -1}, ["seed", "-1", "from 0"]),
        ({"seed": 1.0}, ["seed", "1.0"]),
        ({"seed": True}, ["seed", "True"]),
        ({"device": "gpu"}, ["device", "'gpu'", "cpu"]),
        ({"device": 0}, ["device", "0"]),
        ({"data_dir": 7}, ["data_dir", "7"]),
        ({"ledger_dir": __file__}, ["ledger_dir", "file"]),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(parameters, words):
    with pytest.raises(ValueError, match=".") as caught:
        runtime.start("bngd", **parameters)
    assert all(word in str(caught.value) for word in words)


def test_a_bad_profile_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "tiny")
    with pytest.raises(ValueError, match=r"\$BOOK_PROFILE .*'tiny'"):
        runtime.start("bngd")


def test_an_unknown_name_is_refused_with_its_value():
    with pytest.raises(ValueError, match=r"unknown parameter profil='smoke'; allowed: profile, seed"):
        runtime.refuse_unknown({"seed": 1, "profil": "'smoke'"})


@pytest.mark.parametrize(("profile", "value"), [("smoke", 1), ("quick", 2), ("full", 2), ("paper", 2)])
def test_choose_falls_back_to_the_next_smaller_profile(profile, value):
    assert runtime.start("bngd", profile=profile).choose(smoke=1, quick=2) == value


def test_choose_takes_falsy_values_for_what_they_are():
    assert runtime.start("bngd", profile="full").choose(smoke=1, quick=2, full=0) == 0


@pytest.mark.parametrize(("profile", "reached"), [("smoke", False), ("quick", True), ("paper", True)])
def test_reaches(profile, reached):
    assert runtime.start("bngd", profile=profile).reaches("quick") is reached


def test_a_stream_depends_on_seed_chapter_and_name_only():
    def draw(chapter="bngd", seed=0, name="u"):
        return torch.randn(4, generator=runtime.start(chapter, seed=seed).generator(name))

    assert torch.equal(draw(), draw())
    for other in (draw(chapter="dbn"), draw(seed=1), draw(name="w")):
        assert not torch.equal(draw(), other)


def test_provenance_names_the_data_that_was_noted_once():
    run = runtime.start("bngd")
    run.note_data("MNIST, complete")
    run.note_data("MNIST, complete")
    assert run.provenance()["data"] == "MNIST, complete"
