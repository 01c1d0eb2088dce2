"""A rank's images before training: read, brought to one scale with those of all ranks, and summed to linear maps."""

import logging

import numpy as np

from cryosplat import distributed, progress, symmetrycheck
from cryosplat.backprojection import LinearHalf, back_project, linear_half
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS
from cryosplat.dataset import ParticleDataset, noise_weights, radial_noise
from cryosplat.evaluation import Comparison
from cryosplat.fingerprints import images_in_both_halves, same_images
from cryosplat.fsc import resolution
from cryosplat.halves import DRAWN
from cryosplat.linearmaps import LinearMaps, linear_maps, require_signal
from cryosplat.nodeimages import read_images
from cryosplat.particles import ParticleTable
from cryosplat.sampling import BatchPlan
from cryosplat.settings import Config
from cryosplat.sign import Sign, find_sign
from cryosplat.symmetry import operators

logger = logging.getLogger("cryosplat.train")

_NULLS = {"noise": "pixels", "phases": "phases beyond data.null_shell_a"}


class Preparation:
    """The images that a rank owns, and what is known of all ranks' images before anything is trained; a collective.

    Args:
        config: of the run.
        table: all particles.
        plan: which rank owns which of them, and which are held out.
        cache: where images are held, "device", "host" or "disk".

    Attributes:
        table, plan: all particles and who owns which, in halves that share no image if they were drawn.
        dataset: the rank's images, read.
        same: (N,) for every particle the first one whose image it shares.
        shared: images with copies in both halves.
        noise: (2, S) radial noise power of either half.
        weights: (2, D, D//2+1) that whiten it, if that was asked for.
        sign: of the data.
        held_out: the likelihood of held-out images, on rank 0, once images were back-projected.
        agreement: what the images say of the particle's symmetry, on rank 0; None: nothing, or nothing yet.

    Raises:
        InputError: an image that cannot be used.
    """

    def __init__(self, config: Config, world: distributed.World, table: ParticleTable, plan: BatchPlan, cache: str):
        self.config, self.world, self.table, self.plan, self._cache = config, world, table, plan, cache
        if world.is_main:
            logger.info(
                "%d particles of %d px at %.4g A; %s", len(table), table.box, table.pixel_size_a, table.half_origin
            )
        self.dataset = self._read()
        self.held_out = self.agreement = None

    def _read(self) -> ParticleDataset:
        world = self.world
        owned = int((self.plan.owner(world.size) == world.rank).sum())
        progress.stage("reading images", owned, "images" if world.size == 1 else "images of rank 0")
        dataset = read_images(self.config, world, self.table, self.plan, self._cache, progress.at)
        logger.info("rank %d: read %d images, %.2f GiB", world.rank, owned, dataset.bytes_in_memory / 2**30)
        return dataset

    def share_statistics(self) -> None:
        """Bring the images of all ranks to one scale; a collective.

        Where halves were drawn and turn out to share images, under other names, copies are brought together in one
        half and the images read again, in the new halves: these share no statistic, whatever was read before.
        """
        mine = self.dataset.statistics
        # Every particle's numbers come from its one owner, so the sums are exact.
        numbers, deviation, power, count = distributed.sum_arrays(
            (mine.fingerprint, mine.deviation, mine.power, mine.count), self.world
        )
        self.same = same_images(numbers)
        self.shared = images_in_both_halves(self.same, self.dataset.half)
        if self.shared and self.config.maps.halves and self.table.half_from in DRAWN:
            if self.world.is_main:
                logger.warning(
                    "%d images have copies in both halves, as these were drawn: all copies go to one half, and the "
                    "images are read again",
                    self.shared,
                )
            self.dataset = None  # its memory is needed
            self.table = self.table.with_copies_together(self.same)
            self.plan = BatchPlan(self.table.half, self.plan.batch, self.plan.seed, self.table.held_out)
            self.dataset = self._read()
            self.share_statistics()
            return
        if self.shared and self.world.is_main:
            logger.warning("%d images have copies in both halves: the half maps are not independent", self.shared)
        self.dataset.normalise(deviation)
        self.noise = radial_noise(power, count)
        self.weights = noise_weights(power, count, self.dataset.box) if self.config.train.whiten else None

    def find_sign(self, state: dict | None) -> None:
        """Have the images in the sign that they turn out to be, or that a run which goes on was begun with.

        Args:
            state: of that run; None: a new one.

        Raises:
            InputError: ``data.invert`` is set and clearly wrong.
        """
        data, table = self.config.data, self.table
        if state is None:
            check = data.check_sign and data.null == "none"
            self.sign = find_sign(self.dataset, table, self.noise, self.world, self.config.train.seed, check)
        else:
            # Runs of before it was stored used what the input said, and stopped if the images did not agree.
            self.sign = Sign(**state["sign"]) if "sign" in state else Sign(table.invert, 0.0, "")
            self.dataset.set_sign(self.sign.invert)

    def make_null(self) -> None:
        """Take the signal out of the images, for a null test, if that was asked for."""
        data = self.config.data
        if data.null != "none":
            self.dataset.make_null(data.null, data.null_seed, self.same, self.noise, data.null_shell_a)
            logger.info("rank %d: null test: the images' %s are random", self.world.rank, _NULLS[data.null])

    def back_project(
        self, comparison: Comparison | None, checked: bool, watched: bool
    ) -> tuple[tuple[LinearHalf, ...] | None, LinearMaps | None]:
        """The linear reconstruction of the images that are trained on: of both halves, or of all; a collective.

        Args:
            comparison: what maps are compared by, on rank 0.
            checked: whether images that no map can be made of are to be refused.
            watched: whether held-out images are to watch a fit in the volume.

        Returns:
            The reconstructions and, with halves, what becomes of them; on rank 0. None if a run needs none.

        Raises:
            InputError: halves that agree on nothing.
        """
        world, dataset, plan = self.world, self.dataset, self.plan
        halves, fits = self.config.maps.halves, self.config.volume.steps > 0
        if not halves and not fits:
            return None, None

        symmetry = operators(self.config.model.symmetry)

        def reconstruct(ids: np.ndarray, halves: bool) -> tuple[LinearHalf, ...] | None:
            mine = dataset.in_file_order(dataset.owned[ids[dataset.owned]])
            progress.stage("summing images", len(mine), "images")
            sums = back_project(dataset, mine, self.noise, world, symmetry, halves)
            progress.stage("linear maps")
            return None if sums is None else tuple(linear_half(one, dataset.box, symmetry) for one in sums)

        distributed.doing("the sums of images")
        found = reconstruct(~plan.held_out, halves)
        if symmetry is not None and halves and self.config.data.null == "none":
            self._ask_for_symmetry(found)
        watched = watched and fits and plan.held_out.any()
        kept = reconstruct(plan.held_out, False) if watched else None
        self.held_out = kept[0].equations if kept else None
        distributed.wait_for_main(world)
        return found, distributed.together(
            lambda: self._look_at(found, comparison, checked) if world.is_main else None, world
        )

    def _ask_for_symmetry(self, symmetric: tuple[LinearHalf, ...] | None) -> None:
        """See whether the particle has the symmetry that it is said to have, and say so; a collective."""
        dataset, name = self.dataset, self.config.model.symmetry
        mine = dataset.owned[~self.plan.held_out[dataset.owned]]
        self.agreement = symmetrycheck.agreement(dataset, mine, self.noise, self.world, symmetric)
        if self.world.is_main:
            logger.info("symmetry %s: %s", name, self.agreement or "the images agree on too little to tell")
            if self.agreement and (warning := self.agreement.warning(name)):
                logger.warning("%s", warning)

    def _look_at(self, halves: tuple[LinearHalf, ...], comparison: Comparison, checked: bool) -> LinearMaps | None:
        """Make the linear maps of the halves, and see whether they are worth fitting anything to."""
        data, linear = self.config.data, None
        if self.config.maps.halves:
            linear = linear_maps(halves, self.dataset.pixel_size_a, comparison.mask, f"data.mask={data.mask}")
        if linear is not None:
            # The first that is known of the resolution, long before anything is fitted.
            found = resolution(linear.curve, RESOLUTION_THRESHOLD_HALF_MAPS)
            logger.info("linear half maps: %s (FSC 0.143, not corrected for the mask)", found)
            progress.know(resolution=f"{found} (linear half maps, FSC 0.143)")
        if checked and data.check_signal and linear is not None:
            require_signal(linear)
        return linear
