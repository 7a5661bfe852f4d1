"""The guard of a user's own CI: a bundle measured again through its runtime, held to a baseline token by token.

record     a session's logits -> Tokens: loss, choice, digest and likeliest choices of every token
tokens     Tokens as arrays and as the bytes of a baseline
file       the baseline file: one compressed, bounded, strictly read file
student    Student's t
compare    Tokens against Tokens: paired drift with its error, agreement, KL, identity
gates      limits, and what came out -> passed, failed, inconclusive or skipped
facts      what was measured, with what and where, and what of it differs
speed      tokens per second
subject    a bundle opened and measured
baseline   create and update
check      all of it
text, junit, github    the report for a reader, for CI servers, for GitHub
"""
