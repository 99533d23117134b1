"""The slots of a model, as task threads take them; and tickets that came while none was free."""

from __future__ import annotations

import threading


class Seats:
    """So many threads may work on a model's jobs at a time.

    The pool of threads is for all models of the process together. The consumer takes no tickets for a model whose slots
    are all taken (`worker.queue.consumer`); one that comes all the same, as when the broker is back, would keep a
    thread from the other models if it waited. So it ends; whoever is done with a job does what it was for.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._owed = 0
        self._lock = threading.Lock()

    @property
    def empty(self) -> bool:
        """Whether nobody works on a job, or is about to claim one."""
        return not self._taken

    def take(self) -> bool:
        """Take a seat; when there is none, it is owed to a ticket from now on."""
        with self._lock:
            if self._taken < self._most:
                self._taken += 1
                return True
            self._owed += 1
            return False

    def leave(self) -> bool:
        """Leave it, unless it is owed to a ticket: then the same thread has it on."""
        with self._lock:
            if self._owed:
                self._owed -= 1
                return False
            self._taken -= 1
            return True
