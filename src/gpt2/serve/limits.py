"""Limits on what one client may request."""

from dataclasses import dataclass, field
from typing import Any

from gpt2.errors import ConfigError


def _limit_field(default: float, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Limits:
    """Requests beyond these limits are refused; `gpt2 serve` has a flag for each. Raises ConfigError."""

    slots: int = _limit_field(32, "sequences that are generated at the same time")
    max_waiting: int = _limit_field(512, "sequences that wait for a slot, half of them of one client; more get 429")
    max_tokens: int = _limit_field(4096, "maximum new tokens of a sequence")
    max_n: int = _limit_field(16, "maximum sequences for one prompt")
    max_prompts: int = _limit_field(128, "maximum prompts in a request")
    per_client: int = _limit_field(64, "open requests of one client")
    max_body: int = _limit_field(4 * 2**20, "maximum size of a request body, such as 500 kB or 4 MiB")
    timeout: float = _limit_field(600.0, "maximum time for a request in seconds")

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            least = 0 if name == "max_waiting" else 1
            if not getattr(self, name) >= least:
                flag = name.replace("_", "-")
                raise ConfigError(f"{flag} must be at least {least}, not {getattr(self, name)}", field=name)
