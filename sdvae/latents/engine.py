"""`sdvae encode --engine ray`: the shards of a data set, encoded on a Ray cluster.

    this process:  shards that are not done -> encoders, a few at a time -> manifest
    an encoder:    images from decoders -> batches -> VAE -> rows -> one file      an actor on each GPU (or each node)
    a decoder:     source -> read, decode, resize -> images, a batch at a time     a task on one CPU of any node

The plan of shards, the rows and the files are those of `sdvae encode` without an engine: an encoder runs the same
`Pipeline`, and a shard is done when its file exists, which only one writer can create. So the same command continues
a run that was interrupted, with or without the engine.

These are Ray's actors and tasks and not Ray Data, because the unit of the work is the shard. A shard is resumed as a
whole, its batches are made of its own images in their order, and it is one file of known name. Ray Data forms batches
across the blocks of its stream and writes files that follow from them, so neither the same bytes nor a continued run
could be promised. Those who have a pipeline of their own can use `sdvae.LatentEncoder` in it.

What dies is started again by Ray. A dead encoder is restarted, and its shards are encoded again from their beginning. A
dead decoder reads its shard again. A GPU that does not come back would leave its shards waiting, so encoders that have
nothing else to do take shards that others have begun; the first file of a shard counts.

Memory: each encoder works on `num_workers` shards at once and holds their rows. Each of their decoders holds no more
than AHEAD + 1 batches of images that the encoder has not taken yet, in the object store of its node.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from sdvae.data import ImageError
from sdvae.errors import InputError, one_line
from sdvae.io import is_url
from sdvae.latents.config import EncodeConfig
from sdvae.latents.folder import LatentFolder
from sdvae.latents.pipeline import ClaimedShard, Pipeline, Turn, finish
from sdvae.latents.shards import Shards, SourceImage, raise_if_passing
from sdvae.latents.task import DecodedImage, EncodeTask, ImageReader
from sdvae.latents.writer import LatentWriter

logger = logging.getLogger(__name__)

AHEAD = 2  # batches that a decoder prepares before the encoder takes them
DECODER_DEATHS = 10  # for one shard; after as many, something in the shard kills its decoders
ENCODER_DEATHS = 100  # for one encoder, in the whole run
CONNECT_SECONDS = 10

remote: Any = ray.remote  # whose annotations lack the limit on a generator's results

Message = tuple[int, str]  # level and text of a line of the log


class Begun(NamedTuple):
    """What an encoder tells about the data sets: the number of crops if it is known, and how many of them are done."""

    total: int | None
    done: int
    messages: list[Message]


class Encoded(NamedTuple):
    """What became of the images of a shard, counted once for each resolution."""

    encoded: int
    skipped: int
    messages: list[Message]


def encode_on_ray(config: EncodeConfig) -> list[LatentFolder]:
    """Encode a data set on a Ray cluster, or continue one that was begun.

    Args:
        config: the options.

    Raises:
        InputError: for bad options, when there is no cluster at the address, or when a node does not see the source,
            the VAE or the output.
        OSError: when a shard cannot be written, or processes die again and again. Finished shards stay.
    """
    if not is_url(config.output):
        config = replace(config, output=os.path.abspath(config.output))
    with _connected(config.ray_address), _plain_errors():
        encoders = start_encoders(config)
        begun = ray.get(encoders[0].begin.remote())
        said: set[Message] = set()
        _log(begun.messages, said)
        folders = [LatentWriter(output, config.part_numbers) for output in config.outputs.values()]
        left: set[int] = set()
        unfinished = []
        for folder in folders:
            folder.open()  # an InputError if this machine does not see the folder
            folder.refresh()
            if folder.is_complete:
                logger.info("%s is complete: %s", folder.storage, folder.counts())
            else:
                unfinished.append(folder)
                left |= {number for number in range(folder.num_shards) if not folder.is_done(number)}
        if unfinished:
            with tqdm(total=begun.total, initial=begun.done, unit=" images", smoothing=0.05) as bar:
                for report in encode_all(encoders, left, config.num_workers):
                    bar.update(report.encoded + report.skipped)
                    _log(report.messages, said)
    for folder in unfinished:
        finish(folder)
    return list(folders)


def encode_all(encoders: Sequence[Any], left: set[int], shards_at_once: int) -> Iterator[Encoded]:
    """Have all shards encoded, and yield what became of each. The set of those that are left is emptied."""
    waiting = deque(sorted(left))
    idle = [encoder for _ in range(shards_at_once) for encoder in encoders]
    calls: dict[ray.ObjectRef, tuple[Any, int]] = {}  # the oldest first
    while left:
        resting = []
        while idle:
            encoder = idle.pop()
            shard = waiting.popleft() if waiting else _begun_elsewhere(encoder, calls, left)
            if shard is None:
                resting.append(encoder)
            else:
                calls[encoder.encode.remote(shard)] = encoder, shard
        idle = resting
        (ended,), _ = ray.wait(list(calls))
        encoder, shard = calls.pop(ended)
        idle.append(encoder)
        report = ray.get(ended)
        if shard in left:
            left.remove(shard)
            yield report


def _begun_elsewhere(encoder: Any, calls: dict[ray.ObjectRef, tuple[Any, int]], left: set[int]) -> int | None:
    """The shard that one other encoder has had for the longest time, None if there is no such shard."""
    holders = Counter(shard for _, shard in calls.values())
    for holder, shard in calls.values():
        if shard in left and holder is not encoder and holders[shard] == 1:
            return shard
    return None


def start_encoders(config: EncodeConfig) -> list[Any]:
    """Start an encoder on each free GPU, or on each node if there is no GPU or the device is the CPU.

    Encoders reserve no CPU, so that decoders always find one.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise InputError("got a Ray cluster without CPUs; need at least one, to decode images; add nodes")
    here = os.getcwd()
    actor: Any = _Encoder  # Ray's decorator adds `options`
    if config.device == "cuda" or (config.device is None and ray.cluster_resources().get("GPU", 0) >= 1):
        free = int(ray.available_resources().get("GPU", 0))
        if free == 0:
            raise InputError("got a Ray cluster without a free GPU; wait for one, add nodes, or add --device cpu")
        on_gpu = actor.options(num_gpus=1, max_concurrency=config.num_workers)
        return [on_gpu.remote(config, here, None) for _ in range(free)]
    config = replace(config, device="cpu")
    encoders = []
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
        on_node = actor.options(scheduling_strategy=place, max_concurrency=config.num_workers)
        encoders.append(on_node.remote(config, here, int(node["Resources"]["CPU"])))
    return encoders


# Each attempt to reach an encoder whose node is dead or which is being restarted counts as a retry, one a second, so
# their number is not limited.
@remote(num_cpus=0, max_restarts=ENCODER_DEATHS, max_task_retries=-1)
class _Encoder:
    """A VAE on a device, which encodes several shards at once, one in each thread.

    Args:
        config: the options.
        directory: the working directory of the process that started the command, for paths that are relative to it.
        threads: the number of threads to compute with on a CPU; None for a GPU.
    """

    def __init__(self, config: EncodeConfig, directory: str, threads: int | None):
        _enter(directory)
        _messages()
        if threads is not None:  # Ray allows as many as the actor has reserved CPUs
            torch.set_num_threads(threads)
        self._config = config
        self._directory = directory
        self._task: EncodeTask | None = None
        self._identity = ""  # of the source, as JSON
        self._opening = threading.Lock()

    def begin(self) -> Begun:
        """Start or continue the data set."""
        task = self._opened(begin=True)
        return Begun(task.crops_in_all, task.crops_done(), _messages().take())

    @ray.method(retry_exceptions=[RayError])  # such as the loss of images together with their node
    def encode(self, number: int) -> Encoded:
        """Encode a shard and write it."""
        task = self._opened()
        pipeline = Pipeline(task, may_double=True)
        shards = pipeline.claim(number)
        if not shards:  # it was done before this actor was restarted
            return Encoded((task.shards.count(number) or 0) * len(task.targets), 0, _messages().take())
        said: list[Message] = []
        with _plain_errors(keep=RayError):
            pipeline.encode(self._turns(task, number, shards, said))
        encoded, skipped = sum(len(shard.rows) for shard in shards), sum(len(shard.skipped) for shard in shards)
        return Encoded(encoded, skipped, said + _messages().take())

    def _opened(self, begin: bool = False) -> EncodeTask:
        with self._opening:
            if self._task is None:
                task = EncodeTask(self._config)
                if not begin:
                    for target in task.targets:
                        target.folder.open()  # an InputError if this node does not see a folder that was begun
                task.begin()
                self._task, self._identity = task, json.dumps(task.shards.identity())
            return self._task

    def _turns(self, task: EncodeTask, number: int, shards: list[ClaimedShard], said: list[Message]) -> Iterator[Turn]:
        for batch in _decode.remote(task.reader, self._identity, self._directory, number):
            images, messages = ray.get(batch)
            said += messages
            for image, crops in images:
                future: Future[list[DecodedImage | ImageError]] = Future()
                if isinstance(crops, ImageError):
                    future.set_exception(crops)
                else:
                    future.set_result(crops)
                yield Turn(shards, image, future)
        yield Turn(shards)


Images = list[tuple[SourceImage, list[DecodedImage | ImageError] | ImageError]]


@remote(num_cpus=1, max_retries=DECODER_DEATHS, _generator_backpressure_num_objects=AHEAD)
def _decode(reader: ImageReader, identity: str, directory: str, number: int) -> Iterator[tuple[Images, list[Message]]]:
    """Read and decode the images of a shard, and yield them in batches."""
    _enter(directory)
    _messages()
    images: Images = []
    for image in _shards(reader, identity).images(number):
        crops: list[DecodedImage | ImageError] | ImageError
        try:
            crops = reader.decode(image)
        except ImageError as error:
            raise_if_passing(error)
            crops = ImageError(str(error))
        images.append((replace(image, read=bytes), crops))
        if len(images) == reader.config.batch_size:
            yield images, _messages().take()
            images = []
    yield images, _messages().take()


@lru_cache(maxsize=1)
def _shards(reader: ImageReader, identity: str) -> Shards:
    """The shards of the source, opened once in a process."""
    shards = reader.open_shards()
    if json.dumps(shards.identity()) != identity:
        raise InputError(
            f"{socket.gethostname()} sees other images in {reader.config.source} than the other nodes; need the same"
        )
    return shards


def _enter(directory: str) -> None:
    if Path(directory).is_dir():
        os.chdir(directory)


class _Messages(logging.Handler):
    """Keeps what this process logs, until it is sent to the process that started the command."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: list[Message] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.levelno, record.getMessage()))

    def take(self) -> list[Message]:
        taken, self._kept = self._kept, []
        return taken


@cache
def _messages() -> _Messages:
    """The handler of this process, installed at the first call."""
    handler, ours = _Messages(), logging.getLogger("sdvae")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    return handler


def _log(messages: list[Message], said: set[Message]) -> None:
    """Log what other processes have logged. Each has opened the source and the VAE, so the same is said only once."""
    for message in messages:
        if message not in said:
            said.add(message)
            logger.log(*message)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to a cluster: that of the calling program if it has one, else the one at the address."""
    if ray.is_initialized():
        yield
        return
    place = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address or "")
    try:
        if place is not None:  # for a wrong address, `ray.init` waits five minutes and then ends the process
            socket.create_connection((place[1], int(place[2])), timeout=CONNECT_SECONDS).close()
        elif address not in (None, "auto", "local"):
            raise ValueError("need auto, HOST:PORT or ray://HOST:PORT")
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        raise InputError(
            f"got no Ray cluster at ray_address={address} ({one_line(error)}); start one with `ray start --head`, or "
            "leave out ray_address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _plain_errors(keep: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Raise what was raised in another process as itself, and a failure of Ray as an OSError.

    Args:
        keep: exceptions of Ray to leave as they are.
    """
    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except keep:
        raise
    except RayError as error:
        raise OSError(f"Ray gave up; the same command continues: {one_line(error)}") from error
