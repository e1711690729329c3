"""Reading files without what libraries remark on odd but readable ones.

Remarks are warnings. Whoever makes warnings errors, as tests do, would have another file rejected than a user has; and
where an exception means "damaged" (nearly everywhere in reading), nobody would notice. So whatever reads files does it
in here.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_before: "warnings.catch_warnings[None] | None" = None


@contextmanager
def quietly() -> Iterator[None]:
    """No warning is shown or raised, of any thread, as long as one is in here.

    `warnings.catch_warnings` alone is for one thread: of two that overlap, the second one to leave brings back what the
    first one had set.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = warnings.catch_warnings()
            _before.__enter__()
            warnings.simplefilter("ignore")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _before is not None:
                _before.__exit__(None, None, None)
                _before = None
