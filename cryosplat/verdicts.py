"""Judging a run by its null tests: from curves and numbers on disk to PASS, FAIL or INCONCLUSIVE, with the reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS
from cryosplat.fsc import FscCurve, resolution
from cryosplat.metrics import HOLDOUT_COLUMNS, OVERFITTED, read_metrics, read_volume_fit
from cryosplat.records import Record
from cryosplat.uncertainty import independent_voxels, standard_error

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"

MARGIN_SHELLS = 2
"""Shells beyond the null shell that are not judged: interpolation and the molecule's outline mix neighbours."""

INDEPENDENT_SHARE = 0.5
"""Of the Fourier voxels that are independent in white noise, those counted here: insertion correlates neighbours.
Measured on noise (32 px, 600 images): 0.9 with trilinear insertion on the map's own grid, 1 on one twice as fine. The
rest is caution, because a FAIL says that somebody's halves share images."""

STANDARD_ERRORS = 4.0
"""At which a mean FSC is held to differ from 0: by chance once in 30,000 tests."""

CLAIM_TOLERANCE = 0.1
"""Relative difference, and ``MARGIN_SHELLS`` shells, that two estimates of one resolution may have."""

GAP_LIMIT = 0.5
"""Share of the trained images' gain that the held-out ones may lack. Beyond it the map explains its images more by
their noise than by what they have in common."""

FALL_LIMIT = 0.05
"""Share of its peak by which the held-out gain may fall while training goes on."""

NULL_SHELL_LIMIT = 4
"""Last shell that a calibrated resolution may reach on pure noise: shells of a few voxels correlate by chance, and
calibration does not ask the first ones whether they are above it."""

SAME_MAP_FSC = 0.5
"""Least FSC of the maps of two seeds at the claimed resolution: below it more than half of that shell is chance."""


@dataclass
class Check:
    """One test: what was done, what honest results look like, what came, and what that means."""

    name: str
    done: str
    honest: str
    verdict: str = INCONCLUSIVE
    found: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    panels: list["Panel"] = field(default_factory=list)

    def say(self, verdict: str | None, sentence: str) -> None:
        """Add what came; FAIL outweighs all, and PASS outweighs INCONCLUSIVE. None is a remark."""
        self.found.append(sentence if verdict is None else f"{verdict}: {sentence}")
        order = (INCONCLUSIVE, PASS, FAIL)
        if verdict is not None and order.index(verdict) > order.index(self.verdict):
            self.verdict = verdict


@dataclass(frozen=True, eq=False)
class Panel:
    """Curves for a figure: y by label over x, with a shaded band of noise (its half width by x) where it says so.

    ``in_pairs``: two labels after each other belong together, and have one colour.
    """

    title: str
    x_label: str
    y_label: str
    x: np.ndarray
    lines: Mapping[str, np.ndarray]
    band: np.ndarray | None = None
    mark: float | None = None
    in_pairs: bool = False


def noise_error(box: int, mask: np.ndarray | None = None, copies: int = 1) -> np.ndarray:
    """Standard error (box//2+1,) of the FSC of two linear maps of independent noise under a mask (D, D, D).

    Made with a symmetry of ``copies`` operators.
    """
    return standard_error(np.zeros(box // 2 + 1), INDEPENDENT_SHARE * independent_voxels(box, mask, copies))


def _excess(curve: FscCurve, first: int, error: np.ndarray) -> tuple[float, float]:
    """Mean of a curve from shell ``first`` on and its standard error, were it noise; shells weigh by their voxels."""
    weights = error[first:] ** -2
    known = np.isfinite(curve.fsc[first:])
    if not known.any():
        return float("nan"), float("nan")
    values, weights = curve.fsc[first:][known], weights[known]
    return float((values * weights).sum() / weights.sum()), float(weights.sum() ** -0.5)


def _shared(check: Check, null: Record, first: int, error: np.ndarray) -> None:
    """Whether the linear half maps of images without signal have anything in common from shell ``first`` on."""
    if "linear_half_maps" not in null.curves:
        check.say(INCONCLUSIVE, "the run has no linear half maps, so whether halves share images cannot be seen here.")
        return
    mean, of_mean = _excess(null.curves["linear_half_maps"], first, error)
    check.numbers |= {"linear_mean_fsc": mean, "linear_standard_error": of_mean}
    words = f"the linear half maps' mean FSC from {null.angstrom(first):.2f} A on is {mean:+.4f} (error {of_mean:.4f})"
    if not np.isfinite(mean):
        check.say(INCONCLUSIVE, "the linear half maps have no FSC there.")
    elif mean > STANDARD_ERRORS * of_mean:
        check.say(FAIL, f"{words}: nothing is there to correlate but the images themselves. The halves share images.")
    else:
        check.say(PASS, f"{words}, as of halves that share nothing.")


def _finer(record: Record, one_a: float, other_a: float) -> bool:
    """Whether one resolution is finer than another by more than two estimates of the same may differ."""
    one, other = record.shell(one_a), record.shell(other_a)
    return one > other * (1 + CLAIM_TOLERANCE) and one > other + MARGIN_SHELLS


def judge_phases(run: Record, null: Record, null_shell_a: float, error: np.ndarray) -> Check:
    """The run beside one of the same images with random phases from ``null_shell_a`` on; ``error``: ``noise_error``."""
    shell = run.shell(null_shell_a)
    first = int(np.ceil(shell - 1e-6)) + MARGIN_SHELLS
    check = Check(
        "phases",
        f"The phases of every image beyond {null_shell_a:.2f} A were made random, and all was trained anew.",
        "Beyond that shell half maps have nothing in common, and no resolution is claimed there. What the mixtures' "
        "half maps have in common all the same comes from the model; (F_t - F_n) / (1 - F_n) takes it off (Chen 2013).",
    )
    if first > run.box // 2:
        check.say(INCONCLUSIVE, f"no shell is left beyond {null_shell_a:.2f} A and its margin.")
        return check
    # The outer half: what a mask or the window of insertion carries over from the strong shells below ends before it,
    # what halves have in common does not.
    _shared(check, null, (first + run.box // 2) // 2, error)
    truly = _corrected(run, null, first)
    corrected = resolution(truly, RESOLUTION_THRESHOLD_HALF_MAPS)
    naive = resolution(run.curves["half_maps"], RESOLUTION_THRESHOLD_HALF_MAPS)
    corrected_a = corrected.angstrom
    inflation = float(np.nanmean(null.curves["half_maps"].fsc[first:]))
    check.numbers |= {
        "null_shell_a": null_shell_a,
        "mixtures_mean_fsc": inflation,
        "corrected_resolution_a": corrected_a,
    }
    check.say(
        None,
        f"the mixtures' half maps have a mean FSC of {inflation:+.3f} there from the model alone; with that taken off, "
        f"their resolution is {corrected} instead of {naive}.",
    )
    _judge_claim(check, run, null, null_shell_a, corrected_a)
    check.panels.append(_phases_panel(run, null, truly, shell, error))
    return check


def _corrected(run: Record, null: Record, first: int) -> FscCurve:
    """FSC of the mixtures' half maps, corrected from shell ``first`` on."""
    total, model = run.curves["half_maps"].fsc, null.curves["half_maps"].fsc
    values = total.copy()
    # A null of 1 would leave nothing to divide by: the model alone makes that shell.
    values[first:] = (total[first:] - model[first:]) / np.maximum(1 - model[first:], 1e-3)
    return FscCurve(np.clip(values, -1, 1), run.box, run.pixel_size_a)


def _judge_claim(check: Check, run: Record, null: Record, null_shell_a: float, corrected_a: float) -> None:
    """Whether the resolution that the run claims stands beside what the null shows."""
    if run.claim is None:
        check.say(INCONCLUSIVE, "the run claims no resolution.")
        return
    kind, claim_a = run.claim
    if kind == "naive":
        if _finer(run, claim_a, corrected_a):
            check.say(FAIL, f"the run's naive resolution of {claim_a:.2f} A is the model's doing: {corrected_a:.2f} A.")
        else:
            check.say(PASS, f"the run's naive resolution of {claim_a:.2f} A stands.")
        return
    of_null = null.summary.get("resolution_a")
    if of_null is not None and _finer(run, of_null, null_shell_a):
        words = f"calibration finds {of_null:.2f} A where nothing is left beyond {null_shell_a:.2f} A"
        check.say(FAIL, f"{words}: the calibrated resolution cannot be trusted.")
    else:
        check.say(PASS, f"calibration claims {_angstrom(of_null)} for the null, nothing beyond its shell.")
    _compare_halves(check, run, corrected_a)


def _compare_halves(check: Check, run: Record, corrected_a: float) -> None:
    """The calibrated curves of the two half models against the correction by the null.

    For half maps with independent errors, FSC(a, b) = FSC(a, truth) FSC(b, truth).
    """
    if not {"calibrated_half_a", "calibrated_half_b"} <= run.curves.keys():
        return
    product = run.curves["calibrated_half_a"].fsc * run.curves["calibrated_half_b"].fsc
    known = np.nan_to_num(product, nan=0.0)
    calibrated_a = resolution(FscCurve(known, run.box, run.pixel_size_a), RESOLUTION_THRESHOLD_HALF_MAPS).angstrom
    check.numbers["calibrated_halves_resolution_a"] = calibrated_a
    words = f"the half models' calibrated curves cross at {calibrated_a:.2f} A, the correction says {corrected_a:.2f} A"
    if _finer(run, calibrated_a, corrected_a):
        check.say(FAIL, f"{words}: calibration says too much.")
    else:
        check.say(PASS, f"{words}.")


def _phases_panel(run: Record, null: Record, truly: FscCurve, shell: float, error: np.ndarray) -> Panel:
    lines = {"mixtures": run.curves["half_maps"], "mixtures, null": null.curves["half_maps"], "mixtures, true": truly}
    for label, record, name in (
        ("linear", run, "linear_half_maps"),
        ("linear, null", null, "linear_half_maps"),
        ("calibrated map", run, "calibrated_map"),
    ):
        if name in record.curves:
            lines[label] = record.curves[name]
    return fsc_panel("phases random beyond the line", lines, shell, error)


def fsc_panel(
    title: str, curves: Mapping[str, FscCurve], shell: float | None = None, error: np.ndarray | None = None
) -> Panel:
    """FSC curves of one grid over frequency, with a line at a shell, and the band of noise of linear maps."""
    first = next(iter(curves.values()))
    mark = None if shell is None else shell / (first.box * first.pixel_size_a)
    noise = None if error is None else STANDARD_ERRORS * error[1:]
    lines = {label: curve.fsc[1:] for label, curve in curves.items()}
    return Panel(title, "spatial frequency (1/Å)", "FSC", first.frequency[1:], lines, noise, mark)


def judge_noise(run: Record, null: Record, error: np.ndarray) -> Check:
    """The run beside one of pure noise with the same poses, CTF and halves; ``error``: ``noise_error``."""
    check = Check(
        "noise",
        "Every image was replaced by noise of its own level and spectrum, and all was trained anew.",
        "Linear half maps have nothing in common and no resolution is claimed. Mixtures share their outline at low "
        "resolution; beyond that they should have nothing in common either.",
    )
    _shared(check, null, 1, error)
    naive_a, claim = null.summary.get("resolution_naive_a"), run.claim
    check.numbers |= {"naive_resolution_of_noise_a": naive_a, "calibrated_resolution_of_noise_a": None}
    check.say(None, f"the mixtures' half maps agree to {_angstrom(naive_a)} on noise: no naive number beyond that.")
    if claim is None:
        check.say(INCONCLUSIVE, "the run claims no resolution.")
    elif claim[0] == "naive":
        enough = naive_a is not None and not _finer(run, claim[1], naive_a)
        words = f"the run's naive resolution of {claim[1]:.2f} A"
        check.say(
            FAIL if enough else PASS, f"{words} {'can be had from noise' if enough else 'takes more than noise'}."
        )
    else:
        of_noise = null.summary.get("resolution_a")
        check.numbers["calibrated_resolution_of_noise_a"] = of_noise
        claims = of_noise is not None and null.shell(of_noise) > NULL_SHELL_LIMIT
        check.say(FAIL if claims else PASS, f"calibration claims {_angstrom(of_noise)} for noise.")
    names = {"half_maps": "mixtures", "linear_half_maps": "linear", "calibrated_map": "calibrated map"}
    curves = {label: null.curves[name] for name, label in names.items() if name in null.curves}
    check.panels.append(fsc_panel("pure noise", curves, error=error))
    return check


def judge_holdout(run: Record, fraction: float) -> Check:
    """Held-out and trained images over the epochs of a run with ``data.holdout``."""
    check = Check(
        "holdout",
        f"{100 * fraction:g} % of the images were left out of everything and judged the models at every evaluation.",
        "The likelihood of held-out images rises with that of trained ones and stays near it. If it falls while the "
        "other rises, or is a small part of it, the models learn the noise of their images.",
    )
    table = read_metrics(run.folder / "holdout.csv", HOLDOUT_COLUMNS)
    for model in ("full", "half_a", "half_b"):
        gain, trained = table[f"gain_{model}"], table[f"trained_{model}"]
        if len(gain) and np.isfinite(gain[-1]) and np.isfinite(trained[-1]):
            _judge_curve(check, model, gain, trained, table)
    both = {
        f"{label}, {model.replace('_', ' ')}": table[f"{column}_{model}"]
        for model in ("full", "half_a", "half_b")
        for column, label in (("gain", "held out"), ("trained", "trained"))
    }
    shown = {label: values for label, values in both.items() if np.isfinite(values).any()}
    title = f"{int(table['images'][-1])} held-out images"
    check.panels.append(Panel(title, "epoch", "gain (nats an image)", table["epoch"], shown, in_pairs=True))
    fit = read_volume_fit(run.folder / "volume_fit.csv") or {}
    watched = {name: curve for name, curve in fit.items() if name.endswith("_held_out")}
    if watched:
        _judge_fit(check, watched["gain_full_held_out"])
        shown = {column.removeprefix("gain_").replace("_", " "): curve for column, curve in watched.items()}
        check.panels.append(Panel("the fit in the volume", "step", "gain (nats)", fit["step"], shown))
    return check


def _judge_fit(check: Check, gain: np.ndarray) -> None:
    """Gains of held-out images over the steps of the full model's fit in the volume."""
    best = int(np.argmax(gain))
    fall = float((gain[best] - gain[-1]) / max(gain[best], 1e-9))
    check.numbers["fall_in_fit"] = fall
    words = f"held-out images lost {fall:.0%} of their best gain after step {best} of the fit in the volume"
    if fall > OVERFITTED and gain[best] > 0:
        mend = "take fewer steps (volume.steps) or Gaussians (model.gaussians), or a firmer prior (volume.prior)"
        check.say(FAIL, f"{words}: {mend}.")
    else:
        check.say(PASS, f"{words} ({OVERFITTED:.0%} is allowed).")


def _judge_curve(check: Check, model: str, gain: np.ndarray, trained: np.ndarray, table: Mapping) -> None:
    error = float(np.hypot(table["gain_full_error"][-1], table["trained_full_error"][-1]))
    best = int(np.argmax(gain))
    fall = float((gain[best] - gain[-1]) / max(gain[best], 1e-9))
    gap, uncertainty = (float(value / max(abs(trained[-1]), 1e-9)) for value in (trained[-1] - gain[-1], error))
    check.numbers[model] = {
        "held_out": float(gain[-1]), "trained": float(trained[-1]), "gap": gap, "gap_error": uncertainty, "fall": fall
    }  # fmt: skip
    name = model.replace("_", " ")
    words = f"{name}: {gain[-1]:.4g} nats an image held out, {trained[-1]:.4g} trained (standard error {error:.2g})"
    if max(trained[-1], abs(gain[-1])) < 3 * error:
        check.say(INCONCLUSIVE, f"{words}; neither is certain: hold out more images.")
    elif fall > FALL_LIMIT and gain[best] > 0 and trained[-1] > trained[best]:
        epoch = int(table["epoch"][best])
        check.say(FAIL, f"{words}; the held-out gain fell by {fall:.0%} since epoch {epoch}: train shorter or smaller.")
    elif gap - 2 * uncertainty > GAP_LIMIT:
        check.say(FAIL, f"{words}; {gap:.0%} of what the model explains is noise of its own images.")
    else:
        check.say(PASS, f"{words}; it lacks {gap:.0%} (up to {GAP_LIMIT:.0%} is allowed) and never fell much.")


def judge_seeds(run: Record, others: Sequence[Record], between: Sequence[FscCurve]) -> Check:
    """The run beside others that differ by their seed; ``between`` are FSCs of its map and theirs."""
    check = Check(
        "seeds",
        f"Trained anew with other seeds ({len(others)}; of start and batches, and of halves if they were drawn).",
        "The same resolution within a shell or two, and the same map up to it.",
    )
    claims = [record.claim for record in (run, *others)]
    if any(claim is None for claim in claims):
        check.say(INCONCLUSIVE, "a run claims no resolution.")
        return check
    values = [value for _, value in claims]
    kinds = {kind for kind, _ in claims}
    at_claim = [float(np.interp(run.shell(values[0]), curve.shells, curve.fsc)) for curve in between]
    check.numbers = {"resolutions_a": values, "fsc_between_maps_at_claim": at_claim}
    words = f"{' or '.join(sorted(kinds))} resolutions {min(values):.2f} to {max(values):.2f} A"
    spread = _finer(run, min(values), max(values)) or len(kinds) > 1
    check.say(FAIL if spread else PASS, f"{words}.")
    words = f"the maps' FSC at {values[0]:.2f} A is {min(at_claim):.3f} or more"
    check.say(FAIL if min(at_claim) < SAME_MAP_FSC else PASS, f"{words} ({SAME_MAP_FSC:g} is needed).")
    curves = {f"seed {number}": curve for number, curve in enumerate(between, 1)}
    check.panels.append(fsc_panel("map against those of other seeds", curves, run.shell(values[0])))
    return check


def judge_halves(counts: Sequence[int]) -> Check:
    """Whether halves share images, from what runs on these particles counted as they read them."""
    check = Check(
        "halves",
        "Every image was compared with all others by its pixels, whatever its file, row or grey levels.",
        "No image is in both halves.",
    )
    if not counts:
        check.say(INCONCLUSIVE, "the run was made by a version that did not count them; run another test beside.")
        return check
    check.numbers["images_in_both_halves"] = max(counts)
    if max(counts):
        check.say(FAIL, f"{max(counts)} images are in both halves: half maps are not independent. Remove the copies.")
    else:
        check.say(PASS, "no image is in both halves.")
    return check


def _angstrom(value: float | None) -> str:
    return "no resolution" if value is None else f"{value:.2f} A"
