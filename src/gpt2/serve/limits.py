"""How much a client may ask for."""

from dataclasses import dataclass, field
from typing import Any

from gpt2.errors import UserError


def _limit_field(default: float, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Limits:
    """What is refused beyond; `gpt2 serve` has a flag for each."""

    slots: int = _limit_field(32, "texts that are written at once")
    max_waiting: int = _limit_field(256, "texts that wait for a slot; more are refused, with 429")
    max_tokens: int = _limit_field(4096, "new tokens of a text at most")
    max_n: int = _limit_field(16, "texts from one prompt at most")
    max_prompts: int = _limit_field(128, "prompts in a request at most")
    per_client: int = _limit_field(64, "requests of one client at a time")
    max_body: int = _limit_field(4 * 2**20, "bytes of a request at most")
    timeout: float = _limit_field(600.0, "seconds that a request may take")

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            least = 0 if name == "max_waiting" else 1
            if not getattr(self, name) >= least:
                raise UserError(f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
