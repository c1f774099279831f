"""From files and hub data sets to token batches: sources, templates, partition, batches."""
