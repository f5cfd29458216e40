"""Odd inputs of every kind are taken or refused in words; and the harness finds the faults that are planted for it."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from fuzz.calls import WrongError, command
from fuzz.harness import KINDS, Fuzzer

SOME, ALL = 360, 20_000  # inputs of all kinds together; ALL are those of `make fuzz`
SHOWN = 10  # findings of a kind, after which it is over


@pytest.fixture(scope="module")
def fuzzer(tiny: Path) -> Iterator[Fuzzer]:
    with Fuzzer(tiny) as started:
        yield started


def survives(fuzzer: Fuzzer, kind: str, seeds: range) -> None:
    found = [str(finding) for finding in islice(fuzzer.findings(kind, seeds), SHOWN)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("kind", KINDS)
def test_some(fuzzer: Fuzzer, kind: str) -> None:
    survives(fuzzer, kind, range(-(-SOME // len(KINDS))))


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_all(fuzzer: Fuzzer, kind: str) -> None:
    survives(fuzzer, kind, range(-(-ALL // len(KINDS))))


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with Fuzzer(tmp_path_factory.mktemp("planted"), planted=True) as started:
        yield started


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with Fuzzer(tmp_path_factory.mktemp("planted"), seconds=2, planted=True) as started:
        yield started


@pytest.mark.parametrize(
    ("fault", "what", "words"),
    [
        ("traceback", "traceback", "KeyError: 'planted'"),
        ("panic", "traceback", "BaseException: as a library"),
        ("memory", "memory", "MB, of 256 MB that it may"),
        ("address-space", "memory", "MemoryError"),
        ("hang", "hang", "no answer after 2 seconds"),
        ("native-hang", "hang", "no answer after 2 seconds"),
        ("abort", "abort", "SIGABRT"),
        ("exit", "abort", "exit code 0"),
    ],
)
def test_a_planted_fault_is_found(patient: Fuzzer, impatient: Fuzzer, fault: str, what: str, words: str) -> None:
    """With its kind and seed, and the inputs after it are run all the same."""
    fuzzer = impatient if what == "hang" else patient
    (finding,) = fuzzer.findings(f"planted-{fault}", range(7, 8))
    assert (finding.what, finding.seed) == (what, 7)
    assert words in finding.error
    assert f"python -m tests.fuzz planted-{fault} 7" in str(finding)
    assert "planted.py" in finding.where or what == "memory" or fault == "exit"
    assert [*fuzzer.findings("planted-success", range(2)), *fuzzer.findings("planted-refusal", range(2))] == []


def test_inputs_are_the_same_in_every_process(fuzzer: Fuzzer, tiny: Path, tmp_path: Path) -> None:
    with Fuzzer(tiny) as other:
        for kind in ("manifest", "options"):
            assert [fuzzer.run(kind, seed)["what"] for seed in range(3)] == [
                other.run(kind, seed)["what"] for seed in range(3)
            ]


def test_a_bug_that_the_command_line_reports_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It exits with 1 and in words, as a refusal does."""
    monkeypatch.setattr("cascadekit.converters.contents.contents_of", lambda *_, **__: {}["planted"])
    with pytest.raises(WrongError, match=r"this is a bug of cascadekit.*KeyError: 'planted'"):
        command("inspect", tmp_path)()
