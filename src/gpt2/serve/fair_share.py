"""Equal shares of the slots and of the queue for all clients (max-min fairness), as pure functions of counts."""

from collections.abc import Mapping


def exceeds_queue_share(sequences: int, all_sequences: int, num_clients: int, slots: int, max_waiting: int) -> bool:
    """Whether the queue would be full, or a client would have more sequences in it than places are left free.

    One client can so fill half of the queue, two a third each, and n leave one of n + 1 parts for the next client
    (dynamic thresholds, Choudhury and Hahne 1998). Sequences within the client's share of the slots do not count, and
    nothing is refused while there are free slots.

    sequences, all_sequences: running and waiting, of the client and of all `num_clients`, with the new request.
    """
    waiting = max(0, all_sequences - slots)
    beyond_share = max(0, sequences - slots // num_clients)
    return waiting > max_waiting or (waiting > 0 and beyond_share > max_waiting - waiting + 1)  # half is rounded up


def client_to_pause(client: str, running: Mapping[str, int]) -> str | None:
    """The client that must give a slot to `client`, if none is free; None if its share is not larger.

    The one with the most running sequences, if it still has at least as many as `client` afterwards.
    """
    most = max(running, key=lambda name: running[name], default=None)
    return most if most is not None and running[most] - running.get(client, 0) >= 2 else None
