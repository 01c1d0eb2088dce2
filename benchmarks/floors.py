"""What each kernel cannot do without: operations and bytes, counted from its inputs. The one place where they are.

An operation is one of float32 that a fused multiply-add unit does, one number (a lane) at a time. An interaction is one
Gaussian on one pixel, or voxel, within its cut-off. Each takes

    forward   3: the addition to the image, and two products of the recurrence along the row
    backward  6: that recurrence again, the product with the gradient, and the three sums of the inner loop

and what is done once a Gaussian, a view or a row (projection, exponentials, tails) is left out. Bytes count every
number of the inputs once and every number of the outputs once, as if caches were perfect and nothing were kept between.
The floor of a kernel is the longer of both at the measured rates of the machine; that of a step the sum over its
kernels, since one waits for the other.

A CPU does a row of a footprint at a time: at least one vector, however few pixels of it are inside. So `issued` there
is a vector for every row; `operations`, which a roofline shows, are those of the pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.machine import Machine

FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 3, 6
NUMBERS_IN_PIXELS = 10
"""Of a Gaussian as the kernels take it: mean, covariance, amplitude."""

NUMBERS_OF_A_VIEW = 12
"""Rotation and shift, and the 8 bytes of the model's index less 4."""

FFT_PASSES = 2
"""Rows, then columns: a 2D transform of an image is read and written once in each."""

ADAM_NUMBERS = 7
"""Moved for one parameter: itself, its gradient and two moments read, all but the gradient written."""

FLOAT, HALF_COMPLEX, COMPLEX = 4, 4, 8


@dataclass(frozen=True)
class Work:
    """Of one call: ``operations``, ``issued`` (see the module) and ``bytes``; ``interactions`` if it has any."""

    operations: float
    issued: float
    bytes: float
    interactions: float = 0.0

    def floor_s(self, machine: Machine) -> float:
        return machine.floor_s(self.issued, self.bytes)


def splat(inputs: list[Tensor], box: int, cutoff: float, backward: bool, lanes: int) -> Work:
    """Of the splat of inputs as ``ops.splat`` takes them, without clipping at the image's edge.

    Args:
        inputs: means (M, G, 3), covariances, amplitudes, rotations (V, 3, 3), shifts, model.
        backward: of the gradients of the mixture, poses fixed.
        lanes: of the machine.
    """
    pixels, rows = footprint(inputs, cutoff)
    gaussian_views = inputs[0].shape[1] * inputs[5].shape[0]
    numbers = (1 + backward) * NUMBERS_IN_PIXELS * inputs[0].shape[0] * inputs[0].shape[1]
    moved = numbers + inputs[5].shape[0] * (box**2 + NUMBERS_OF_A_VIEW)
    return _work(gaussian_views * pixels, gaussian_views * rows, moved, backward, lanes)


def footprint(inputs: list[Tensor], cutoff: float) -> tuple[float, float]:
    """Mean pixels, and mean rows, of the cut-off's rectangle in an image."""
    _, covariances, _, rotations, _, model = inputs
    symmetric = _symmetric(covariances)
    pixels = rows = 0.0
    for view, shown in zip(rotations, model.tolist(), strict=True):  # one at a time: 30,000 Gaussians in 64 views
        projected = torch.einsum("ij,gjk,ik->gi", view, symmetric[shown], view)[..., :2]
        sides = 2 * cutoff * projected.sqrt()
        pixels, rows = pixels + float(sides.prod(-1).mean()), rows + float(sides[..., 1].mean())
    return pixels / len(model), rows / len(model)


def voxelise(inputs: list[Tensor], box: int, cutoff: float, backward: bool, lanes: int) -> Work:
    """Of the map of means (M, G, 3), covariances and amplitudes: in every plane the rule of the splat."""
    symmetric = _symmetric(inputs[1])
    planes = 2 * cutoff * symmetric[..., 2, 2].sqrt()
    given_z = symmetric[..., :2, :2].diagonal(dim1=-2, dim2=-1) - symmetric[..., :2, 2] ** 2 / symmetric[..., 2, 2:]
    sides = 2 * cutoff * given_z.clamp(min=0).sqrt()
    voxels, rows = float((planes * sides.prod(-1)).sum()), float((planes * sides[..., 1]).sum())
    moved = (1 + backward) * NUMBERS_IN_PIXELS * planes.numel() + len(planes) * box**3
    return _work(voxels, rows, moved, backward, lanes)


def insertion(rotations: Tensor, grid: Tensor, box: int, padded: int) -> Work:
    """Of the insertion of half-spectra (V, D, D//2+1) into grids: eight corners of four numbers a coefficient.

    Bytes: values, weights and, read and written, every line of 64 bytes of the grids that the batch reaches.
    """
    y, x = torch.meshgrid(torch.fft.fftfreq(box) * box, torch.fft.rfftfreq(box) * box, indexing="ij")
    inside = (x**2 + y**2 < (box / 2) ** 2) & ((x > 0) | (y >= 0))
    plane = torch.stack([x[inside], y[inside]], -1).to(rotations)
    lines = -(-(padded // 2 + 1) // 4)
    reached = torch.zeros(int(grid.max()) + 1, padded * padded * lines, dtype=torch.bool, device=rotations.device)
    for view, which in zip(rotations, grid.tolist(), strict=True):
        point = padded / box * plane @ view[:2]
        point = torch.where(point[:, :1] < 0, -point, point).floor().long()
        for corner in range(8):
            i, j, k = (point[:, axis] + (corner >> axis & 1) for axis in range(3))
            at = ((k % padded) * padded + j % padded) * lines + i.clamp(max=padded // 2) // 4
            reached[which, at] = True
    coefficients = len(rotations) * len(plane)
    operations = 32.0 * coefficients
    moved = 2 * 64 * float(reached.sum()) + coefficients * (COMPLEX + FLOAT)
    return Work(operations, operations, moved, 8.0 * coefficients)


def residual(box: int, images: int, views: int) -> Work:
    """Of the spectral residual of ``views`` projections of ``images`` particles, data in half precision.

    For each coefficient of a view two products by the filter, a difference and a square, of complex numbers; making the
    CTF from its parameters is left out.
    """
    coefficients = float(box * (box // 2 + 1))
    moved = 2 * COMPLEX * coefficients * views + HALF_COMPLEX * coefficients * images
    return Work(8 * coefficients * views, 8 * coefficients * views, moved)


def step(inputs: list[Tensor], box: int, cutoff: float, images: int, lanes: int) -> dict[str, Work]:
    """Of the kernels of a training step on ``images`` particles whose views are those of ``inputs``.

    The images' transforms are read from memory in half precision, once for all views of a particle.
    """
    views = inputs[5].shape[0]
    pixels, coefficients = float(box**2), float(box * (box // 2 + 1))
    transform = FLOAT * pixels + COMPLEX * coefficients
    # A real transform of n numbers takes 5/4 n log2 n multiply-adds.
    turning = 1.25 * pixels * math.log2(pixels) * views
    passes = views * (transform + (FFT_PASSES - 1) * 2 * COMPLEX * coefficients)
    parameters = inputs[0].shape[0] * inputs[0].shape[1] * 11
    return {
        "splat": splat(inputs, box, cutoff, False, lanes),
        "transform": Work(turning, turning, passes),
        "residual": residual(box, images, views),
        "inverse transform": Work(turning, turning, passes),
        "gradient": splat(inputs, box, cutoff, True, lanes),
        "optimiser": Work(0.0, 0.0, FLOAT * ADAM_NUMBERS * parameters),
    }


def _work(interactions: float, rows: float, moved_numbers: float, backward: bool, lanes: int) -> Work:
    each = BACKWARD_OPERATIONS if backward else FORWARD_OPERATIONS
    issued = each * (interactions if lanes == 1 else rows * lanes)
    return Work(each * interactions, issued, FLOAT * float(moved_numbers), interactions)


def _symmetric(covariances: Tensor) -> Tensor:
    return covariances[..., [0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(-1, (3, 3))
