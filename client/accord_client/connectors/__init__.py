"""Where a site's records come from: files, databases and hub data sets, checked row by row before any run."""

from accord_client.connectors.loading import Loaded, Report, check_plan, inspect, load
from accord_client.connectors.spec import (
    ColumnRule,
    CsvData,
    DataSpec,
    HubData,
    ParquetData,
    SqlData,
    make_spec,
)

__all__ = [
    "ColumnRule",
    "CsvData",
    "DataSpec",
    "HubData",
    "Loaded",
    "ParquetData",
    "Report",
    "SqlData",
    "check_plan",
    "inspect",
    "load",
    "make_spec",
]
