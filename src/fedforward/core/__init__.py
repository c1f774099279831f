"""The vocabulary of the whole package: steps, layout, seeds, errors, units, and what the machine
says of itself. numpy and psutil only."""
