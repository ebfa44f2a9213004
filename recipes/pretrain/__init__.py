"""Pretraining: ``data_prep`` makes Megatron datasets from text (see ``__main__``)."""
