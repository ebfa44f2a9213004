"""Reads inputs in a process of its own, for libraries that take their settings at import.

Every line in is a JSON list of paths; every line out says what they hold, or why they cannot be
read. A line ``["again"]`` fetches and reads what was listed last.
"""

from __future__ import annotations

import json
import sys

from recipe_inputs import SHARD_BYTES, input_settings

from recipes.errors import InputError
from recipes.stages.documents import DocumentReader
from recipes.stages.scratch import Scratch
from recipes.stages.shards import cut_into_shards
from recipes.stages.sources import list_inputs

scratch = Scratch("hub", 10_004)
files = ()
for line in sys.stdin:
    paths = json.loads(line)
    try:
        files = files if paths == ["again"] else list_inputs(input_settings(*paths))
        reader = DocumentReader("text", 10_000)
        shards = cut_into_shards(files, SHARD_BYTES)
        texts = [
            text for shard in shards for file in scratch.fetch(shard) for text in reader.read(file)
        ]
        answer = {
            "names": [file.name for file in files],
            "urls": [file.url for file in files],
            "versions": [file.version for file in files],
            "texts": texts,
            "counts": [reader.rows_in, reader.filtered, reader.errors],
        }
    except InputError as error:
        answer = {"error": str(error)}
    scratch.remove_all()
    print(json.dumps(answer), flush=True)
