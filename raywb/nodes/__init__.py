"""What a job was given and what a node has: CPUs, memory, GPUs, Slurm, container, cloud.

compute.py      what this job was given: ``raywb.collect_compute_metadata`` (SPEC A)
node.py         what the whole machine has, for a probe on each node (SPEC F)
probe.py        who is in the cluster, and one probe on each node; the Ray side
records.py      what is known of each node, and what all of them amount to
utilization.py  how busy each node is, as Ray's own agent on it tells

The detectors that both are made of, each with the world it looks at as an argument:

cpu.py  memory.py  cgroups.py  slurm.py  gpu.py  nvml.py  torch_devices.py  surroundings.py
config_facts.py

A fact that cannot be had is left out. Nothing here raises because something is missing.
"""
