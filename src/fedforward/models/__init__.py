"""Language models behind one interface: probes beside the weights, and commits."""
