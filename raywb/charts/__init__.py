"""``raywb charts``: the recommended W&B charts as a saved view of the run's project.

command.py         the command
panels.py          which panels there are, as plain data
saving.py          whose project it is, and the process that saves
views_process.py   a process of its own: W&B's workspaces package, and nothing else
"""
