"""The results of `evaluate`: accuracies of zero-shot tasks, and everything that is needed to repeat them.

Fields may be added; a field that changes its meaning or goes away raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

from afq_export.spec.strict import Data

SCHEMA_VERSION = 1


class Score(Data):
    """Share of documents answered rightly, and the standard error of that mean over documents."""

    value: float
    stderr: float


class Difference(Data):
    """This minus the reference on the same documents; `stderr` of the mean of the documents' differences.

    `gained` and `lost`: documents that only this one, and only the reference, answered rightly (McNemar's counts).
    """

    value: float
    stderr: float
    gained: int
    lost: int


class Documents(Data):
    """What was asked. `version` is that of lm-eval's definition, `digest` the sha256 of `file`.

    `count`: the first documents of `in_file`. `tokens`: sha256 of the token ids of everything that was asked.
    """

    version: float
    file: str
    digest: str
    count: int
    in_file: int
    tokens: str


class TaskScores(Data, kw_only=True):
    """One task. `scores` by metric; `hits` by metric: a 1 or a 0 for every document, in the order of the file."""

    task: str
    documents: Documents
    scores: dict[str, Score]
    hits: dict[str, str]
    reference: dict[str, Score] = {}
    difference: dict[str, Difference] = {}


class Evaluated(Data, kw_only=True):
    """What was evaluated. `digest`: sha256 of a bundle's manifest, which holds all of its files', or of a float model.

    `model_digest`: that of the float model itself, or of the one that the bundle was made from.
    """

    name: str
    kind: str
    digest: str
    model_digest: str
    recipe: str = ""
    target: str = ""
    runtime: str = ""


class ZeroShot(Data, kw_only=True):
    """`evaluate --json`. `limit`: the first documents of each file, None: all. `seed`: given to lm-eval's samplers,
    which a task without examples in its prompt does not ask."""

    schema_version: int = SCHEMA_VERSION
    subject: Evaluated
    reference: Evaluated | None = None
    limit: int | None
    seed: int
    threads: int
    tasks: tuple[TaskScores, ...]
    versions: dict[str, str]
