"""The history of every series of a run, read from the outbox's files: columns, then charts.

Nothing here changes a file, so it works beside a live service and on a directory that was left.
Reading has a process of its own (``python -m raywb.view.history``): it takes neither time nor
memory of whoever asks.

The way of a row: ``log_pieces`` reads large pieces of the outbox's files, ``outbox_reader`` cuts
their batches into items, ``batch_rows`` sorts these by layout (``row_layout``) and reads all rows
of one layout at once, ``run_history`` files them by their set of keys as ``columns``. A question
(``requests``) comes through ``history_process`` to ``__main__``; ``answers`` takes the columns of
the series, joins their axes and brings them to a chart's resolution (``downsampling``).
``directory`` says of the runs what needs no service.
"""
