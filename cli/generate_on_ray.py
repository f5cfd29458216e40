"""The part of `generate --prompts` that generates on a Ray cluster (`--ray`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..runtime.batch.generate_batch import BatchCounts, BatchDraft, BatchObserver, BatchSettings
from ..runtime.cluster.actor_pools import parse_pools
from ..runtime.cluster.connect import LOCAL, import_ray, store_bytes
from ..runtime.cluster.generate_on_cluster import ClusterSettings, generate_on_cluster
from ..runtime.text.tokenizer import ClipTokenizer
from ..schemas.errors import UsageError
from ..storage.bundle import open_bundle
from .console import inform, note
from .generate_common import OPENING, note_cut_prompts


def on_ray(
    draft: BatchDraft,
    settings: BatchSettings,
    engine: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    address: str,
    actors: Sequence[str],
    observer: BatchObserver,
) -> tuple[BatchCounts, dict[str, Any]]:
    """Generate the images of `draft` on the cluster at `address`, and print what each stage did.

    Returns the counts and the facts of the report. `engine` has the options of MACHINERY.

    Raises UsageError for options that a cluster cannot follow."""
    if engine["loras"]:
        raise UsageError("--lora: nodes have no merged weights; merge them with `cascadekit lora apply BUNDLE LORA`")
    opening = {name: engine[name] for name in OPENING if name != "loras"}
    opening["stages"] = {stage: path.resolve() for stage, path in engine["stages"].items()}
    cluster = ClusterSettings(address, parse_pools(actors), opening)
    import_ray()
    assert settings.bundle is not None
    tokenizer = ClipTokenizer.open(open_bundle(settings.bundle).tokenizer, draft.manifest.text_rows)
    note_cut_prompts([job.request for job in draft.plan.jobs], tokenizer)
    if address == LOCAL:
        note(f"starting Ray here, with an object store of at most {store_bytes() / 1e6:.0f} MB; it ends with the batch")
    counts, report = generate_on_cluster(draft, settings, cluster, defaults, observer, say=note)
    for line in report.lines():
        inform(line)
    return counts, {"on_stages": report.to_json()}
