"""The `[data.NAME]` tables of a site's settings: where records are, which columns mean what, and what a row must be.

They are the operator's alone: a plan names neither paths nor databases.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from accord_shared.errors import SettingsError
from accord_shared.plan import Table, first_problem

ColumnType = Literal["any", "string", "integer", "float", "boolean", "date", "timestamp"]

Column = Annotated[str, Field(min_length=1, max_length=200)]
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgresql+psycopg": "postgresql+psycopg"}
_COMMIT = re.compile(r"hub:[^/@\s]+/[^/@\s]+@[0-9a-f]{40}")


class ColumnRule(Table):
    """What every cell of a column must be. In TOML either `COL = "integer"` or a table.

    `any` is any plain value; `date` and `timestamp` are ISO 8601; `float` is finite; `min` and `max` are inclusive;
    `max_length` counts characters; `allowed` lists the cells as they are written.
    """

    type: ColumnType = "any"
    required: bool = True
    """Whether an empty cell fails."""
    min: int | float | None = Field(default=None, allow_inf_nan=False)
    max: int | float | None = Field(default=None, allow_inf_nan=False)
    max_length: int | None = Field(default=None, ge=1)
    allowed: tuple[str, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _type_alone(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("allowed", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if (self.min is not None or self.max is not None) and self.type not in ("integer", "float"):
            raise ValueError(f'min and max belong to "integer" and "float", not "{self.type}"')
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class _Records(Table):
    """What all kinds have in common."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    text: Column | None = None
    """The column that is read. Either this or `texts`."""
    texts: tuple[Column, ...] = Field(default=(), max_length=16)
    """Columns that are read together, joined by a blank line; empty cells are left out, all must not be."""
    label: Column
    label_map: dict[str, str] = Field(default={})
    """From cells of the label column to labels of plans; cells that it does not name stay as they are."""
    unit: Column | None = None
    """The column whose equal cells belong to one privacy unit (None: every row is one). Plans must name the same."""
    rules: dict[Column, ColumnRule] = Field(default={}, alias="schema")
    """The declared schema, `[data.NAME.schema]`. Its columns must exist, and every row must fit."""
    most_rows: int = Field(default=10_000_000, ge=1)
    most_bytes: int = Field(default=4 * 2**30, ge=1)
    """Of the cells that are read, decompressed: more is an error."""
    most_characters: int = Field(default=1_000_000, ge=1, le=2**24)
    """Of one cell; a row with a longer one fails."""
    most_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Of all rows; if more fail, the data set does."""

    @field_validator("texts", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        if (self.text is None) == (not self.texts):
            raise ValueError('give either text = "COLUMN" or texts = ["COLUMN", …]')
        if len(set(self.texts)) != len(self.texts):
            raise ValueError("texts names a column twice")
        if self.label in self.text_columns or self.unit in (*self.text_columns, self.label):
            raise ValueError("text, label and unit must be different columns")
        for column in self.text_columns:
            if column in self.rules and self.rules[column].type not in ("any", "string"):
                raise ValueError(f'schema: {column!r} is read as text, so its type is "string"')
        return self

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that make the text, in order."""
        return self.texts or (self.text or "",)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read, each once: texts, label, unit, then those of the schema alone."""
        unit = () if self.unit is None else (self.unit,)
        return tuple(dict.fromkeys((*self.text_columns, self.label, *unit, *self.rules)))

    def rule(self, column: str) -> ColumnRule:
        """The declared rule of a column; without one any cell that is not empty. Texts are strings."""
        declared = self.rules.get(column, ColumnRule(required=column not in self.texts))
        return declared.model_copy(update={"type": "string"}) if column in self.text_columns else declared


class CsvData(_Records):
    """A CSV file with a header, UTF-8 (BOM tolerated), gzip if its name ends in .gz."""

    kind: Literal["csv"]
    path: str = Field(min_length=1)
    """Relative to the site's folder."""
    delimiter: str = Field(default=",", pattern=r"^[\t -!#-~]$")
    max_cell_lines: int = Field(default=200, ge=1, le=1_000_000)
    """Of one quoted cell: with more lines a quote is taken for one that was never closed, and all of them fail."""


class ParquetData(_Records):
    """A Parquet file."""

    kind: Literal["parquet"]
    path: str = Field(min_length=1)


class SqlData(_Records):
    """The rows of a query, read in a transaction that cannot write, ordered by the columns that are read."""

    kind: Literal["sql"]
    url: str
    """`sqlite:///FILE` (relative to the site's folder) or `postgresql://USER@HOST:PORT/DATABASE`; no password."""
    password_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable that holds the password."""
    query: str = Field(min_length=1, max_length=100_000)
    """One SELECT; without `;`."""
    timeout_s: int = Field(default=600, ge=1, le=86_400)

    @field_validator("url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        """Errors never quote the URL: it may hold a password."""
        scheme, found, rest = url.partition("://")
        if not found or scheme not in _DRIVERS:
            raise ValueError("url must begin with sqlite:///, postgresql:// or postgresql+psycopg://")
        authority, _, query = rest.partition("?")
        user = authority.rpartition("@")[0]
        if ":" in user or "password" in unquote(query).lower():
            raise ValueError("url holds a password: name the environment variable that holds it, as password_env")
        if scheme == "sqlite" and (not rest.startswith("/") or len(rest) < 2 or query):
            raise ValueError("url of SQLite is sqlite:///FILE, without options")
        return url

    @field_validator("query")
    @classmethod
    def _one_statement(cls, query: str) -> str:
        bare = query.strip()
        if ";" in bare or "\x00" in bare or not re.match(r"(?i)(select|with|values)\b", bare):
            raise ValueError("query must be one SELECT, without ;")
        return bare

    @model_validator(mode="after")
    def _password_fits(self) -> Self:
        if self.password_env is not None and self.url.startswith("sqlite"):
            raise ValueError("password_env does not belong to SQLite")
        return self

    @property
    def driver(self) -> str:
        """What SQLAlchemy calls the dialect and driver."""
        return _DRIVERS[self.url.partition("://")[0]]


class HubData(_Records):
    """One split of a data set that the `datasets` library reads; cells of a `ClassLabel` count by their names."""

    kind: Literal["hub"]
    source: str
    """`hub:OWNER/NAME@COMMIT`, or `path:FOLDER` (relative to the site's folder)."""
    config: str | None = Field(default=None, min_length=1)
    split: str = Field(default="train", min_length=1)

    @field_validator("source")
    @classmethod
    def _pinned(cls, source: str) -> str:
        if source.startswith("hub:") and not _COMMIT.fullmatch(source):
            raise ValueError(
                f"source = {source[:80]!r}: hub:OWNER/NAME@COMMIT needs the 40 digits of a commit: names can be moved"
            )
        if not source.startswith("hub:") and not re.match(r"path:.", source):
            raise ValueError(f"source = {source[:80]!r} is neither hub:OWNER/NAME@COMMIT nor path:FOLDER")
        return source


DataSpec = Annotated[CsvData | ParquetData | SqlData | HubData, Field(discriminator="kind")]
"""A `[data.NAME]` table; `kind` is "csv", "parquet", "sql" or "hub"."""

_ADAPTER: TypeAdapter[CsvData | ParquetData | SqlData | HubData] = TypeAdapter(DataSpec)


def make_spec(table: dict[str, Any]) -> CsvData | ParquetData | SqlData | HubData:
    """Validate one `[data.NAME]` table.

    Raises:
        SettingsError: one line that names the key.
    """
    try:
        return _ADAPTER.validate_python(table)
    except ValidationError as error:
        raise SettingsError(first_problem(error)) from None
