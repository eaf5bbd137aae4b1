"""What was done to each graph and why no more: the data, and how text, page and picture tell it."""
