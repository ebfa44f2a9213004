"""What recipes share, along the way of a document.

sources    where inputs are listed and opened
shards     inputs, cut into units of work
plan       PlanStage: which shards are finished?
scratch    a shard's input on the node that works on it
download   DownloadStage: brings it there
rows       bytes become rows; what cannot is counted
parquet    the rows of Parquet files, and which of their bytes a slice needs
documents  rows become documents; what cannot is counted
tokenizer  documents become token ids
receipts   what went into a finished shard; the blend of all
manifest   which settings made an output directory
layout     what lies where in it
"""
