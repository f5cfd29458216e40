"""Generates the images of jobs on a Ray cluster: text actors -> prior actors -> decoder actors -> tasks that write.

Ray holds back a stage whose successors cannot keep up, starts actors again that died, and repeats the work of nodes
that are lost. A group's images depend on its jobs alone, so they are the same wherever and however often it is
computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

from ...schemas.errors import CascadeError, EngineError
from ...schemas.manifest import Manifest
from ...schemas.request import Request
from ...schemas.stages import Stage
from ..batch.batch_runner import GeneratedGroup
from ..batch.image_jobs import ImageJob
from ..batch.job_groups import job_groups, windows
from ..memory.prediction import loaded_bytes
from .actor_pools import ActorPool
from .stage_actors import ACTORS, PIECES, BatchPiece, ClusterBundle, StageActor, write_files
from .stage_report import StageReport

MOST_BLOCKS = 10_000  # that Ray schedules in each stage; a block of one group is repeated alone when an actor dies
WRITERS = 8  # most tasks that encode PNG files at a time; the driver stores images more slowly than these encode them
BESIDE = {Stage.DECODER: (Stage.VQGAN,)}  # stages that an actor runs too


@dataclass
class ClusterGroups:
    """Generates the images of jobs with `ray`, connected to a cluster, and counts what each stage did in `report`.

    `together` images are computed at once. `check` is called after each group and may raise an exception to stop."""

    ray: Any
    bundle: ClusterBundle
    manifest: Manifest
    pools: Mapping[Stage, ActorPool]
    together: int = 1
    check: Callable[[], object] = lambda: None
    report: StageReport = field(default_factory=StageReport)
    actors: Mapping[Stage, type[StageActor]] = field(default_factory=lambda: ACTORS)

    def __call__(self, jobs: Sequence[ImageJob]) -> Iterator[GeneratedGroup]:
        """Yield each group once its images are computed, in the order in which that happens.

        Raises CascadeError for a bundle that a node cannot open, and when Ray gives the work up."""
        left = {job.number for job in jobs}
        began = perf_counter()
        for piece in self._pieces(jobs):
            if not left.issuperset(job.number for job in piece.jobs):
                continue
            left.difference_update(job.number for job in piece.jobs)
            self.report.add(piece.busy, perf_counter() - began)
            yield piece
            self.check()
        if left:
            raise EngineError(f"Ray returned no result for {len(left)} images; run the same command again")

    def _pieces(self, jobs: Sequence[ImageJob]) -> Iterator[BatchPiece]:
        groups = [group for window in windows(jobs) for group in job_groups(window, self.together, _length(count(1)))]
        dataset = self._dataset([{PIECES: [BatchPiece(tuple(group)).pack()]} for group in groups])
        try:
            for row in dataset.iter_rows():
                yield from map(BatchPiece.unpack, row[PIECES])
        except self.ray.exceptions.RayError as error:
            raise _reason(error) from error

    def _dataset(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        data = self.ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.raise_original_map_exception = True
        dataset = data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))
        for stage, actor in self.actors.items():
            pool = self.pools[stage]
            weights = sum(loaded_bytes(self.manifest, each) for each in (stage, *BESIDE.get(stage, ())))
            dataset = dataset.map(
                actor,
                fn_constructor_args=(self.bundle.opened_by(pool),),
                compute=data.ActorPoolStrategy(**({"size": pool.size} if pool.size else {"min_size": 1})),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus or None,
                memory=weights,
            )
        # These tasks reserve no CPU: where actors fill all nodes, there is none left until the actors end.
        return dataset.map(write_files, num_cpus=0, compute=data.TaskPoolStrategy(size=WRITERS))


def _length(numbers: "count[int]") -> Callable[[Request], int]:
    """Long prompts are computed alone: the number of their chunks is not known before they are encoded."""
    return lambda request: next(numbers) if request.settings.long_prompts else 0


def _reason(error: BaseException) -> CascadeError:
    """The error of cascadekit that ended the work, or Ray's words."""
    cause = getattr(error, "cause", None)  # the error of an actor; Ray's own is one of its class with a traceback
    if isinstance(cause, CascadeError):
        return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return EngineError(f"Ray gave up: {lines[-1] if lines else type(error).__name__}; finished images are kept")
