"""What recipes share, along the way of a document.

sources       where inputs are listed and opened
remote        stores that fsspec knows (s3://, gs://, …); beside it web (https://) and hub (hf://)
questions     conversations about the standard library (stdlib-qa://)
store_errors  what a store's library raised, in one sentence
shards        inputs, cut into units of work
plan          PlanStage: which shards are finished?
scratch       a shard's input on the node that works on it, unpacked (compression)
download      DownloadStage: brings it there
rows          bytes become rows; what cannot is counted
parquet       the rows of Parquet files; parquet_slices which of their bytes a slice needs
documents     rows become documents; what cannot is counted
tokenizer     documents become token ids
receipts      what went into a finished shard
dataset       all shards through the stages, added up and checked
manifest      which settings made an output directory
layout        what lies where in it
"""
