"""MicroAdam for JAX: Adam in less than a byte of optimizer state a parameter."""

from microadam_optax import layerwise as layerwise
from microadam_optax import memory as memory
from microadam_optax._accumulate import Accumulate as Accumulate
from microadam_optax._accumulate import AccumulateState as AccumulateState
from microadam_optax._accumulate import accumulate as accumulate
from microadam_optax._apply import apply_updates_stochastic as apply_updates_stochastic
from microadam_optax._apply import lost_updates as lost_updates
from microadam_optax._dense import matching as matching
from microadam_optax._dense import smaller_than as smaller_than
from microadam_optax._diagnostics import Diagnostics as Diagnostics
from microadam_optax._diagnostics import Health as Health
from microadam_optax._diagnostics import diagnostics as diagnostics
from microadam_optax._fit import check_checkpoint as check_checkpoint
from microadam_optax._microadam import PAPER as PAPER
from microadam_optax._microadam import microadam as microadam
from microadam_optax._microadam import scale_by_microadam as scale_by_microadam
from microadam_optax._microadam import static_args as static_args
from microadam_optax._sharding import shard_grid as shard_grid
from microadam_optax._sharding import state_shardings as state_shardings
from microadam_optax._state import MicroAdamState as MicroAdamState

__version__ = "0.1.0"
