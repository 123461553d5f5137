"""Types of request fields: strict, except that a whole float such as 100.0 is taken for an integer."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """A request, or part of one. Unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown_field(cls, data: Any) -> Any:
        """Without all unknown fields but the first: pydantic would collect an error for each of a million."""
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        unknown = next((name for name in data if name not in known), None)
        return {name: value for name, value in data.items() if name in known or name == unknown}


def expect(message: str) -> WrapValidator:
    """One error message for all that a field does not accept, such as one for all members of a union."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise PydanticCustomError("expected", "{message}", {"message": message}) from None

    return WrapValidator(validate)


def limit_items(limit: int) -> BeforeValidator:
    """Refuse a larger object or list before an error is collected for each of its items."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > limit:
            raise PydanticCustomError("too_long", "has at most {limit} items", {"limit": limit})
        return value

    return BeforeValidator(check)


def limit_prompts(limit: int) -> BeforeValidator:
    """Refuse a longer list of prompts before each of them is validated; a list of token ids is one prompt."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit and not isinstance(value[0], int):
            context = {"limit": limit, "given": len(value)}
            raise PydanticCustomError("too_long", "must hold at most {limit} prompts, not {given}", context)
        return value

    return BeforeValidator(check)


def _whole_float_to_int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole_float_to_int)
Int64 = Annotated[int, WHOLE, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, WHOLE, Field(ge=0, le=2**31)]
Samples = Annotated[int, WHOLE, Field(ge=1, le=128)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(fail_fast=True)]
