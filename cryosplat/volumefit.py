"""Fitting mixtures in the volume: to the likelihood of all images at once, as the linear sums know it.

A mixture starts as points drawn from the density of its own linear map, all of one size and amplitude, or at random.
Then Adam follows the gradient of

    Q(V) + prior / 2 sum_i (a_i - 1)^2,

Q in nats (``quadratic.QuadraticForm``), V the mixture's map and a_i its amplitudes over their mean at the start. The
prior is what is known before there is an image: density where the start has found some, more or less. Amplitudes are
free to be negative, and become so where the images insist (some of a protein is less dense than solvent), but not where
they only whisper. Every figure here has its row in benchmarks/quality.md.

Nothing is shared between models: mask, filter, number of Gaussians and points are each half's own.
"""

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.optimize
import torch
from torch import Tensor

from cryosplat import distributed, progress
from cryosplat.backprojection import LinearHalf
from cryosplat.descent import Descent
from cryosplat.errors import InputError, Interrupted
from cryosplat.fitkeeping import FitKeeper
from cryosplat.gaussians import AMPLITUDE, MEAN, NUMBERS, QUATERNION, SCALE, GaussianMixture, inverse_softplus
from cryosplat.masks import mask_from_map, spherical_mask
from cryosplat.metrics import OVERFITTED
from cryosplat.quadratic import NormalEquations
from cryosplat.sectors import SectorSums, smooth
from cryosplat.settings import ModelConfig, VolumeConfig
from cryosplat.symmetry import fold

logger = logging.getLogger(__name__)

SIGNIFICANT = 0.1
"""Mean Wiener weight of the last shell that counts as resolved when Gaussians are counted."""

GAUSSIANS_PER_ELEMENT = 3.0
"""Gaussians for each cube, of the resolution's side, of the volume under the mask."""

FEWEST, MOST = 256, 200_000
"""Bounds of that count."""

START_LOW_PASS_A = 6.0
"""Half-amplitude resolution that the density is smoothed to before points are drawn from it."""

START_SCALE = 0.65
"""Standard deviation of the first Gaussians over the distance between them."""

MASK_LEVEL = 0.3
"""Value of the mask down to which it counts for the side of the fit's box."""

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Problem:
    """What one model is fitted to, all of it from the images of that model alone.

    Attributes:
        half: its linear map, the map's variance and the normal equations.
        pixel_size_a: A/px.
        name: of the model, in messages.
        seed: of the points drawn.
        share: of all images that are the model's. What is made of both halves has the noise of all images, so each
            half is filtered, and its Gaussians are counted, as for that noise and not for its own.
        held_out: normal equations of images that nothing is fitted to, to watch overfitting with; None: there are none.
    """

    half: LinearHalf
    pixel_size_a: float
    name: str
    seed: int
    share: float = 1.0
    held_out: NormalEquations | None = None

    @property
    def box(self) -> int:
        """D."""
        return len(self.half.map)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A mixture that came out of a fit.

    Attributes:
        parameters: (G, 11) of ``GaussianMixture``, on the CPU.
        unit: its grey scale.
        gains: log likelihood over that of an empty map, in nats, before every step.
        held_out_gains: the same of the images held out; empty if there are none.
    """

    parameters: Tensor
    unit: float
    gains: list[float]
    held_out_gains: list[float]

    def warn(self, name: str) -> None:
        """Say what a user should know of a fit, if anything."""
        if self.gains[-1] < self.gains[0]:
            logger.warning("%s: its fit in the volume made it worse; lower volume.step_px", name)
        best = int(np.argmax(self.held_out_gains)) if self.held_out_gains else 0
        if self.held_out_gains and self.held_out_gains[-1] < (1 - OVERFITTED) * self.held_out_gains[best]:
            logger.warning(
                "%s: after step %d of its fit the images held out fell from %.5g to %.5g nats: more Gaussians or steps "
                "than the data carry; lower model.gaussians or volume.steps, or raise volume.prior",
                *(name, best, self.held_out_gains[best], self.held_out_gains[-1]),
            )


def whole(halves: tuple[LinearHalf, LinearHalf]) -> LinearHalf:
    """The linear map of all particles from those of both halves, weighted by voxel with what each knows."""
    weights = [1 / half.variance for half in halves]
    total = weights[0] + weights[1]
    spectrum = sum(
        scipy.fft.rfftn(half.map) * weight for half, weight in zip(halves, weights, strict=True)
    ) / np.maximum(total, 1e-30)
    variance = np.divide(1, total, out=np.full_like(total, np.inf), where=total > 0)
    volume = scipy.fft.irfftn(spectrum, halves[0].map.shape).astype(np.float32)
    return LinearHalf(volume, variance, halves[0].equations + halves[1].equations, halves[0].symmetry)


def make_problems(
    halves: tuple[LinearHalf, ...],
    pixel_size_a: float,
    names: Sequence[str],
    seed: int,
    held_out: NormalEquations | None,
) -> list[Problem]:
    """What the models of a run are fitted to: both halves, and before them the whole of both; or the one of all."""
    linear = (whole(halves), *halves) if len(halves) == 2 else halves
    shares = (1.0, 0.5, 0.5)
    return [
        Problem(half, pixel_size_a, names[m], seed * 1_000_003 + m, shares[m], held_out)
        for m, half in enumerate(linear)
    ]


def fit(
    problem: Problem,
    model: ModelConfig,
    volume: VolumeConfig,
    scale_range: tuple[float, float],
    device: torch.device = CPU,
    keeper: FitKeeper | None = None,
) -> Fitted:
    """Start a mixture and fit it, or go on where ``keeper`` has it.

    Args:
        problem: of the model.
        model: of the run; ``gaussians`` None: as many as its resolution and volume ask for.
        volume: of the run.
        scale_range: least and greatest scale, fractions of the box.
        device: to fit on.
        keeper: keeps it on disk while it goes on.

    Raises:
        InputError: the fit did not stay finite.
        Interrupted: by ``keeper``, which has kept it.
    """
    box = problem.box
    sums = SectorSums(box)
    filtered, resolved = wiener_alone(problem.half, sums, problem.share)
    mask = _mask(problem)
    side = min(2 * (int(np.abs(np.argwhere(mask > MASK_LEVEL) - box // 2).max()) + 1), 2 * (box // 2))
    form = problem.half.equations.to(device).within(side)
    kept = None if keeper is None else keeper.load(problem.name)
    count = math.ceil((model.gaussians or _count(mask, resolved, box)) / problem.half.copies)
    if kept is not None:
        count = len(kept["parameters"])
    mixture = GaussianMixture(1, count, model.amplitudes, scale_range, problem.half.symmetry).to(device)
    if model.start == "random":
        mixture.start_randomly(model.spread, model.scale, problem.seed)
    elif kept is None:
        _start_from(filtered * mask, mixture, problem)
    held_out = None if problem.held_out is None else problem.held_out.to(device).within(side)
    descent = Descent(mixture, form, box, volume, held_out)
    if kept is not None:
        descent.load_state(kept)
        logger.info("%s: its fit in the volume goes on after step %d", problem.name, descent.steps)
    progress.stage(f"fitting {problem.name.replace('_', ' ')}", volume.steps, "steps", descent.steps)
    while descent.steps < volume.steps:
        descent.step()
        progress.at(descent.steps)
        if keeper is not None:
            keeper.after_step(problem.name, descent.state, last=descent.steps == volume.steps)
    gains, held_out_gains = descent.gains(problem.name)
    logger.info(
        "%s: %d Gaussians fitted in the volume, %d steps in a box of %d px; %.0f nats above an empty map",
        *(problem.name, mixture.drawn[0], len(gains), side, gains[-1]),
    )
    return Fitted(mixture.mixtures[0].detach().cpu(), float(mixture.unit), gains, held_out_gains)


def fit_all(
    problems: Sequence[Problem] | None,
    models: int,
    settings: tuple[ModelConfig, VolumeConfig, tuple[float, float]],
    world: distributed.World,
    keeper: FitKeeper | None = None,
) -> list[Fitted]:
    """Fit all models, each on one rank, and tell all ranks of them.

    What a fit gives does not depend on the rank that does it, nor on what the other models are.

    Args:
        problems: of the models, on rank 0; None on the others.
        models: M.
        settings: ``model``, ``volume`` and ``scale_range`` of ``fit``.
        world: the ranks.
        keeper: of this rank's fits.

    Raises:
        InputError: see ``fit``; on all ranks.
        Interrupted: on all ranks, when each has kept its fits.
    """
    mine = []
    for m in range(models):
        rank = m % world.size
        problem = distributed.send_object(None if problems is None else problems[m], rank, world)
        if rank == world.rank:
            mine.append((m, problem))

    def fit_mine() -> dict[int, Fitted]:
        done = {}
        try:
            for m, problem in mine:
                with contextlib.suppress(Interrupted):
                    done[m] = fit(problem, *settings, world.device, keeper)
            return done
        finally:
            if world.size > 1:
                progress.stage("waiting for the fits of other ranks")
            distributed.wait_for_main(world)  # and for every other rank: fits may take longer than a collective waits

    done = distributed.together(fit_mine, world)
    fitted = [distributed.broadcast_object(done.get(m), world, m % world.size) for m in range(models)]
    if None in fitted:
        raise Interrupted("a fit in the volume was not finished")
    return fitted


def wiener_alone(half: LinearHalf, sums: SectorSums, share: float = 1.0) -> tuple[np.ndarray, int]:
    """A linear map filtered by its own signal and noise, and the last shell that stands out of the noise.

    The variance is known, so one half needs no other to tell signal from noise: |L|^2 less the variance, voxels that
    are well seen counting more.
    """
    seen = np.isfinite(half.variance) & sums.inside
    variance = np.where(seen, half.variance, 1)
    trust = np.where(seen, 1 / variance, 0)
    spectrum = scipy.fft.rfftn(half.map)
    power = sums((trust * (np.abs(spectrum) ** 2 - variance)).astype(np.float32)).sum(1)
    power = smooth(np.maximum(power / np.maximum(sums(trust.astype(np.float32)).sum(1), 1e-30), 0))
    signal = power.astype(np.float32)[sums.shell]
    weights = np.where(seen, signal / (signal + share * variance), 0)
    mean = sums(weights.astype(np.float32)).sum(1) / np.maximum(sums.voxels.sum(1), 1)
    # Signal over noise may dip where a molecule's spectrum does, near 15 A, and is resolved again beyond.
    falling = scipy.optimize.isotonic_regression(mean[1:], weights=np.arange(1, len(mean)), increasing=False).x
    resolved = int((falling >= SIGNIFICANT).sum())
    return scipy.fft.irfftn(spectrum * weights, half.map.shape).astype(np.float32), max(resolved, 1)


def _mask(problem: Problem) -> np.ndarray:
    try:
        return mask_from_map(problem.half.map, problem.pixel_size_a)
    except InputError:
        logger.warning("%s: no molecule stands out in its linear map; fitting within a sphere", problem.name)
        return spherical_mask(problem.box)


def _count(mask: np.ndarray, resolved: int, box: int) -> int:
    element_px = box / resolved
    count = GAUSSIANS_PER_ELEMENT * float(mask.sum()) / element_px**3
    return int(np.clip(count, FEWEST, MOST))


@torch.no_grad()
def _start_from(density: np.ndarray, mixture: GaussianMixture, problem: Problem) -> None:
    """Points drawn from what is positive of a density (D, D, D), of one size and amplitude.

    With a symmetry as many as an asymmetric unit has are drawn from all of it, and taken into one unit: there they lie
    as points drawn from that unit do.
    """
    box, count = problem.box, mixture.gaussians
    frequency = np.fft.fftfreq(box), np.fft.rfftfreq(box)
    squares = frequency[0][:, None, None] ** 2 + frequency[0][:, None] ** 2 + frequency[1] ** 2
    fall = np.exp(-math.log(2) * squares * (START_LOW_PASS_A / problem.pixel_size_a) ** 2).astype(np.float32)
    smoothed = scipy.fft.irfftn(scipy.fft.rfftn(density) * fall, density.shape)
    weight = np.maximum(smoothed, 0).ravel().astype(np.float64)
    if not weight.sum() > 0:
        weight = np.ones_like(weight)
    rng = np.random.default_rng(problem.seed)
    threshold, within = rng.random(len(weight)), rng.random((len(weight), 3), dtype=np.float32)
    place, turn = _deal(weight, threshold, count)
    # A voxel's second point and further ones lie well apart from its first (the sequence of the plastic number).
    uniform = (within[place] + turn[:, None] * np.array([0.8191725, 0.6710436, 0.5497005])) % 1
    zyx = np.stack(np.unravel_index(place, density.shape), axis=1)
    position = zyx[:, ::-1] - box // 2 + uniform - 0.5
    if problem.half.symmetry is not None:
        position = fold(position, problem.half.symmetry)
    spacing_px = (weight.sum() ** 2 / (weight**2).sum() / mixture.drawn[0]) ** (1 / 3)
    parameters = torch.empty(count, NUMBERS)
    parameters[:, MEAN] = torch.from_numpy(position / box).float()
    parameters[:, SCALE] = inverse_softplus(START_SCALE * spacing_px / box)
    # Turned at random: the axes of a round Gaussian would all grow along those of the box.
    parameters[:, QUATERNION] = torch.from_numpy(_quaternions(uniform)).float()
    parameters[:, AMPLITUDE] = mixture.raw_amplitude_of_equals(count)
    mixture.mixtures[0].copy_(parameters)
    mixture.stay_in_bounds()


def _deal(weight: np.ndarray, threshold: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Deal ``count`` points to voxels in proportion to their weights, none much more or less than its due.

    A voxel gets floor(due + threshold) of them, its threshold uniform from 0 to 1, where dues are weights times a
    factor that makes the sum right. What a voxel gets depends on other weights through that factor alone, so that maps
    which are equal up to rounding (made by another number of ranks) have the same points, but for one now and then.

    Returns:
        The voxel of every point (count,), and which point of its voxel it is, from 0.
    """
    low, high = 0.0, 2 * (count + 1) / weight.sum()
    while np.floor(high * weight + threshold).sum() < count:
        high *= 2
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if np.floor(middle * weight + threshold).sum() >= count else (middle, high)
    number = np.floor(high * weight + threshold).astype(np.int64)
    place = np.repeat(np.arange(len(weight)), number)
    turn = np.arange(len(place)) - np.repeat(np.cumsum(number) - number, number)
    return place[:count], turn[:count]  # where the last factor adds several points at once, a few are too many


def _quaternions(uniform: np.ndarray) -> np.ndarray:
    """Quaternions (N, 4) uniform over all rotations from numbers (N, 3) uniform from 0 to 1 (Shoemake)."""
    one, two, three = uniform.T
    less, more = np.sqrt(1 - one), np.sqrt(one)
    turns = 2 * math.pi * two, 2 * math.pi * three
    return np.stack(
        [less * np.sin(turns[0]), less * np.cos(turns[0]), more * np.sin(turns[1]), more * np.cos(turns[1])], 1
    )
