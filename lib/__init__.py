import warnings

# What the pinned libraries say to each other at import, and no user can act on.
for message in (r"`?torch\.jit\.script", r".*mode\.chained_assignment", "__array_wrap__"):
    warnings.filterwarnings("ignore", message=message)
