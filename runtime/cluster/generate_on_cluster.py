"""Generates all images of a file of prompts on a Ray cluster, with the files, log and resume of `generate_batch`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...schemas.callbacks import Say, ignored
from ...schemas.errors import UsageError
from ...schemas.stages import Stage
from ..batch.generate_batch import BatchCounts, BatchDraft, BatchObserver, BatchSettings, run_batch
from ..batch.image_jobs import bundle_identity
from .actor_pools import DEFAULT_POOLS, ActorPool, fitted_pools
from .cluster_groups import ClusterGroups
from .connect import connected
from .stage_actors import ClusterBundle
from .stage_report import StageReport

CPU = "cpu"


@dataclass(frozen=True)
class ClusterSettings:
    """Where a batch runs: `address` is "local" or the HOST:PORT of a cluster, `pools` are the actors of each stage.

    `options` are those of `Cascade.open`. Actors keep what they run in memory, unless `memory` says otherwise, and use
    as many threads as they have CPUs, unless `threads` says otherwise."""

    address: str
    pools: Mapping[Stage, ActorPool] = field(default_factory=lambda: DEFAULT_POOLS)
    options: Mapping[str, Any] = field(default_factory=dict)


def generate_on_cluster(
    draft: BatchDraft,
    settings: BatchSettings,
    cluster: ClusterSettings,
    defaults: Mapping[str, Any],
    observer: BatchObserver | None = None,
    *,
    say: Say = ignored,
) -> tuple[BatchCounts, StageReport]:
    """Generate the images of `draft` that are not there yet, and count how each of them ended.

    This process plans, and writes the files and the log into its own folder; nodes need the bundle under the same path.
    One image at a time goes through a stage unless `settings.batch` says more: then an image has the same bytes as
    with a batch of the same size in one process. `say` is called with lines for the user.

    Raises what `generate_batch` raises, and UsageError for a cluster that cannot be reached or is too small."""
    observer = observer or BatchObserver()
    if settings.bundle is None:
        raise UsageError("a batch on a cluster: expected the path of the bundle; give bundle=...")
    if settings.preview_every:
        raise UsageError("preview_every: a batch on a cluster shows no previews; leave it out")
    if settings.sign:
        raise UsageError("sign: a batch on a cluster is not signed; leave it out")
    with connected(cluster.address, say) as ray:
        use_gpus = cluster.options.get("device") != CPU
        pools = fitted_pools(cluster.pools, ray.cluster_resources(), use_gpus=use_gpus)
        identity = bundle_identity(draft.manifest)
        groups = ClusterGroups(
            ray,
            ClusterBundle(settings.bundle.resolve(), dict(cluster.options), identity),
            draft.manifest,
            pools,
            together=settings.batch or 1,
            check=observer.check,
        )
        counts = run_batch(
            draft,
            settings,
            groups,
            {"settings": dict(defaults), "ray": cluster.address},
            observer=observer,
            ended=lambda: {"on_stages": groups.report.to_json()},
        )
    return counts, groups.report
