"""The lock of a run directory: one job at a time writes there, and what a dead one has left stands in nobody's way.

A lock is a file, lock.json, a name that is given only if nothing has it, which NFS honours too. It says who holds it,
and its modification time is renewed while the holder lives. Whether a holder lives is asked, in this order, of its
process (if it is one of this machine), of Slurm (if it was a job), and of the age of its last sign of life, by the file
server's clock alone.
"""

import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from cryosplat.errors import InputError

logger = logging.getLogger(__name__)

NAME = "lock.json"

BEAT_S = 15.0
STALE_S = 180.0
"""Between signs of life, and without one after which a holder is held to be dead. Servers show a file's time up to a
minute late."""

RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
"""States of Slurm in which a job's processes may be there."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, pid: its process.
        started: when that began, in ticks since the machine did; with ``boot`` and ``namespace`` it tells processes of
            one number apart.
        job, restarts, cluster: of Slurm; empty without.
        token: of this lock and no other.
    """

    host: str
    pid: int
    started: str
    boot: str
    namespace: str
    job: str
    restarts: str
    cluster: str
    token: str

    @classmethod
    def this_process(cls) -> "Holder":
        variables = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")
        slurm = (os.environ.get(name, "") for name in variables)
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), *_machine(), *slurm, secrets.token_hex(8))

    @classmethod
    def of(cls, facts: object) -> "Holder | None":
        """The holder that a file tells of; None if it does not."""
        try:
            return cls(**facts)
        except TypeError:
            return None

    def __str__(self) -> str:
        job = f", job {self.job} of Slurm" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """The lock of a folder, for one process at a time; not held until ``acquire``.

    Args:
        folder: the run directory; it need not be there yet.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._holder: Holder | None = None
        self._done = threading.Event()

    def acquire(self) -> None:
        """Take the lock, also from a holder that is dead, which the log says; nothing if it is held already.

        Raises:
            InputError: a job that is alive, or may be, holds it; or the folder cannot be written to.
        """
        if self._holder is not None:
            return
        mine = Holder.this_process()
        try:
            while not self._create(mine):
                self._remove_if_stale(mine)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._holder = mine
        threading.Thread(target=self._beat, args=(mine,), daemon=True).start()

    def require(self) -> None:
        """See that the lock is still this process's: it may have slept for longer than others wait.

        Raises:
            InputError: another has taken it over.
        """
        held = read_holder(self.path)
        if self._holder is not None and (held is None or held.token != self._holder.token):
            raise InputError(f"{self.path.parent}: {held or 'somebody'} has taken over this run; this process stops")

    def release(self) -> None:
        """Give it back; nothing if it is not held, or not any more."""
        mine, self._holder = self._holder, None
        self._done.set()
        held = read_holder(self.path)
        if mine is not None and held is not None and held.token == mine.token:
            self.path.unlink(missing_ok=True)

    def _create(self, mine: Holder) -> bool:
        """Whether there was no lock; it appears with all that it says, by a link to a finished file."""
        finished = self.path.with_name(f".lock.{os.getpid()}.{mine.token[:8]}.json")
        try:
            finished.write_text(json.dumps(asdict(mine), indent=1) + "\n")
            return _put(finished, self.path)
        finally:
            finished.unlink(missing_ok=True)

    def _remove_if_stale(self, mine: Holder) -> None:
        found = read_holder(self.path)
        if not self.path.exists():
            return  # given back meanwhile
        age = self._age(mine)
        reason = why_dead(found, mine, age)
        if reason is None:
            raise InputError(
                f"run_dir: {self.path.parent} is in use by {found}, whose last sign of life is {age:.0f} s old. Wait "
                f"for it or end it, or choose another run_dir; if nothing can be alive there, remove {self.path}"
            )
        # Another process may have come to the same conclusion and be the new holder already: then it gets it back.
        aside = self.path.with_name(f".lock.{os.getpid()}.{mine.token[8:]}.json")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            if read_holder(aside) == found:
                logger.warning("%s: taking over from %s: %s", self.path.parent, found or "an unreadable lock", reason)
            else:
                _put(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)

    def _age(self, mine: Holder) -> float:
        """Seconds since the last sign of life, by the clock of whoever keeps the files."""
        probe = self.path.with_name(f".lock.{os.getpid()}.{mine.token[4:12]}.json")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self, mine: Holder) -> None:
        while not self._done.wait(BEAT_S):
            held = read_holder(self.path)
            if held is None or held.token != mine.token:
                return
            try:
                os.utime(self.path)
            except OSError:
                continue  # a server that is away for a moment; the next beat will tell


def _put(file: Path, path: Path) -> bool:
    """Give a file a second name that nothing has yet; whether nothing had it."""
    try:
        os.link(file, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        try:  # no second names here: a copy, which for a moment is not whole, but is there
            with open(path, "x") as handle:
                handle.write(file.read_text())
        except FileExistsError:
            return False
    return True


def why_dead(found: Holder | None, mine: Holder, age: float) -> str | None:
    """Why a holder is held to be dead; None if it may be alive.

    Args:
        found: the holder; None: a lock that cannot be read.
        mine: this process.
        age: seconds since its last sign of life.
    """
    place = (mine.host, mine.boot, mine.namespace)
    if found is not None and mine.boot and (found.host, found.boot, found.namespace) == place:
        return None if _started(found.pid) == found.started else "that process has ended"
    if found is not None and found.job and found.job == mine.job and found.restarts != mine.restarts:
        return "that was this job, before it was queued again"
    if found is not None and found.job and found.cluster in ("", mine.cluster or found.cluster):
        state = _slurm_state(found.job)
        if state is not None and state not in RUNNING:
            return f"that job is {state.lower() or 'unknown to Slurm'}"
    return f"no sign of life for {age:.0f} s" if age > STALE_S else None


def _slurm_state(job: str) -> str | None:
    """What Slurm says of a job, empty if it knows of none; None if it does not answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode == 0:
        return answer.stdout.strip()
    return "" if "Invalid job id" in answer.stderr else None


def read_holder(path: Path) -> Holder | None:
    """None if there is none, or none that can be read."""
    try:
        return Holder.of(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _machine() -> tuple[str, str]:
    """This boot of this machine, and the namespace in which its processes are counted."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return "", ""


def _started(pid: int) -> str:
    """When a process of this machine began; empty if there is none, or it has ended and nobody has asked how."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
