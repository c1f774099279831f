"""The vocabulary of the whole package: steps, layout, seeds, errors, units. numpy only."""
