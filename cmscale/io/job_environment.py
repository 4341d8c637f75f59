"""Tells a job's own variables apart, which must not reach another job."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cmscale.io.process import EARLY_SIGNAL, START

_OF_JOBS = (
    *("SLURM_", "SLURMD_", "SLURMSTEPD_", "SBATCH_", "SRUN_", "SALLOC_", "SUBMITIT_", "PMI_", "PMIX_", "OMPI_"),
    "TORCHELASTIC_",  # with torchrun's, rank 0 would wait for a store that nobody opens
)
_OF_RANKS = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", START, EARLY_SIGNAL),
    }
)
_DEVICES = frozenset({"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL"})


def outside_of_jobs(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without variables of jobs and ranks, which sbatch and srun would read as options of another job.

    SLURM_CONF stays: it says which Slurm this is, and SLURM_JWT, by which some log in. Inside of a job its devices are
    left out, too.
    """
    of_this_job = _OF_RANKS | _DEVICES if "SLURM_JOB_ID" in environment else _OF_RANKS
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("SLURM_CONF", "SLURM_JWT")) or not (name.startswith(_OF_JOBS) or name in of_this_job)
    }


@contextmanager
def outside_of_this_job() -> Iterator[None]:
    """Takes the variables of jobs and ranks out of this process's environment while the block runs."""
    before, kept = dict(os.environ), outside_of_jobs()
    for name in before.keys() - kept.keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)
