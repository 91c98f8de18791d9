"""Tabular data: `read_table` makes a `Table` of a file, an `Encoder` makes X and y of a table."""

from backprop.table.encoder import Encoder
from backprop.table.files import read_table
from backprop.table.table import MAX_REFUSED, Kind, RefusedRow, Table

__all__ = ["MAX_REFUSED", "Encoder", "Kind", "RefusedRow", "Table", "read_table"]
