"""Token reduction: where (sites), how much a token matters (scores), what becomes of it (reducers), how many stay."""
