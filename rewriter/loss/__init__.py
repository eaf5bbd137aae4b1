"""A head with its loss as one op, and logits that leave the graph left to whoever reads them."""
