"""What speaks against a run's map, in plain words: one list for the report, the last words of a run, and the docs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryosplat.directional import ANISOTROPIC_BELOW, SIDE_VIEWS_EVENNESS
from cryosplat.halves import DRAWN
from cryosplat.linearmaps import EMPTY_SHARE, LEAST_SHELLS
from cryosplat.records import Record
from cryosplat.sign import CERTAINTY as SIGN_CERTAINTY
from cryosplat.verdicts import FAIL, Check, judge_halves, judge_holdout

PROBLEM, REMARK = "problem", "remark"


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its headline, what it means, and what to do.

    Attributes:
        title, means, do: sentences for people who know molecules.
        level: ``PROBLEM``, the resolution or the map cannot be taken as it is; or ``REMARK``, worth knowing.
        phrase: what is in the warnings of an FSC suite that are of this kind; None if no warning is.
    """

    title: str
    means: str
    do: str
    level: str = PROBLEM
    phrase: str | None = None


KINDS = {
    "no_signal": Kind(
        "No signal: the two halves of the data do not agree on a molecule",
        "What the map shows may be noise. No resolution can be given.",
        "Check that poses and CTF belong to these images row by row, that A/px is right, and that there are enough "
        "particles; cryosplat backproject shows the linear maps in seconds.",
    ),
    "wrong_sign": Kind(
        "Wrong sign: the molecule is darker than its surroundings",
        "The images have the opposite contrast to the one they were taken for, so density came out negative. The FSC "
        "does not see this; the map and the Gaussians are wrong all the same.",
        "Leave data.invert out, and the sign is found from the images; and leave data.check_sign at true, which stops "
        "such a run at once.",
    ),
    "symmetry": Kind(
        "Wrong symmetry: the molecule does not have the one that was imposed",
        "What is not alike under the symmetry was averaged away; the map shows a molecule that does not exist.",
        "Check the point group (model.symmetry) and that its axes lie where RELION has them; C1 asks for none.",
        phrase="the images contradict symmetry",
    ),
    "leaked": Kind(
        "Leaked halves: the same images are in both halves",
        "The half maps share noise, so they agree better than the data allow, and every resolution here is too good.",
        "Remove the copies (duplicate picks, symmetry-expanded particles, stacks joined twice), or give data.halves "
        "that keep all copies of an image in one half.",
    ),
    "plateau": Kind(
        "The FSC does not fall to zero",
        "At the finest details, where only noise is left, the half maps still agree. Something other than the molecule "
        "is common to both, and the resolution is too good.",
        "Look for the same particles in both halves (overlapping picks, symmetry copies, shifted duplicates), and for "
        "a mask or filter that was applied to the images.",
        phrase="the halves share particles",
    ),
    "identical": Kind(
        "The two half maps are the same map",
        "Their FSC is 1 everywhere and says nothing about resolution.",
        "Give data.halves that differ.",
        phrase="the two maps are identical",
    ),
    "overfitted": Kind(
        "Overfitting: the Gaussians have learnt noise",
        "Images that were kept aside are explained worse than before while those that were used are explained better. "
        "Fine detail in the map may be noise.",
        "Use fewer Gaussians (model.gaussians) or steps (volume.steps, train.epochs), or a firmer prior "
        "(volume.prior).",
    ),
    "orientation": Kind(
        "Preferred orientation: the molecule was not seen from all sides",
        "In the directions that are missing the map is blurred or stretched, however good its overall resolution "
        "looks.",
        "Look at the viewing directions and at the resolution by direction below. Rebalancing the particles does not "
        "bring missing views back; tilted data or another grid preparation does.",
    ),
    "direction": Kind(
        "The resolution differs much by direction",
        "The views are spread evenly, so it is not they that are missing; with few particles or weak signal the "
        "measure itself is uncertain.",
        "Look at the resolution by direction below; check for a dominant class of particles or a flexible part.",
        REMARK,
        phrase="the map is far worse in some directions",
    ),
    "empty": Kind(
        "Parts of Fourier space were not measured",
        "No image says anything there: views are missing, or there are too few particles for the box.",
        "Crop with data.box, use more particles, and look at the resolution by direction.",
        REMARK,
    ),
    "contrast": Kind(
        "One of the half maps has inverted contrast",
        "The half maps are opposite at low resolution, so nothing measured from the two holds.",
        "Check the sign of the images of either half.",
        phrase="one of the maps has inverted contrast",
    ),
    "mask": Kind(
        "The mask shapes the FSC",
        "A mask that is too tight or too sharp makes half maps agree, or cuts the molecule.",
        "Give a wider, softer data.mask, or leave data.mask out and one is made.",
        phrase="the mask",
    ),
    "again": Kind(
        "The FSC falls and rises again",
        "The resolution stated is that of the first crossing.",
        "Look for a missing zone of the CTF, a mask that cuts, or images that were filtered.",
        REMARK,
        phrase="is above it again at",
    ),
    "sampling": Kind(
        "The pixel size limits the resolution, not the data",
        "The curve never falls below its threshold: the data may hold more than pixels of this size can show.",
        "Run again with a larger data.box (less binning).",
        REMARK,
        phrase="the sampling is the limit",
    ),
    "sphere": Kind(
        "No molecule stands out from its background",
        "No mask could be made round it, so everything was measured under a sphere, and noise counts in full.",
        "Give a data.mask; check poses, CTF and sign if the map does not look like the molecule.",
    ),
    "drawn": Kind(
        "The half sets were drawn here",
        "If the poses come from a refinement of all particles together, the halves are not quite independent, and the "
        "resolution may be a little too good.",
        "Give the refinement's own half sets: rlnRandomSubset, alignments3D/split, or data.halves.",
        REMARK,
    ),
    "null": Kind(
        "This is a null test: its images hold no signal where it was taken out",
        "Its map is not one of the molecule.",
        "Read it beside the run that it tests.",
    ),
    "other": Kind(
        "Something is odd about the FSC",
        "The sentence says what.",
        "Read its line under Messages in docs/operations.md.",
        REMARK,
    ),
}
"""By name, gravest first."""


@dataclass(frozen=True)
class Finding:
    """What was found of a kind in a run: sentences with its numbers."""

    kind: str
    found: str

    @property
    def words(self) -> Kind:
        return KINDS[self.kind]


def find(summary: Mapping[str, Any], folder: Path, null: str = "none") -> list[Finding]:
    """What there is to say of a run, problems before remarks and the gravest first.

    Args:
        summary: what summary.json says, or as much of it as is known at an evaluation.
        folder: the run directory, for holdout.csv and volume_fit.csv.
        null: ``data.null`` of the run.

    Raises:
        InputError: holdout.csv or volume_fit.csv is damaged.
    """
    found = [*_of_data(summary, null), *_of_views(summary), *_of_warnings(summary.get("warnings") or ())]
    found += [Finding("overfitted", sentence) for sentence in overfitting(summary, folder)]
    kinds = {finding.kind for finding in found}
    silenced = {"direction", "sampling", "again", "sphere"} if "no_signal" in kinds else set()
    silenced |= {"sphere"} if "wrong_sign" in kinds else set()
    silenced |= {"direction"} if "orientation" in kinds else set()
    together: dict[str, list[str]] = {kind: [] for kind in sorted(KINDS, key=lambda kind: KINDS[kind].level != PROBLEM)}
    for finding in found:
        together[finding.kind].append(_sentence(finding.found))
    return [Finding(kind, " ".join(said)) for kind, said in together.items() if said and kind not in silenced]


def as_records(found: Iterable[Finding]) -> list[dict[str, str]]:
    """As summary.json holds them, with all their words."""
    return [
        {"kind": each.kind, "level": each.words.level, "title": each.words.title, "found": each.found,
         "means": each.words.means, "do": each.words.do}
        for each in found
    ]  # fmt: skip


def of_holdout(summary: Mapping[str, Any], folder: Path) -> Check | None:
    """What ``cryosplat validate`` would say of a run's held-out images; None of a run without."""
    if not (folder / "holdout.csv").exists():
        return None
    return judge_holdout(Record(folder, dict(summary), {}), summary["held_out"] / max(summary["particles"], 1))


def overfitting(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """What ``cryosplat validate`` would hold against a run with held-out images."""
    check = of_holdout(summary, folder)
    said = check.found if check else []
    return [sentence.removeprefix(f"{FAIL}: ") for sentence in said if sentence.startswith(FAIL)]


def _of_data(summary: Mapping[str, Any], null: str) -> Iterator[Finding]:
    """What the images themselves tell."""
    if null != "none":
        yield Finding("null", f"it was made with data.null={null}")
    shells, halves = summary.get("shells_of_signal"), summary.get("halves")
    if shells is not None and shells < LEAST_SHELLS:
        yield Finding("no_signal", f"beyond a round ball of density the linear half maps agree in {shells} shells")
    elif halves and "resolution_a" in summary and summary["resolution_a"] is None:
        yield Finding("no_signal", "the calibrated FSC says nothing beyond the first shells")
    sign, invert = summary.get("sign_certainty"), summary.get("invert")
    if sign is not None and (sign if invert else -sign) < -SIGN_CERTAINTY:
        taken, are = ("white on dark", "dark on white") if invert else ("dark on white", "white on dark")
        found = f"the particles are {are} by {abs(sign):.1f} standard errors, and were taken for {taken}"
        yield Finding("wrong_sign", f"{found} (data.invert={str(invert).lower()})")
    if summary.get("images_in_both_halves"):
        (sentence,) = judge_halves([summary["images_in_both_halves"]]).found
        yield Finding("leaked", sentence.removeprefix(f"{FAIL}: "))
    if "a sphere" in (summary.get("mask_origin") or ""):
        yield Finding("sphere", f"the mask is {summary['mask_origin']}")
    if summary.get("halves_from") in DRAWN:
        yield Finding("drawn", halves)


def _of_views(summary: Mapping[str, Any]) -> Iterator[Finding]:
    evenness, anisotropy, empty = (summary.get(key) for key in ("view_evenness", "anisotropy", "empty_share"))
    if evenness is not None and evenness < SIDE_VIEWS_EVENNESS:
        found = f"the views' evenness is {evenness:.2f} (1 is even, {SIDE_VIEWS_EVENNESS:g} side views alone)"
        if anisotropy is not None:
            uneven = "far worse in some directions than in others" if anisotropy < ANISOTROPIC_BELOW else "bearable"
            found += f"; the FSC's anisotropy is {anisotropy:.2f}, {uneven}"
        yield Finding("orientation", found)
    if empty is not None and empty > EMPTY_SHARE:
        yield Finding("empty", f"{empty:.0%} of the Fourier voxels of a half map within Nyquist are empty")


def _of_warnings(warnings: Iterable[str]) -> Iterator[Finding]:
    """The sentences on the FSC of the linear half maps, each under its kind."""
    for sentence in warnings:
        named = (name for name, kind in KINDS.items() if kind.phrase and kind.phrase in sentence)
        yield Finding(next(named, "other"), sentence)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:].rstrip(".") + "."
