"""The operating-system process of a worker: its parent, its name, its watchdog, and how its death is reported."""
