"""A real Slurm on this machine, for the tests: two nodes with hostnames of their own, started in under a second.

``slurm/up`` says what it is made of. It needs root, unshare and the packages below, which are installed where they are
missing and apt may. One cluster of a kind serves a whole test session, all its workers too; a test has it to itself.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent / "slurm"
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
SESSION = "CRYOSPLAT_TEST_CLUSTERS"
"""Names the folder of this session's clusters in the environment, where xdist's workers find it too."""

REQUIRED = "CRYOSPLAT_TEST_SLURM_REQUIRED"
"""Set where these tests must run, and being unable to is a failure: in CI."""

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
"""States that a job does not leave by itself."""


@dataclass(frozen=True)
class Cluster:
    """Nodes node1 and node2, 8 cores and 2 GPUs each (devices that stand in for them); partitions main and high.

    ``folder`` has the daemons' logs (log/), ``environment`` is what client programs need.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str | os.PathLike, **options) -> subprocess.CompletedProcess:
        """A command of this cluster's user, by default with its output kept and two minutes of time."""
        options = {"capture_output": True, "text": True, "timeout": 120, "env": self.environment, **options}
        return subprocess.run([str(word) for word in words], **options)

    def ask(self, *words: str) -> str:
        """What a command says; it must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *words: str | os.PathLike, **options) -> str:
        """Submit a batch script; returns the job's id."""
        done = self.run("sbatch", "--parsable", *words, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED; empty for a job that is not known."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """All that ``scontrol show job`` says."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)

    def wait(self, job: str, states: Sequence[str] = OVER, seconds: float = 100) -> str:
        """Wait until the job is in one of ``states``; returns which."""
        self.until(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", seconds)
        return self.state(job)

    def until(self, happened: Callable[[], bool], what: str, seconds: float = 100) -> None:
        """Wait for something; fails with the queue and the controller's last words."""
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end:
                log = (self.folder / "log" / "slurmctld.log").read_text().splitlines()[-15:]
                queue = self.run("squeue", "--states=all").stdout
                pytest.fail(f"waited {seconds} s in vain for {what}\n{queue}\n" + "\n".join(log))
            time.sleep(0.1)

    def crash_node(self, number: int) -> None:
        """As a power cut would: everything on the node is gone at once."""
        assert self.run(self.folder / "bin" / "crash-node", str(number)).returncode == 0

    def start_node(self, number: int) -> None:
        assert self.run(self.folder / "bin" / "start-node", str(number)).returncode == 0

    def clear(self) -> None:
        """Cancel what is left, bring back what was crashed, and wait for idle nodes."""
        for number in (1, 2):
            if not (self.folder / "run" / f"slurmd-node{number}.pid").exists():
                self.start_node(number)
        self.run("scancel", "--user=root")
        self.until(lambda: not self.run("squeue", "--noheader").stdout.strip(), "an empty queue", 40)
        for number in (1, 2):
            if "idle" not in self.ask(
                "sinfo", "--noheader", f"--nodes=node{number}", "--partition=main", "--format=%t"
            ):
                self.run("scontrol", "update", f"nodename=node{number}", "state=resume")
        idle = "sinfo --noheader --Node --partition=main --format=%t".split()
        self.until(lambda: self.ask(*idle).split() == ["idle"] * 2, "idle nodes", 40)


@contextlib.contextmanager
def cluster(kind: str) -> Iterator[Cluster]:
    """The session's cluster of a kind, for this test alone; skips where there cannot be one.

    Args:
        kind: "1", or "net": each node in a network of its own, where a loopback address leads to no other node.
    """
    session = Path(os.environ[SESSION])
    with open(session / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _start(session, kind)
        try:
            yield found
        finally:
            found.clear()


def begin_session() -> None:
    """Make the folder of this session's clusters; a short path, because that of munge's socket may have 107 bytes."""
    os.environ[SESSION] = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")
    (Path(os.environ[SESSION]) / "pid").write_text(str(os.getpid()))


def end_session() -> None:
    """Stop this session's clusters, whatever has become of its tests."""
    session = Path(os.environ.pop(SESSION))
    for running in session.glob("*/env"):
        subprocess.run([SCRIPTS / "down", running.parent], check=False, timeout=90)
    shutil.rmtree(session, ignore_errors=True)


def _start(session: Path, kind: str) -> Cluster:
    folder = session / kind
    if not (folder / "env").exists():
        _require(session)
        settings = {"NS": kind, "PORT": str(_free_ports())}
        started = subprocess.run(
            [SCRIPTS / "up", folder], env=_bare() | settings, capture_output=True, text=True, timeout=90
        )
        if started.returncode:
            _skip(session, f"no Slurm starts here: {started.stderr.strip()}")
        _guard(session, folder)
    sourced = subprocess.run(
        ["bash", "-c", f". {folder}/env; env -0"], env=_bare(), check=True, capture_output=True, text=True
    )
    words = [word.split("=", 1) for word in sourced.stdout.split("\0") if "=" in word]
    return Cluster(folder, {name: value for name, value in words})


def _guard(session: Path, folder: Path) -> None:
    """Stop the cluster when the session's process is gone, which may have been killed before it could do so."""
    session_ends = f"tail --pid={(session / 'pid').read_text()} -f /dev/null"
    stop = f"[ ! -e '{folder}/env' ] || '{SCRIPTS}/down' '{folder}'"
    command = ["setsid", "--fork", "bash", "-c", f"{session_ends}; {stop}; rm -rf '{session}'"]
    nothing = subprocess.DEVNULL
    subprocess.run(command, check=True, stdin=nothing, stdout=nothing, stderr=nothing)


def _bare() -> dict[str, str]:
    """This process's environment without what another Slurm or launcher has put there, and one thread a rank."""
    others = ("SLURM", "SUBMITIT", "SBATCH", "SRUN", "RANK", "LOCAL_", "WORLD_", "MASTER_")
    left = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return left | {"OMP_NUM_THREADS": "1", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def _require(session: Path) -> None:
    """Install Slurm if it is missing and that may be done; else skip. What was found once holds for the session."""
    if (session / "skip").exists():
        _skip_or_fail((session / "skip").read_text())
    if os.geteuid() != 0:
        _skip(session, "a Slurm of our own needs root (unshare, munged)")
    if _missing():
        if shutil.which("apt-get") is None:
            _skip(session, f"no {', '.join(_missing())} here, and no apt-get to install {' '.join(PACKAGES)}")
        error = _install()
        if _missing():
            _skip(session, f"apt-get does not install {' '.join(PACKAGES)}: {error}")


def _skip(session: Path, reason: str) -> None:
    (session / "skip").write_text(reason)
    _skip_or_fail(reason)


def _skip_or_fail(reason: str) -> None:
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and {reason}")
    pytest.skip(reason)


def _missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_bare()["PATH"]) is None]


def _install() -> str:
    """Returns the last line of what apt-get said."""
    # At this run level services are installed and not started: what the tests need they start themselves.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if command == install and done.returncode == 0:
            break
    return (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]


def _free_ports() -> int:
    """The first of some consecutive ports that nobody listens on; sessions side by side start at different ones."""
    for attempt in range(30):
        first = 16800 + 100 * ((os.getpid() + attempt) % 31)
        if not any(_listening(first + offset) for offset in (0, 11, 12)):
            return first
    raise RuntimeError("no free ports for a Slurm between 16800 and 19900")


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
