"""The actors of the stages. Each takes pieces of work from the stage before it, and hands them on.

A piece is a group of jobs with what is known of them so far: embeddings, then the prior's latents, then images. It
travels as pickled bytes between processes of one cluster, which trust each other as Ray's own messages do.
"""

import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from ...schemas.errors import CascadeError, CheckpointError, UsageError
from ...schemas.messages import one_line
from ...schemas.stages import Stage
from ..batch.batch_runner import GeneratedGroup
from ..batch.generate_requests import GeneratedImage, encode_requests, generate_prior, generate_requests
from ..batch.image_jobs import bundle_identity
from ..batch.local_groups import Stopwatch, png_files
from ..cascade import Cascade
from ..result import Result
from ..text.prompts import PromptEmbeds
from .actor_pools import ActorPool
from .stage_report import BusyTime

PIECES = "pieces"  # the column of a row
AUTO, RESIDENT = "auto", "resident"  # of the option `memory`


@dataclass(frozen=True)
class ClusterBundle:
    """The bundle as all nodes find it: its path, the options of `Cascade.open`, and the digests of its stages."""

    path: Path
    options: Mapping[str, Any]
    identity: Mapping[str, str]

    def opened_by(self, pool: ActorPool) -> "ClusterBundle":
        """The bundle with the options for an actor of `pool`, which runs few stages, and has CPUs of its own."""
        options = {**self.options}
        if options.get("memory", AUTO) == AUTO:
            options["memory"] = RESIDENT
        if options.get("threads") is None and not pool.gpus:
            options["threads"] = max(1, int(pool.cpus))
        return replace(self, options=options)


@dataclass(frozen=True)
class BatchPiece(GeneratedGroup):
    """A group in work: what the last stage made of its jobs, and the time that each stage worked for it."""

    made: PromptEmbeds | Result | None = None
    images: Sequence[GeneratedImage] = ()
    busy: tuple[BusyTime, ...] = ()

    def alone(self, number: int) -> "BatchPiece":
        """The piece for job `number` alone."""
        made = None if self.made is None else self.made.row(number)
        return replace(self, jobs=self.jobs[number : number + 1], made=made)

    def pack(self) -> bytes:
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)

    @classmethod
    def unpack(cls, packed: bytes) -> "BatchPiece":
        piece = pickle.loads(packed)
        assert isinstance(piece, cls)
        return piece


class StageActor:
    """One stage of the cascade in a process of its own. The bundle is opened with the first piece of work."""

    stage: ClassVar[Stage]

    def __init__(self, bundle: ClusterBundle) -> None:
        self.bundle = bundle

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {PIECES: [done.pack() for packed in row[PIECES] for done in self._done(packed)]}

    @cached_property
    def cascade(self) -> Cascade:
        """The cascade of this node's copy of the bundle. Raises UsageError when it differs from that of the driver."""
        try:
            cascade = Cascade.open(self.bundle.path, **self.bundle.options)
        except CascadeError as error:
            raise type(error)(f"node {socket.gethostname()}: {error}") from error
        if bundle_identity(cascade.manifest) != self.bundle.identity:
            raise UsageError(
                f"node {socket.gethostname()}: {self.bundle.path}: another bundle than on the machine that started the "
                "batch; copy the same bundle to all nodes"
            )
        return cascade

    def work(self, piece: BatchPiece) -> BatchPiece:
        """The piece with what this stage makes of it."""
        raise NotImplementedError

    def _done(self, packed: bytes) -> Iterator[BatchPiece]:
        """Yield the piece after this stage. If it fails, yield the piece of each of its jobs alone, or its error."""
        piece = BatchPiece.unpack(packed)
        if piece.error is not None:
            yield piece
            return
        cascade, began = self.cascade, perf_counter()  # a bundle that cannot be opened ends the whole batch
        assert cascade
        try:
            done = self.work(piece)
        except CheckpointError:
            raise
        except (CascadeError, OSError, MemoryError) as error:
            if len(piece.jobs) == 1:
                yield replace(piece, made=None, error=one_line(error))
                return
        else:
            yield timed(done, str(self.stage), began)
            return
        fresh = BatchPiece.unpack(packed)  # the attempt may have changed the noise of the piece
        for number in range(len(fresh.jobs)):
            yield from self._done(fresh.alone(number).pack())


def timed(piece: BatchPiece, stage: str, began: float) -> BatchPiece:
    """The piece with the time that this process worked for it since `began`."""
    worker = f"{socket.gethostname()}/{os.getpid()}"
    return replace(piece, busy=(*piece.busy, BusyTime(stage, worker, perf_counter() - began, len(piece.jobs))))


class TextActor(StageActor):
    """Encodes prompts and negative prompts."""

    stage = Stage.TEXT_ENCODER

    def work(self, piece: BatchPiece) -> BatchPiece:
        clock = Stopwatch()
        embeds = encode_requests(self.cascade, [job.request for job in piece.jobs])
        clock.lap(Stage.TEXT_ENCODER)
        return replace(piece, made=embeds, seconds=clock.rounded())


class PriorActor(StageActor):
    """Samples the prior. Its latents go on with the pooled embeddings, all that the decoder needs of the text."""

    stage = Stage.PRIOR

    def work(self, piece: BatchPiece) -> BatchPiece:
        assert isinstance(piece.made, PromptEmbeds)
        clock, embeds = Stopwatch(), piece.made
        result = generate_prior(self.cascade, [job.request for job in piece.jobs], embeds)
        pooled = replace(embeds, clip_text=embeds.clip_text[:, :0], negative_clip_text=embeds.negative_clip_text[:, :0])
        clock.lap(Stage.PRIOR)
        return replace(piece, made=replace(result, embeds=pooled), seconds={**piece.seconds, **clock.rounded()})


class DecoderActor(StageActor):
    """Samples the decoder, and makes images with the vqgan."""

    stage = Stage.DECODER

    def work(self, piece: BatchPiece) -> BatchPiece:
        assert isinstance(piece.made, Result)
        clock, requests = Stopwatch(), [job.request for job in piece.jobs]
        images = generate_requests(self.cascade, requests, lambda stage, step: clock.lap(stage), after=piece.made)
        clock.lap(Stage.VQGAN)
        return replace(piece, made=None, images=images, seconds={**piece.seconds, **clock.rounded()})


def write_files(row: Mapping[str, Any]) -> dict[str, Any]:
    """Make the bytes of the PNG files, in a task that needs no GPU."""
    pieces = []
    for piece in map(BatchPiece.unpack, row[PIECES]):
        began = perf_counter()
        if piece.error is None:
            piece = timed(replace(piece, images=(), files=png_files(piece.jobs, piece.images)), "write", began)
        pieces.append(piece.pack())
    return {PIECES: pieces}


ACTORS: Mapping[Stage, type[StageActor]] = {actor.stage: actor for actor in (TextActor, PriorActor, DecoderActor)}
