"""Adds up the memory of one rank: what stays from step to step, and the worst moment of a step.

What DeepSpeed 0.19.8 holds was read in its sources: which copies each stage keeps, in which dtype, and what it makes
for a moment when it reduces gradients. `ops/bench/memory.py` measures a real step against these numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from cmscale.config import Config, accumulation_steps
from cmscale.engine.settings import LARGEST_BUCKET
from cmscale.training.estimate import counts

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30
VGG16 = 14_714_688  # parameters of LPIPS' convolutions, in float32
GATHERED = 1_000_000_000  # elements that stage 3 keeps gathered from forward to backward (stage3_max_live_parameters)
FAR = 32  # images of the second micro-batch that is counted; between and beyond, bytes follow a line


@dataclass(frozen=True)
class Term:
    """Bytes on one rank, what they are, and a remark."""

    name: str
    size: float
    remark: str = ""


@dataclass(frozen=True)
class Assumed:
    """Bytes that no count knows. On CUDA they are assumptions, which a measurement on the card replaces.

    Attributes:
        context: The driver's context and loaded kernels, NCCL's buffers, workspaces of cuDNN and cuBLAS.
        unused: The share that the allocator holds and can't use.
    """

    context: float = 2.0 * GIB
    unused: float = 0.05


@dataclass(frozen=True)
class Memory:
    """The memory of one rank of a run.

    Args:
        on_cuda: Whether the ranks are GPUs: reduction overlaps backward there, and the optimizer takes all tensors at
            once.
    """

    config: Config
    num_ranks: int
    on_cuda: bool = True
    assumed: Assumed = Assumed()
    _peaks: dict[tuple[int, bool, int], int] = field(default_factory=dict)

    def at(self, num_ranks: int) -> "Memory":
        """The same run on another number of ranks; what was counted of a micro-batch holds there too."""
        return replace(self, num_ranks=num_ranks)

    @cached_property
    def states(self) -> list[Term]:
        """Weights, gradients, optimizer and averages: what the number of parameters decides."""
        config, count, low = self.config, self._count, self._low
        stage, facts, averages = config.engine.zero_stage, config.method.facts, num_averages(config)
        part = count / self.num_ranks
        held = part if stage >= 1 else count
        working = low * (part if stage == 3 else count)
        masters = 0 if self._is_plain else 4 * held
        names = ["student", *["target"] * facts.has_target, *["teacher"] * facts.follows_teacher]
        terms = [
            Term("weights", working * len(names), f"{', '.join(names)}; {config.engine.precision}"),
            Term("gradients", self._gradients, self._gradients_are),
            Term("master weights", masters, "fp32" if masters else "the weights themselves"),
            Term("optimizer moments", 8 * held, "two, fp32"),
            Term(
                "averages", 4 * part * (averages + facts.has_target), f"{averages} EMA{', target' * facts.has_target}"
            ),
        ]
        values = self._float32_values * 4
        if values:
            terms.append(Term("float32 layers", values * len(names), "model.precision_layout"))
        return terms

    @cached_property
    def bytes_per_parameter(self) -> float:
        """Of `states`, per parameter."""
        return sum(term.size for term in self.states) / self._count

    def terms(self, micro_batch: int, *, activation_checkpointing: bool) -> list[Term]:
        """All terms of a rank. Of the moments of a step (the last terms) the worst one counts."""
        terms = list(self.states)
        settings = self.config.method.distance_settings
        if settings is not None and settings.name == "lpips":
            size = 2 if settings.lpips_precision == "fp16" else 4
            terms.append(Term("LPIPS", size * VGG16, f"VGG16, {settings.lpips_precision}"))
        moments = self.moments(micro_batch, activation_checkpointing=activation_checkpointing)
        worst = max(moments, key=lambda moment: moment.size)
        terms.append(worst)
        if self.on_cuda:
            used = sum(term.size for term in terms)
            context = Term("CUDA", self.assumed.context, "context, NCCL, workspaces: an assumption")
            share = f"{self.assumed.unused:.0%} that the allocator can't use: an assumption"
            terms += [context, Term("fragmentation", self.assumed.unused * used, share)]
        return terms

    def total(self, micro_batch: int, *, activation_checkpointing: bool) -> float:
        """The sum of `terms`."""
        return sum(term.size for term in self.terms(micro_batch, activation_checkpointing=activation_checkpointing))

    def largest_micro_batch(self, capacity: float, *, activation_checkpointing: bool) -> int:
        """The most images per micro-batch that fit into `capacity` bytes, 0 if not one does."""
        low, high = 0, 1
        while high <= 1 << 16 and self.total(high, activation_checkpointing=activation_checkpointing) <= capacity:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.total(middle, activation_checkpointing=activation_checkpointing) <= capacity:
                low = middle
            else:
                high = middle
        return low

    def moments(self, micro_batch: int, *, activation_checkpointing: bool) -> list[Term]:
        """The bytes of each moment of a step that may be the worst, beside what stays."""
        config, stage = self.config, self.config.engine.zero_stage
        activations = self.activations(micro_batch, activation_checkpointing=activation_checkpointing)
        with_or_without = "with" if activation_checkpointing else "without"
        remark = f"{micro_batch} images, {with_or_without} checkpointing; gradient buckets"
        moments = [
            Term("activations", activations + self._backward, remark),
            Term("optimizer step", self._optimizer, "temporaries"),
        ]
        if config.train.sample_every or config.train.consistency_error_every:
            whole = 4 * self._count * (2 if self.num_ranks > 1 else 1) + 4 * self._count * (stage == 0)
            moments.append(Term("samples", whole, "an average, gathered whole"))
        return moments

    def activations(self, micro_batch: int, *, activation_checkpointing: bool) -> float:
        """Bytes at the worst moment of forward and backward, between two counted sizes on a line."""
        near = min(self.config.train.micro_batch_size, FAR // 2)
        first, second = (self._peak(size, activation_checkpointing) for size in (near, FAR))
        return max(first + (second - first) / (FAR - near) * (micro_batch - near), 0.0)

    def _peak(self, size: int, activation_checkpointing: bool) -> int:
        """Bytes at the worst moment of a micro-batch, the reduction of gradients included."""
        key = size, activation_checkpointing, self.num_ranks if self._joined else 0
        if key not in self._peaks:
            reduce = self._reduction()
            self._peaks[key] = counts.micro_batch_peak(
                self.config, size=size, activation_checkpointing=activation_checkpointing, reduce=reduce
            )
        return self._peaks[key]

    def _reduction(self) -> Callable[[int], int]:
        whole = self.config.engine.zero_stage == 0
        if self._joined:
            return _Joined(self._low, last=0 if whole else self._sent)
        return counts.no_reduction if whole else _Bucket(self._bucket, self._low)

    @cached_property
    def _count(self) -> int:
        return counts.num_parameters(self.config)

    @property
    def _bucket(self) -> int:
        """Elements of the bucket in which gradients are reduced."""
        return min(LARGEST_BUCKET, self._count)

    @cached_property
    def _float32_values(self) -> int:
        return counts.num_float32_values(self.config)

    @property
    def _low(self) -> int:
        return BYTES[self.config.engine.precision]

    @property
    def _is_plain(self) -> bool:
        return self.config.engine.zero_stage == 0 and self.config.engine.precision == "fp32"

    @property
    def _joined(self) -> bool:
        return self.config.engine.parameters == "joined"

    @property
    def _sent(self) -> int:
        """Bytes of one tensor's gradient while stages 1 and 2 reduce it, beside the buckets.

        It is sent in slices, one for each rank, several together until they are more than a bucket. Each time they are
        copied into one tensor, and into float32. A gradient that fits into the bucket is moved there before.
        """
        count, low = self._count, self._low
        part = -(-count // self.num_ranks)
        slices = min(self.num_ranks, self._bucket // part + 1)
        copies = (low if slices > 1 else 0) + (4 if low < 4 else 0)
        own = low * count if self._exceeds_bucket else 0
        return own + copies * min(slices * part, count)

    @property
    def _exceeds_bucket(self) -> bool:
        """Whether the gradient is one tensor that fits into no bucket."""
        return self._joined and self._count > LARGEST_BUCKET

    @property
    def _accumulates(self) -> bool:
        return accumulation_steps(self.config, num_ranks=self.num_ranks) > 1

    @property
    def _gradients(self) -> float:
        """Gradients that wait for the step. Stages 0 and 1 keep them whole, in the compute dtype."""
        stage = self.config.engine.zero_stage
        if stage <= 1 or self._keeps_whole:
            return self._low * self._count
        return 4 * self._count / self.num_ranks

    @property
    def _gradients_are(self) -> str:
        stage, precision = self.config.engine.zero_stage, self.config.engine.precision
        return f"whole, {precision}" if stage <= 1 or self._keeps_whole else "accumulated, fp32"

    @property
    def _keeps_whole(self) -> bool:
        """Whether stage 2 keeps whole gradients: in fp32 DeepSpeed copies every tensor of which a rank has a part."""
        return self._joined and self.config.engine.precision == "fp32"

    @property
    def _backward(self) -> float:
        """What lives during all of backward: buckets, and of stage 3 the gathered weights."""
        stage, precision = self.config.engine.zero_stage, self.config.engine.precision
        if stage == 0:
            return 0.0
        if stage < 3:
            again = self._gradients if stage == 2 and precision == "fp32" and self._accumulates else 0
            unused = self._exceeds_bucket and not self.on_cuda  # so that its pages are never given
            return self._bucket * self._low * (0 if unused else 2 if self.on_cuda else 1) + again
        return self._bucket * 4 + self._low * min(self._count, GATHERED)

    @cached_property
    def _optimizer(self) -> float:
        """Temporaries of the optimizer, and fp32 gradients that exist for the step alone."""
        stage = self.config.engine.zero_stage
        if stage == 0:
            sizes = list(self._sizes())
            copies = 0 if self._is_plain else 4 * self._count
        else:
            sizes = [-(-self._count // self.num_ranks)]
            # stages 1 and 2 drop what was accumulated once it is copied, stage 3 keeps its buffer
            copies = 4 * sizes[0] - (self._gradients if stage < 3 else 0)
        return copies + counts.optimizer_peak(self.config, sizes, foreach=self.on_cuda)

    def _sizes(self) -> Iterator[int]:
        if self._joined:
            yield self._count
            return
        with counts.META:
            yield from (parameter.numel() for parameter in counts.network_builder(self.config)().parameters())


def num_averages(config: Config) -> int:
    """Averages of the weights that a run keeps, the target aside."""
    return len(config.ema.rates) + len(config.ema.lengths)


class _Bucket:
    """DeepSpeed's bucket: a full one is flattened, and sent in fp32."""

    def __init__(self, size: int, low: int) -> None:
        self._size = size
        self._sent = low + (4 if low < 4 else 0)
        self._filled = 0

    def __call__(self, numel: int) -> int:
        """Adds a gradient, or with 0 ends the micro-batch. Returns the bytes of the reduction that follows."""
        if numel and self._filled + numel <= self._size:
            self._filled += numel
            return 0
        taken, self._filled = self._sent * self._filled, numel
        return taken


class _Joined:
    """One tensor's gradient: those of the layers wait for each other, are joined, and then reduced.

    Args:
        last: Bytes while it is reduced; 0 at stage 0, where it stays, so that it is counted elsewhere.
    """

    def __init__(self, low: int, *, last: int) -> None:
        self._low = low
        self._last = last
        self._kept = 0

    def __call__(self, numel: int) -> int:
        """Adds a gradient, or with 0 ends the micro-batch. Returns the bytes of the gradients, or of the end."""
        if numel:
            self._kept += numel
            return self._low * self._kept
        kept, self._kept = self._low * self._kept, 0
        return max(2 * kept, self._last) if self._last else kept
