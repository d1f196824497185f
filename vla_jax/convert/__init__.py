"""Foreign weights to ours and back: RoboVLMs' policy heads.

    config, params = convert.from_robovlms(tensors, window_size=8)
    tensors = convert.to_robovlms(config, params)

`python -m vla_jax.convert SRC DST` does the same with files.
"""

from vla_jax.convert.files import TensorFile, read, write
from vla_jax.convert.folder import read_folder, read_params, write_folder
from vla_jax.convert.report import Report
from vla_jax.convert.robovlms import from_robovlms, report_robovlms, to_robovlms

__all__ = [
    "Report",
    "TensorFile",
    "from_robovlms",
    "read",
    "read_folder",
    "read_params",
    "report_robovlms",
    "to_robovlms",
    "write",
    "write_folder",
]
