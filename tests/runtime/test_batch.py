"""Batches from inside: files of prompts, names, keys, the log, and the order in which things are drawn."""

import csv
import io
import json
import os
import string
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from cascadekit import Cascade
from cascadekit.runtime.batch.batch_log import BatchLog, BucketLog, read_log
from cascadekit.runtime.batch.batch_runner import BatchRunner, last_seed
from cascadekit.runtime.batch.file_names import NameTemplate, slug
from cascadekit.runtime.batch.image_jobs import (
    BatchPlan,
    BatchPlanner,
    ImageJob,
    OutputState,
    content_key,
    output_state,
)
from cascadekit.runtime.batch.job_groups import windows
from cascadekit.runtime.batch.local_groups import LocalGroups
from cascadekit.runtime.batch.prompt_files import PromptFile, read_prompt_file
from cascadekit.runtime.engines.onnxruntime import OnnxRuntimeEngine
from cascadekit.schemas.errors import CascadeError, EngineError, UsageError
from cascadekit.schemas.stages import Stage
from cascadekit.storage.bucket import BucketPath

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=30)
COMMON = {"width": 64, "height": 64, "prior_steps": 1, "decoder_steps": 1}


@pytest.fixture(scope="module")
def cascade(tiny: Path) -> Cascade:
    return Cascade.open(tiny / "bundle", threads=1)


def read(folder: Path, name: str, content: str | bytes) -> PromptFile:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompt_file(path)


def said(file: PromptFile) -> list[dict[str, Any]]:
    return [dict(entry.given) for entry in file.entries]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


class TestFiles:
    @settings(deadline=None)
    @given(lines=st.lists(LINE, min_size=1), end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
    def test_txt(self, folder: Path, lines: list[str], end: str, mark: bool) -> None:
        lines = ["first", *lines]
        content = ("\ufeff" if mark else "") + end.join(lines)
        kept = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
        file = read(folder, "p.txt", content)
        assert [(entry.line, entry.given["prompt"]) for entry in file.entries] == kept

    @settings(deadline=None)
    @given(rows=st.lists(st.dictionaries(TEXT, st.none() | TEXT | st.integers(-9, 9)) | TEXT, min_size=1))
    def test_jsonl(self, folder: Path, rows: list[Any]) -> None:
        file = read(folder, "p.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        expected = [{"prompt": row} if isinstance(row, str) else row for row in rows]
        assert said(file) == [{name: value for name, value in row.items() if value is not None} for row in expected]
        assert [entry.line for entry in file.entries] == list(range(1, 2 * len(rows), 2))

    @settings(deadline=None)
    @given(
        header=st.lists(st.sampled_from("prompt negative seed width images".split()), unique=True, min_size=2),
        cells=st.lists(st.lists(TEXT.filter(lambda text: "\0" not in text), min_size=5, max_size=5), min_size=1),
    )
    def test_csv(self, folder: Path, header: list[str], cells: list[list[str]]) -> None:
        written = io.StringIO(newline="")
        csv.writer(written).writerows([header, *(row[: len(header)] for row in cells)])
        expected = [{name: cell for name, cell in zip(header, row, strict=False) if cell} for row in cells]
        assert said(read(folder, "p.csv", written.getvalue())) == expected

    @settings(deadline=None)
    @given(content=st.binary(max_size=200), kind=st.sampled_from(["txt", "jsonl", "csv"]))
    def test_anything_is_read_or_refused(self, folder: Path, content: bytes, kind: str) -> None:
        try:
            file = read(folder, f"x.{kind}", content)
        except UsageError:
            return
        for entry in file.entries:
            assert entry.problem or json.dumps(entry.given, ensure_ascii=False).encode()

    @pytest.mark.parametrize(
        ("name", "content", "line", "problem"),
        [
            ("p.txt", b"a\n\xff\nb", 2, "not UTF-8"),
            ("p.jsonl", b'"a"\n{"prompt": "\\ud800"}', 2, "not UTF-8"),
            ("p.jsonl", b'\n["a"]', 2, "expected an object"),
            ("p.jsonl", b"[" * 100_000, 1, "nested too deep"),
            ("p.csv", b'prompt,seed\na,1\n"b,2\n', 3, "not CSV"),
            ("p.csv", b"prompt,prompt\na,1\n", 1, "different names"),
        ],
    )
    def test_what_is_wrong_has_its_line(self, folder: Path, name: str, content: bytes, line: int, problem: str) -> None:
        (entry,) = (entry for entry in read(folder, name, content).entries if entry.problem)
        assert entry.line == line
        assert problem in (entry.problem or "")

    def test_lists_in_cells(self, folder: Path) -> None:
        file = read(folder, "p.csv", 'prompt,prior_timesteps\na,1;0.5;0\nb,"1,0"\n')
        assert [row["prior_timesteps"] for row in said(file)] == [["1", "0.5", "0"], ["1", "0"]]

    @pytest.mark.parametrize("content", ["", "\n# only\n"])
    def test_nothing_in_it(self, folder: Path, content: str) -> None:
        with pytest.raises(UsageError, match="holds no prompts"):
            read(folder, "p.txt", content)


class TestNames:
    @settings(deadline=None)
    @given(text=st.text(), name=st.text())
    def test_no_text_leads_out_of_the_folder(self, text: str, name: str) -> None:
        values = {"prompt": text, "name": name, "number": 3}
        path = NameTemplate.parse("{number:04d}-{prompt}-{name}").path(values)
        assert path.parent == Path()
        assert path.name.startswith("0003-")
        assert len(os.fsencode(path.name)) < 255
        assert not set(path.name) & set('/\\:*?"<>|\0\n')

    @settings(deadline=None)
    @given(text=st.text(string.ascii_letters + string.digits, min_size=1, max_size=50))
    def test_letters_stay(self, text: str) -> None:
        assert slug(f" {text}, ({text})!") == f"{text}-{text}"[:100].rstrip("-")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Ein Bär, 猫!", "Ein-Bär-猫"),
            ("../../etc/passwd", "etc-passwd"),
            ("हिन्दी", "हिन्दी"),
            ("猫" * 50, "猫" * 33),
            ("(" + "0" * 120, "0" * 100),
            ("?", ""),
        ],
    )
    def test_slugs(self, text: str, expected: str) -> None:
        assert slug(text) == expected

    def test_every_field(self) -> None:
        values = {"number": 7, "seed": -1, "prompt": "a b c", "width": 64, "height": 72, "name": "n", "key": "abcdef"}
        template = "{width}x{height}/{{{number:03d}}}_{seed}_{prompt:.3}_{name}_{key:.4}.png"
        assert NameTemplate.parse(template).path(values) == Path("64x72/{007}_-1_a-b_n_abcd.png")

    @pytest.mark.parametrize(
        "text",
        "{ {} {0} {other} {prompt!r} {prompt.x} {prompt[0]} {number:0999d} {number:{seed}} {key:>99} a\\b a:b".split(),
    )
    def test_templates_that_are_none(self, text: str) -> None:
        with pytest.raises(UsageError, match="name "):
            NameTemplate.parse(text)

    @pytest.mark.parametrize("text", ["", "..", "/x", "a//b", "a/", "../a", ".hidden", "{prompt}", "x" * 250])
    def test_paths_that_are_none(self, text: str) -> None:
        with pytest.raises(UsageError, match="gives "):
            NameTemplate.parse(text).path({"prompt": "?!"})


def plan(cascade: Cascade, folder: Path, rows: list[Any], **more: Any) -> BatchPlan:
    common = {**COMMON, **more.pop("common", {})}
    how = {"template": NameTemplate("{name}"), "base_seed": 10, **more}
    planner = BatchPlanner(cascade.manifest, folder / "out", common=common, **how)
    return planner.plan(read(folder, "p.jsonl", "\n".join(map(json.dumps, rows))))


class TestPlan:
    def test_places_count_bad_entries_too(self, cascade: Cascade, tmp_path: Path) -> None:
        made = plan(
            cascade,
            tmp_path,
            ["a", {"x": 1}, {"prompt": "b", "images": 2}, {"prompt": "c", "width": 1, "images": 3}, "d"],
        )
        assert [(job.number, job.request.seed, job.path.name) for job in made.jobs] == [
            (0, 10, "0000.png"),
            (2, 12, "0002.png"),
            (3, 12, "0003.png"),
            (7, 14, "0007.png"),
        ]
        assert [(job.request.index, job.request.batch) for job in made.jobs] == [(0, 1), (0, 2), (1, 2), (0, 1)]
        assert len(made.problems) == 2

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ({"negative": "x"}, "prompt: Field required"),
            ({"prompt": "x", "prior_steps": "many"}, "prior_steps"),
            ({"prompt": "x", "prior_steps": 0}, "prior_steps=0: expected 1 to 1000"),
            ({"prompt": "x", "prior_timesteps": [0, 1]}, "timesteps"),
            ({"prompt": "x", "height": 60}, "height 60"),
            ({"prompt": "x", "prior_guidance": float("nan")}, "finite"),
            ({"prompt": "x", "images": True}, "images"),
            ({"prompt": "x", "images": 2, "index": 1}, "index"),
            ({"prompt": "(x:99)", "weighted": True}, "weights"),
            ({"prompt": "x", "loras": [{"name": "l"}]}, "as loras=..."),
            ({"prompt": "x", "image_prompts": ["none.png"]}, "none.png: expected a picture, found no such file"),
            ({"prompt": "x", "image_prompts": ["p.jsonl"]}, "no image_encoder"),
            ({"prompt": "x", "mask": "p.jsonl"}, "mask"),
            ({"prompt": "x", "controls": ["canny=p.jsonl"]}, "controlnet/canny"),
        ],
    )
    def test_what_can_be_known_before_is_told_before(
        self, cascade: Cascade, tmp_path: Path, row: dict[str, Any], problem: str
    ) -> None:
        made = plan(cascade, tmp_path, ["good", row])
        assert len(made.jobs) == 1
        assert made.problems[0].startswith(f"{tmp_path}/p.jsonl:2: ")
        assert problem in made.problems[0]

    def test_names_of_two_images(self, cascade: Cascade, tmp_path: Path) -> None:
        made = plan(cascade, tmp_path, [{"prompt": "x", "name": "A"}, {"prompt": "y", "name": "a"}])
        assert [job.path.name for job in made.jobs] == ["A.png"]
        assert "also the name for line 1" in made.problems[0]

    def test_keys(self, cascade: Cascade, tmp_path: Path) -> None:
        """Whatever decides about an image changes its key, and nothing else does."""
        rows = [
            "a",
            {"prompt": "a", "seed": 10},
            {"prompt": "b", "seed": 10},
            {"prompt": "a", "negative": "n", "seed": 10},
        ]
        rows += [{"prompt": "a", "seed": 10, name: 2} for name in ("prior_guidance", "decoder_steps", "images")]
        keys = [job.key for job in plan(cascade, tmp_path, rows).jobs]
        assert keys[0] == keys[1]
        assert len(set(keys)) == len(keys) - 1 == 7
        request = plan(cascade, tmp_path, ["a"]).jobs[0].request
        stages = cascade.manifest.stages
        for stage, same in ((Stage.DECODER, False), (Stage.TEXT_ENCODER, False)):
            file = stages[stage].files[0].model_copy(update={"fingerprint": "0" * 64})
            entry = stages[stage].model_copy(update={"files": (file, *stages[stage].files[1:])})
            other = cascade.manifest.model_copy(update={"stages": {**stages, stage: entry}})
            assert (content_key(request, other) == keys[0]) is same
        more = cascade.manifest.model_copy(update={"stages": {**stages, Stage.PREVIEWER: stages[Stage.VQGAN]}})
        assert content_key(request, more) == keys[0]


class TestLook:
    @pytest.fixture
    def job(self, cascade: Cascade, tmp_path: Path) -> ImageJob:
        return plan(cascade, tmp_path, ["a"]).jobs[0]

    def put(self, job: ImageJob, told: object, size: int = 50) -> bytes:
        """A PNG that Pillow writes."""
        info = PngImagePlugin.PngInfo()
        info.add_itxt("cascadekit", json.dumps(told))
        job.path.parent.mkdir(exist_ok=True)
        Image.effect_noise((size, size), 90).save(job.path, pnginfo=info)
        return job.path.read_bytes()

    def test_images(self, job: ImageJob) -> None:
        assert output_state(job) is OutputState.NOTHING
        for told, found in (
            ({"key": job.key}, OutputState.DONE),
            ({"key": "x"}, OutputState.OTHER),
            ([], OutputState.OTHER),
        ):
            self.put(job, told)
            assert output_state(job) is found

    def test_cut_anywhere(self, job: ImageJob) -> None:
        content = self.put(job, {"key": job.key}, 8)
        for length in range(len(content)):
            job.path.write_bytes(content[:length])
            assert output_state(job) is OutputState.DAMAGED

    @settings(deadline=None)
    @given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
    def test_bytes_changed_anywhere(self, cascade: Cascade, folder: Path, place: int, byte: int) -> None:
        job = plan(cascade, folder, ["a"]).jobs[0]
        content = bytearray(self.put(job, {"key": job.key}, 8))
        content[place % len(content)] = byte
        job.path.write_bytes(content)
        output_state(job)  # raises nothing

    @pytest.mark.parametrize("content", [b"my notes", b"\xff\xd8\xff\xe0 a JPEG"])
    def test_other_files_are_nobodys_to_replace(self, job: ImageJob, content: bytes) -> None:
        job.path.parent.mkdir()
        job.path.write_bytes(content)
        assert output_state(job) is OutputState.OTHER
        job.path.unlink()
        job.path.mkdir()
        assert output_state(job) is OutputState.OTHER


class TestLog:
    def test_a_cut_line_is_left_behind(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "log.jsonl"
        with BatchLog(path) as log_file:
            log_file.write("started", {"base_seed": 5})
        with path.open("a") as file:
            file.write('{"time": "2026')
        assert last_seed(path) == 5
        with BatchLog(path) as log_file:
            log_file.write("done", {"number": 1}, {"number": 2, "prompt": "猫\n"})
        assert [event.get("number") for event in read_log(path)] == [None, 1, 2]
        assert len(path.read_text().splitlines()) == 4
        assert list(read_log(tmp_path / "none")) == []
        assert last_seed(tmp_path / "none") is None


class TestRun:
    def test_the_text_encoder_is_loaded_once_for_many_prompts(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded: Counter[Stage] = Counter()
        load = OnnxRuntimeEngine.load

        def counting(self: OnnxRuntimeEngine, stage: Stage, graph: str = "model") -> Any:
            loaded[stage] += graph in ("model", "step")
            return load(self, stage, graph)

        monkeypatch.setattr(OnnxRuntimeEngine, "load", counting)
        with (
            Cascade.open(tiny / "bundle", memory="staged", threads=1) as staged,
            BatchLog(tmp_path / "log") as log_file,
        ):
            jobs = plan(staged, tmp_path, [{"prompt": f"p{n}", "negative": f"n{n}"} for n in range(6)]).jobs
            outcomes = list(BatchRunner(LocalGroups(staged, 3), log_file).run(jobs))
        assert loaded == {Stage.TEXT_ENCODER: 1, Stage.PRIOR: 2, Stage.DECODER: 2, Stage.VQGAN: 2}
        assert [outcome.kind for outcome in outcomes] == ["generated"] * 6
        assert all(outcome.seconds.keys() >= {"prior", "decoder", "vqgan"} for outcome in outcomes)

    def test_windows(self, cascade: Cascade, tmp_path: Path) -> None:
        rows = [{"prompt": f"p{n}", "negative": f"n{n // 3}"} for n in range(20)]
        made = list(windows(plan(cascade, tmp_path, rows).jobs, rows=6))
        assert [job.number for window in made for job in window] == list(range(20))
        for window in made:
            assert len({text for job in window for text in (job.request.prompt, job.request.negative)}) <= 6
        assert min(map(len, made[:-1])) >= 3

    def test_what_fails_together_is_tried_alone(
        self, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when memory runs out in a batch of three, and for one image whatever is done."""
        calls: list[list[str]] = []

        def failing(prompts: list[str], *arguments: Any, **more: Any) -> Any:
            calls.append(prompts)
            if len(prompts) == 3 or prompts == ["b"]:
                raise EngineError("out of\nmemory")
            return Cascade.generate(cascade, prompts, *arguments, **more)

        monkeypatch.setattr(cascade, "generate", failing)
        with BatchLog(tmp_path / "log") as log_file:
            outcomes = list(
                BatchRunner(LocalGroups(cascade, 3), log_file).run(plan(cascade, tmp_path, ["a", "b", "c"]).jobs)
            )
        assert calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]
        assert [(outcome.kind, outcome.error) for outcome in outcomes] == [
            ("generated", None),
            ("failed", "out of memory"),
            ("generated", None),
        ]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000.png", "0002.png"]

    def test_long_prompts_do_not_depend_on_their_neighbours(self, cascade: Cascade, tmp_path: Path) -> None:
        """Drawn with a longer prompt, a short one would be given empty chunks."""
        rows = [{"prompt": "word " * 100, "seed": 1}, {"prompt": "short", "seed": 2}]
        (tmp_path / "alone").mkdir()
        common = {"long_prompts": True}
        together = plan(cascade, tmp_path, rows, common=common)
        alone = plan(cascade, tmp_path / "alone", rows[1:], common=common)
        with BatchLog(tmp_path / "log") as log_file:
            for made in (together, alone):
                list(BatchRunner(LocalGroups(cascade, 2), log_file).run(made.jobs))
        one, other = (np.asarray(Image.open(made.jobs[-1].path), np.int16) for made in (together, alone))
        assert abs(one - other).max() <= 1


def test_a_bucket_that_does_not_answer_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Silent(BucketPath):
        def read_bytes(self) -> bytes:
            raise CascadeError("the store does not answer")

    with pytest.raises(CascadeError, match="does not answer"):
        BucketLog(Silent("s3:/images/log.jsonl"))
    assert not list(tmp_path.iterdir())
