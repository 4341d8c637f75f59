#!/bin/bash
# A training under PBS with mpiexec: 4 nodes of 8 GPUs, one rank per GPU. Adapt what stands in capitals.
#PBS -N lsun-bedroom-ct
#PBS -l select=4:ncpus=64:ngpus=8:mpiprocs=8
#PBS -l walltime=24:00:00
#PBS -q QUEUE
#PBS -r y
#PBS -j oe

cd "$PBS_O_WORKDIR" || exit 1
source .venv/bin/activate

MASTER_ADDR=$(head -n 1 "$PBS_NODEFILE")
MASTER_PORT=$((10000 + ${PBS_JOBID%%[!0-9]*} % 20000))
export MASTER_ADDR MASTER_PORT

# Open MPI passes variables with -x; MPICH and Intel MPI pass them all, or with -genvlist MASTER_ADDR,MASTER_PORT.
# RANK and WORLD_SIZE follow from mpiexec's own variables.
mpiexec -x MASTER_ADDR -x MASTER_PORT -x PATH -x CMSCALE_SITE \
    python launchers/worker.py --name lsun-bedroom-ct --runs-dir RUNS configs/lsun_bedroom_ct.yaml \
    data.path=s3://BUCKET/lsun_bedroom_256
status=$?

# 75: the ranks were asked to stop (qsig -s TERM, or the time limit's signal) and saved. The next job continues.
if [ "$status" -eq 75 ]; then
    qsub "$0"
fi
exit "$status"
