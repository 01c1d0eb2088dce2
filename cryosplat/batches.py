"""Batches of particles: where their images lie, and how these reach the device before they are needed."""

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """B particles on one rank and one device; D is the training box.

    Attributes:
        stored: (N, D, D//2+1, 2) real and imaginary parts of orthonormal half-spectra (see conventions) as they are
            held, in half or single precision; N images, of which the batch has some.
        rows: (B,) int64, which of them.
        gain: (B,) what makes units of the noise's standard deviation of each.
        rotations: (B, 3, 3), whose first two rows project; with a magnification in them they are no rotations.
        shifts: (B, 2) in pixels.
        ctf: (B, 7) or None.
        half: (B,) int64, 0 or 1.
        ids: (B,) rows of the particle table, on the host.
        phases: (B, D, D//2+1) for ``ctf_image``, or None.
    """

    stored: Tensor
    rows: Tensor
    gain: Tensor
    rotations: Tensor
    shifts: Tensor
    ctf: Tensor | None
    half: Tensor
    ids: np.ndarray
    phases: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def images(self) -> Tensor:
        """(B, D, D//2+1) half-spectra in units of the noise, complex64 (complex128 where the gain is float64)."""
        return torch.view_as_complex(self.stored[self.rows].to(self.gain.dtype)) * self.gain[:, None, None]

    def part(self, places: slice) -> "Batch":
        """Some of its particles, neighbours."""
        ctf, phases = (None if one is None else one[places] for one in (self.ctf, self.phases))
        of_each = (self.rows, self.gain, self.rotations, self.shifts)
        return Batch(self.stored, *(one[places] for one in of_each), ctf, self.half[places], self.ids[places], phases)


@dataclass
class Chosen:
    """Which particles make a batch.

    Attributes:
        ids: (B,) rows of the particle table, on the host.
        at: (B,) the same, int64 on the device.
        stored: (B, D, D//2+1, 2) their half-spectra on the device, if these are held by the host; else None.
    """

    ids: np.ndarray
    at: Tensor
    stored: Tensor | None = None


class Courier:
    """Takes rows of an array in host memory to a device while that is busy with something else.

    Rows are gathered into pinned memory and copied on a stream of their own; nothing waits on the host. The array
    itself need not be pinned, which would round its size up to a power of two. On a CPU rows are gathered, no more.

    Args:
        array: (N, ...) on the host.
        device: where rows go.

    Attributes:
        waited_s: seconds in which the host did nothing but gather rows, or wait for them.
    """

    ahead = 1
    """Batches that are to be sent before the first is taken."""

    def __init__(self, array: Tensor, device: torch.device):
        self._array, self._device = array, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited_s = 0.0

    def send(self, rows: Tensor) -> Any:
        """Begin to copy ``rows`` (B,), on the host; what is returned is for ``take``."""
        began = time.perf_counter()
        staged = self._staging(len(rows))
        torch.index_select(self._array, 0, rows, out=staged)
        self.waited_s += time.perf_counter() - began
        self._follow()
        return self._ship(staged)

    def take(self, sent: Any) -> Tensor:
        """The same rows, for use in the current stream, which waits for them; the host does not."""
        rows, arrived = sent
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            rows.record_stream(current)
        return rows

    def _staging(self, count: int) -> Tensor:
        """Host memory for so many rows."""
        pinned = self._stream is not None
        return torch.empty(count, *self._array.shape[1:], dtype=self._array.dtype, pin_memory=pinned)

    def _follow(self) -> None:
        """Not farther ahead of the work than it has been queued: a host in a hurry would fill the GPU with batches."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _ship(self, staged: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        """Begin to copy to the device; what is copied must not be used before that event."""
        if self._stream is None:
            return staged, None
        with torch.cuda.stream(self._stream):
            return staged.to(self._device, non_blocking=True), self._stream.record_event()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for; on a CPU the array itself."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
