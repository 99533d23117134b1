"""The archive: ended jobs and usage in a database on disk, beyond what Redis keeps.

The background process that leads is the only writer (`web.background.archiver`); API processes read.
"""
