"""What all sections are made of: the base class and the numbers with bounds.

Every field has a `description` in full sentences; `moetrain config --explain` and docs/config.md are made of them.
Defaults stand in configs/; a field has one here only where a file of an older version may lack it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from moetrain.common.registry import Options

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["auto", "fp32", "bf16"]


def _say_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Checks a number or auto. Raises `ValueError` with one rule for both."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError("must be auto or a whole number above 0") from None


PositiveOrAuto = Annotated[Positive | Literal["auto"], WrapValidator(_say_auto)]
Shape = Literal["uniform", "descending", "ascending", "pyramid_up", "pyramid_down", "wave_up", "wave_down"]
BOUNDS = {"above": "gt", "at_least": "ge", "below": "lt", "at_most": "le"}  # of registry.option -> of pydantic


class Section(BaseModel):
    """A frozen section that refuses fields it does not have, and `true` or `false` where a number is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, bool | None):
            raise ValueError("must not be true or false")
        return value


def core_field(options: type[Options], name: str) -> Any:
    """Returns the field of a section that is the option `name` of the core, with the bounds and the description there.

    The section repeats the type alone, for the type checker. The default stands in configs/.
    """
    (found,) = [field for field in dataclasses.fields(options) if field.name == name]
    return Field(
        description=found.metadata["description"], **find_bounds(get_type_hints(options)[name], found.metadata)
    )


def find_bounds(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the bounds of an option of this type, as pydantic has them. Numbers are finite."""
    bounds: dict[str, Any] = {BOUNDS[name]: value for name, value in metadata.items() if name in BOUNDS}
    return bounds | ({"allow_inf_nan": False} if float in (hint, *get_args(hint)) else {})
