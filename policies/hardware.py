"""Hardware profiles: the calibrated constants that the simulator and the runtime both read.

A profile is a TOML file in ``policies/profiles`` or anywhere else. It gives every figure in SI
units and says for each where it comes from. Nothing here knows a clock: a profile answers how
long one copy or one expert takes, not when.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policies.link_times import Link
from policies.tables import build, leaves
from traces.errors import InputError
from traces.names import did_you_mean

PROFILES = Path(__file__).with_name("profiles")

#: Where a figure may come from. *reported*: measured by others, *measured*: on the machine named.
SOURCES = ("measured", "reported", "datasheet", "assumed")
KINDS = ("measured", "datasheet")

#: The sections whose every figure needs a source.
FIGURES = ("gpu", "link", "host", "software", "whole", "expert", "cpu")

#: The key of ``software.layer_floor_s`` for every family that is not named.
ANY_FAMILY = "any"

MATMUL_WEIGHT_FLOPS = 2
SWIGLU_MATRICES = 3


def _by_name() -> Any:
    """A field of a figure, at least 0, by the name of what it is about; none is said at first."""
    return field(default_factory=dict, hash=False, metadata={"least": 0})


@dataclass(frozen=True)
class Gpu:
    """What the GPU reaches: memory and dense bf16 rates are achievable ones, not peaks.

    *kernel_min_s* is the shortest time that one kernel takes up in a stream without host delays.
    *workspace_bytes* is what a run allocates besides slots, dense weights and key-value cache:
    workspaces of libraries, pools of captured graphs.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    bf16_flops_per_s: float
    kernel_min_s: float
    workspace_bytes: int = field(default=0, metadata={"least": 0})


@dataclass(frozen=True)
class Host:
    """What one host thread needs to issue work.

    *copy_issue_s* per copy, *kernel_launch_s* per kernel with the framework's overhead,
    *gate_sync_s* from a gate's last kernel until the host has its answer, *event_s* for policy
    and planner per event, *step_s* for a step's work outside its layers.

    *graph_launch_s* is the time of one graph replay, from an event's plan on; above 0, decode
    steps run as captured graphs, one from each gate to the next. Where any entry of the table
    changes that tells the graph where experts lie, that takes *table_tell_s*, and
    *table_update_s* for each. Policy and planner may take *access_s* more for each distinct
    expert of an event, *move_s* for each demanded move, *prefetch_s* for each prefetch, and
    *miss_s*, before the first copy is issued, for an event that misses anything. A table
    *policy_...* says the same of single policies. Prefetches are decided on when an event has
    been launched: what that takes however many they are is *policy_foresee_event_s*, and
    *policy_foresee_access_s* for each distinct expert; none for a policy not named there.
    Each is then handed over in *prefetch_issue_s* (0: in *copy_issue_s*), and issued once few
    enough are on their way; one that an event has to issue itself takes it *late_issue_s* (0:
    *copy_issue_s*). From there it is *return_s* until the host can read the next answer.

    A host that has waited w seconds for a graph's answer finds less of what it needs in its
    caches: the first *cold_most_s* of what it then issues and launches take 1 +
    *cold_share* ln(1 + w / *cold_after_s*) times as long; of what it plans, by
    policy, the first *policy_cold_most_s* with *policy_cold_share*.
    """

    copy_issue_s: float
    kernel_launch_s: float
    gate_sync_s: float
    event_s: float
    step_s: float
    pinned_alloc_bytes_per_s: float
    graph_launch_s: float = field(default=0.0, metadata={"least": 0})
    table_update_s: float = field(default=0.0, metadata={"least": 0})
    table_tell_s: float = field(default=0.0, metadata={"least": 0})
    access_s: float = field(default=0.0, metadata={"least": 0})
    move_s: float = field(default=0.0, metadata={"least": 0})
    prefetch_s: float = field(default=0.0, metadata={"least": 0})
    miss_s: float = field(default=0.0, metadata={"least": 0})
    return_s: float = field(default=0.0, metadata={"least": 0})
    late_issue_s: float = field(default=0.0, metadata={"least": 0})
    prefetch_issue_s: float = field(default=0.0, metadata={"least": 0})
    cold_share: float = field(default=0.0, metadata={"least": 0})
    cold_after_s: float = 1e-4
    cold_most_s: float = 1.0
    policy_event_s: Mapping[str, float] = _by_name()
    policy_access_s: Mapping[str, float] = _by_name()
    policy_miss_s: Mapping[str, float] = _by_name()
    policy_move_s: Mapping[str, float] = _by_name()
    policy_prefetch_s: Mapping[str, float] = _by_name()
    policy_foresee_event_s: Mapping[str, float] = _by_name()
    policy_foresee_access_s: Mapping[str, float] = _by_name()
    policy_cold_share: Mapping[str, float] = _by_name()
    policy_cold_most_s: Mapping[str, float] = _by_name()


@dataclass(frozen=True)
class Software:
    """How many kernels the model's code launches per layer.

    *attention_kernels* come before the gate's answer is known; then *expert_kernels_fixed* for
    every group of experts computed together, and *expert_kernels_each* for each of the group.
    For a prompt a group takes *prompt_kernels*, if that is given: experts of many tokens are
    computed in another way.

    Where decode steps are captured graphs: *layer_floor_s*, by model family, are the GPU
    seconds of one layer for one token if its weights took no time to read (``any``: families
    not named), *several_floor_s* the same for more than one token; *dense_efficiency* is the
    share of the GPU's memory rate at which what is not an expert is read, *kv_efficiency*, by
    family, that of the key-value cache as a model specification counts it: code that copies
    or expands it first has a small one. Sequences are read beside each other; what one takes
    for each position of its cache however many there are is *kv_token_s*, by family. Under
    a policy that *policy_layer_s* names, every layer takes so much more.
    """

    name: str
    attention_kernels: int = field(metadata={"least": 0})
    expert_kernels_fixed: int = field(metadata={"least": 0})
    expert_kernels_each: int = field(metadata={"least": 0})
    layer_floor_s: Mapping[str, float] = _by_name()
    dense_efficiency: float = 1.0
    kv_efficiency: Mapping[str, float] = field(default_factory=dict, hash=False)
    kv_token_s: Mapping[str, float] = _by_name()
    several_floor_s: Mapping[str, float] = _by_name()
    policy_layer_s: Mapping[str, float] = _by_name()
    prompt_kernels: int = field(default=0, metadata={"least": 0})


@dataclass(frozen=True)
class Whole:
    """Decode steps as one graph each, with a handshake at every gate (:mod:`policies.whole_steps`).

    *handshake_s* is the GPU time from a gate's end until its experts begin, where nothing has
    to be waited for; *notice_s* from what the host publishes, or the end of a copy, until a GPU
    that waits for it goes on; *answer_s* from a gate's end until a host that polls has the
    answer. The host takes *publish_s* to write what has changed into the table of experts:
    once for what an event demands, once for its prefetches, nothing where neither moved any.
    From an event's end it is *follow_s* until it can read the next answer, and *launch_s* (0:
    ``host.graph_launch_s``) to launch a step. *layer_floor_s* and *several_floor_s* are as
    those of :class:`Software`, which count for families that are not named here.
    """

    handshake_s: float = field(metadata={"least": 0})
    answer_s: float = field(metadata={"least": 0})
    notice_s: float = field(metadata={"least": 0})
    publish_s: float = field(metadata={"least": 0})
    follow_s: float = field(default=0.0, metadata={"least": 0})
    launch_s: float = field(default=0.0, metadata={"least": 0})
    layer_floor_s: Mapping[str, float] = _by_name()
    several_floor_s: Mapping[str, float] = _by_name()


@dataclass(frozen=True)
class ExpertModel:
    """How well an expert uses the GPU.

    *kernels* when it is computed alone; *memory_efficiency*, the share of the GPU's memory rate
    at which its weights are read; *activation_passes*, how many vectors of its mean width a
    token reads and writes. *fused_efficiency* is the share where captured graphs read all
    experts of an event in place; 0 means as *memory_efficiency*. There each further token of
    an expert takes *fused_token_share* of the time that reading it takes. Low-precision copies are
    read at *low_efficiency* of the rate, by their bits, with *low_token_share*; where that is not
    known they take as long as full ones.
    """

    kernels: int
    memory_efficiency: float
    activation_passes: float
    fused_efficiency: float = field(default=0.0, metadata={"least": 0})
    fused_token_share: float = field(default=0.0, metadata={"least": 0})
    low_efficiency: Mapping[str, float] = field(default_factory=dict, hash=False)
    low_token_share: float = field(default=0.0, metadata={"least": 0})


@dataclass(frozen=True)
class Cpu:
    """Experts computed by the host: read at *expert_bytes_per_s* or bound by *flops_per_s*."""

    expert_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Measurement:
    """Where and when a measured profile was taken."""

    machine: str
    driver: str
    software: str
    date: str


@dataclass(frozen=True)
class ExpertRow:
    """Measured times of one SwiGLU expert: eager by tokens, and in a CUDA graph (one token).

    *graph_s* of 0 means that it was not measured; so does an empty *tokens*.
    """

    model: str
    expert_bytes: int
    tokens: tuple[int, ...]
    eager_s: tuple[float, ...]
    graph_s: float = field(default=0.0, metadata={"least": 0})


@dataclass(frozen=True)
class HardwareProfile:
    """One machine as the two worlds see it; *sources* says where each figure comes from."""

    name: str
    kind: str
    title: str
    gpu: Gpu
    link: Link
    host: Host
    software: Software
    expert: ExpertModel
    cpu: Cpu
    sources: Mapping[str, str] = field(hash=False)
    measurement: Measurement | None = None
    whole: Whole | None = None
    expert_rows: tuple[ExpertRow, ...] = ()

    def roofline_s(
        self,
        read_bytes: float,
        flops: float,
        activation_bytes: float = 0.0,
        efficiency: float = 0.0,
    ) -> float:
        """GPU seconds to read *read_bytes* of weights and do *flops* on them, launches aside.

        Reading and computing overlap only in part, which the root of squares expresses.
        *efficiency* is the share of the memory rate, 0 for that of an expert alone.
        """
        rate = self.gpu.memory_bytes_per_s
        read_s = read_bytes / ((efficiency or self.expert.memory_efficiency) * rate)
        compute_s = flops / self.gpu.bf16_flops_per_s + activation_bytes / rate
        return math.hypot(read_s, compute_s)

    def expert_s(self, expert_bytes: float, flops_per_token: float, tokens: int) -> float:
        """GPU seconds of one expert computed alone for *tokens* tokens.

        *flops_per_token* is two per weight. Never less than its kernels take at the least.
        """
        floor_s = self.expert.kernels * self.gpu.kernel_min_s
        return max(floor_s, self.expert_roofline_s(expert_bytes, flops_per_token, tokens))

    def group_s(self, expert_bytes: float, flops_per_token: float, tokens: Sequence[int]) -> float:
        """GPU seconds of several experts computed together; *tokens* has one number for each.

        The number of kernels is the software's: it bounds the time from below.
        """
        kernels = self.group_kernels(len(tokens))
        loads = (self.expert_roofline_s(expert_bytes, flops_per_token, n) for n in tokens)
        return max(kernels * self.gpu.kernel_min_s, sum(loads))

    def group_kernels(self, experts: int, *, prompt: bool = False) -> int:
        """Kernels that the software launches for a group of *experts* computed together.

        For a *prompt* their number may be another, and does not depend on the experts.
        """
        if prompt and self.software.prompt_kernels:
            return self.software.prompt_kernels
        return self.software.expert_kernels_fixed + experts * self.software.expert_kernels_each

    def cpu_expert_s(self, expert_bytes: float, flops_per_token: float, tokens: int) -> float:
        """Host seconds of one expert computed on the CPU for *tokens* tokens."""
        read_s = expert_bytes / self.cpu.expert_bytes_per_s
        return max(read_s, flops_per_token * tokens / self.cpu.flops_per_s)

    def source_of(self, path: str) -> str:
        """Where the figure at *path* (``gpu.memory_bytes``) comes from, '' if nothing is said."""
        while path not in self.sources and "." in path:
            path = path.rpartition(".")[0]
        return self.sources.get(path, "")

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values, for JSON."""
        return dataclasses.asdict(self)

    def expert_roofline_s(
        self, expert_bytes: float, flops_per_token: float, tokens: int, efficiency: float = 0.0
    ) -> float:
        """GPU seconds of one expert's reads and operations, launches aside."""
        weights = flops_per_token / MATMUL_WEIGHT_FLOPS
        mean_width = math.sqrt(weights / SWIGLU_MATRICES)
        bytes_per_value = expert_bytes / weights
        passes = self.expert.activation_passes * mean_width * bytes_per_value
        return self.roofline_s(expert_bytes, flops_per_token * tokens, passes * tokens, efficiency)


def profile_names() -> list[str]:
    """The profiles that come with the package, by name."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """Read a profile by its name, or from a TOML file (a path, or a name that ends in .toml).

    Raises :class:`InputError` naming file and key, or the nearest name of an unknown profile.
    """
    path = _locate(str(name_or_path))
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a hardware profile") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    if "name" in raw:
        raise InputError(f"{path}: unknown key 'name': a profile is called as its file")
    profile = build(HardwareProfile, {"name": path.stem, **raw}, str(path))
    _check(profile, str(path))
    return profile


def _locate(name: str) -> Path:
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    if name not in profile_names():
        hint = did_you_mean(name, profile_names())
        known = ", ".join(profile_names())
        raise InputError(f"hardware: no profile {name!r}{hint} (known: {known}; or a .toml file)")
    return PROFILES / f"{name}.toml"


def _check(profile: HardwareProfile, where: str) -> None:
    """What no single value can tell: kinds, sources and tables that fit each other."""
    if profile.kind not in KINDS:
        raise InputError(f"{where}: kind is {profile.kind!r}, expected {' or '.join(KINDS)}")
    if (profile.kind == "measured") != (profile.measurement is not None):
        raise InputError(f"{where}: [measurement] belongs to kind 'measured' and to no other")
    _check_sources(profile, where)
    if profile.host.graph_launch_s and not profile.software.layer_floor_s:
        raise InputError(
            f"{where}: host.graph_launch_s is given, expected software.layer_floor_s as well"
        )
    if profile.whole is not None and not profile.host.graph_launch_s:
        raise InputError(f"{where}: [whole] is given, expected host.graph_launch_s as well")
    for name in ("layer_floor_s", "several_floor_s", "kv_efficiency", "kv_token_s"):
        by_family = getattr(profile.software, name)
        if by_family and ANY_FAMILY not in by_family:
            raise InputError(f"{where}: key 'software.{name}.{ANY_FAMILY}' is missing")
    for way, direction in (("h2d", profile.link.h2d), ("d2h", profile.link.d2h)):
        for size in direction.queued.sizes_bytes:
            if direction.queued.copy_s(size) > 1.01 * direction.isolated.copy_s(size):
                raise InputError(f"{where}: link.{way}: queued copies of {size} bytes are slower")


def _check_sources(profile: HardwareProfile, where: str) -> None:
    figures = list(leaves(profile, FIGURES))
    for path in figures:
        if not profile.source_of(path):
            raise InputError(f"{where}: sources: nothing is said of {path}")
    for path, source in profile.sources.items():
        if source.partition(":")[0] not in SOURCES:
            raise InputError(
                f"{where}: sources.{path} is {source!r}, expected it to begin with one of "
                f"{', '.join(SOURCES)} and a colon"
            )
        if not any(f"{figure}.".startswith(f"{path}.") for figure in figures):
            raise InputError(f"{where}: sources.{path} names no figure of the profile")
