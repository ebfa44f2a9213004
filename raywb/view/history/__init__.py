"""The history of every series of a run, read from the outbox's files: columns, then charts.

Nothing here changes a file, so it works beside a live service and on a directory that was left.
Reading has a process of its own (``python -m raywb.view.history``): it takes neither time nor
memory of whoever asks.
"""
