"""Data sets, and how they are dealt to clients: `vfl.data.federated("digits", partition="dirichlet:0.3", clients=100)`.

Your own data: `from_arrays`, `from_list`, `from_dataset` or `from_leaf` pack it for a `FederatedData`; or put it into a
`Dataset` and let `federate` deal it.
"""

from vfl.data.container import (
    Dataset,
    Examples,
    FederatedData,
    Normalize,
    Packed,
    Transform,
    as_stored,
    cast,
    from_arrays,
    from_dataset,
    from_list,
    tokens,
)
from vfl.data.convert import WRITERS, convert
from vfl.data.datasets import CLIENTS, DATASETS, data_root, federate, federated, load
from vfl.data.describe import Summary, label_table, plot_labels, summary
from vfl.data.download import SOURCES, get
from vfl.data.leaf import from_leaf
from vfl.data.partition import PARTITIONS, Assignment, hold_out

__all__ = [
    "CLIENTS",
    "DATASETS",
    "PARTITIONS",
    "SOURCES",
    "WRITERS",
    "Assignment",
    "Dataset",
    "Examples",
    "FederatedData",
    "Normalize",
    "Packed",
    "Summary",
    "Transform",
    "as_stored",
    "cast",
    "convert",
    "data_root",
    "federate",
    "federated",
    "from_arrays",
    "from_dataset",
    "from_leaf",
    "from_list",
    "get",
    "hold_out",
    "label_table",
    "load",
    "plot_labels",
    "summary",
    "tokens",
]
