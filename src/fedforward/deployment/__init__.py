"""A federation across machines: coordinator, sites and the engines that carry messages."""
