"""Early stopping: the best validation, and the number of validations since then."""

import math

from gpt2.train.early_stopping import BestValidation


def test_ties_keep_the_first_best_and_steps_without_validation_are_ignored() -> None:
    best = BestValidation()
    assert (best.step, best.loss, best.evals_since_best) == (None, None, 0)
    losses = [(1, 3.0), (2, None), (3, 2.0), (4, 2.0), (5, math.nan), (6, 2.5), (7, None), (8, 1.9)]
    result = []
    for step, loss in losses:
        record = {"step": step, "loss": 9.0} | ({} if loss is None else {"val_loss": loss})
        result.append((best.update(record), best.step, best.evals_since_best))
    assert result == [
        (True, 1, 0),
        (False, 1, 0),
        (True, 3, 0),
        (False, 3, 1),
        (False, 3, 2),
        (False, 3, 3),
        (False, 3, 3),
        (True, 8, 0),
    ]


def test_records_read_again_give_the_same() -> None:
    records = [{"step": step, "loss": 1.0, "val_loss": loss} for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5))]
    best = BestValidation(records)
    assert (best.step, best.loss, best.evals_since_best) == (2, 1.0, 1)


def test_a_loss_that_is_not_a_number_is_never_the_best() -> None:
    best = BestValidation([{"step": 1, "loss": 1.0, "val_loss": math.nan}])
    assert best.update({"step": 2, "loss": 1.0, "val_loss": 5.0})
