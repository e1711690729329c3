"""Other programs' forms: weights in, weights out, each checked by what it computes."""
