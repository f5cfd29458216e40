"""Reports as JSON, JUnit XML and HTML: read back with the standard library and jsonschema, hostile names included."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from PIL import Image

from cascadekit.parity.compare import Kind, Subject, compare
from cascadekit.parity.reference_run import ReferencePass
from cascadekit.parity.report.figures import figure
from cascadekit.parity.report.image_slider import amplification
from cascadekit.parity.report.svg import decade
from cascadekit.parity.report.write_report import write_report
from cascadekit.parity.results import Report
from cascadekit.parity.tolerances import StageTolerance
from cascadekit.schemas.errors import UsageError
from cascadekit.schemas.json_models import schema_text
from cascadekit.schemas.precision import Precision
from cascadekit.schemas.quantization import Quantization
from cascadekit.schemas.report import ParityReport
from cascadekit.schemas.stages import Stage
from helpers.reports import IMAGE, Images, alone, along, comparison, healthy, made_report, noise_images, report

HOSTILE = (
    '</title></script><script>alert(1)</script><img src=x onerror="alert(2)"> & \' {{ 7 }} {% if %} ]]> \x00\x1b\ud800'
)
CLEANED = HOSTILE.translate({0x00: 0xFFFD, 0x1B: 0xFFFD, 0xD800: "?"})
SCHEMA = json.loads((files("cascadekit.parity.report.data") / "report.schema.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """All tags with their attributes, all text, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page(tmp_path: Path, run: Report, images: Images | None = None, **more: str) -> Page:
    write_report(tmp_path / "r.html", report(run, images, **more), images)
    return Page((tmp_path / "r.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("made", "name", "kind", "step"),
    [
        (ReferencePass(Stage.PRIOR, {}, {}, "batch 1"), "prior: noise_pred (batch 1)", "stage", None),
        (ReferencePass(Stage.CONTROLNET_CANNY, {}, {}, "t 1"), "controlnet/canny: noise_pred (t 1)", "stage", None),
        (
            ReferencePass(Stage.DECODER, {}, {}, step=12),
            "teacher-forced: decoder pass 12, noise_pred",
            "teacher-forced",
            12,
        ),
    ],
)
def test_entries_say_where_a_comparison_belongs(made: ReferencePass, name: str, kind: str, step: int | None) -> None:
    """What a comparison is about is data from the pass to the report; names are for people alone."""
    entry = comparison(made.subject("noise_pred", ""))
    assert (entry.name, entry.kind, entry.stage, entry.step) == (name, kind, made.stage, step)
    anything = comparison(Subject("vqgan step 7", Kind.TRAJECTORY, made.stage, 3))
    assert (anything.kind, anything.stage, anything.step) == ("trajectory", made.stage, 3)
    assert comparison(IMAGE).stage is None


def test_the_published_schema_is_that_of_the_models() -> None:
    published = (files("cascadekit.parity.report.data") / "report.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(ParityReport)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("error", [1e-6, 0.0, math.inf])
def test_json_follows_its_schema(tmp_path: Path, error: float) -> None:
    """Strict JSON, with infinities as strings, that reads back as what it was."""

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    whole = report(made_report((*healthy(), comparison(alone("prior", "x"), error)), image_psnr=math.inf))
    write_report(tmp_path / "r.json", whole)
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=no_constants)
    jsonschema.validate(content, SCHEMA)
    assert content["image"]["psnr_db"] == "Infinity"
    assert content["comparisons"][-1]["passed"] is (error < 1)
    assert ParityReport.model_validate_json(text) == whole
    del content["comparisons"][0]["relative_l2"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)


def test_a_comparison_keeps_all_its_figures() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal(50)
    found = reference + 1e-3
    found[7] = np.nan
    entry = compare(alone("prior", "y"), found, reference, 1.0)
    assert entry.nan.count == 1
    assert entry.nan.first == (7,)
    assert entry.max_abs == pytest.approx(1e-3)
    assert sum(entry.histogram.counts) == 49
    assert entry.failures == ("1 values are NaN or infinite",)


def test_junit_counts_what_failed(tmp_path: Path) -> None:
    odd = (
        comparison(alone("prior", "z"), 0.5),
        comparison(alone("vqgan", "z"), math.inf),
        comparison(alone("vqgan", f"{HOSTILE}")),
    )
    run = made_report((*healthy(), *odd), image_psnr=30.0)
    write_report(tmp_path / "r.xml", report(run, bundle=HOSTILE))
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert root.tag == "testsuites"
    cases = root.findall("testsuite/testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    assert failed == ["prior: z", "vqgan: z", "final image"]
    assert (root.get("tests"), root.get("failures")) == (str(len(cases)), "3")
    assert sum(int(suite.get("tests", "")) for suite in root) == len(cases) == len(run.comparisons) + 1
    assert sum(int(suite.get("failures", "")) for suite in root) == 3
    message = next(case for case in cases if case.get("name") == "prior: z").find("failure")
    assert message is not None
    assert "relative L2" in message.get("message", "")
    assert f"vqgan: {CLEANED}" in [case.get("name") for case in cases]
    bundle = root.find("testsuite/properties/property[@name='bundle']")
    assert bundle is not None
    assert bundle.get("value") == CLEANED


def test_html_refers_to_nothing_elsewhere(tmp_path: Path) -> None:
    found = page(tmp_path, made_report(healthy()), noise_images())
    assert not found.open
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\(", text)
    policy = next(m for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")


def test_html_says_the_verdict_first_and_gives_every_chart_in_words(tmp_path: Path) -> None:
    found = page(tmp_path, made_report((*healthy(), comparison(alone("prior", "z"), 0.5))), noise_images())
    text = [part.strip() for part in found.text if part.strip()]
    assert text[text.index("Parity of bundle") - 1] == "✗ Failed"
    assert any("first part of the graph at fault: prior, down_blocks.0.25" in part for part in text)
    assert any(part.startswith("prior: z: relative L2") for part in text)
    figures = [a for a in found.all("figure") if a.get("class") == "chart"]
    pictures = [a for a in found.all("svg") if a.get("class") in ("wide", "narrow")]
    assert len(pictures) == 2 * len(figures) > 10
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 30 for a in pictures)
    assert text.count("The numbers") == len(figures)
    assert all(a.get("alt") for a in found.all("img"))
    assert "cascadekit verify bundle --against model --report report.html" in text
    assert "not finite" not in text
    assert "not finite" in page(tmp_path, made_report((*healthy(), comparison(alone("vqgan", "z"), math.inf)))).text
    assert "✓ Passed" in page(tmp_path, made_report(healthy())).text


def test_what_was_left_out_is_told_in_every_report(tmp_path: Path) -> None:
    """Names come from an engine's own words: hostile ones stay text."""
    what = ("prior in two parts (t 0.95, batch 1)", f"the image: {HOSTILE}")
    run = made_report(healthy(), left_out=what)
    for suffix in (".json", ".xml"):
        write_report(tmp_path / f"r{suffix}", report(run))
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    jsonschema.validate(content, SCHEMA)
    assert content["left_out"] == [what[0], f"the image: {HOSTILE.replace(chr(0xD800), '?')}"]
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    skipped = [case.get("name") for case in root.findall("testsuite/testcase") if case.find("skipped") is not None]
    assert skipped == [what[0], f"the image: {CLEANED}"]
    assert root.get("skipped") == "2"
    assert int(root.get("tests", "")) == len(root.findall("testsuite/testcase")) == len(run.comparisons) + 1 + 2
    found = page(tmp_path, run)
    assert not found.open
    assert {what[0], f"the image: {CLEANED}"} <= set(found.text)
    assert any("2 more were left out" in text for text in found.text)
    assert not any("left out, listed" in text for text in page(tmp_path, made_report(healthy())).text)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    subjects = (alone("prior", HOSTILE), along("decoder", 1, HOSTILE), f"{HOSTILE}: x")
    found_wrong = (comparison(subject, 0.5) for subject in subjects)
    run = replace(made_report((*healthy(), *found_wrong), engine=HOSTILE), reference=HOSTILE)
    images = noise_images()
    whole = report(run, images, bundle=HOSTILE, command=HOSTILE, cpu=HOSTILE)
    entry = whole.depth[25].model_copy(update={"name": HOSTILE})
    whole = whole.model_copy(update={"depth": (*whole.depth, entry)})
    write_report(tmp_path / "r.html", whole, images)
    found = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not found.open
    assert len(found.all("script")) == 1
    assert len(found.all("img")) == 3
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in found.all("img"))
    assert [image["alt"] for image in found.all("img")[:2]] == [f"The image generated by {CLEANED}"] * 2
    assert any(f"Parity of {CLEANED}" in text for text in found.text)


def test_values_no_axis_holds(tmp_path: Path) -> None:
    odd = [comparison(along("vqgan", n), e) for n, e in enumerate((0.0, math.inf, 1e-300, 1e9), 1)]
    whole = report(made_report((*healthy(), *odd)))
    spoilt = whole.depth[3].model_copy(update={"own": math.nan, "accumulated": -math.inf})
    spread = whole.ranges[3].model_copy(update={"max_abs": math.inf})
    update = {"depth": (*whole.depth, spoilt), "ranges": (*whole.ranges, spread)}
    write_report(tmp_path / "r.html", whole.model_copy(update=update))
    found = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not found.open
    for attributes in (a for _, a in found.tags):
        for name in ("x", "y", "cx", "cy", "x1", "y1", "width", "height", "points"):
            assert not re.search("nan|inf", attributes.get(name) or "")
    page(tmp_path, made_report((comparison(alone("prior", "x"), 0.0),), image_psnr=None))
    page(tmp_path, made_report(()))


def test_the_images_in_the_page_are_the_images(tmp_path: Path) -> None:
    images = noise_images()
    sources = [image["src"] or "" for image in page(tmp_path, made_report(healthy()), images).all("img")]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2])))) for s in sources]
    for picture, planes in zip(shown, images, strict=False):
        assert np.array_equal(picture, np.round(planes[0].transpose(1, 2, 0).astype(float) * 255).astype(np.uint8))
    error = np.abs(images[0][0].astype(float) - images[1][0].astype(float)).transpose(1, 2, 0)
    assert np.array_equal(shown[2], np.round(error * amplification(error.max()) * 255).astype(np.uint8))
    assert 127 < shown[2].max() <= 255


@pytest.mark.parametrize(
    ("value", "place"), [(1e-3, -3), (0, -6), (-1, -6), (1e-300, -6), (1e9, 2), (math.inf, 2), (math.nan, 2)]
)
def test_places_on_an_axis(value: float, place: float) -> None:
    assert decade(value, -6, 2) == pytest.approx(place)


@pytest.mark.parametrize(("largest", "factor"), [(0, 1), (1, 1), (0.6, 1), (0.5, 2), (0.3, 2), (0.001, 512)])
def test_amplification(largest: float, factor: int) -> None:
    assert amplification(largest) == factor


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (math.inf, "∞"), (-math.inf, "−∞"), (math.nan, "NaN"), (3.14e-6, "3.1e-6"), (65504, "65 504")],
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    whole = report(made_report(healthy()))
    with pytest.raises(UsageError, match=r"one of .html, .json, .xml"):
        write_report(tmp_path / "report.pdf", whole)
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(tmp_path / "absent" / "report.html", whole)
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(tmp_path / "taken.html", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.html"]


def test_the_image_of_a_quantised_bundle_is_explained() -> None:
    """Its PSNR says little; that of other bundles, and a report without an image, need no explanation."""
    floors = {"precision": Precision.FP32, "floor": 1e-6, "factor": 3.0}
    int8 = StageTolerance(quantization=Quantization.INT8, quantized_floor=0.02, **floors)
    plain = StageTolerance(quantization=Quantization.NONE, **floors)
    made = Report("engine", "reference", image_psnr=7.1, tolerances={Stage.PRIOR: int8, Stage.VQGAN: plain})
    assert "another picture of the same prompt may come out" in made.image_note
    assert replace(made, tolerances={Stage.PRIOR: plain}).image_note == ""
    assert replace(made, image_psnr=None).image_note == ""
