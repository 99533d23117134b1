"""The slots of a model, as task threads take them; and tickets that came while none was free."""

from __future__ import annotations

import threading


class Seats:
    """So many threads may work on a model's jobs at a time.

    The pool of threads is for all models of the process together. A ticket for a model whose slots are all taken would
    keep a thread from the other models if it waited; so it ends, and whoever is done with a job of this model does what
    it was for.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._owed = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take a seat; when there is none, it is owed to a ticket from now on."""
        with self._lock:
            if self._taken < self._most:
                self._taken += 1
                return True
            self._owed = min(self._owed + 1, self._most)  # more would find no jobs that others cannot take
            return False

    def leave(self) -> bool:
        """Leave it, unless it is owed to a ticket: then the same thread has it on."""
        with self._lock:
            if self._owed:
                self._owed -= 1
                return False
            self._taken -= 1
            return True
