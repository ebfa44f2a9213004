"""Supervised fine-tuning: ``data_prep`` packs conversations into Parquet (see ``__main__``)."""
