"""The site: README, CONTRIBUTING, docs/ and benchmarks/*.md as they stand, with links as GitHub follows them.

The source folder of the build is the checkout, not docs/: so a link to ../README.md or ../csrc/splat.h leads somewhere
in the site too. ``make docs`` builds it into build/docs, with warnings as errors, and needs no network.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "cryosplat"
author = "the developers of cryosplat"
html_title = "cryosplat"

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/*.md"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4  # the anchors that GitHub makes of headings
highlight_language = "none"

html_theme = "furo"
html_extra_path = ["site"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = []


def setup(app):
    app.connect("env-updated", list_external_links)


def list_external_links(app, env):
    """Write build/docs/external_links.txt: address and page of every link that leads out of the site."""
    found = set()
    for page in sorted(env.found_docs):
        for node in env.get_doctree(page).findall(lambda node: "refuri" in getattr(node, "attributes", {})):
            if "://" in node["refuri"]:
                found.add((node["refuri"], page))
    lines = [f"{address}  {page}\n" for address, page in sorted(found)]
    Path(app.outdir, "external_links.txt").write_text("".join(lines))
