"""A rank's particles, ready for training: normalised half-spectra in memory or on disk, batches on demand."""

import collections
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosplat.batches import Batch, Chosen, Courier, to_device
from cryosplat.conventions import rescaled_pixel_size
from cryosplat.fingerprints import NUMBERS
from cryosplat.imageprep import IMAGES_PER_READ, Prepared, Preparer, fourier_crop, shells_of, training_box
from cryosplat.nulls import Null, null_shell
from cryosplat.particles import ParticleTable
from cryosplat.prefetch import CachedImages, DiskCourier, prepared_in_order

logger = logging.getLogger(__name__)

FIRST_NOISE_SHELL = 2
"""Of white noise whose mean over the corners was subtracted, shell 0 has none left, shell 1 70 % and shell 2 all."""


@dataclass
class Statistics:
    """What a rank's particles say of the noise, to be shared before training.

    ``deviation`` (N,) noise standard deviation of each particle, and ``fingerprint`` (N, 6) what tells copies (zero for
    those of other ranks); ``power`` (2, S) and ``count`` (2,) sums over each half's particles, but for those held out,
    of the radial noise power.
    """

    deviation: np.ndarray
    fingerprint: np.ndarray
    power: np.ndarray
    count: np.ndarray


class ParticleDataset:
    """The particles a rank owns, held as half-spectra on its device or in the host's memory, or kept on disk.

    Every image has its own background taken off and is divided by its half's noise level, so that
    the grey levels of the stack do not matter: a stack times 100 plus an offset is the same data set.
    What is done to each image by itself is in ``imageprep``.

    Args:
        table: all particles.
        owned: ids of this rank's particles, ascending.
        box: training box in pixels, even, at most the stored one.
        invert: cryoDRGN's flag: true where particles are white on dark.
        precision: "half" or "single", of the images in memory.
        progress: called with the number of images read so far.
        device: where images are prepared and batches are made.
        cache: "device", "host" or "disk", where half-spectra are held. From the host each batch's follow on a stream of
            their own while the batch before is at work; from the disk they are gathered a few batches ahead.
        kept: the images of the node, for "disk", which have been prepared already.

    Attributes:
        reach: the largest factor by which a projection stretches frequencies; 1 without magnifications.

    Raises:
        InputError: a non-finite or constant image (named), or a box larger than the stored one.
    """

    def __init__(
        self,
        table: ParticleTable,
        owned: np.ndarray,
        box: int | None = None,
        invert: bool = True,
        precision: str = "half",
        progress: Callable[[int], None] = lambda done: None,
        device: torch.device | str = "cpu",
        cache: str = "device",
        kept: CachedImages | None = None,
    ):
        self.box = training_box(box, table)
        self.pixel_size_a = rescaled_pixel_size(table.pixel_size_a, table.box, self.box)
        self.particles = len(table)
        self.owned = owned
        self.half = table.half.astype(np.int64)
        self.device = torch.device(device)
        self._held_out = table.held_out
        self._row = np.full(len(table), -1, dtype=np.int64)
        self._row[owned] = np.arange(len(owned))
        self._cropped = self.box < table.box
        self.invert = invert
        # What a batch has of every particle, on the device, so that a batch is a selection there.
        self._rows = torch.from_numpy(self._row).to(self.device)
        self._halves = torch.from_numpy(self.half).to(self.device)
        projections = table.rotations if table.optics is None else table.optics.projections(table.rotations)
        # No rotation of a checked table reaches farther than 1; a magnification may.
        self.reach = 1.0
        if projections is not table.rotations:
            self.reach = float(np.linalg.norm(projections[:, :2], 2, (1, 2)).max())
        self._rotations = torch.from_numpy(projections).float().to(self.device)
        self._shifts = (torch.from_numpy(table.shifts) * self.box).float().to(self.device)
        self._ctf = None if table.ctf is None else torch.from_numpy(table.ctf).float().to(self.device)
        rest = None if table.optics is None else table.optics.rest
        self._phases = None if rest is None else fourier_crop(torch.from_numpy(rest), self.box).to(self.device)
        self._optics = None if rest is None else torch.from_numpy(table.optics.group).to(self.device)
        self._gain = torch.zeros(len(table), device=self.device)
        self._table, self._null = table, None
        if kept is not None:
            self._place_rows(kept)
            return
        preparer, place = Preparer(table, self.box, precision, self.device), "cpu" if cache == "host" else device
        self._spectra = torch.empty(len(owned), *preparer.shape, dtype=preparer.dtype, device=place)
        self._courier = Courier(self._spectra, self.device) if cache == "host" else None
        ordered, statistics = self.in_file_order(owned), _Sums(table, preparer.shells)
        parts = np.split(ordered, range(IMAGES_PER_READ, len(ordered), IMAGES_PER_READ))
        for ids, prepared in prepared_in_order(preparer, parts):
            statistics.add(ids, prepared)
            self._spectra[torch.from_numpy(self._row[ids]).to(place)] = prepared.spectra.to(place)
            progress(statistics.images)
        self.statistics = statistics.total()

    def _place_rows(self, kept: CachedImages) -> None:
        """Take images from the disk."""
        place = np.full(len(self._row), -1)
        place[kept.ids] = np.arange(len(kept.ids))
        places = place[self.owned]  # of every row
        statistics = _Sums(self._table, kept.preparer.shells)
        for ids, found in kept.statistics(np.sort(places)):
            statistics.add(ids, found)
        self.statistics = statistics.total()

        def gather(rows: np.ndarray, out: Tensor) -> None:
            kept.gather(places[rows], out)
            if self._null is not None:
                self._null.change(out, self.owned[rows])

        self._spectra = None
        self._courier = DiskCourier(gather, kept.preparer.shape, kept.preparer.dtype, self.device)

    def normalise(self, deviation: np.ndarray) -> None:
        """Set the scale of all images from the noise levels (N,) of all particles, gathered from all ranks.

        Each half has its own level, the root mean square of its particles' (halves share no statistic), but for those
        held out; sums run in the order of the table, so they are the same for any number of ranks.
        """
        deviation, gain = torch.from_numpy(deviation), torch.zeros(self.particles)
        for h in (0, 1):
            mine = self.half == h
            level = deviation[mine & ~self._held_out].square().mean().sqrt()
            gain[mine] = ((1 if self.invert else -1) * deviation[mine] / level).float()
        self._gain = gain.to(self.device)

    def set_sign(self, invert: bool) -> None:
        """Take all images, which are normalised, for white on dark or for dark on white."""
        if invert != self.invert:
            self.invert, self._gain = invert, -self._gain

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Which of the particles ``ids`` (n,) this rank owns, bool (n,)."""
        return self._row[ids] >= 0

    def make_null(
        self, kind: str, seed: int, same: np.ndarray, noise: np.ndarray, null_shell_a: float | None = None
    ) -> None:
        """Take the signal out of the images: all of it ("noise"), or its phases from a resolution on ("phases").

        Noise has each image's own level and the spectrum of its half. Poses, CTF, halves and noise statistics stay.
        What is drawn depends on seed and image alone, not on the number of ranks.

        Args:
            kind: "noise" or "phases".
            same: (N,) for every particle the first one whose image it shares: copies stay copies.
            noise: (2, S) radial noise power of either half, as ``radial_noise`` gives it.
            null_shell_a: A, for "phases".

        Raises:
            InputError: that resolution is not one of these images.
        """
        shells = torch.from_numpy(shells_of(self.box)[0])
        level = torch.from_numpy(noise).sqrt().float()[:, shells.clamp(max=noise.shape[1] - 1)]
        if self._cropped:
            level[:, self.box // 2], level[:, :, self.box // 2] = 0, 0  # as fourier_crop leaves them
        beyond = shells >= null_shell(null_shell_a, self.box, self.pixel_size_a) - 1e-6 if kind == "phases" else None
        null = Null(same, self.half, level, beyond, seed)
        if self._spectra is None:
            self._null = null  # what others share on disk stays as it is; images are changed as they come from there
            return
        for start in range(0, len(self.owned), IMAGES_PER_READ):
            rows = slice(start, start + IMAGES_PER_READ)
            null.change(self._spectra[rows], self.owned[rows])

    def batch(self, ids: np.ndarray) -> Batch:
        """The particles ``ids``, which this rank owns, on its device."""
        return next(self.batches([ids]))

    def batches(self, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Batches of particles that this rank owns, one after the other, on its device."""
        return map(self.select, self.choose(order))

    def choose(self, order: Sequence[np.ndarray]) -> Iterator[Chosen]:
        """What ``select`` makes batches of, one after the other.

        All ids go to the device at the beginning, in one copy; after that the host waits for nothing. Half-spectra
        that are held by the host are sent a batch ahead; those on disk are gathered some batches ahead.
        """
        # Row -1 would be the last image: another particle's pixels under this one's pose, and no error.
        assert all((self._row[ids] >= 0).all() for ids in order), "a batch has a particle of another rank"
        every, sizes = np.concatenate([np.empty(0, np.int64), *order]), [len(ids) for ids in order]
        places = to_device(every, self.device).split(sizes)
        if self._courier is None:
            yield from map(Chosen, order, places)
            return
        rows = iter(torch.from_numpy(self._row[every]).split(sizes))
        sent = collections.deque(self._courier.send(first) for first in itertools.islice(rows, self._courier.ahead))
        for ids, at in zip(order, places, strict=True):
            stored = self._courier.take(sent.popleft())
            sent.extend(self._courier.send(following) for following in itertools.islice(rows, 1))
            yield Chosen(ids, at, stored)

    def select(self, chosen: Chosen) -> Batch:
        """A batch, of nothing but selections on the device."""
        at, stored = chosen.at, chosen.stored
        return Batch(
            self._spectra if stored is None else stored,
            self._rows[at] if stored is None else torch.arange(len(at), device=self.device),
            self._gain[at],
            self._rotations[at],
            self._shifts[at],
            None if self._ctf is None else self._ctf[at],
            self._halves[at],
            chosen.ids,
            None if self._phases is None else self._phases[self._optics[at]],
        )

    def in_file_order(self, ids: np.ndarray) -> np.ndarray:
        """The particles ``ids`` (n,) in the order in which their images lie on disk, and are read fastest."""
        return self._table.images.in_file_order(ids)

    @property
    def waited_s(self) -> float:
        """Seconds so far in which this rank waited for images to come from the disk or from the host's memory."""
        return 0.0 if self._courier is None else self._courier.waited_s

    @property
    def bytes_in_memory(self) -> int:
        return 0 if self._spectra is None else self._spectra.numel() * self._spectra.element_size()


class _Sums:
    """Statistics on their way: images are added in any pieces of one order, always with the same result."""

    def __init__(self, table: ParticleTable, shells: int):
        self._table, self.images = table, 0
        self._made = Statistics(
            np.zeros(len(table)), np.zeros((len(table), NUMBERS)), np.zeros((2, shells)), np.zeros(2)
        )

    def add(self, ids: np.ndarray, prepared: Prepared) -> None:
        """Count the particles ``ids`` (n,), whose n prepared images these are."""
        made, self.images = self._made, self.images + len(ids)
        made.deviation[ids], made.fingerprint[ids] = prepared.deviation, prepared.fingerprint
        for h in (0, 1):
            mine = (self._table.half[ids] == h) & ~self._table.held_out[ids]
            # One by one and not as a sum of sums, so that it does not matter where pieces begin.
            for power in prepared.power[mine].astype(np.float64):
                made.power[h] += power
            made.count[h] += int(mine.sum())

    def total(self) -> Statistics:
        self._made.power /= shells_of(self._table.box)[1]
        return self._made


def radial_noise(power: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Noise power (2, S) of each half by shell, near 1, from sums over all ranks.

    Args:
        power: (2, S) summed radial noise power of either half.
        count: (2,) particles summed.
    """
    radial = power / np.maximum(count, 1)[:, None]
    # Each image's background was taken off, and with it its noise in the first shells.
    radial[:, :FIRST_NOISE_SHELL] = radial[:, FIRST_NOISE_SHELL, None]
    return radial


def noise_weights(power: np.ndarray, count: np.ndarray, box: int) -> Tensor:
    """Weights (2, D, D//2+1) that whiten each half's noise: 1 / radial power, mean 1 over the grid.

    Args:
        power: (2, S) summed radial noise power of either half, over all ranks.
        count: (2,) particles summed.
        box: D of the training images.
    """
    shells, _ = shells_of(box)
    weights = []
    for radial in radial_noise(power, count):
        weight = 1.0 / radial[np.minimum(shells, len(radial) - 1)]
        weights.append(weight / weight.mean())
    return torch.from_numpy(np.stack(weights)).float()


def shells_of_half_plane(box: int) -> np.ndarray:
    """Shell (D, D//2+1) of every coefficient of a half-spectrum; those in the corners lie beyond D//2."""
    return shells_of(box)[0]


def half_plane_weights(box: int) -> Tensor:
    """How often (D//2+1,) a column of a half-spectrum counts: 2 where the Friedel mates are not stored, else 1."""
    weights = torch.full((box // 2 + 1,), 2.0)
    weights[:: box // 2] = 1.0
    return weights
