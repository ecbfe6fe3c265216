"""Process groups and collectives for LLM inference.

>>> import distcomm
>>> with distcomm.init_distributed(tp=8, cp=2) as state:   # in a torchrun-launched process
...     y = state.tp.all_reduce(x)

`init_distributed` makes a `ParallelState` with one `GroupCoordinator` per axis. Importing this
package does nothing but define torch's operators ``torch.ops.distcomm.*`` (`graph_ops`).
"""

from . import graph_ops, symmetric
from .context_parallel import (
    ContextParallelPlan,
    KvGather,
    PipelinedKvGather,
    all_gather_kv,
    all_gather_kv_into_cache,
)
from .current import (
    ParallelState,
    destroy_distributed,
    get_attn_tp_group,
    get_cp_group,
    get_dp_group,
    get_ep_group,
    get_moe_tp_group,
    get_parallel_state,
    get_pp_group,
    get_tp_group,
    get_world_group,
    graph_capture,
    init_distributed,
    is_initialized,
    profiler_ranges,
)
from .errors import (
    AlreadyInitializedError,
    ArgumentError,
    CaptureMismatchError,
    CollectiveError,
    CommunicatorDisabledError,
    DistcommError,
    GroupClosedError,
    GroupMember,
    InitializationError,
    LaunchError,
    LayoutError,
    NativeLibraryError,
    NcclError,
    NcclLibraryError,
    NotInitializedError,
    PeerCopyError,
    PlanMismatchError,
    SleepError,
    SymmetricMemoryError,
    SymmetricMismatchError,
)
from .group import GroupCoordinator
from .group_memory import GraphCapture
from .handles import AsyncHandle
from .layout import ParallelLayout
from .memory import (
    HostMemoryError,
    SleepablePool,
    SleepOutOfMemoryError,
    Slept,
    SymmetricOutOfMemoryError,
    SymmetricPool,
    TagUsage,
)
from .nccl import NcclLibrary, PyNcclCommunicator
from .sleeping import SleepReport, sleep, wake_up
from .symmetric import suspend_symmetric_memory, use_symmetric_memory

__version__ = "0.1.0"

__all__ = [
    "AlreadyInitializedError",
    "ArgumentError",
    "AsyncHandle",
    "CaptureMismatchError",
    "CollectiveError",
    "CommunicatorDisabledError",
    "ContextParallelPlan",
    "DistcommError",
    "GraphCapture",
    "GroupClosedError",
    "GroupCoordinator",
    "GroupMember",
    "HostMemoryError",
    "InitializationError",
    "KvGather",
    "LaunchError",
    "LayoutError",
    "NativeLibraryError",
    "NcclError",
    "NcclLibrary",
    "NcclLibraryError",
    "NotInitializedError",
    "ParallelLayout",
    "ParallelState",
    "PeerCopyError",
    "PipelinedKvGather",
    "PlanMismatchError",
    "PyNcclCommunicator",
    "SleepError",
    "SleepOutOfMemoryError",
    "SleepReport",
    "SleepablePool",
    "Slept",
    "SymmetricMemoryError",
    "SymmetricMismatchError",
    "SymmetricOutOfMemoryError",
    "SymmetricPool",
    "TagUsage",
    "__version__",
    "all_gather_kv",
    "all_gather_kv_into_cache",
    "destroy_distributed",
    "get_attn_tp_group",
    "get_cp_group",
    "get_dp_group",
    "get_ep_group",
    "get_moe_tp_group",
    "get_parallel_state",
    "get_pp_group",
    "get_tp_group",
    "get_world_group",
    "graph_capture",
    "graph_ops",
    "init_distributed",
    "is_initialized",
    "profiler_ranges",
    "sleep",
    "suspend_symmetric_memory",
    "symmetric",
    "use_symmetric_memory",
    "wake_up",
]
