"""The documents as a site; and pages whose numbers come from elsewhere: they are those that stand there."""

import re
import subprocess
import sys

import pytest
from reader import ROOT, table

PERFORMANCE, EMPIAR = ROOT / "docs/performance.md", ROOT / "docs/empiar.md"


def test_the_site_is_built_without_a_warning_and_lists_where_it_leads(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (tmp_path / "docs").glob("*.html")}
    assert pages == {path.stem for path in (ROOT / "docs").glob("*.md")}
    links = (tmp_path / "external_links.txt").read_text()
    assert "https://openreview.net/forum?id=dLaUZKBzta  README" in links
    assert not re.findall(
        r'(?:src|href)="(?:https?:)?//[^"]+\.(?:js|css|woff2?)"', (tmp_path / "README.html").read_text()
    )


def test_the_figures_of_time_and_memory_stand_on_the_pages_that_they_are_said_to_be_from():
    """Every number of a table's row is on the page of benchmarks/ that the row, or the text before it, links to."""
    source, checked = None, 0
    for line in PERFORMANCE.read_text().splitlines():
        named = re.findall(r"\.\./benchmarks/(\w+\.md)", line)
        source = (ROOT / "benchmarks" / named[-1]).read_text() if named else source
        if line.startswith("|") and source:
            cells = re.sub(r"\]\([^)]*\)", "", line)
            for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", cells):
                found = {number, number.replace(",", "")}
                assert any(re.search(rf"(?<![\d.]){re.escape(text)}(?![\d])", source) for text in found), (number, line)
                checked += 1
    assert checked > 40


def columns() -> dict[str, list[str]]:
    """Rows of the tables of docs/empiar.md by their first cell."""
    rows = [*table(EMPIAR, "## What there is"), *table(EMPIAR, "## On which machine")]
    return {row[0]: row[1:] for row in rows}


def test_boxes_memory_and_time_of_the_empiar_sets_follow_from_their_numbers():
    said = columns()
    particles = [int(cell.replace(",", "")) for cell in said["particles"]]
    stored, boxes = (list(map(int, said[name])) for name in ("stored box, px", "box of the configuration, px"))
    pixels = [float(size) * whole / box for size, whole, box in zip(said["A/px"], stored, boxes, strict=True)]
    assert pixels == pytest.approx([float(cell) for cell in said["A/px of that box"]], abs=1e-3)
    assert [2 * pixel for pixel in pixels] == pytest.approx(
        [float(cell) for cell in said["Nyquist of that box, A"]], abs=6e-3
    )
    gib = [count * box * (box // 2 + 1) * 4 / 2**30 for count, box in zip(particles, boxes, strict=True)]
    assert [f"{value:.1f} GiB" for value in gib] == said["images in memory, all ranks together"]
    minutes = [0.6e-3 * count * (box / 128) ** 2 / 60 for count, box in zip(particles, boxes, strict=True)]
    assert [f"{value:.1f}" for value in minutes] == said["CPU minutes for the images"]


@pytest.mark.parametrize(("place", "number"), list(enumerate(("10028", "10049", "10076", "10180"))))
def test_numbers_of_the_empiar_sets_are_those_of_their_configurations_and_pages(place, number):
    comments = (ROOT / f"configs/{number}.yaml").read_text()
    page = (ROOT / f"docs/empiar-{number}.md").read_text().replace("\n", " ")
    said = columns()
    for row in ("particles", "CryoSplat paper, FSC 0.143 of its half maps, A"):
        if not (number == "10076" and row == "particles"):  # the configuration leaves it out
            assert said[row][place] in comments
        assert said[row][place] in page
    assert f"{said['stored box, px'][place]} px at {said['A/px'][place]} A/px" in comments.replace("\n# ", " ")
    assert f"box: {said['box of the configuration, px'][place]} " in comments
