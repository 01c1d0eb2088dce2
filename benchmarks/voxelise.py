"""Wall time of a map from a mixture: python -m benchmarks.voxelise [--gaussians 30000] [--box 256] [--threads 1]."""

import argparse
import statistics
import time

import torch

from benchmarks.ops import CUTOFF, mixture
from cryosplat import ops
from cryosplat.gaussians import VOXEL_CUTOFF


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gaussians", type=int, default=30000)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs = mixture(args.gaussians, args.box, views=0)[:3]
    for cutoff in (CUTOFF, VOXEL_CUTOFF):
        seconds = []
        for _ in range(7):
            began = time.perf_counter()
            ops.voxelise(*inputs, args.box, cutoff)
            seconds.append(time.perf_counter() - began)
        print(f"{args.gaussians} Gaussians into {args.box}^3, cut-off {cutoff}: {statistics.median(seconds):.3f} s")


if __name__ == "__main__":
    main()
