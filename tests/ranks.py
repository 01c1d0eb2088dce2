"""Training on several ranks for the tests, with something watched or gone wrong on the way.

Under torchrun, as a user starts it:   torchrun --nproc-per-node 2 ranks.py PROGRAM FOLDER ARGUMENT key=value ...
Many jobs at less cost:                python ranks.py JOBS.json

The second forks the ranks of every job from one process, which has imported PyTorch once; each rank finds what torchrun
would have put into its environment. A rank's output goes to FOLDER/rank0.txt and so on.
"""

import dataclasses
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import training_set
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from cryosplat import distributed, nodeimages, train
from cryosplat.descent import Descent
from cryosplat.errors import is_first_rank
from cryosplat.optimiser import GatedAdam
from cryosplat.trainer import Trainer

FEW = 20
"""Steps of a ``mortal`` training."""

TIMEOUT_S = 120
"""After which ranks that hang are killed; none takes ten seconds."""


@dataclasses.dataclass
class Job:
    """``folder`` takes the outputs; ``argument`` is the program's own, ``words`` are settings of the training."""

    program: str
    ranks: int
    folder: str
    words: list[str]
    argument: int = 0


@dataclasses.dataclass
class Outcome:
    """Exit codes (negative: the signal) and outputs, one for each rank."""

    codes: list[int]
    texts: list[str]


def run_jobs(folder: Path, jobs: list[Job]) -> list[Outcome]:
    """Run jobs one after the other, their ranks at the same time."""
    for job in jobs:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
    listing = folder / "jobs.json"
    listing.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    subprocess.run([sys.executable, __file__, str(listing)], check=True, env=environment())
    codes = json.loads(listing.with_suffix(".codes").read_text())
    return [
        Outcome(of_job, [(Path(job.folder) / f"rank{rank}.txt").read_text() for rank in range(job.ranks)])
        for job, of_job in zip(jobs, codes, strict=True)
    ]


def environment() -> dict[str, str]:
    """This process's, without what a launcher has left in it, and one thread a rank."""
    left = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        left.pop(name, None)
    return left | {"OMP_NUM_THREADS": "1"}


# Programs: what every rank does. Each returns the exit code.


def recorded(folder: Path, argument: int, words: list[str]) -> int:
    """Train, and save what passed: ids and losses of every batch, parameters before it, the first three gradients."""
    record = {"ids": [], "gradients": [], "losses": [], "theta": []}
    step, update = Trainer._step, GatedAdam.step

    def watched_step(self, mine, counts, rate):
        record["ids"].append(torch.from_numpy(mine.ids))
        record["theta"].append(self.reconstruction.mixture.theta.detach().clone())
        step(self, mine, counts, rate)

    def watched_update(self, losses, counts):
        if len(record["gradients"]) < 3:
            record["gradients"].append(torch.stack([mixture.grad.clone() for mixture in self._mixtures]))
        record["losses"].append(losses.clone())
        update(self, losses, counts)

    Trainer._step, GatedAdam.step = watched_step, watched_update
    try:
        return train.main(words)
    finally:
        Trainer._step, GatedAdam.step = step, update
        torch.save(record, folder / f"record{os.environ.get('RANK', '0')}.pt")


def counted(folder: Path, argument: int, words: list[str]) -> int:
    """Train; ``argument`` 1: as on GPUs, where gradients are shared apart. Saves how often they were shared."""
    wrap, shared = distributed.wrap, []

    def counting(_, bucket):
        shared.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    def watched_wrap(module, world):
        made = wrap(module, world)
        made.register_comm_hook(None, counting)
        return made

    prepare = Trainer.__post_init__

    def prepared(self):
        prepare(self)
        self._shares_apart = argument == 1

    distributed.wrap, Trainer.__post_init__ = watched_wrap, prepared
    code = train.main(words)
    (folder / f"shared{os.environ['RANK']}.txt").write_text(str(sum(shared)))
    return code


def poisoned(folder: Path, argument: int, words: list[str]) -> int:
    """Train; the last rank's first particle of step ``argument`` turns into NaN.

    Saves the parameters in the end, and whether DistributedDataParallel was gone before the process group was.
    """
    step, run_epoch, wrap, destroy = Trainer._step, Trainer.run_epoch, distributed.wrap, dist.destroy_process_group
    wrapped = []

    def poisoned_step(self, mine, counts, rate):
        if self.progress.step == argument and self.world.rank == self.world.size - 1:
            self.dataset._spectra[self.dataset._row[mine.ids[0]]] = torch.nan
            (folder / "particle.txt").write_text(self.table.location(int(mine.ids[0])))
        step(self, mine, counts, rate)

    def watched_epoch(self, *callbacks):
        try:
            run_epoch(self, *callbacks)
        finally:
            torch.save(self.reconstruction.mixture.theta.detach(), folder / f"theta{self.world.rank}.pt")

    def watched_wrap(module, world):
        made = wrap(module, world)
        wrapped.append(weakref.ref(made))
        return made

    def watched_destroy():
        (folder / f"freed{dist.get_rank()}.txt").write_text(str([each() is None for each in wrapped]))
        destroy()

    Trainer._step, Trainer.run_epoch = poisoned_step, watched_epoch
    distributed.wrap, dist.destroy_process_group = watched_wrap, watched_destroy
    return train.main(words)


def killed(folder: Path, argument: int, words: list[str]) -> int:
    """Train, and die without a word before step ``argument``."""
    step = Trainer._step

    def last_step(self, mine, counts, rate):
        if self.progress.step == argument:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, mine, counts, rate)

    Trainer._step = last_step
    return train.main(words)


def asked(folder: Path, argument: int, words: list[str]) -> int:
    """Train; before step ``argument`` the last rank, and no other, is sent SIGTERM. Steps take long enough to meet."""
    step = Trainer._step

    def watched_step(self, mine, counts, rate):
        if self.progress.step == argument and self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, mine, counts, rate)

    Trainer._step = watched_step
    return train.main(words)


def asked_in_fit(folder: Path, argument: int, words: list[str]) -> int:
    """Fit; before step ``argument`` of its first fit the last rank is sent SIGUSR2, and others are slow."""
    step, last = Descent.step, int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1

    def watched_step(self):
        if self.steps == argument and last:
            os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0 if last else 0.05)
        step(self)

    Descent.step = watched_step
    return train.main(words)


def asked_while(folder: Path, argument: int, words: list[str]) -> int:
    """Train; rank 0 is sent SIGUSR2 while it reads images (``argument`` 0) or evaluates (1)."""
    owner, name = ((nodeimages, "ParticleDataset"), (train, "evaluate"))[argument]
    work = getattr(owner, name)

    def watched(*args, **kwargs):
        if is_first_rank():
            os.kill(os.getpid(), signal.SIGUSR2)
        return work(*args, **kwargs)

    setattr(owner, name, watched)
    return train.main(words)


def stopped(folder: Path, argument: int, words: list[str]) -> int:
    """Train; before step ``argument`` the last rank stops for good, and is killed some seconds later."""
    step = Trainer._step

    def watched_step(self, mine, counts, rate):
        if self.progress.step == argument and self.world.rank == self.world.size - 1:
            subprocess.Popen(["sh", "-c", f"sleep 12; kill -9 {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        step(self, mine, counts, rate)

    Trainer._step = watched_step
    return train.main(words)


def mortal(folder: Path, argument: int, words: list[str]) -> int:
    """Train and die without a word after ``argument`` ms, whatever is done then, or after FEW slow steps if that is
    earlier; after minus ``argument`` ms at full speed, if it is negative."""
    step, left = Trainer._step, [FEW]

    def slow_step(self, mine, counts, rate):
        time.sleep(0.05)
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, mine, counts, rate)

    if argument > 0:
        Trainer._step = slow_step
    threading.Timer(abs(argument) / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return train.main(words)


def plain(folder: Path, argument: int, words: list[str]) -> int:
    """Train, and keep the summary that this rank is given."""
    ended = train.train

    def watched(config):
        summary = ended(config)
        (folder / f"summary{os.environ.get('RANK', '0')}.json").write_text(json.dumps(summary))
        return summary

    train.train = watched
    return train.main(words)


ALL = (recorded, counted, poisoned, killed, asked, asked_in_fit, asked_while, stopped, mortal, plain)
PROGRAMS = {program.__name__: program for program in ALL}


# The launcher


def _launch(job: Job) -> list[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [_fork(job, rank, port) for rank in range(job.ranks)]
    codes, end = {}, time.monotonic() + TIMEOUT_S
    while len(codes) < job.ranks:
        for process in processes:
            if process not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[process] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[process] for process in processes]


def _fork(job: Job, rank: int, port: int) -> int:
    """Process number of a rank."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        if job.ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        output = os.open(Path(job.folder) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            with training_set.without_figures():
                code = PROGRAMS[job.program](Path(job.folder), job.argument, job.words)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # what Python itself would print
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> int:
    if len(sys.argv) == 2:
        for module in ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure"):
            importlib.import_module(module)  # before the fork, so that no rank has to
        listing = Path(sys.argv[1])
        codes = [_launch(Job(**job)) for job in json.loads(listing.read_text())]
        listing.with_suffix(".codes").write_text(json.dumps(codes))
        return 0
    program, folder, argument, *words = sys.argv[1:]
    return PROGRAMS[program](Path(folder), int(argument), words)


if __name__ == "__main__":
    sys.exit(main())
