"""Conversion of other libraries' weights to and from ours; a round trip preserves every byte.

    config, params = convert.from_robovlms(tensors, window_size=8)     # a policy head of RoboVLMs
    config, params = convert.from_torch(module.state_dict())           # torch.nn.RNN, LSTM, GRU
    cell, params = convert.from_flax(params)                           # a cell of Linen or NNX

`to_robovlms`, `to_torch` and `to_flax` convert back. `python -m vla_jax.convert SRC DST` converts
files of the first two.
"""

from vla_jax.convert.conversion_report import Report
from vla_jax.convert.flax_cells import from_flax, from_flax_stack, to_flax, to_flax_stack
from vla_jax.convert.folder import read_folder, read_params, read_recurrence, write_folder
from vla_jax.convert.robovlms.checkpoints import from_robovlms, report_robovlms, to_robovlms
from vla_jax.convert.torch_rnn import from_torch, report_torch, to_torch
from vla_jax.convert.weight_files import TensorFile, read, write

__all__ = [
    "Report",
    "TensorFile",
    "from_flax",
    "from_flax_stack",
    "from_robovlms",
    "from_torch",
    "read",
    "read_folder",
    "read_params",
    "read_recurrence",
    "report_robovlms",
    "report_torch",
    "to_flax",
    "to_flax_stack",
    "to_robovlms",
    "to_torch",
    "write",
    "write_folder",
]
