"""How calibration went: a stable part of report.json."""

from __future__ import annotations

from afq_export.spec.strict import Data


class EpochRecord(Data):
    """One epoch of one block: mean loss, least dominance margin and largest condition number over its sites; `held`:
    the loss at its end on the windows that are held out, null where none are."""

    epoch: int
    loss: float
    dominance: float
    condition: float
    stability_factor: float
    held: float | None = None


class History(Data):
    """How a block's calibration went. Losses are relative: squared error over the mean square of the float output
    (`learning.loss` says how tokens are weighted).

    `start_loss` is that of the start values, `rounded_loss` that of no transform and no clipping (round-to-nearest),
    `final_loss` that of what was kept. `events`: rollbacks and retries in words.
    """

    rounded_loss: float
    start_loss: float
    final_loss: float
    epochs: tuple[EpochRecord, ...] = ()
    events: tuple[str, ...] = ()


class Tuning(Data):
    """How end-to-end learning went: mean KL(float || quantized), nats per token, of windows that were not learned from,
    before and after (null: learning diverged), and of every step's windows. Not `kept`: it had not become less, and
    nothing was changed."""

    steps: int
    windows: int
    before: float
    after: float | None
    kept: bool
    losses: tuple[float, ...] = ()
