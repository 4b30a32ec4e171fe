"""Bases of methods: a frozen dataclass of options with exactly one verb, what it requires and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from aerogel.layers.conv import size
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.numerics.scheme import PerTensor, Scheme
from aerogel.options import Options
from aerogel.runtime.policy_state import PolicyState

_FEW = 0.05
"""Share of a block's weights up to which a layer that no group fits is left unquantized instead of refusing the recipe."""
Requirement = Literal[
    "calls", "teacher", "teacher_layers", "gradients", "uncached", "dense", "pruned", "allocation", "edges", "residual", "experts",
    "feed_forwards", "heads", "filters", "attention", "kv_cache", "decoder", "layers", "images", "patch_grid", "time_path", "trajectories",
    "cached_modules", "block_range", "skips", "cfg", "concatenations", "schedule", "replays",
]  # fmt: skip
"""Requirements of a method on a model:

calls: calibration data;  teacher: the model before any step, whose blocks no earlier step has given another basis;  teacher_layers: nor has
one put the channels, scales or experts inside of blocks into another order;  gradients: autograd is on;  uncached: every module runs, so no
feature cache may be on;  dense: no earlier step has pruned weights;  pruned: an earlier step has;  allocation: an earlier step gives each
layer its share of zeros;  edges: norms and linear layers whose channels others read;  residual: one stream that can be rotated;  experts:
routed experts;  feed_forwards: FFNs with channels that can leave, and no policy measured on all of them;  heads: attention heads, in the
same way;  filters: output channels of convolutions that one other reads, in the same way;  attention: modules that call
scaled_dot_product_attention;  kv_cache: modules with a place in a key-value cache;  decoder: one row of blocks that attend with such a
cache, each to everything before;  layers: one row of decoder layers that the configuration counts;  images: tokens that stand for
images;  patch_grid: tokens of an image that are the patches of a square grid;  time_path: a time embedding that is projected for the
blocks;  trajectories: whole denoising runs;  cached_modules: attentions and feed-forwards that are added to the stream;  block_range:
blocks in one row with the stream between them;  skips: a way down and up again with skip connections;  cfg: classifier-free guidance in one
batch;  concatenations: layers that read concatenated channels;  schedule: a feature-caching policy right before it;  replays: the pipeline,
whose sampler repeats recorded generations.
"""


class CalibrationSize(NamedTuple):
    """Size of a calibration."""

    tokens: int
    """Positions of all calls: tokens of text, patches of an image."""
    at_once: int
    """Positions of the largest call."""
    sample: int
    """Positions of the largest sample: a sequence, an image."""
    steps: int = 1
    """Denoising steps of a generation; 1 for models that do not denoise."""
    length: int = 0
    """Tokens of a sequence, where text is cut into sequences for the calibration."""


@dataclass(frozen=True)
class CostEstimate:
    """Cost of a method beside reading and rounding the weights, for the plan."""

    block_passes: float = 0.0
    """Forwards of each block over all its calls, the one that hands outputs to the next block included."""
    fitted_samples: float = 0.0
    """Samples that an optimiser sees in each block, over all its steps."""
    model_tokens: float = 0.0
    """Positions that pass the whole model beyond those recorded."""
    activation_bytes: float = 0.0
    """Activations held at once beyond those of one call."""


@dataclass(frozen=True)
class Before:
    """A model as a step of a recipe finds it, as far as the plan knows."""

    size: CalibrationSize
    """Size of the calibration."""
    quantized: Mapping[str, Scheme] = field(default_factory=dict)
    """The layers that are quantized by then, by full name."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the parameters that have another by then, by full name."""


def name_of(method: object) -> str:
    """Return the name that recipes call a method by: that of its file."""
    return type(method).__module__.rpartition(".")[2]


class _Method(Options, ABC):
    """Declarations to the plan that all three kinds of methods make."""

    prunes: ClassVar[bool] = False
    """True where it sets weights to zero for good: steps that require `dense` cannot come after it."""
    allocates: ClassVar[bool] = False
    """True where it gives each layer the share of zeros that a pruning step after it makes."""
    shares_calls: ClassVar[bool] = False
    """True where several processes may each have a part of the calls, because what it takes from them is added up over processes; else
    every process has all of them and does the same."""

    reorders: ClassVar[Literal["nothing", "layers", "blocks"]] = "nothing"
    """Where channels have another order, scale or basis afterwards, though the model computes the same: between layers of a block, or
    between blocks too. What is compared with the original model there would be wrong."""

    @property
    def quantizes(self) -> bool:
        """True where it gives layers a number format; others may have a scheme too, that of the step they prepare for."""
        return False

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Say why its options do not suit the model, beside what `requires` says; decided without calls and without reading a weight."""
        yield from ()

    def remarks(self, network: Network) -> Iterator[str]:
        """Say what it will leave undone in the model, though it can run."""
        yield from ()

    def unsuitable(self, network: Network, calls: Sequence[Call]) -> Iterator[str]:
        """Say why the calls of the calibration do not serve it; decided without a forward."""
        yield from ()

    def requantized(self, network: Network, before: Before) -> dict[str, Scheme]:
        """Return the layers quantized by then to whose schemes it adds inputs, with the schemes they get."""
        return {}


class BlockMethod(_Method):
    """Changes one block for good, seeing that block and its calls only."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "uncached"})

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Estimate what a visit to a block takes."""
        return CostEstimate(block_passes=2.0 if "calls" in self.requires else 0.0)

    @property
    def groups_in_activation_order(self) -> bool:
        """True where the groups of a weight follow the order of its inputs' activations, which few engines read."""
        return False

    def assign(self, block: Block) -> dict[str, tuple[Any, Scheme]]:
        """Return the block's float layers that it quantizes: name in the block -> (layer, scheme); nothing unless a method says so."""
        return {}

    @abstractmethod
    def compress(self, block: Block) -> None:
        """Change the block's weights or modules in place."""


class Method(_Method):
    """Changes a whole model for good."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"uncached"})

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Estimate what applying it takes."""
        return CostEstimate()

    @property
    def quantizes(self) -> bool:
        """True where it stores layers in a number format."""
        return type(self).stores is not Method.stores

    def stores(self, network: Network) -> dict[str, tuple[Any, Scheme]]:
        """Return the layers that it quantizes, for the plan: full name -> (layer, scheme)."""
        return {}

    def reshapes(self, network: Network) -> Mapping[str, tuple[int, ...]]:
        """Return the parameters that have another shape afterwards, for the plan: full name -> shape; none unless a method says so."""
        return {}

    def removes(self, network: Network) -> tuple[str, ...]:
        """Return the blocks that leave the model, or as many like them, for the plan; none unless a method says so."""
        return ()

    @abstractmethod
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Change the network in place."""


State = TypeVar("State", bound=PolicyState)
"""The state of a policy."""


class RuntimePolicy(_Method, Generic[State]):
    """Acts while the network runs: calibrated once, then put on and taken off."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls"})
    state: ClassVar[type[PolicyState]]
    """The class of its state, which reads what was saved."""
    skips_modules: ClassVar[bool] = False
    """True where modules do not run while it is on: steps that require `uncached` cannot come after it."""
    drops_positions: ClassVar[bool] = False
    """True where some positions of a forward are not computed while it is on: their logits are NaN."""
    supersedes: ClassVar[bool] = False
    """True where it starts from the state of the policy right before it and takes that one's place."""

    @property
    def config_entries(self) -> dict[str, Any]:
        """Return what it adds to quantization_config, by which engines do the same; nothing unless a policy says so."""
        return {}

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """Return the arguments of vLLM's command line by which it does the same, by their long names; nothing unless a policy says so."""
        return {}

    def config_tensors(self, state: State) -> dict[str, Tensor]:
        """Return the tensors that go with these entries, to be stored beside the weights, by full name."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[RuntimePolicy[Any], PolicyState] | None:
        """Return the policy and the state that entries of a quantization_config describe; None where they describe another, or none."""
        return None

    @property
    def shards_weights(self) -> bool:
        """True where each of several processes is to hold a part of the weights while it is calibrated (FSDP2)."""
        return False

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Estimate what calibrating it takes."""
        return CostEstimate()

    @abstractmethod
    def calibrate(self, network: Network, calls: Sequence[Call]) -> State:
        """Measure what the policy needs: small tensors and numbers."""

    def calibrated(self, network: Network, calls: Sequence[Call], before: PolicyState | None = None) -> State:
        """Return the state that is put on and saved: what calibrating gives, from the state before where it supersedes a policy."""
        return self.calibrate(network, calls)

    def refusal(self, before: RuntimePolicy[Any] | None) -> str:
        """Return the reason why the policy cannot stand right behind this one, or behind none; empty where it can."""
        return ""

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> State:
        """Read a saved state; raises AerogelError that names the policy and the field where it is not one of this policy."""
        return cls.state.read(saved, cls.__module__.rpartition(".")[2])  # type: ignore[return-value]

    def quantized(self, state: State) -> tuple[str, ...]:
        """Return the full names of the modules whose inputs it quantizes while it is on; none unless a policy says so."""
        return ()

    def parameters(self, state: State) -> dict[str, Tensor]:
        """Return what block methods may learn of the state, by full name (module.parameter); nothing unless a policy says so."""
        return {}

    def with_parameters(self, state: State, values: Mapping[str, Tensor]) -> State:
        """Return the state with these values of its parameters."""
        return state

    def on_with(self, network: Network, state: State, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Put the policy on with other values of its parameters, looked up at each forward: what is learned of them acts at once."""
        return self.on(network, state)

    @abstractmethod
    def on(self, network: Network, state: State) -> AbstractContextManager[None]:
        """Put the policy on; after the context the network is bit for bit what it was."""


@dataclass(frozen=True)
class TargetedMethod(BlockMethod):
    """A block method that acts on linear layers, and on convolutions where it can, chosen by name."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """The kinds of layers it can act on."""

    targets: tuple[str, ...] = field(default=("Linear",), kw_only=True)
    """Layers to act on: globs on full dotted names, `re:` patterns or class names (Linear, Conv2d)."""
    ignore: tuple[str, ...] = field(default=("lm_head",), kw_only=True)
    """Layers to leave alone; wins over targets."""

    def targeted(self, block: Block) -> dict[str, Any]:
        """Return the block's float layers that this method acts on, by name relative to the block."""
        found = block.linears(self.targets, self.ignore)
        return {name: layer for name, layer in found.items() if isinstance(layer, self.layers)}


@dataclass(frozen=True)
class WeightMethod(TargetedMethod):
    """A targeted method that gives layers a number format."""

    scheme: Scheme | str = "W4A16"
    """Preset name of the number format and granularity, for example W4A16_G64."""
    overrides: Mapping[str, Scheme | str] = field(default_factory=dict, kw_only=True)
    """Other schemes for some layers, by pattern; the first match wins."""

    @property
    def quantizes(self) -> bool:
        """True: that is what it is for."""
        return True

    def scheme_of(self, name: str) -> Scheme:
        """Return the scheme of the layer with this full dotted name."""
        for pattern, scheme in self.overrides.items():
            if matches(name, (pattern,)):
                return Scheme.parse(scheme)
        return Scheme.parse(self.scheme)

    def assign(self, block: Block) -> dict[str, tuple[Any, Scheme]]:
        """Return the block's float layers that this method quantizes: name relative to the block -> (layer, scheme).

        Small layers that read less than one group, such as the low rank of a Mamba time step, are left unquantized.
        """
        return wide({name: (layer, self.scheme_of(block.full_name(name))) for name, layer in self.targeted(block).items()}, block)


def wide(found: Mapping[str, tuple[Any, Scheme]], block: Block) -> dict[str, tuple[Any, Scheme]]:
    """Return a block's layers with their schemes, without those that are left unquantized because they are narrower than a group."""
    if any(scheme.weights.scale_format == "e4m3" or isinstance(scheme.weights.granularity, PerTensor) for _, scheme in found.values()):
        _ = block.network.fused_sets  # whose layers share scales; found now, while no call is under way
    weights = sum(layer.weight.numel() for layer, _ in found.values())
    return {name: pair for name, pair in found.items() if not is_narrow(*pair, weights)}


def is_narrow(layer: Any, scheme: Scheme, weights: int) -> bool:
    """Return True for a layer that reads fewer inputs than a group of its scheme has, and holds few of its block's weights."""
    return scheme.group is not None and size(layer)[0] < scheme.group and layer.weight.numel() <= _FEW * weights
