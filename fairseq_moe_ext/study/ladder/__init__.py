"""A ladder of dense sizes, and sparse models on its lower rungs, at several numbers of tokens."""
