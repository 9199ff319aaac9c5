"""How long each stage of a step takes: the roofline of the device, times what systems reach of it.

Operations of a forward pass are 2 a parameter and token, and 2 * 2 a token and token that it attends to; of a
forward and backward pass three times as many, four with checkpoints. Decoding reads all weights for every
step and each sequence's KV cache; its time is the larger of reading and multiplying.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_ray.config.schema import EngineSection, OnlineSection, TrainingSection
from rlhf_ray.planning.decoding import Speed, decode_seconds
from rlhf_ray.planning.hardware import Device
from rlhf_ray.planning.lengths import Lengths
from rlhf_ray.planning.shapes import ModelShape


@dataclass(frozen=True)
class Efficiency:
    """What is reached of the data sheet's peak. Set by published rows; docs/planning.md says which, and how
    far off the others are.

    Fields:
        train, forward: of the operations a second, in training and in a pass without gradient.
        prefill: of an engine that reads prompts. multiply: of one that decodes with large batches.
        read: of the memory's bandwidth, with the weights. cache: with the KV cache, of which each sequence's
            is in pieces. move: of links and network.
    """

    train: float = 0.40
    forward: float = 0.41
    prefill: float = 0.40
    multiply: float = 0.50
    read: float = 0.68
    cache: float = 0.27
    move: float = 0.60


ALL_REDUCE = 15e-6
"""Seconds of a small all-reduce between the devices of a node: a tensor-parallel layer does two."""


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Fields:
        samples: answers. prompt: tokens of each prompt, group: answers to each. lengths: of the answers.
    """

    samples: int
    group: int
    prompt: float
    lengths: Lengths

    @property
    def sequence(self) -> float:
        """Tokens of a prompt and an answer."""
        return self.prompt + self.lengths.mean

    @property
    def tokens(self) -> float:
        return self.samples * self.sequence


@dataclass(frozen=True)
class Clock:
    """Seconds of the stages on one kind of device."""

    device: Device
    work: Work
    efficiency: Efficiency = field(default_factory=Efficiency)

    def pass_operations(self, shape: ModelShape, tokens: float, with_head: bool = True) -> float:
        matrices = shape.computed + (shape.head if with_head else 0)
        # The mean token attends to half of its sequence; scores and their use are two products.
        attention = 2 * 2 * shape.layers * shape.queries * self.work.sequence / 2
        return tokens * (2 * matrices + attention)

    def forward(self, shape: ModelShape, devices: int, with_head: bool = True) -> float:
        """A pass without gradient over all tokens of the step."""
        operations = self.pass_operations(shape, self.work.tokens, with_head)
        return operations / (devices * self.device.flops * self.efficiency.forward)

    def train(
        self, shape: ModelShape, training: TrainingSection, devices: int, epochs: int, head: bool
    ) -> float:
        """Forward and backward over all tokens, as often as there are epochs, without communication."""
        passes = 3.0 if training.lora is None else 2.0  # no gradient of frozen weights
        passes += 1.0 if training.gradient_checkpointing else 0.0
        operations = epochs * passes * self.pass_operations(shape, self.work.tokens, head)
        return operations / (devices * self.device.flops * self.efficiency.train)

    def gathers(
        self,
        shape: ModelShape,
        training: TrainingSection,
        devices: int,
        *,
        spans: bool,
        updates: int,
        epochs: int,
    ) -> float:
        """Communication of an update: gradients once a step, and at ZeRO-3 the weights of every micro-batch,
        in the forward pass, in the backward, and their gradients."""
        if devices == 1:
            return 0.0
        rate = (self.device.network if spans else self.device.link) * self.efficiency.move
        trained = shape.trained(training.lora)
        if training.zero_stage < 3:
            # An all-reduce is a reduce-scatter and an all-gather.
            return updates * 2 * 4 * trained / rate
        micro_batches = self.micro_batches(training, devices) * epochs
        return micro_batches * (2 * 4 * shape.parameters + 4 * trained) / rate

    def gathers_to_look(
        self, shape: ModelShape, training: TrainingSection, devices: int, *, spans: bool
    ) -> float:
        """The weights of every micro-batch of a pass without gradient at ZeRO-3."""
        if devices == 1:
            return 0.0
        rate = (self.device.network if spans else self.device.link) * self.efficiency.move
        return self.micro_batches(training, devices) * 4 * shape.parameters / rate

    def micro_batches(self, training: TrainingSection, devices: int) -> float:
        """Of each group of ranks that has rows of its own."""
        groups = max(1, devices // training.sequence_parallel_size)
        return max(1.0, self.work.tokens / groups / training.tokens_per_micro_batch)

    def update(self, trained: int, ranks: int) -> float:
        """Adam reads and writes weight, gradient and two moments."""
        return 28.0 * trained / ranks / (self.device.bandwidth * self.efficiency.read)

    def publish(
        self, shape: ModelShape, training: TrainingSection, *, same_device: bool, spans: bool
    ) -> float:
        """Gathered if they are partitioned, sent once in the engine's type, and loaded."""
        rate = (self.device.network if spans else self.device.link) * self.efficiency.move
        gathered = 4.0 * shape.parameters / rate if training.zero_stage == 3 else 0.0
        sent = 0.0 if same_device else 2.0 * shape.parameters / rate
        loaded = 3 * 2.0 * shape.parameters / (self.device.bandwidth * self.efficiency.read)
        return gathered + sent + loaded

    def speed(self, shape: ModelShape, engine: EngineSection) -> Speed:
        """Of one engine. Prompts, each read once a group, are spread over the tokens of the answers."""
        parts, itemsize = engine.tensor_parallel_size, 2 if engine.number_format == "bfloat16" else 4
        rate = parts * self.device.bandwidth * self.efficiency.read
        products = parts * self.device.flops
        latency = self.device.latency + (2 * ALL_REDUCE * shape.layers if parts > 1 else 0.0)
        context = self.work.prompt + self.work.lengths.mean / 2
        cache = parts * self.device.bandwidth * self.efficiency.cache
        # Hidden states go around the devices twice for an all-reduce, of which a layer has two.
        reduced = 2 * 2 * shape.layers * shape.width * itemsize * (parts - 1) / parts
        link = self.device.link * self.efficiency.move
        prefill = 2.0 * shape.computed * self.work.prompt / (products * self.efficiency.prefill)
        return Speed(
            fixed=latency,
            weights=itemsize * (shape.computed + shape.head) / rate,
            read=shape.kv_bytes(itemsize) * context / cache + reduced / link,
            compute=2.0 * (shape.computed + shape.head) / (products * self.efficiency.multiply),
            prefill=prefill / self.work.group / self.work.lengths.mean,
        )

    def generate(self, shape: ModelShape, engine: EngineSection, engines: int, slots: int) -> float:
        """Until the last engine is done: each has an equal share of short and long answers."""
        share = -(-self.work.samples // engines)
        lengths = self.work.lengths.typical(self.work.samples)[::engines][:share]
        # In no order of their lengths, as prompts come.
        order = sorted(range(len(lengths)), key=lambda index: (index * 0.6180339887) % 1.0)
        return decode_seconds([float(lengths[index]) for index in order], slots, self.speed(shape, engine))


def updates_of(online: OnlineSection) -> int:
    """Optimizer steps of a step."""
    return online.num_ppo_epochs * online.num_mini_batches
