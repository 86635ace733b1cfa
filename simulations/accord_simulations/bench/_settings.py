"""Settings of a benchmark: a frozen table, checked before anything heavy is loaded."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from accord_shared.errors import PlanError
from accord_shared.plan import first_problem


class BenchSettings(BaseModel):
    """Base of the benchmarks' settings: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, settings: dict[str, Any]) -> Self:
        """Settings over the defaults.

        Raises:
            PlanError: one line that names the key.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise PlanError(f"{first_problem(error)} (known: {', '.join(cls.model_fields)})") from None
