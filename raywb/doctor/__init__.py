"""``raywb doctor``: what keeps a cluster's metrics from W&B, and what to do about it.

command.py          the command
examination.py      all checks in their order; one that fails does not stop the others
findings.py         what a check says: ✓ ! ✗, what was found, the remedy

cluster_look.py     asks the cluster, through
cluster_process.py  a process of its own, which Ray may hang or end
on_node.py          a task on each node that brings with it all that it needs
wandb_access.py     W&B's key and server, seen from here or from the head
look.py             what all these brought

ray_address.py  ray_environment.py  nodes.py  disks.py  wandb_key.py  service.py  charts.py
                    the checks: from what was brought to findings
"""
