"""The decoder families: one file each, the same names in each.

Every rung of the ladder (float, folded, fake-quant, integer, exported) runs the same functions; only `Ops` differs.

Shape letters: B batch, T tokens, D hidden, H query heads, K KV heads, d head size, V vocabulary.
"""
