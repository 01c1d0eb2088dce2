"""What is odd about a set of FSC curves, said in sentences."""

from collections.abc import Iterator, Mapping

import numpy as np

from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH, shell_to_angstrom
from cryosplat.fsc import FscCurve, resolution

ERRORS = 4.0
"""Standard errors that something must amount to before it is said: of some hundred shells, chance passes 0.01."""

PLATEAU = 0.03
"""Level of a plateau at high frequency that is worth a warning, noise aside."""

PLATEAU_BELOW = 0.9
"""A curve flatter than that and higher is one of maps that are good up to Nyquist."""

PLATEAU_SHELLS = 6
"""Shells in the last third that are needed to tell a plateau from a curve still falling."""

INVERTED = -0.5
"""Mean FSC of the first shells below which one of the maps has the other sign."""

FIRST_SHELLS = 3


def warnings(curves: Mapping[str, FscCurve], identical: bool, randomisation_shell: int | None) -> list[str]:
    """Sentences on the curves of a suite; none if nothing is odd.

    Args:
        curves: by name, with errors: "unmasked", and, if made, "phase_randomised" and "corrected".
        identical: the two maps are the same.
        randomisation_shell: first shell whose phases were randomised, if any.
    """
    unmasked = curves["unmasked"]
    if identical:
        return ["the two maps are identical: their FSC is 1 everywhere and says nothing about resolution"]
    if unmasked.fsc[1 : 1 + FIRST_SHELLS].mean() < INVERTED:
        return ["the FSC is negative at low resolution: one of the maps has inverted contrast"]
    name = "corrected" if "corrected" in curves else "unmasked"
    found = [*_at_nyquist(name, curves[name]), *_crossings(name, curves[name])]
    found += [sentence for each in dict.fromkeys(("unmasked", name)) for sentence in _plateau(each, curves[each])]
    if randomisation_shell is not None:
        found += [*_mask(curves["phase_randomised"]), *_dip(curves["corrected"], randomisation_shell)]
    return found


def _angstrom(curve: FscCurve, shell: float) -> str:
    return f"{shell_to_angstrom(shell, curve.box, curve.pixel_size_a):.2f} A"


def _at_nyquist(name: str, curve: FscCurve) -> Iterator[str]:
    if resolution(curve, RESOLUTION_THRESHOLD_HALF_MAPS).limited_by_nyquist:
        yield (
            f"the {name} FSC never falls below 0.143: the sampling is the limit, not the data (Nyquist is "
            f"{_angstrom(curve, len(curve.fsc) - 1)}); use a smaller A/px to see the resolution"
        )


def _crossings(name: str, curve: FscCurve) -> Iterator[str]:
    """A curve that falls below a threshold and comes back by more than noise."""
    for threshold in (RESOLUTION_THRESHOLD_TRUTH, RESOLUTION_THRESHOLD_HALF_MAPS):
        first = resolution(curve, threshold)
        below = np.flatnonzero(curve.fsc[1:] < threshold - ERRORS * curve.error[1:]) + 1
        if first.limited_by_nyquist or len(below) == 0:
            continue
        back = np.flatnonzero(curve.fsc > threshold + ERRORS * curve.error)
        back = back[back > below[0]]
        if len(back):
            yield (
                f"the {name} FSC falls below {threshold:g} at {first.angstrom:.2f} A and is above it again at "
                f"{_angstrom(curve, back[0])}: the resolution stated is that of the first crossing; look for a missing "
                "zone of the CTF, a mask that cuts, or filtered maps"
            )


def _plateau(name: str, curve: FscCurve) -> Iterator[str]:
    """A level above noise over the last third of the shells that does not decline, as signal does."""
    tail = slice(2 * len(curve.fsc) // 3, len(curve.fsc))
    values, errors = curve.fsc[tail], curve.error[tail]
    if len(values) < PLATEAU_SHELLS:
        return
    middle = len(values) // 2
    level, error = values.mean(), np.sqrt((errors**2).sum()) / len(values)
    decline = values[:middle].mean() - values[middle:].mean()
    # The difference of two halves of the tail has twice the error of its mean.
    if max(PLATEAU, ERRORS * error) < level < PLATEAU_BELOW and decline < max(0.1 * level, 2 * error):
        yield (
            f"the {name} FSC stays at {level:.3f} up to Nyquist, {level / error:.0f} standard errors above 0: the "
            "halves share particles (duplicates, symmetry copies), or a mask or a filter that was applied to both"
        )


def _mask(randomised: FscCurve) -> Iterator[str]:
    """A mask that correlates what has no phases in common, where nothing else can."""
    tail = slice(3 * len(randomised.fsc) // 4, None)
    level = randomised.fsc[tail].mean()
    error = np.sqrt((randomised.error[tail] ** 2).mean() / len(randomised.fsc[tail]))
    if level > max(2 * PLATEAU, ERRORS * error):
        yield (
            f"with randomised phases the masked FSC is still {level:.3f} at the highest frequencies: the mask is too "
            "tight or its edge too sharp; widen it or soften its edge"
        )


def _dip(corrected: FscCurve, randomisation_shell: int) -> Iterator[str]:
    """The corrected curve lower just after the hand-over than further on."""
    start = randomisation_shell + 2
    near, beyond = slice(start, start + 3), slice(start + 3, start + 8)
    if len(corrected.fsc[beyond]) < 5:
        return
    lowest = start + int(np.argmin(corrected.fsc[near]))
    depth = corrected.fsc[beyond].mean() - corrected.fsc[lowest]
    if depth > max(0.05, ERRORS * corrected.error[lowest]):
        yield (
            f"the corrected FSC dips by {depth:.2f} at {_angstrom(corrected, lowest)}, just beyond where phases are "
            f"randomised ({_angstrom(corrected, randomisation_shell)}): the mask cuts the molecule, or is too sharp"
        )
