"""How much a client may ask for."""

from dataclasses import dataclass

from gpt2.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What is refused beyond.

    slots:        texts that are written at once, by each model; each holds a row of its cache.
    max_waiting:  texts that wait for a slot, for each model.
    max_tokens:   new tokens of a text.
    max_n:        texts from one prompt (`n`, `best_of`).
    max_prompts:  prompts in one request.
    per_client:   requests that one client may have open at a time.
    max_body:     bytes of a request.
    timeout:      seconds that a request may take, from its arrival to its last token.
    """

    slots: int = 32
    max_waiting: int = 256
    max_tokens: int = 4096
    max_n: int = 16
    max_prompts: int = 128
    per_client: int = 64
    max_body: int = 4 * 2**20
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            least = 0 if name == "max_waiting" else 1
            if not getattr(self, name) >= least:
                raise UserError(f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
