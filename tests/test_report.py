"""report.html: complete in itself, true to its run, and plain about what is wrong with it."""

import fnmatch
import json
import pickle
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import training_set
from reader import ROOT, table
from scipy.spatial.transform import Rotation

from cryosplat import cli, findings, report, train
from cryosplat.errors import InputError
from cryosplat.metrics import write_volume_fit
from cryosplat.runfiles import MEANINGS
from cryosplat.simulate import SimulateOptions, simulate


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and its words by the tag they stand in.

    Attributes:
        tags: (tag, attributes) in their order.
        words: (tag, text) in their order; of text within several, the innermost.
    """

    EMPTY = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag  # well formed

    def handle_data(self, text):
        if self._open and text.strip():
            self.words.append((self._open[-1], " ".join(text.split())))

    def of(self, tag):
        return [text for where, text in self.words if where == tag]

    @property
    def text(self):
        return " ".join(text for tag, text in self.words if tag not in ("style", "title"))


def page(run_dir):
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def summary(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def good(stack, tmp_path_factory):
    """A run with nothing wrong, with figures and held-out images; to be read only."""
    run_dir = tmp_path_factory.mktemp("good") / "run"
    threads = torch.get_num_threads()
    words = ("data.holdout=0.1", f"data.halves={halves_file(stack, run_dir.parent)}")
    train.train(training_set.config(stack, run_dir, *words, of=training_set.VOLUME_SETTINGS))
    torch.set_num_threads(threads)
    return run_dir


def halves_file(stack, folder):
    np.save(folder / "halves.npy", training_set.halves(stack))
    return folder / "halves.npy"


# The page


def test_the_page_is_complete_in_itself(good):
    found = page(good)
    assert {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "base"} == set()
    for _, attributes in found.tags:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#")), name
        assert not any(name.startswith("on") for name in attributes)
    style = " ".join(found.of("style"))
    assert "url(" not in style and "@import" not in style and "@media print" in style and "A4" in style
    assert (good / "report.html").stat().st_size < 4e6


def test_links_within_the_page_lead_somewhere(good):
    tags = page(good).tags
    targets = {attributes["id"] for _, attributes in tags if "id" in attributes}
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert links and links <= {f"#{target}" for target in targets}


def test_every_figure_of_the_run_is_there_with_words_and_how_to_read_it(good):
    found = page(good)
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    drawn = {name for name in report.PICTURES if (good / name).exists()}
    assert drawn == set(report.PICTURES) - {"loss.png"}
    assert len(pictures) == len(drawn)
    assert all(attributes["alt"] for attributes in pictures)
    captions = [index for index, (tag, _) in enumerate(found.tags) if tag == "figcaption"]
    assert len(captions) == len(pictures)
    assert len(" ".join(found.of("figcaption"))) > 100 * len(pictures)


def test_the_numbers_are_those_of_the_summary(good):
    said, found = summary(good), page(good)
    number = f"{said['resolution_a']:.2f}" + (f" ± {e:.2f}" if (e := said["resolution_error_a"]) else "") + " Å"
    assert number in found.of("div")
    text = found.text
    for part in (
        f"{said['resolution_linear_a']:.2f} Å at FSC 0.143, of half_a.mrc",
        f"{said['resolution_naive_a']:.2f} Å at FSC 0.143, of the Gaussians",
        f"{said['resolution_truth_a']:.2f} Å at FSC 0.5, known because",
        f"{said['particles']} particles of 32 px at 4 Å",
        said["halves"],
        "No image is in both halves",
        f"{said['held_out']} images were kept aside",
        said["hardware"],
        f"{said['wall_seconds']:.0f} s",
        "data.holdout: 0.0 -> 0.1",
    ):
        assert part in text, part


def test_every_file_of_the_run_is_listed_with_its_meaning(good):
    said = dict(row[:2] for row in files_table(good))
    there = {path.name + "/" * path.is_dir() for path in good.iterdir()} - {"report.html", "status.json"}
    assert set(said) == there
    assert all(meaning and meaning != "not a file of cryosplat" for meaning in said.values())


def files_table(run_dir):
    text = (run_dir / "report.html").read_text()
    section = text.partition('<section id="files">')[2].partition("</section>")[0]
    row = r'<th scope="row"><code>([^<]+)</code></th><td>([^<]+)</td><td class="size">([^<]+)</td>'
    return re.findall(row, section)


def test_every_file_that_the_manual_names_has_its_meaning_in_code():
    named = {name for row in table(ROOT / "docs/formats.md", "## The run directory") for name in _ticked(row[0])}
    for name in named:
        assert any(fnmatch.fnmatch(name.rstrip("/"), pattern) for pattern in MEANINGS), name


def _ticked(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_a_file_that_no_run_writes_is_called_so(good, tmp_path):
    copy = lay_out(good, tmp_path / "run")
    (copy / "notes.txt").write_text("mine")
    report.write_report(copy, summary(copy))
    assert ("notes.txt", "not a file of cryosplat", "4 B") in files_table(copy)


def lay_out(run_dir, folder):
    """A copy of a run without its large files."""
    folder.mkdir()
    for path in run_dir.iterdir():
        if path.is_file() and path.suffix != ".mrc":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_names_with_marks_of_html_are_shown_as_they_are(good, tmp_path):
    copy = lay_out(good, tmp_path / "<b>&run")
    report.write_report(copy, summary(copy) | {"halves": 'Halves of <script>"x"</script>'})
    found = page(copy)
    assert "b" not in {tag for tag, _ in found.tags[:12]} and "script" not in {tag for tag, _ in found.tags}
    assert "<b>&run" in found.text and 'Halves of <script>"x"</script>' in found.text


def test_figures_that_are_not_there_are_left_out(stack, tmp_path):
    run_dir = training_set.fitted(stack, tmp_path / "run")  # without figures
    found = page(run_dir)
    assert [tag for tag, _ in found.tags if tag in ("img", "figure")] == []
    assert "No images were kept aside" in found.text


def test_of_a_run_without_halves_nothing_is_claimed(stack, tmp_path):
    run_dir = training_set.fitted(stack, tmp_path / "run", "maps.halves=false")
    found = page(run_dir)
    assert "unknown" in found.of("div") and "without them nothing is known of the noise" in found.text


def test_the_rise_of_the_likelihood_at_the_end_is_said(good, tmp_path):
    copy = lay_out(good, tmp_path / "run")
    write_volume_fit(copy / "volume_fit.csv", {"gain_full": [*np.linspace(0, 95, 90), *np.linspace(95.5, 100, 10)]})
    report.write_report(copy, summary(copy))
    assert "In the last tenth of the steps the likelihood rose by 5.0 % of its whole rise" in page(copy).text


def test_the_verdict_of_validate_is_on_the_page(good, tmp_path):
    copy = lay_out(good, tmp_path / "run")
    (copy / "validation").mkdir()
    verdict = {"verdict": "FAIL", "tests": {"noise": {"verdict": "FAIL", "found": ["FAIL: the halves share images."]}}}
    (copy / "validation/verdict.json").write_text(json.dumps(verdict))
    assert cli.main(["report", str(copy)]) == 0
    text = page(copy).text
    assert "Null tests (cryosplat validate): FAIL" in text and "the halves share images." in text


# What is wrong with a run


def views(folder, colatitudes, seed=3):
    """poses.pkl of views at those colatitudes (degrees) from +z, everywhere round it."""
    rng = np.random.default_rng(seed)
    number = len(colatitudes)
    angles = np.stack([rng.uniform(0, 360, number), colatitudes, rng.uniform(0, 360, number)], axis=1)
    rotations = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().transpose(0, 2, 1)
    path = folder / "views.pkl"
    path.write_bytes(pickle.dumps((rotations.astype(np.float32), np.zeros((number, 2), np.float32))))
    return path


def simulated(folder, **options):
    molecule = folder / "molecule.mrc"
    training_set.write_map(molecule, training_set.true_map(), training_set.PIXEL_SIZE_A)
    given = {"images": training_set.IMAGES, "snr": training_set.SNR, "seed": 1} | options
    simulate(SimulateOptions(out=str(folder / "stack"), map=str(molecule), **given))
    return folder / "stack"


def a_little_noisier(images):
    return images + 0.05 * np.random.default_rng(5).standard_normal(images.shape)


def from_above(folder, stack):
    return simulated(folder, poses=str(views(folder, np.abs(np.random.default_rng(4).normal(0, 8, 301))))), []


def inverted(folder, stack):
    return stack, ["data.invert=false", "data.check_sign=false"]


def noise(folder, stack):
    return simulated(folder, snr=1e-7), ["data.check_signal=false", "data.check_sign=false"]


def overfitted(folder, stack):
    words = ["data.holdout=0.2", "model.gaussians=2000", "volume.steps=200", "volume.prior=0.01"]
    return simulated(folder, images=120, snr=0.03), [*words, "data.check_signal=false"]


def duplicates(folder, stack):
    return training_set.leaked(stack, folder / "stack", 0.3)[0], []


def near_duplicates(folder, stack):
    noisy = simulated(folder, snr=0.02)
    words = ["data.check_signal=false"]
    return training_set.leaked(noisy, folder / "leaked", 0.6, a_little_noisier)[0], words


PROBLEMS = {
    "preferred orientation": (from_above, "orientation", "not seen from all sides"),
    "wrong sign": (inverted, "wrong_sign", "darker than its surroundings"),
    "no signal": (noise, "no_signal", "do not agree on a molecule"),
    "overfitting": (overfitted, "overfitted", "have learnt noise"),
    "leaked halves": (duplicates, "leaked", "the same images are in both halves"),
    "an FSC that does not fall to zero": (near_duplicates, "plateau", "does not fall to zero"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_run_with_a_problem_says_so_at_the_top_in_plain_words(stack, tmp_path, name, capsys):
    make, kind, words = PROBLEMS[name]
    folder, settings = make(tmp_path, stack)
    run_dir = training_set.fitted(folder, tmp_path / "run", *settings)
    found = summary(run_dir)["findings"]
    problems = [each["kind"] for each in found if each["level"] == "problem"]
    assert kind in problems
    shown = page(run_dir)
    titles = shown.of("h3")
    place = [each["kind"] for each in found].index(kind)
    assert words in titles[place]
    assert "Nothing was found that speaks against this map" not in titles
    # Before any number, and in words: what it means, what to do, what was seen.
    before = (run_dir / "report.html").read_text().partition('<section id="resolution">')[0]
    assert f"<h3>{titles[place]}</h3>" in before
    for part in (findings.KINDS[kind].means, findings.KINDS[kind].do):
        assert part in shown.text
    if summary(run_dir)["resolution_a"] is not None:
        assert "Not to be quoted: see above." in shown.text
    assert cli.main(["report", str(run_dir)]) == 0
    assert f"problem: {findings.KINDS[kind].title}" in capsys.readouterr().out


def test_a_run_with_nothing_wrong_is_not_warned_of(good):
    assert summary(good)["findings"] == []
    found = page(good)
    assert "Nothing was found that speaks against this map" in found.of("h3")
    assert "Not to be quoted" not in found.text


# The words


SAID = {
    "no_signal": {"shells_of_signal": 2},
    "wrong_sign": {"sign_certainty": -6.5, "invert": True},
    "leaked": {"images_in_both_halves": 7},
    "orientation": {"view_evenness": 0.4, "anisotropy": 0.9},
    "empty": {"empty_share": 0.02},
    "sphere": {"mask_origin": "a sphere, because no molecule stands out in the linear map"},
    "drawn": {
        "halves_from": "particle",
        "halves": "Halves were drawn by particle from seed 0; the poses may come from both.",
    },
}
"""What a summary says of each kind that comes from it alone."""

WARNINGS = {
    "plateau": "the corrected FSC stays at 0.100 up to Nyquist, 9 standard errors above 0: the halves share particles",
    "identical": "the two maps are identical: their FSC is 1 everywhere",
    "direction": "anisotropy 0.30: the map is far worse in some directions (9.0 A) than in others (5.0 A)",
    "contrast": "the FSC is negative at low resolution: one of the maps has inverted contrast",
    "mask": "with randomised phases the masked FSC is still 0.200: the mask is too tight or its edge too sharp",
    "again": "the corrected FSC falls below 0.143 at 9.00 A and is above it again at 7.00 A: the resolution stated",
    "sampling": "the corrected FSC never falls below 0.143: the sampling is the limit, not the data",
    "symmetry": "the images contradict symmetry C4: only 30 % of their power agrees",
    "other": "something new",
}


@pytest.mark.parametrize("kind", SAID)
def test_each_kind_is_found_where_the_summary_says_so(tmp_path, kind):
    assert [each.kind for each in findings.find(SAID[kind], tmp_path)] == [kind]


@pytest.mark.parametrize("kind", WARNINGS)
def test_each_warning_has_its_kind(tmp_path, kind):
    (found,) = findings.find({"warnings": [WARNINGS[kind]]}, tmp_path)
    assert found.kind == kind and WARNINGS[kind][1:] in found.found


def test_nothing_is_found_where_all_is_as_it_should_be(tmp_path):
    fine = {
        "shells_of_signal": 30, "resolution_a": 3.2, "sign_certainty": -50.0, "invert": False,
        "images_in_both_halves": 0, "view_evenness": 0.95, "anisotropy": 0.4, "empty_share": 0.0,
        "halves": "Halves are those of x.",
        "warnings": [], "mask_origin": "made from the linear map of both halves",
    }  # fmt: skip
    assert findings.find(fine, tmp_path) == []
    assert findings.find({}, tmp_path) == []  # a run of an older version


def test_a_null_test_is_called_one(tmp_path):
    (found,) = findings.find({}, tmp_path, null="noise")
    assert found.kind == "null" and "data.null=noise" in found.found


def test_problems_come_before_remarks_and_each_once(tmp_path):
    said = SAID["drawn"] | SAID["leaked"] | {"warnings": [WARNINGS["plateau"], WARNINGS["plateau"], WARNINGS["mask"]]}
    found = findings.find(said, tmp_path)
    assert [each.kind for each in found] == ["leaked", "plateau", "mask", "drawn"]
    assert found[1].found.count("up to Nyquist") == 2


def test_where_there_is_no_signal_nothing_is_made_of_its_noise(tmp_path):
    said = SAID["no_signal"] | SAID["sphere"] | {"warnings": [WARNINGS["direction"], WARNINGS["sampling"]]}
    assert [each.kind for each in findings.find(said, tmp_path)] == ["no_signal"]


def test_every_kind_can_come_up():
    assert set(findings.KINDS) == {*SAID, *WARNINGS, "overfitted", "null"}


def test_the_manual_has_the_words_of_the_findings():
    rows = table(ROOT / "docs/operations.md", "### What a run is warned of")
    assert [row[0] for row in rows] == [kind.title for kind in findings.KINDS.values()]
    assert [row[1] for row in rows] == [kind.means for kind in findings.KINDS.values()]


def test_the_last_words_of_a_run_say_it_too(good):
    from cryosplat.ending import ending

    said = summary(good)
    assert "problem" not in ending(said)
    said["findings"] = findings.as_records(findings.find(said | {"images_in_both_halves": 3}, good))
    assert "               problem  Leaked halves: the same images are in both halves\n" in ending(said)


# When it is written


def test_a_run_that_goes_on_has_a_page_at_every_evaluation(stack, tmp_path, monkeypatch):
    written = []

    def kept(folder, *words, **names):
        path = report.write_report(folder, *words, **names)
        written.append(page(folder))
        return path

    monkeypatch.setattr("cryosplat.train.write_report", kept)
    threads = torch.get_num_threads()
    train.train(training_set.config(stack, tmp_path / "run", "train.epochs=2", "maps.every=1"))
    torch.set_num_threads(threads)
    (first,) = written
    assert "the run goes on, 19 of 38 steps are done" in first.text
    assert "Nothing so far speaks against this map" in first.of("h3")
    pictures = {attributes["alt"] for tag, attributes in first.tags if tag == "img"}
    assert pictures == {"FSC curves of the run", "central sections of the map", "projections of the map"}
    last = page(tmp_path / "run")
    assert "the run goes on" not in last.text and "loss by step of training" in {
        attributes.get("alt") for _, attributes in last.tags
    }


def test_the_command_writes_the_same_page_again(good, tmp_path, capsys):
    copy = lay_out(good, tmp_path / "run")
    before = (copy / "report.html").read_text()
    (copy / "report.html").unlink()
    assert cli.main(["report", str(copy)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    mended = re.compile(
        r"written \d{4}-\d\d-\d\d [\d:]+ \w+|on \d{4}-\d\d-\d\d [\d:]+ \w+\.|/[\w/.-]*run\b|[\d.]+ [kM]?B"
    )
    after = (copy / "report.html").read_text()
    assert Page(mended.sub("", after)).of("figcaption") == Page(mended.sub("", before)).of("figcaption")
    assert page(copy).of("h3") == page(good).of("h3")


def test_the_page_goes_where_it_is_asked_to_and_replaces_nothing_there(good, tmp_path, capsys):
    before = (good / "report.html").stat().st_mtime_ns
    target = tmp_path / "page.html"
    assert cli.main(["report", str(good), "-o", str(target)]) == 0
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert cli.main(["report", str(good), "-o", str(target)]) == 2
    assert f"{target} exists already" in capsys.readouterr().err
    assert (good / "report.html").stat().st_mtime_ns == before


def test_what_is_no_complete_run_is_refused_by_name(good, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no run of cryosplat" in capsys.readouterr().err
    copy = lay_out(good, tmp_path / "run")
    (copy / "summary.json").write_text("{")
    assert cli.main(["report", str(copy)]) == 2
    assert "summary.json: not as a run writes it" in capsys.readouterr().err
    (copy / "summary.json").unlink()
    assert cli.main(["report", str(copy)]) == 2
    said = capsys.readouterr().err
    assert "the run is not complete" in said and f"{copy / 'report.html'} is of its last evaluation" in said
    (copy / "validation").mkdir()
    (copy / "validation/verdict.json").write_text("[")
    with pytest.raises(InputError, match=r"verdict\.json: not as cryosplat validate writes it"):
        report.write_report(copy, summary(good))
