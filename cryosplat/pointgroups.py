"""Names of point groups, as RELION writes them; what they mean in the map is in ``symmetry``."""

import re

LARGEST_FOLD = 99
"""Largest n of C<n> and D<n>: RELION reads two digits."""

KNOWN = f"C<n> or D<n> with n from 1 to {LARGEST_FOLD} (C1: none), T, O, I, I1, I2, I3 or I4 (I is I2)"


def canonical(name: str) -> str | None:
    """A name in upper case, without leading zeros, I as I2; None if it names no point group.

    >>> canonical("c07"), canonical(" d2 "), canonical("i"), canonical("C100"), canonical("I5")
    ('C7', 'D2', 'I2', None, None)
    """
    key = name.strip().upper()
    axial = re.fullmatch(r"([CD])0*([1-9]\d*)", key)
    if axial:
        return f"{axial[1]}{axial[2]}" if int(axial[2]) <= LARGEST_FOLD else None
    key = "I2" if key == "I" else key
    return key if key in ("T", "O", "I1", "I2", "I3", "I4") else None
