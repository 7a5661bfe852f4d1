"""Fold sites: the places of a Transformer block where an invertible transform vanishes into neighbouring weights.

The table of the design (AffineQuant, arXiv 2403.12544, restricted to what is exact at inference):

    norm_to_linears   diagonal (and shift when the norm has a bias)   norm weight  -> columns of its linears
                      any matrix, if its inverse stays online         behind it    -> columns of its linears
    v_to_o            one matrix per KV head (and shift)              v rows       -> o columns
    q_to_k            what commutes with RoPE, or any matrix without  q rows       -> k rows
    up_to_down        diagonal (positive through ReLU), permutation   up/fc1 rows  -> down/fc2 columns
"""

from __future__ import annotations

import enum

from afq_export.spec.strict import Data

ONLINE = "the recipe's online Hadamard matrix stands between"
"""Why nothing folds from up to down."""


class SiteKind(enum.Enum):
    """Which neighbours a transform and its inverse fold into."""

    NORM_TO_LINEARS = "norm_to_linears"
    V_TO_O = "v_to_o"
    Q_TO_K = "q_to_k"
    UP_TO_DOWN = "up_to_down"


class Form(enum.Enum):
    """The shape of a transform's matrix. PER_HEAD is a dense one for each of the site's heads: at a norm, which has
    one, for the whole width."""

    DIAGONAL = "diagonal"
    PER_HEAD = "per_head"
    ROPE_PAIRS = "rope_pairs"
    PERMUTATION = "permutation"


class FoldSite(Data):
    """One place in every block of a family.

    `name` is unique in the block. `producers` own the rows (or the norm weight) that take the inverse; `consumers` own
    the columns that take the matrix. `dim` is the width of the transformed space, `heads` the number of independent
    matrices (KV heads; 1 for a matrix over the whole width). `forms` are the matrices that fold exactly here;
    `refused` says why each other form does not. `shift` tells whether a shift folds (a bias exists to take it).
    `online`: forms whose inverse would stay in the program (`transforms.online = ["norm_matrix"]`).
    """

    name: str
    kind: SiteKind
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    dim: int
    forms: tuple[Form, ...]
    heads: int = 1
    repeats: int = 1
    """Query heads that share one KV head (GQA ratio); consumers or producers on the query side repeat the matrix."""
    refused: dict[str, str] = {}
    shift: bool = False
    positive: bool = False
    """Diagonal entries must be positive (the site spans a ReLU)."""
    online: tuple[Form, ...] = ()

    @property
    def head_dim(self) -> int:
        """Size of one matrix."""
        return self.dim // self.heads
