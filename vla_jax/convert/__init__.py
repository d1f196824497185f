"""Conversion of other libraries' weights to and from ours; a round trip preserves every byte.

    config, params = convert.from_robovlms(tensors, window_size=8)     # a policy head of RoboVLMs
    policy = convert.from_robovlms_policy(tensors, folder, training)   # a whole policy of RoboVLMs
    config, params = convert.from_torch(module.state_dict())           # torch.nn.RNN, LSTM, GRU
    cell, params = convert.from_flax(params)                           # a cell of Linen or NNX

`to_robovlms`, `to_robovlms_policy`, `to_torch` and `to_flax` convert back.
`python -m vla_jax.convert SRC DST` converts files of all but Flax.
"""

from vla_jax.convert.conversion_report import Report
from vla_jax.convert.flax_cells import from_flax, from_flax_stack, to_flax, to_flax_stack
from vla_jax.convert.folder import read_folder, read_params, read_recurrence, write_folder
from vla_jax.convert.robovlms.checkpoints import from_robovlms, report_robovlms, to_robovlms
from vla_jax.convert.robovlms.policies import (
    from_robovlms_policy,
    report_robovlms_policy,
    to_robovlms_policy,
)
from vla_jax.convert.robovlms.training_json import Training, read_training
from vla_jax.convert.torch_rnn import from_torch, report_torch, to_torch
from vla_jax.convert.weight_files import TensorFile, read, write

__all__ = [
    "Report",
    "TensorFile",
    "Training",
    "from_flax",
    "from_flax_stack",
    "from_robovlms",
    "from_robovlms_policy",
    "from_torch",
    "read",
    "read_folder",
    "read_params",
    "read_recurrence",
    "read_training",
    "report_robovlms",
    "report_robovlms_policy",
    "report_torch",
    "to_flax",
    "to_flax_stack",
    "to_robovlms",
    "to_robovlms_policy",
    "to_torch",
    "write",
    "write_folder",
]
