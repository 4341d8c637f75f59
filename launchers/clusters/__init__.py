"""The clusters that jobs can run on: their registry, and the choice among them."""

from launchers.clusters.base import Cluster
from launchers.clusters.local import LocalMachine
from launchers.clusters.slurm import SlurmCluster
from launchers.placement import Placement, PlacementRequest

CLUSTERS: dict[str, Cluster] = {cluster.name: cluster for cluster in (SlurmCluster(), LocalMachine())}
"""Clusters by name. `--cluster auto` takes the first that suits; this machine suits always."""


def place(name: str, request: PlacementRequest) -> Placement:
    """The placement of a job on the cluster `name`, or for `auto` on the first that suits.

    Raises:
        UserError: the request cannot be met there.
    """
    if name != "auto":
        return CLUSTERS[name].place(request)
    return next(cluster for cluster in CLUSTERS.values() if cluster.suits(request)).place(request)
