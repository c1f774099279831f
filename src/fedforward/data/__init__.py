"""From files to token batches: sources, templates, labels, partition, batches."""
