"""Machines of Vast.ai: rent one that runs a recipe, look at it, destroy it.

source.py       which commit: clean, and at the remote
offers.py       which machine, and what it costs
onstart.py      the script that the machine runs, from onstart.sh
onstart.sh      its body: fetch, install, run the job, end
ready.py        there: whether it could end the instance, asked before the job
attempts.py     there: starts Ray, begins the job or goes on with it
job.py          there: one job, watched over Ray's job API
instances.py    rent, list, read the log, destroy
client.py       the official client, with errors of ours
command.py      `raywb vast`
"""
