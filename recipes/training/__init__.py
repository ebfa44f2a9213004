"""Training, as both recipes do it: a small GPT, data-parallel over the workers of Ray Train.

settings       the section ``train:`` of a recipe's YAML
batches        token ids become batches; which sample comes at which place of an endless order
model          the GPT
launch         in the driver: what is trained, Ray Train around it, failures in words, the result
run_record     the W&B run that a training belongs to, over all starts
worker         in each worker: the steps, validation, checkpoints
initial        in each worker: weights of an earlier training
worker_log     in each worker: what it logs through raywb
checkpoints    whole or not there: write, find the newest, go on from it
"""
