"""The cluster that the other tests on Slurm run on."""

import pytest
import slurmcluster


def test_a_job_runs_on_two_nodes_with_names_and_gpus_of_their_own(slurm, tmp_path):
    wrapped = "--wrap=srun bash -c 'hostname; echo $CUDA_VISIBLE_DEVICES'"
    job = slurm.sbatch("--nodes=2", "--gpus-per-node=2", f"--output={tmp_path}/log", wrapped)
    assert slurm.wait(job) == "COMPLETED"
    assert sorted((tmp_path / "log").read_text().split()) == ["0,1", "0,1", "node1", "node2"]


def test_nodes_with_networks_of_their_own_do_not_meet_on_the_loopback(slurm_net, tmp_path):
    job = slurm_net.sbatch("--nodes=2", f"--output={tmp_path}/log", "--wrap=srun hostname -I")
    assert slurm_net.wait(job) == "COMPLETED"
    assert len(set((tmp_path / "log").read_text().split())) == 2


def test_without_root_the_tests_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(slurmcluster.os, "geteuid", lambda: 1000)
    monkeypatch.setenv(slurmcluster.SESSION, str(tmp_path))
    monkeypatch.delenv(slurmcluster.REQUIRED, raising=False)
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match="needs root"), slurmcluster.cluster("1"):
            pass
    assert "needs root" in (tmp_path / "skip").read_text()
    monkeypatch.setenv(slurmcluster.REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="needs root"), slurmcluster.cluster("1"):
        pass


def test_what_is_missing_is_installed_or_the_reason_given(tmp_path, monkeypatch):
    apt = tmp_path / "apt-get"
    apt.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\necho "E: no network" >&2\nexit 100\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurmcluster.os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurmcluster, "PROGRAMS", ("no-such-slurmctld",))
    monkeypatch.setenv(slurmcluster.SESSION, str(tmp_path))
    monkeypatch.delenv(slurmcluster.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="does not install munge .*: E: no network"):
        with slurmcluster.cluster("1"):
            pass
    install = "install -y --no-install-recommends munge slurmctld slurmd slurm-client"
    assert (tmp_path / "asked").read_text().splitlines() == [install, "update", install]
