"""What people see: the real TensorBoard on a real run, and its report, in a real browser.

Pictures of every page stay in build/screenshots to be looked at. Without Chromium these tests are skipped.
"""

import re

import browser
import numpy as np
import pytest
import torch
import training_set
from PIL import Image

from cryosplat import train

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that was fitted in the volume, trained, and judged by held-out images; with figures."""
    browser.find_chromium()
    stack = training_set.training_set(tmp_path_factory)
    folder = tmp_path_factory.mktemp("seen") / "run"
    words = "data.holdout=0.1 train.epochs=3 maps.every=1 train.batch=16 train.log_every=3 train.lr=0.002".split()
    threads = torch.get_num_threads()
    train.train(training_set.config(stack, folder, *words, of=training_set.VOLUME_SETTINGS))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def page():
    with browser.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(run_dir, tmp_path_factory):
    with browser.tensorboard(run_dir / "tensorboard", tmp_path_factory.mktemp("log") / "log") as found:
        yield found


def visit(page, address, plugin, height=1300):
    """One page of TensorBoard, afresh: it keeps what was chosen on another."""
    page.open("about:blank")
    page.open(f"{address}#{plugin}", 1400, height)


def coloured(path, share):
    """Whether at least that share of a picture's pixels has a colour, as curves and maps of a page have."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (pixels.max(-1) - pixels.min(-1) > 60).mean() > share


def test_tensorboard_draws_the_charts_to_watch(page, address):
    visit(page, address, "custom_scalars")
    page.wait_for_words("What to watch", "resolution (Å)", "held-out images", "fit in the volume")
    # Every series of a chart has its line in a legend; a tag that TensorBoard cannot take apart has none.
    page.wait_for_words("resolution/calibrated_0.5_A", "holdout/gain_full", "loss/half_b", "volume_fit/gain_full")
    page.wait(f"{CURVES} >= 12")
    page.picture("tensorboard_charts")
    assert page.errors == []


# Lines of charts that have somewhere to go; through web components, which querySelectorAll does not enter.
CURVES = """(() => {
  const all = node => [node, ...[...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children].flatMap(all)];
  const lines = all(document.body).filter(each => each.nodeName === "path" && each.classList.contains("line"));
  return lines.filter(each => (each.getAttribute("d") || "").length > 10).length;
})()"""


def test_tensorboard_shows_maps_curves_and_a_particle(page, address):
    visit(page, address, "images", 3000)
    page.wait_for_words("fsc/curves", "map/projections", "map/sections")
    page.wait(f"{PICTURES} >= 9")
    page.ask(OPEN_PARTICLES)  # TensorBoard opens the first two groups only
    page.wait_for_words("particles/particle_projection_residual")
    page.wait(f"{PICTURES} >= 10")
    assert coloured(page.picture("tensorboard_images"), 0.002)
    assert page.errors == []


OPEN_PARTICLES = """(() => {
  const all = node => [node, ...[...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children].flatMap(all)];
  const buttons = all(document.body).filter(each => each.nodeName === "BUTTON");
  buttons.find(each => each.textContent.trim().startsWith("particles")).click();
})()"""

PICTURES = """(() => {
  const all = node => [node, ...[...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children].flatMap(all)];
  return all(document.body).filter(each => each.nodeName === "IMG" && each.naturalWidth > 300).length;
})()"""


def test_tensorboard_says_what_numbers_mean_and_what_the_run_was(page, address):
    visit(page, address, "text")
    page.wait_for_words("run/config", "gaussians: 200", "run/hardware", "1 ranks")
    page.picture("tensorboard_text")
    visit(page, address, "histograms")
    page.wait_for_words("gaussians/scale_full_A", "gaussians/amplitude_full")
    page.picture("tensorboard_histograms")
    visit(page, address, "timeseries")
    page.wait_for_words("fsc", "gaussians", "holdout")
    page.picture("tensorboard_time_series")
    assert page.errors == []


def test_the_report_is_read_from_its_file_alone(page, run_dir):
    page.open(f"file://{run_dir}/report.html", 1280, 900)
    assert page.errors == [] and [url for url in page.asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in page.asked if url.startswith("file:")]) == 1
    assert page.ask("[...document.images].every(image => image.complete && image.naturalWidth > 400)")
    for width in (1280, 400):
        page.open(f"file://{run_dir}/report.html", width, 900)
        assert page.ask("document.documentElement.scrollWidth") <= width, width
    page.open(f"file://{run_dir}/report.html", 1280, 900)
    # Lines that can be read: neither too small nor too long.
    assert page.ask("Math.min(...[...document.querySelectorAll('p, td, figcaption')].map(e => "
                    "parseFloat(getComputedStyle(e).fontSize)))") >= 14  # fmt: skip
    assert page.ask("Math.max(...[...document.querySelectorAll('p, figcaption')].map(e => e.clientWidth))") < 900
    assert coloured(page.picture("report", whole=True), 0.005)
    page.picture("report_top")


def test_the_report_prints_on_a_few_pages_of_a4(page, run_dir):
    page.open(f"file://{run_dir}/report.html", 1280, 900)
    content = page.print_to_pdf("report").read_bytes()
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert 4 <= len(sizes) <= 9
    for width, height in sizes:
        assert float(width) == pytest.approx(595, abs=2) and float(height) == pytest.approx(842, abs=2)
