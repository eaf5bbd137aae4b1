"""Linear layers that read one input, in 4 bits or not, with their adapters: found, and made one op."""
