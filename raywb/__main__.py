"""``python -m raywb`` is the ``raywb`` command."""

from raywb.cli import main

main()
